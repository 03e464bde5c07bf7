import HostSystem
import VMMemory
import VhostUser
import VirtioQueue
import VirtioSpec

/// What a back end offers, as far as asking shows.
package struct Offer: Sendable {
  var features: FeatureSet = []
  var protocolFeatures: ProtocolFeatures = []
  /// `GET_QUEUE_NUM`; nil without `MQ`.
  var queueCount: UInt64?
  /// `GET_MAX_MEM_SLOTS`; nil without `CONFIGURE_MEM_SLOTS`.
  var memorySlots: UInt64?
  /// The configuration space as far as it could be read; nil when it was refused or is not there.
  var configuration: [UInt8]?
  var configurationProblem: String?

  var hasProtocolFeatures: Bool { features.contains(.vhostUserProtocolFeatures) }
}

/// One conversation with a back end.
struct Link: ~Copyable {
  var frontEnd: BlockingFrontEnd
  var offer = Offer()

  init(_ socket: consuming OwnedFD, timeout: Duration) {
    frontEnd = BlockingFrontEnd(socket)
    frontEnd.timeout = timeout
  }

  /// Connects to the back end; nothing has been said yet.
  init(_ target: Target) throws(ProbeError) { self.init(try target.connect(), timeout: target.timeout) }

  var hasAcknowledgements: Bool { frontEnd.protocolFeatures.contains(.replyAck) }

  /// Sends a request and returns when it has been processed.
  mutating func send(_ message: FrontEndMessage, descriptors: [CInt] = []) throws(ProbeError) {
    do throws(VhostUserError) {
      _ = try frontEnd.request(message, descriptors: descriptors)
    } catch {
      throw .protocolError("do \(message.request.name)", error)
    }
  }

  mutating func ask(_ message: FrontEndMessage) throws(ProbeError) -> Reply {
    do throws(VhostUserError) { return try frontEnd.request(message).reply } catch {
      throw .protocolError("do \(message.request.name)", error)
    }
  }

  mutating func number(_ message: FrontEndMessage) throws(ProbeError) -> UInt64 {
    do throws(VhostUserError) { return try frontEnd.number(message) } catch {
      throw .protocolError("do \(message.request.name)", error)
    }
  }

  /// Protocol features that we can live with.
  static let wanted: ProtocolFeatures = [
    .mq, .replyAck, .config, .inflightShmFD, .resetDevice, .configureMemSlots, .status, .logShmFD, .deviceState,
  ]

  /// The first contact: features, protocol features, and what they allow to ask.
  mutating func negotiate(_ wanted: ProtocolFeatures = Link.wanted, configurationByteCount: Int = 0) throws(ProbeError) {
    try send(.setOwner)
    offer.features = FeatureSet(rawValue: try number(.getFeatures))
    guard offer.hasProtocolFeatures else { return }
    offer.protocolFeatures = ProtocolFeatures(rawValue: try number(.getProtocolFeatures))
    let agreed = offer.protocolFeatures.intersection(wanted).withoutUnmetDependencies
    try send(.setProtocolFeatures(agreed))
    if agreed.contains(.mq) { offer.queueCount = try number(.getQueueNum) }
    if agreed.contains(.configureMemSlots) { offer.memorySlots = try number(.getMaxMemSlots) }
    if agreed.contains(.config), configurationByteCount > 0 {
      do throws(ProbeError) {
        offer.configuration = try configuration(byteCount: configurationByteCount)
        if offer.configuration == nil { offer.configurationProblem = "the back end refused to give it" }
      } catch {
        offer.configurationProblem = "\(error)"
        throw error
      }
    }
  }

  /// The start of the configuration space; nil when the back end refuses.
  mutating func configuration(byteCount: Int) throws(ProbeError) -> [UInt8]? {
    let zeros = [UInt8](repeating: 0, count: byteCount)
    guard case .config(let piece) = try ask(.getConfig(ConfigMessage(offset: 0, bytes: zeros))) else { return nil }
    return piece.bytes
  }

  /// Acknowledges virtio features; bit 30 goes along where it is offered.
  mutating func accept(_ features: FeatureSet) throws(ProbeError) {
    var all = features
    if offer.hasProtocolFeatures { all.insert(.vhostUserProtocolFeatures) }
    try send(.setFeatures(all))
  }

  /// Gives the back end the memory.
  mutating func share(_ arena: Arena) throws(ProbeError) {
    try send(.setMemTable(RegionTable(regions: arena.descriptions)), descriptors: arena.descriptors)
  }

  /// Everything a ring needs, its kick last, then enabled.
  mutating func start(_ ring: borrowing ProbeRing, base: UInt32? = nil) throws(ProbeError) {
    try describe(ring, base: base)
    try send(.setVringCall(VringEvent(index: UInt8(ring.index), carriesDescriptor: true)), descriptors: [ring.call.fd.rawValue])
    try send(.setVringKick(VringEvent(index: UInt8(ring.index), carriesDescriptor: true)), descriptors: [ring.kick.fd.rawValue])
    if offer.hasProtocolFeatures { try enable(ring.index, true) }
  }

