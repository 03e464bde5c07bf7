import HostSystem
import VMMemory
import VhostUser
import VirtioQueue
import VirtioSpec

/// What the session asks for, done.
extension BackendServer: BackEndDelegate where Device: ~Copyable {
  mutating func replaceMemory(_ table: [RegionDescription], _ descriptors: consuming ReceivedDescriptors) throws(Refusal) {
    var mapped: [(RegionDescription, MemoryRegion)] = []
    for description in table {
      guard let fd = descriptors.takeFirst() else { throw Refusal("a region came without its descriptor") }
      mapped.append((description, try map(description, fd)))
    }
    // `moveVring` follows for every ring that runs, and gives it back to the device.
    try quiesce()
    try install(mapped)
  }

  mutating func addMemory(_ description: RegionDescription, _ descriptor: consuming OwnedFD) throws(Refusal) {
    let region = try map(description, descriptor)
    try quiesce()
    try install(regions + [(description, region)])
    try moveAll()
  }

  mutating func removeMemory(_ description: RegionDescription) throws(Refusal) {
    try quiesce()
    try install(regions.filter { !$0.description.isSameRegion(as: description) })
    try moveAll()
  }

  /// The rings stay where they are, in another table.
  private mutating func moveAll() throws(Refusal) {
    for ring in rings where ring.isStarted {
      guard let memory, var queue = ring.queue.take() else { continue }
      do { try queue.ring.replaceMemory(memory) } catch { throw Refusal("queue \(ring.index): \(error)") }
      ring.queue = consume queue
    }
    try resume()
  }

  mutating func moveVring(at index: Int, to layout: VringLayout) {
    let ring = rings[index]
    do {
      try takeBack(ring)
      guard let old = ring.queue.take() else { return }
      let base = old.ring.base.rawValue
      ring.lastBase = base
      let moved = try makeRing(index, layout, old.ring.configuration.features, base: base)
      ring.queue = DeviceQueue(index: index, ring: moved, ports: ring.ports, kickFD: old.kickFD)
      try handOver(ring)
    } catch {
      Log.warning("Queue \(index) cannot follow the guest's memory: \(error.why)")
      _ = ring.ports.signalError()
    }
  }

  mutating func setFeatures(_ features: FeatureSet, logging: Bool) throws(Refusal) {
    if logging { throw Refusal("dirty logging is not offered", .notSupported) }
    self.features = features
    // Features do not change while rings run: the session has seen to that.
    if !rings.contains(where: \.isStarted) { device.negotiated(features, &context) }
  }

  mutating func startVring(_ setup: consuming VringSetup) throws(Refusal) {
    let ring = rings[setup.index]
    let moved = try makeRing(setup.index, setup.layout, setup.features, base: setup.base)
    let number = ring.take(setup.kick.take())
    ring.queue = DeviceQueue(index: setup.index, ring: moved, ports: ring.ports, kickFD: number)
    do {
      try ring.ports.replaceCall(setup.call)
      if let err = setup.err { try ring.ports.replaceError(err.fd) } else { try ring.ports.dropError() }
    } catch {
      throw Refusal("\(error)", error.errno)
    }
    ring.ports.forgetError()
    ring.isStarted = true
    ring.isEnabled = setup.isEnabled
    try handOver(ring)
  }

  mutating func stopVring(at index: Int, suspending: Bool) throws(Refusal) -> StopOutcome {
    let ring = rings[index]
    try takeBack(ring)
    // A ring that was lost on a move stands where it was.
    let base = ring.queue?.ring.base.rawValue ?? ring.lastBase
    Log.info("Queue \(index): \(ring.ports.counters.summary)")
    try drop(ring)
    return .stopped(base: base)
  }

  mutating func enableVring(at index: Int, _ isEnabled: Bool) {
    let ring = rings[index]
    ring.isEnabled = isEnabled
    if profile.servesDisabledQueues, ring.isWithDevice {
      device.enabled(queue: index, isEnabled, &context)
      if profile.kickWaiter == .loop { device.kicked(queue: index, &context) }
      return
    }
    do {
      if isEnabled { try handOver(ring) } else { try takeBack(ring) }
    } catch {
      context.end(because: "Queue \(index) cannot be \(isEnabled ? "enabled" : "disabled"): \(error.why)")
    }
  }

  mutating func replaceKick(at index: Int, _ kick: consuming OwnedFD?) throws(Refusal) {
    let ring = rings[index]
    try takeBack(ring)
    guard let old = ring.queue.take() else { throw Refusal("ring \(index) does not run") }
    ring.queue = DeviceQueue(index: index, old, kickFD: ring.take(kick))
    try handOver(ring)
  }

  mutating func replaceCall(at index: Int, _ call: consuming OwnedFD?) {
    do { try rings[index].ports.replaceCall(call) } catch { Log.warning("Queue \(index): \(error)") }
  }

  mutating func replaceErr(at index: Int, _ err: SharedDescriptor?) {
    do {
      if let err { try rings[index].ports.replaceError(err.fd) } else { try rings[index].ports.dropError() }
    } catch { Log.warning("Queue \(index): \(error)") }
  }

  mutating func resetDevice() -> ResetOutcome {
    do {
      try quiesce()
      for ring in rings {
        try drop(ring)
        ring.isEnabled = false
      }
    } catch {
      context.end(because: "The device cannot be reset: \(error.why)")
    }
    // What was recorded belongs to rings that are no more.
    inflight = nil
    device.reset(&context)
    return .done
  }

  mutating func configuration(_ range: Range<Int>) throws(Refusal) -> [UInt8] {
    // Front ends ask for more than a device has, and want zeros (some insist on 256 bytes).
    var bytes = device.configuration
    guard range.lowerBound >= 0, range.upperBound <= 256 else { throw Refusal("the configuration space has 256 bytes") }
    if bytes.count < 256 { bytes.append(contentsOf: repeatElement(0, count: 256 - bytes.count)) }
    return Array(bytes[range])
  }

  mutating func writeConfiguration(at offset: Int, _ bytes: [UInt8], migrating: Bool) throws(Refusal) {
    guard device.writeConfiguration(bytes, at: offset, &context) else {
      throw Refusal("the configuration bytes from \(offset) on are not all writable")
    }
  }

  mutating func makeInflightArea(queueCount: Int, queueSize: Int) throws(Refusal) -> InflightArea? {
    // Not every front end has sent features by now; then there is room for either layout.
    let isPacked = features.isEmpty || features.contains(.packedRing)
    switch inflightStore {
    case .some(let store): return try store.area(queueCount: queueCount, queueSize: queueSize, packed: isPacked)
    case .none: return nil
    }
  }

  mutating func setInflightArea(_ description: InflightDescription, _ descriptor: consuming OwnedFD) throws(Refusal) {
    guard !rings.contains(where: \.isStarted) else { throw Refusal("rings run that are recorded elsewhere", .busy) }
    inflight = try InflightMemory(description, descriptor, allowsUnsealed: allowsUnsealedMemory)
  }
}
