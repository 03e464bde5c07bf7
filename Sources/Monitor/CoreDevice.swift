import ControlProtocol
import FrontEnd
import HostSystem
import Machine
import VMMemory
import VhostUser
import VirtioSpec
import VirtioTransport

/// One device of the VM: what the supervisor assigned, the session with its back end, and its place in the machine.
final class CoreDevice {
  let assignment: DeviceAssignment
  /// Its name in the event loop; never used again.
  let key: Int
  let frontEnd: DeviceFrontEnd
  /// Index in the machine, once it is plugged in.
  private(set) var index: Int?
  /// Descriptors registered in the event loop.
  var watchedSocket: CInt?
  var watchedChannel: CInt?
  /// Why there is no back end any more; empty while there is one.
  var reason = ""
  /// What the supervisor was told last.
  var lastReport: DeviceReport?
  /// The request to give it a new back end, until that is done.
  var reattachSequence: UInt32?
  /// The request to examine or exchange a back end, until that is done.
  var exchangeSequence: UInt32?
  var watchedCandidate: CInt?
  /// The request to add it to a guest that runs, until that is done.
  var plugSequence: UInt32?
  /// Requests to take it away, until nothing is left of it.
  var unplugSequences: [UInt32] = []
  /// It is off the bus, or never came there; its rings are being stopped.
  var isLeaving = false

  init(
    _ assignment: DeviceAssignment, _ socket: consuming OwnedFD, key: Int, memory: SharedGuestMemory, replyDeadline: Duration
  ) throws(VhostUserError) {
    self.assignment = assignment
    self.key = key
    var configuration = FrontEndConfiguration(allowedFeatures: assignment.allowedFeatures)
    if assignment.configuration.isEmpty {
      configuration.configurationByteCount = Self.configurationByteCount(of: assignment.deviceType)
      if assignment.deviceType == .block { configuration.configurationGrowth = BlockConfiguration.growth }
    } else {
      configuration.wantedProtocolFeatures.remove(.config)
    }
    configuration.wantedProtocolFeatures.insert(.inflightShmFD)
    configuration.hearsConfigurationChanges = configuration.configurationByteCount > 0
    configuration.timeouts.setUp = replyDeadline
    configuration.timeouts.suspend = replyDeadline
    // Stopping a ring waits for requests in flight, which a slow disk may hold for long; never shorter than the others.
    configuration.timeouts.drain = max(replyDeadline, configuration.timeouts.drain)
    frontEnd = try DeviceFrontEnd(name: assignment.id, assignment.deviceType, socket, configuration, memory)
  }

  /// Bytes of configuration space to ask a back end for: back ends refuse more than their structure has.
  private static func configurationByteCount(of device: DeviceID) -> Int {
    switch device {
    case .net: NetConfiguration.byteCount
    case .block: BlockConfiguration.commonByteCount
    case .console: ConsoleConfiguration.byteCount
    case .balloon: BalloonConfiguration.byteCount
    case .fileSystem: FileSystemConfiguration.byteCount
    case .vsock: VsockConfiguration.byteCount
    case .persistentMemory: PersistentMemoryConfiguration.byteCount
    case .entropy: 0
    default: 256
    }
  }

  /// Bytes that a driver may write (virtio 1.4, section 5).
  private static func writableConfiguration(of device: DeviceID) -> [Range<Int>] {
    switch device {
    // writeback
    case .block: [32..<33]
    // emerg_wr
    case .console: [8..<12]
    // actual
    case .balloon: [4..<8]
    // select, subsel
    case .input: [0..<2]
    default: []
    }
  }

  /// Shows the device to the guest as first contact found it. After `.ready`.
  func plug(into machine: Machine, _ memory: GuestMemory, slot: UInt8? = nil) throws(CoreError) {
    guard let offer = frontEnd.offer else {
      throw .device("Device \(assignment.id): its back end has not answered")
    }
    let queueCount = assignment.queueSizes.count
    // Network back ends may count pairs of queues.
    let offered = offer.queueCount.map { assignment.deviceType == .net ? $0 * 2 : $0 } ?? queueCount
    guard offered >= queueCount else {
      throw .device(
        "Device \(assignment.id): its back end has \(offered) queues, \(queueCount) are asked for; ask for fewer")
    }
    var configuration = assignment.configuration.isEmpty ? offer.configuration ?? [] : assignment.configuration
    var features = offer.features.union(assignment.ownFeatures)
    if queueCount == 1, assignment.deviceType == .block { frontEnd.hiddenFeatures = .blockMultipleQueues }
    features.subtract(frontEnd.hiddenFeatures)
    frontEnd.ownFeatures = assignment.ownFeatures
    let queueLimit = QueueCountField(assignment.deviceType, queueCount: queueCount, configuration: configuration)
    queueLimit?.apply(to: &configuration)
    let description = VirtioPCIFunction.Description(
      device: assignment.deviceType, offeredFeatures: features,
      queueSizes: assignment.queueSizes, configuration: configuration,
      writableConfiguration: Self.writableConfiguration(of: assignment.deviceType).filter {
        $0.upperBound <= configuration.count
      })
    do {
      let index = try machine.addVirtioDevice(description, pciDevice: slot ?? assignment.pciSlot)
      self.index = index
      frontEnd.attach(MachineDeviceHost(machine: machine, memory: memory, index: index, queueLimit: queueLimit))
    } catch {
      throw .device("Device \(assignment.id): \(error.description)")
    }
  }