  /// Size, base and place of a ring.
  mutating func describe(_ ring: borrowing ProbeRing, base: UInt32? = nil) throws(ProbeError) {
    let index = UInt32(ring.index)
    let layout = ring.queue.configuration
    try send(.setVringNum(VringState(index: index, number: UInt32(layout.size))))
    try send(.setVringBase(VringState(index: index, number: base ?? VringBase.start(packed: layout.isPacked).rawValue)))
    try send(.setVringAddr(try ring.address()))
  }

  mutating func enable(_ index: Int, _ isEnabled: Bool) throws(ProbeError) {
    try send(.setVringEnable(VringState(index: UInt32(index), number: isEnabled ? 1 : 0)))
  }

  /// Stops a ring; where it stood.
  mutating func stop(_ index: Int) throws(ProbeError) -> UInt32 {
    guard case .vringState(let state) = try ask(.getVringBase(VringState(index: UInt32(index), number: 0))) else { return 0 }
    return state.number
  }
}

/// Memory that plays the guest's: one sealed object, in one region or several.
final class Arena {
  let fd: OwnedFD
  let memory: GuestMemory
  let descriptions: [RegionDescription]
  private var next: UInt64
  private let end: UInt64
  private let start: UInt64

  /// Ring addresses on the wire are of this space; it is ours to choose.
  static let userBase: UInt64 = 0x7F00_0000_0000

  /// - Parameter regionCount: the memory is cut into so many regions that follow one another in the guest.
  init(byteCount: UInt64, regionCount: Int = 1, guestStart: UInt64 = 0) throws(ProbeError) {
    let size = (byteCount + 0xFFFF) & ~0xFFFF
    let fd = try wrapping { () throws(SystemError) in try SharedMemory.sealed(name: "martlet-probe", byteCount: size) }
    let piece = size / UInt64(regionCount) & ~0xFFF
    var descriptions: [RegionDescription] = []
    var regions: [MemoryRegion] = []
    for index in 0..<UInt64(regionCount) {
      let offset = index * piece
      let count = index == UInt64(regionCount) - 1 ? size - offset : piece
      let description = RegionDescription(
        guestAddress: guestStart + offset, size: count, userAddress: Self.userBase + offset, mapOffset: offset)
      descriptions.append(description)
      regions.append(
        try wrapping { () throws(MemoryError) in
          try MemoryRegion.mapping(
            fd, guestAddress: GuestAddress(description.guestAddress), byteCount: count, frontEndAddress: description.userAddress,
            fileOffset: offset, allowUnsealed: true)
        })
    }
    self.descriptions = descriptions
    memory = try wrapping { () throws(MemoryError) in try GuestMemory(regions: regions) }
    self.fd = fd
    start = guestStart + 4096
    next = guestStart + 4096
    end = guestStart + size
  }

  var descriptors: [CInt] { descriptions.map { _ in fd.rawValue } }

  /// Guest memory of so many bytes that nobody else uses.
  func allocate(_ byteCount: Int, alignment: UInt64 = 64) throws(ProbeError) -> GuestAddress {
    let address = (next + alignment - 1) & ~(alignment - 1)
    guard byteCount >= 0, UInt64(byteCount) <= end - min(end, address) else {
      throw .unsuitable("The probe's own memory is too small for this run; lower depth, block size or queues")
    }
    next = address + UInt64(byteCount)
    return GuestAddress(address)
  }

  /// Everything allocated is free again.
  func reset() { next = start }

  func userAddress(_ address: GuestAddress, _ byteCount: Int) throws(ProbeError) -> UInt64 {
    guard let user = memory.frontEndAddress(of: address, byteCount: UInt64(byteCount)) else {
      throw .unsuitable("A ring does not fit into one region of the probe's memory")
    }
    return user
  }
}

/// One ring with its descriptors.
struct ProbeRing: ~Copyable {
  let index: Int
  var queue: DriverQueue
  let kick: EventFD
  let call: EventFD
  let arena: Arena

  init(_ index: Int, size: UInt16, features: FeatureSet, arena: Arena) throws(ProbeError) {
    let byteCount = VirtqueueConfiguration.contiguousByteCount(size: size, features: features)
    let place = try arena.allocate(byteCount, alignment: 4096)
    let kick = try wrapping { () throws(SystemError) in try EventFD() }
    let call = try wrapping { () throws(SystemError) in try EventFD() }
    let queue = try wrapping { () throws(VirtqueueError) in
      try DriverQueue(.contiguous(size: size, features: features, at: place), memory: arena.memory)
    }
    self.index = index
    self.arena = arena
    self.kick = kick
    self.call = call
    self.queue = queue
  }

  func address() throws(ProbeError) -> VringAddress {
    let layout = queue.configuration
    let base = try arena.userAddress(layout.descriptors, 1)
    return VringAddress(
      index: UInt32(index), descriptorTable: base,
      availableRing: base + (layout.driver.rawValue - layout.descriptors.rawValue),
      usedRing: base + (layout.device.rawValue - layout.descriptors.rawValue))
  }
}
