import HostSystem
import VMMemory
import VhostUser
import VirtioQueue
import VirtioSpec

/// One front end's device: memory table and rings, between the vhost-user session, which checks what the front end says,
/// and the device, which gets ready queues. It outlives connections; `disconnect` makes it as new.
struct BackendServer<Device: DeviceBackend & ~Copyable>: ~Copyable {
  var device: Device
  var context: BackendContext
  let profile: DeviceProfile
  /// Guest memory that its owner could cut off under us is refused, unless nobody else is in charge of that.
  let allowsUnsealedMemory: Bool
  var memory: GuestMemory?
  var regions: [(description: RegionDescription, region: MemoryRegion)] = []
  let rings: [RingRecord]
  /// Where chains in flight are recorded, once the front end has said.
  var inflight: InflightMemory?
  let inflightStore: InflightStore?
  var features: FeatureSet = []
  var hasWarnedOfUnsealed = false
  /// When the rings are looked at for which the front end has given no kick; nil while there are none.
  var nextLook: MonotonicTime?
  /// What a process that waits for its turn is called when that has come.
  var titleInService: String?

  /// - Parameter statistics: a page for every queue, to be read by others; nil for memory of our own.
  init(
    _ device: consuming Device, _ context: consuming BackendContext, allowsUnsealedMemory: Bool, statistics: MemoryMapping? = nil
  ) throws(SystemError) {
    let profile = device.profile
    var rings: [RingRecord] = []
    let pages: MemoryMapping
    if let statistics {
      pages = statistics
    } else {
      pages = try .anonymous(byteCount: profile.queueCount * QueueStatistics.pageByteCount)
    }
    for index in 0..<profile.queueCount {
      let ports = try QueuePorts(QueueCounters(pages, page: index), isServedByLoop: profile.kickWaiter == .loop)
      rings.append(RingRecord(index: index, ports: ports))
    }
    let store =
      profile.recordsInflight
      ? try InflightStore(queueCount: profile.queueCount, greatestQueueSize: profile.greatestQueueSize) : nil
    self.profile = profile
    self.rings = rings
    inflightStore = store
    self.device = device
    self.context = context
    self.allowsUnsealedMemory = allowsUnsealedMemory
  }

  /// What the session offers for this device.
  var offer: BackEndOffer {
    var features = BackEndOffer.standard
    if !device.configuration.isEmpty { features.insert(.config) }
    if profile.recordsInflight { features.insert(.inflightShmFD) }
    return BackEndOffer(
      features: profile.features, protocolFeatures: features, queueCount: profile.queueCount,
      maximumQueueSize: Int(profile.greatestQueueSize))
  }

  /// One ring as the kit keeps it. A class, because an array cannot own what cannot be copied.
  final class RingRecord {
    let index: Int
    let ports: QueuePorts
    var kick: EventFD?
    /// Here while the device does not have it.
    var queue: DeviceQueue?
    var isStarted = false
    var isEnabled = false
    var isWithDevice = false
    /// There is no kick: the ring is looked at every `lookInterval`.
    var isPolled = false
    /// Where the ring stood when it was last taken apart.
    var lastBase: UInt32 = 0

    init(index: Int, ports: QueuePorts) {
      self.index = index
      self.ports = ports
    }

    /// Takes the front end's kick; without one the ring is polled. The descriptor to wait for.
    func take(_ kick: consuming OwnedFD?) -> CInt {
      isPolled = true
      self.kick = nil
      guard let kick = kick.take() else { return ports.lookNumber }
      isPolled = false
      let number = kick.rawValue
      self.kick = EventFD(adopting: kick)
      return number
    }
  }

  // MARK: Handing over and taking back

  /// Gives a started and enabled ring to the device.
  mutating func handOver(_ ring: RingRecord) throws(Refusal) {
    guard ring.isStarted, ring.isEnabled || profile.servesDisabledQueues, !ring.isWithDevice,
      let queue = ring.queue.take()
    else { return }
    let kickFD = queue.kickFD
    do {
      try device.start(queue, &context)
      ring.isWithDevice = true
      if profile.servesDisabledQueues { device.enabled(queue: ring.index, ring.isEnabled, &context) }
      if ring.isPolled, nextLook == nil { nextLook = .now }
      guard profile.kickWaiter == .loop else { return }
      // Edges only: every kick is reported, and its counter never has to be read.
      if !ring.isPolled { try context.loop.add(number: kickFD, for: [.readable, .edgeTriggered], token: .kick(queue: ring.index)) }
    } catch let error as BackendError {
      throw Refusal("the device cannot start queue \(ring.index): \(error)", .inputOutput)
    } catch {
      throw Refusal("queue \(ring.index): \(error)", .noMemory)
    }
    device.kicked(queue: ring.index, &context)
  }

