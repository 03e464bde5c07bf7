import HostSystem
import VhostUser
import VirtioSpec

/// A device that does nothing but remember what it was told.
public struct RecordingDevice: BackEndDelegate, ~Copyable {
  public var log: [String] = []
  public var configurationSpace: [UInt8] = Array(0..<64)
  /// `stopVring` leaves the answer to `finishStop`.
  public var drains = false
  public var resetTakesTime = false
  /// What the next call that can refuse is refused with.
  public var refusal: Refusal?
  public var bases: [Int: UInt32] = [:]
  public var kicks: [Int: SharedDescriptor] = [:]
  public var calls: [Int: SharedDescriptor] = [:]
  public var errs: [Int: SharedDescriptor] = [:]
  public var memory: [SharedDescriptor] = []
  public var inflight: SharedDescriptor?
  public var layouts: [Int: VringLayout] = [:]
  /// The name of the memory objects made for inflight areas.
  public var inflightName = "inflight"

  public init() {}

  private mutating func refuseOnce() throws(Refusal) {
    if let refusal = refusal.take() { throw refusal }
  }

  private func keep(_ fd: consuming OwnedFD?) -> SharedDescriptor? {
    guard let fd = fd.take() else { return nil }
    return SharedDescriptor(fd)
  }

  public mutating func replaceMemory(_ regions: [RegionDescription], _ descriptors: consuming ReceivedDescriptors) throws(Refusal) {
    try refuseOnce()
    memory = []
    while let fd = descriptors.takeFirst() { memory.append(SharedDescriptor(fd)) }
    log.append("memory \(regions.count)")
  }
  public mutating func addMemory(_ region: RegionDescription, _ descriptor: consuming OwnedFD) throws(Refusal) {
    try refuseOnce()
    memory.append(SharedDescriptor(descriptor))
    log.append("add \(region.guestAddress)")
  }
  public mutating func removeMemory(_ region: RegionDescription) throws(Refusal) {
    try refuseOnce()
    if !memory.isEmpty { memory.removeLast() }
    log.append("remove \(region.guestAddress)")
  }
  public mutating func setFeatures(_ features: FeatureSet, logging: Bool) throws(Refusal) {
    try refuseOnce()
    log.append("features \(features.bits)\(logging ? " log" : "")")
  }
  public mutating func startVring(_ setup: consuming VringSetup) throws(Refusal) {
    try refuseOnce()
    let index = setup.index
    layouts[index] = setup.layout
    bases[index] = setup.base
    log.append("start \(index) size \(setup.layout.size) base \(setup.base)\(setup.isEnabled ? " enabled" : "")")
    kicks[index] = keep(setup.kick.take())
    calls[index] = keep(setup.call.take())
    errs[index] = setup.err
  }
  public mutating func moveVring(at index: Int, to layout: VringLayout) {
    layouts[index] = layout
    log.append("move \(index)")
  }
  public mutating func stopVring(at index: Int, suspending: Bool) throws(Refusal) -> StopOutcome {
    try refuseOnce()
    log.append("stop \(index)\(suspending ? " suspending" : "")")
    kicks[index] = nil
    calls[index] = nil
    return drains ? .pending : .stopped(base: (bases[index] ?? 0) + 5)
  }
  public mutating func enableVring(at index: Int, _ isEnabled: Bool) { log.append("\(isEnabled ? "enable" : "disable") \(index)") }
  public mutating func replaceKick(at index: Int, _ kick: consuming OwnedFD?) throws(Refusal) {
    kicks[index] = keep(kick)
    log.append("kick \(index)")
  }
  public mutating func replaceCall(at index: Int, _ call: consuming OwnedFD?) {
    calls[index] = keep(call)
    log.append("call \(index)\(calls[index] == nil ? " none" : "")")
  }
  public mutating func replaceErr(at index: Int, _ err: SharedDescriptor?) { errs[index] = err }
  public mutating func resetDevice() -> ResetOutcome {
    log.append("reset")
    kicks = [:]
    calls = [:]
    return resetTakesTime ? .pending : .done
  }
  public mutating func configuration(_ range: Range<Int>) throws(Refusal) -> [UInt8] {
    try refuseOnce()
    guard range.upperBound <= configurationSpace.count else { throw Refusal("the configuration space ends before that") }
    return Array(configurationSpace[range])
  }
  public mutating func writeConfiguration(at offset: Int, _ bytes: [UInt8], migrating: Bool) throws(Refusal) {
    try refuseOnce()
    guard offset + bytes.count <= configurationSpace.count else { throw Refusal("the configuration space ends before that") }
    configurationSpace.replaceSubrange(offset..<offset + bytes.count, with: bytes)
    log.append("write \(offset) \(bytes)\(migrating ? " migrating" : "")")
  }
  public mutating func makeInflightArea(queueCount: Int, queueSize: Int) throws(Refusal) -> InflightArea? {
    try refuseOnce()
    let size = UInt64(queueCount * (queueSize * 16 + 64))
    guard let fd = try? SharedMemory.sealed(name: inflightName, byteCount: size) else { return nil }
    return InflightArea(
      description: InflightDescription(size: size, queueCount: UInt16(queueCount), queueSize: UInt16(queueSize)), fd: fd)
  }
  public mutating func setInflightArea(_ description: InflightDescription, _ descriptor: consuming OwnedFD) throws(Refusal) {
    inflight = SharedDescriptor(descriptor)
    log.append("inflight \(description.queueCount)x\(description.queueSize)")
  }
  public mutating func setLog(_ description: LogDescription, _ descriptor: consuming OwnedFD) throws(Refusal) {
    log.append("log \(description.size)")
  }
  public mutating func setLogSignal(_ descriptor: consuming OwnedFD) throws(Refusal) { log.append("log signal") }
  public mutating func setMTU(_ bytes: Int) throws(Refusal) { log.append("mtu \(bytes)") }
  public mutating func sendRARP(_ address: [UInt8]) throws(Refusal) { log.append("rarp \(address)") }
  public mutating func setStatus(_ status: DeviceStatus) throws(Refusal) { log.append("status \(status.rawValue)") }
}
