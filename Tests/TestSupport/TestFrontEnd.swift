// Plays driver and front end for a back end under test: guest memory in a sealed memfd, a vhost-user session, queues.

import Glibc
import HostSystem
import VMMemory
import VhostUser
import VirtioQueue
import VirtioSpec

/// One queue from the driver's side.
public final class TestQueue {
  public let index: Int
  public var driver: DriverQueue
  public let kick: EventFD
  public let call: EventFD
  public let error: EventFD

  init(index: Int, driver: consuming DriverQueue) throws {
    self.index = index
    self.driver = driver
    kick = try EventFD()
    call = try EventFD()
    error = try EventFD()
  }

  /// Offers a chain and shows it to the device, kicking if it wants to be.
  @discardableResult
  public func offer(_ buffers: [DriverBuffer], indirectTable: GuestAddress? = nil) -> UInt16? {
    let head = indirectTable.map { driver.addIndirect(buffers.span, table: $0) } ?? driver.add(buffers.span)
    if head != nil { show() }
    return head
  }

  /// Adds a chain, to be shown later.
  public func add(_ buffers: [DriverBuffer]) { _ = driver.add(buffers.span) }

  /// Shows what was added.
  public func show() { if driver.publish() { kick.signal() } }

  /// The next used chain, waiting for the device's call as a driver would.
  public func nextUsed(within limit: Duration = .seconds(10)) throws -> (head: UInt16, written: UInt32?) {
    let end = MonotonicTime.now.advanced(by: limit)
    while true {
      switch driver.nextUsed() {
      case .used(let head, let written): return (head, written)
      case .broken: throw TestFailure("the device broke the used ring of queue \(index)")
      case .empty: break
      }
      if driver.enableCalls() { continue }
      let now = MonotonicTime.now
      guard now < end else { throw TestFailure("queue \(index): nothing used in time") }
      try call.fd.waitUntil(.readable, timeout: end.since(now))
      call.drain()
      driver.disableCalls()
    }
  }
}

/// A vhost-user front end that waits, with guest memory and queues of its own.
public final class TestFrontEnd {
  public var frontEnd: BlockingFrontEnd
  public let memoryFD: OwnedFD
  public let memory: GuestMemory
  public let memoryByteCount: UInt64
  public private(set) var offered: FeatureSet = []
  public private(set) var features: FeatureSet = []
  public private(set) var protocolFeatures: ProtocolFeatures = []
  public private(set) var queues: [TestQueue] = []
  private var nextFree: UInt64
  static let guestStart: UInt64 = 0x10_0000
  static let userStart: UInt64 = 0x7E00_0000_0000

  /// Connects, negotiates and passes memory; queues follow with `startQueue`.
  public init(
    _ socket: consuming OwnedFD, memoryByteCount: UInt64 = 32 << 20, wanting wanted: (FeatureSet) -> FeatureSet = { $0 },
    sealed: Bool = true
  ) throws {
    frontEnd = BlockingFrontEnd(socket)
    self.memoryByteCount = memoryByteCount
    if sealed {
      memoryFD = try SharedMemory.sealed(name: "test-guest", byteCount: memoryByteCount)
    } else {
      memoryFD = try OwnedFD.open("/dev/shm", O_RDWR | 0o20200000)  // O_TMPFILE
      ftruncate(memoryFD.rawValue, Int(memoryByteCount))
    }
    memory = try GuestMemory(regions: [
      MemoryRegion(
        guestAddress: GuestAddress(Self.guestStart), byteCount: memoryByteCount, frontEndAddress: Self.userStart, fileOffset: 0,
        mapping: MemoryMapping.shared(memoryFD, byteCount: Int(memoryByteCount)))
    ])
    nextFree = Self.guestStart
    _ = try frontEnd.request(.setOwner)
    offered = FeatureSet(rawValue: try frontEnd.number(.getFeatures))
    protocolFeatures = ProtocolFeatures(rawValue: try frontEnd.number(.getProtocolFeatures))
    _ = try frontEnd.request(.setProtocolFeatures(protocolFeatures))
    features = wanted(offered.subtracting(.vhostOnlyMask)).intersection(offered)
    _ = try frontEnd.request(.setFeatures(features.union(.vhostUserProtocolFeatures)))
    try passMemory()
  }

  /// The record of requests in flight, once there is one.
  public private(set) var inflight: InflightKept?

  /// Asks the back end for a record of requests in flight and gives it back to it; before queues are started.
  public func recordInflight(queues: Int, queueSize: UInt16) throws {
    var answer = try frontEnd.request(.getInflightFD(InflightDescription(queueCount: UInt16(queues), queueSize: queueSize)))
    guard case .inflight(let description) = answer.reply, let fd = answer.descriptors.takeFirst() else {
      throw TestFailure("there is no inflight area")
    }
    inflight = InflightKept(description, SharedDescriptor(fd))
    try passInflight()
  }

  public func passInflight() throws {
    guard let inflight else { return }
    _ = try frontEnd.request(.setInflightFD(inflight.description), descriptors: [inflight.descriptor.fd.rawValue])
  }