  /// Takes a ring back from the device, drained and published.
  mutating func takeBack(_ ring: RingRecord) throws(Refusal) {
    guard ring.isWithDevice else { return }
    if profile.kickWaiter == .loop, let number = ring.kick?.fd.rawValue { context.loop.remove(number: number) }
    let queue: DeviceQueue?
    do { queue = try device.stop(queue: ring.index, &context) } catch {
      throw Refusal("the device cannot stop queue \(ring.index): \(error)", .inputOutput)
    }
    guard let queue else { throw Refusal("the device lost queue \(ring.index)", .inputOutput) }
    ring.queue = consume queue
    ring.isWithDevice = false
  }

  /// Takes every ring back that the device has: before memory or features change, and at the end.
  mutating func quiesce() throws(Refusal) {
    for ring in rings { try takeBack(ring) }
  }

  mutating func resume() throws(Refusal) {
    for ring in rings { try handOver(ring) }
  }

  /// The front end is gone: nothing of it stays.
  mutating func disconnect() throws(Refusal) {
    try quiesce()
    for ring in rings {
      if ring.isStarted { Log.info("Queue \(ring.index): \(ring.ports.counters.summary)") }
      try drop(ring)
    }
    memory = nil
    regions = []
    inflight = nil
    features = []
    device.disconnected(&context)
  }

  func drop(_ ring: RingRecord) throws(Refusal) {
    // A kick that came after the device stopped looking must not wake the front end's own users of the descriptor.
    ring.kick?.drain()
    ring.kick = nil
    ring.queue = nil
    ring.isStarted = false
    do { try ring.ports.replaceCall(nil) } catch { throw Refusal("\(error)", error.errno) }
  }

  // MARK: Polling

  /// How often a ring without a kick is looked at: an idle one costs a thousand wake-ups a second and no more.
  static var lookInterval: Duration { .milliseconds(1) }

  /// Looks at the rings without a kick when it is time to.
  mutating func lookAtPolledRings() {
    guard let time = nextLook else { return }
    let now = MonotonicTime.now
    guard now >= time else { return }
    nextLook = nil
    for ring in rings where ring.isPolled && ring.isWithDevice {
      nextLook = now.advanced(by: Self.lookInterval)
      switch profile.kickWaiter {
      case .loop: device.kicked(queue: ring.index, &context)
      case .device: ring.ports.askForLook()
      }
    }
  }

  // MARK: Memory

  mutating func map(_ description: RegionDescription, _ fd: borrowing OwnedFD) throws(Refusal) -> MemoryRegion {
    let address = GuestAddress(description.guestAddress)
    do {
      do {
        return try MemoryRegion.mapping(
          fd, guestAddress: address, byteCount: description.size, frontEndAddress: description.userAddress,
          fileOffset: description.mapOffset, allowUnsealed: false)
      } catch MemoryError.notSealed where allowsUnsealedMemory {
        if !hasWarnedOfUnsealed {
          hasWarnedOfUnsealed = true
          Log.warning("Guest memory is not sealed against shrinking: a front end that truncates it loses its connection")
        }
        return try MemoryRegion.mapping(
          fd, guestAddress: address, byteCount: description.size, frontEndAddress: description.userAddress,
          fileOffset: description.mapOffset, allowUnsealed: true)
      }
    } catch {
      throw Refusal("\(error)")
    }
  }

  /// Replaces the table; rings have been taken back.
  mutating func install(_ table: [(description: RegionDescription, region: MemoryRegion)]) throws(Refusal) {
    do { memory = try GuestMemory(regions: table.map(\.region)) } catch { throw Refusal("\(error)") }
    regions = table
  }

  /// A ring of that shape in the present memory.
  func makeRing(_ index: Int, _ layout: VringLayout, _ features: FeatureSet, base: UInt32) throws(Refusal) -> Virtqueue {
    guard let memory else { throw Refusal("there is no guest memory yet") }
    guard let size = UInt16(exactly: layout.size) else { throw Refusal("a ring of \(layout.size) entries is impossible") }
    let record = try inflight?.region(ofQueue: index, size: size, packed: features.contains(.packedRing))
    var configuration = VirtqueueConfiguration(
      size: size, descriptors: GuestAddress(layout.descriptorTable), driver: GuestAddress(layout.availableRing),
      device: GuestAddress(layout.usedRing), features: features, base: VringBase(rawValue: base))
    do {
      // DPDK's virtio-user starts the rings of its next back end at 0, wherever they are. What was answered is in memory, and
      // all behind that is to be done.
      if record == nil, let used = try Virtqueue.usedIndex(misplaced: configuration, memory) {
        Log.warning("Queue \(index) cannot be at \(base); it goes on at its used index, \(used)")
        configuration.base = VringBase(availableIndex: used)
      }
      let ring = try Virtqueue(configuration, memory: memory, inflight: record)
      rings[index].ports.counters[.replays].add(UInt64(ring.replayCount))
      if ring.replayCount > 0 { Log.info("Queue \(index): \(ring.replayCount) requests were in flight and are done again") }
      return ring
    } catch {
      throw Refusal("\(error)")
    }
  }
}