  /// Whether the guest waits for a reset of this device.
  func isResetting(in machine: Machine) -> Bool {
    index.flatMap { machine.function(ofDevice: $0) }?.state.isResetting ?? false
  }

  /// The report of this moment.
  func report(_ machine: Machine?) -> DeviceReport {
    let function = index.flatMap { machine?.function(ofDevice: $0) }
    let state: DeviceReport.State =
      switch frontEnd.state {
      case .negotiating: .connecting
      case .lost: .lost
      case .detached, .reattaching: .waiting
      case .broken: .needsReset
      case .idle, .resetting: .connected
      case .activating, .running, .pausing, .paused, .exchanging: frontEnd.activeQueues.isEmpty ? .connected : .active
      }
    let active = Set(frontEnd.activeQueues)
    let queues = assignment.queueSizes.enumerated().map { index, size in
      let wait = frontEnd.wait(ofQueue: index)
      return DeviceReport.Queue(
        size: function?.state.queues[index].size ?? size, isEnabled: active.contains(index), waitingSince: wait?.since.nanoseconds ?? 0,
        waitingCount: wait?.count ?? 0)
    }
    var features = frontEnd.driverFeatures
    if features.isEmpty { features = function?.state.offered ?? frontEnd.offer?.features ?? [] }
    return DeviceReport(
      id: assignment.id, state: state, features: features,
      protocolFeatures: frontEnd.offer?.protocolFeatures.rawValue ?? 0, queues: queues, reason: reason)
  }
}

/// A function of the machine as its front end sees it.
struct MachineDeviceHost: DeviceHost {
  let machine: Machine
  let memory: GuestMemory
  let index: Int
  let queueLimit: QueueCountField?

  func kick(ofQueue queue: Int) -> SharedDescriptor? {
    machine.kick(ofDevice: index, queue: queue).flatMap { try? SharedDescriptor(duplicating: $0.event.fd) }
  }

  func call(ofVector vector: Int) -> SharedDescriptor? {
    machine.call(ofDevice: index, vector: vector).flatMap { try? SharedDescriptor(duplicating: $0.event.fd) }
  }

  func usedIndex(ofUsedRing address: UInt64) -> UInt16? {
    memory.load(UInt16.self, at: GuestAddress(address &+ UInt64(SplitRing.usedIndexOffset)))
  }

  func word(at address: UInt64) -> UInt16? { memory.load(UInt16.self, at: GuestAddress(address)) }

  func update(_ change: (inout VirtioPCIFunction) -> [TransportEffect]) {
    machine.updateDevice(index) { function in
      var effects = change(&function)
      // The back end may have told its own number of queues again.
      if let queueLimit { effects += queueLimit.apply(to: &function) }
      return effects
    }
  }
}

/// The number of queues in the configuration space of a device that counts them: a back end may have more than the
/// machine gives it, and a driver believes the larger number.
struct QueueCountField: Equatable, Sendable {
  private let offset: Int
  private let limit: UInt16

  /// Nil for devices without such a field, or with too short a configuration space to hold it.
  init?(_ device: DeviceID, queueCount: Int, configuration: [UInt8]) {
    switch device {
    case .block:
      offset = 34
      limit = UInt16(clamping: queueCount)
    case .net:
      offset = 8
      limit = UInt16(clamping: max(1, queueCount / 2))
    default: return nil
    }
    guard configuration.count >= offset + 2 else { return nil }
  }

  private func limited(_ bytes: [UInt8]) -> [UInt8]? {
    let value = UInt16(bytes[offset]) | UInt16(bytes[offset + 1]) << 8
    guard value > limit else { return nil }
    return [UInt8(truncatingIfNeeded: limit), UInt8(truncatingIfNeeded: limit >> 8)]
  }

  func apply(to configuration: inout [UInt8]) {
    if let bytes = limited(configuration) { configuration.replaceSubrange(offset..<offset + 2, with: bytes) }
  }

  func apply(to function: inout VirtioPCIFunction) -> [TransportEffect] {
    limited(function.configuration.bytes).map { function.updateConfiguration(from: offset, with: $0) } ?? []
  }
}