  /// Another back end for the same guest: what was negotiated is negotiated again, and every queue goes on from its used
  /// index, or from where the record says.
  public func reconnect(_ socket: consuming OwnedFD) throws {
    frontEnd = BlockingFrontEnd(socket)
    _ = try frontEnd.request(.setOwner)
    guard FeatureSet(rawValue: try frontEnd.number(.getFeatures)) == offered else { throw TestFailure("other features are offered") }
    _ = try frontEnd.request(.setProtocolFeatures(protocolFeatures))
    _ = try frontEnd.request(.setFeatures(features.union(.vhostUserProtocolFeatures)))
    try passMemory()
    try passInflight()
    for queue in queues {
      let used = GuestAddress(queue.driver.configuration.device.rawValue + 2)
      let isPacked = features.contains(.packedRing)
      try start(queue, base: isPacked ? 0x8000_8000 : UInt32(memory.load(UInt16.self, at: used) ?? 0))
      queue.kick.signal()
    }
  }

  var region: RegionDescription {
    RegionDescription(guestAddress: Self.guestStart, size: memoryByteCount, userAddress: Self.userStart, mapOffset: 0)
  }

  public func passMemory() throws {
    _ = try frontEnd.request(.setMemTable(RegionTable(regions: [region])), descriptors: [memoryFD.rawValue])
  }

  /// Guest memory that nothing else uses.
  public func allocate(_ byteCount: Int, alignment: UInt64 = 16) -> GuestAddress {
    nextFree = (nextFree + alignment - 1) & ~(alignment - 1)
    let address = GuestAddress(nextFree)
    nextFree += UInt64(byteCount)
    precondition(nextFree <= Self.guestStart + memoryByteCount, "The test's guest memory is large enough")
    return address
  }

  private func userAddress(_ address: GuestAddress) -> UInt64 { address.rawValue - Self.guestStart + Self.userStart }

  /// Makes a fresh ring for the next queue and starts it.
  @discardableResult
  public func startQueue(size: UInt16 = 128) throws -> TestQueue {
    let start = allocate(VirtqueueConfiguration.contiguousByteCount(size: size, features: features), alignment: 64)
    let configuration = VirtqueueConfiguration.contiguous(size: size, features: features, at: start)
    let queue = try TestQueue(index: queues.count, driver: DriverQueue(configuration, memory: memory))
    queues.append(queue)
    try self.start(queue, base: configuration.base.rawValue)
    return queue
  }

  /// Starts a queue whose ring is laid out, from a state.
  public func start(_ queue: TestQueue, base: UInt32) throws {
    let index = UInt32(queue.index)
    let event = VringEvent(index: UInt8(queue.index), carriesDescriptor: true)
    let configuration = queue.driver.configuration
    _ = try frontEnd.request(.setVringNum(VringState(index: index, number: UInt32(configuration.size))))
    _ = try frontEnd.request(.setVringBase(VringState(index: index, number: base)))
    _ = try frontEnd.request(
      .setVringAddr(
        VringAddress(
          index: index, descriptorTable: userAddress(configuration.descriptors), availableRing: userAddress(configuration.driver),
          usedRing: userAddress(configuration.device))))
    _ = try frontEnd.request(.setVringCall(event), descriptors: [queue.call.fd.rawValue])
    _ = try frontEnd.request(.setVringErr(event), descriptors: [queue.error.fd.rawValue])
    _ = try frontEnd.request(.setVringKick(event), descriptors: [queue.kick.fd.rawValue])
    _ = try frontEnd.request(.setVringEnable(VringState(index: index, number: 1)))
  }

  /// Sends the kick and call descriptors of a running queue again.
  public func replaceDescriptors(_ queue: TestQueue) throws {
    let event = VringEvent(index: UInt8(queue.index), carriesDescriptor: true)
    _ = try frontEnd.request(.setVringCall(event), descriptors: [queue.call.fd.rawValue])
    _ = try frontEnd.request(.setVringKick(event), descriptors: [queue.kick.fd.rawValue])
  }

  /// Stops a queue; where it stands.
  public func stop(_ queue: TestQueue) throws -> UInt32 {
    let answer = try frontEnd.request(.getVringBase(VringState(index: UInt32(queue.index), number: 0)))
    guard case .vringState(let state) = answer.reply else { throw TestFailure("no vring state") }
    return state.number
  }

  public func configuration(_ byteCount: Int, at offset: UInt32 = 0) throws -> [UInt8] {
    let answer = try frontEnd.request(.getConfig(ConfigMessage(offset: offset, bytes: [UInt8](repeating: 0, count: byteCount))))
    guard case .config(let message) = answer.reply else { throw TestFailure("the configuration space was refused") }
    return message.bytes
  }

  public func writeConfiguration(_ bytes: [UInt8], at offset: UInt32) throws {
    _ = try frontEnd.request(.setConfig(ConfigMessage(offset: offset, bytes: bytes)))
  }
}

/// A small generator with a seed, so that a failure can be repeated.
public struct SeededRandom: RandomNumberGenerator {
  public var state: UInt64
  public init(_ seed: UInt64) { state = seed }
  public mutating func next() -> UInt64 {
    state &+= 0x9E37_79B9_7F4A_7C15
    var mixed = state
    mixed = (mixed ^ mixed >> 30) &* 0xBF58_476D_1CE4_E5B9
    mixed = (mixed ^ mixed >> 27) &* 0x94D0_49BB_1331_11EB
    return mixed ^ mixed >> 31
  }
}
