import VirtioSpec

/// The state of a virtio device that every transport shows in its own registers (virtio 1.4, sections 2.1 to 2.6):
/// status, features and queues, with the rules of what a driver may change and when.
///
/// Rules beyond the letter: a status bit cannot be cleared but by a full reset; features are frozen by FEATURES_OK; the
/// geometry of a queue is frozen by its enable bit and that of all queues by DRIVER_OK; a queue that is not set up
/// soundly (size, alignment) cannot be enabled. Whoever activates a device therefore never sees a size change later.
package struct VirtioDeviceState: Sendable {
  /// The registers of one queue.
  package struct Queue: Hashable, Sendable {
    package let maximumSize: UInt16
    package internal(set) var size: UInt16
    package internal(set) var vector = VirtioPCI.noVector
    package internal(set) var isEnabled = false
    /// A reset of this queue has been asked for and is not finished.
    package internal(set) var isResetting = false
    /// Reset since DRIVER_OK, hence open for being set up again.
    package internal(set) var mayBeReconfigured = false
    package internal(set) var descriptors: UInt64 = 0
    package internal(set) var driver: UInt64 = 0
    package internal(set) var device: UInt64 = 0

    init(maximumSize: UInt16) {
      self.maximumSize = maximumSize
      size = maximumSize
    }
  }

  package let device: DeviceID
  /// What a driver that starts anew is offered; it may differ from what the present one was.
  package internal(set) var offered: FeatureSet
  let vectorCount: Int

  package private(set) var status: DeviceStatus = []
  /// Features the driver has written so far; agreed on once `status` has FEATURES_OK.
  package private(set) var accepted: FeatureSet = []
  /// From DRIVER_OK until the end of the reset that follows.
  package private(set) var isActive = false
  /// A reset of the active device has been asked for and is not finished; all else the driver writes is ignored.
  package private(set) var isResetting = false
  package private(set) var queues: [Queue]
  package private(set) var configurationVector = VirtioPCI.noVector

  // Selectors may hold anything; what they select is checked at use.
  package var deviceFeatureSelect: UInt32 = 0
  package var driverFeatureSelect: UInt32 = 0
  package var queueSelect: UInt16 = 0

  init(device: DeviceID, offered: FeatureSet, queueSizes: [UInt16], vectorCount: Int) {
    self.device = device
    self.offered = offered
    self.vectorCount = vectorCount
    queues = queueSizes.map(Queue.init(maximumSize:))
  }

  // MARK: Features

  package var selectedDeviceFeatures: UInt32 { Self.word(deviceFeatureSelect, of: offered) }

  package var selectedDriverFeatures: UInt32 { Self.word(driverFeatureSelect, of: accepted) }

  private static func word(_ select: UInt32, of features: FeatureSet) -> UInt32 {
    select < 2 ? UInt32(truncatingIfNeeded: features.rawValue >> (32 * UInt64(select))) : 0
  }

  mutating func setSelectedDriverFeatures(_ value: UInt32) {
    guard driverFeatureSelect < 2, !isResetting, !status.contains(.featuresOK) else { return }
    let shift = 32 * UInt64(driverFeatureSelect)
    accepted = FeatureSet(rawValue: accepted.rawValue & ~(0xFFFF_FFFF << shift) | UInt64(value) << shift)
  }

  /// A driver may accept what was offered, with all it depends on, and must accept the modern dialect.
  private var acceptedIsSound: Bool {
    accepted.isSubset(of: offered) && accepted.contains(.version1)
      && accepted.unmetDependencies(for: device).isEmpty
  }

  // MARK: Status

  mutating func writeStatus(_ written: DeviceStatus, effects: inout [TransportEffect]) {
    guard !isResetting else { return }
    if written.isEmpty {
      beginReset(effects: &effects)
      return
    }
    status.formUnion(written.intersection([.acknowledge, .driver, .failed]))
    if written.contains(.featuresOK), status.contains([.acknowledge, .driver]), acceptedIsSound {
      status.formUnion(.featuresOK)
    }
    if written.contains(.driverOK), status.contains(.featuresOK), !status.contains(.driverOK) {
      status.formUnion(.driverOK)
      isActive = true
      effects.append(.activate(activation))
    }
  }

  /// What has been agreed on; meaningful once active.
  package var activation: Activation {
    Activation(features: accepted, queues: queues.indices.filter { queues[$0].isEnabled }.map(geometry(ofQueue:)))
  }

  private func geometry(ofQueue index: Int) -> QueueGeometry {
    let queue = queues[index]
    return QueueGeometry(
      index: index, size: queue.size, descriptors: queue.descriptors, driver: queue.driver, device: queue.device,
      vector: queue.vector == VirtioPCI.noVector ? nil : queue.vector)
  }

  mutating func beginReset(effects: inout [TransportEffect]) {
    guard isActive else {
      clear()
      return
    }
    guard !isResetting else { return }
    isResetting = true
    effects.append(.reset)
  }

  /// The queues are stopped; the status register may say zero.
  mutating func completeReset() {
    guard isResetting else { return }
    clear()
  }

  private mutating func clear() {
    status = []
    accepted = []
    isActive = false
    isResetting = false
    configurationVector = VirtioPCI.noVector
    deviceFeatureSelect = 0
    driverFeatureSelect = 0
    queueSelect = 0
    queues = queues.map { Queue(maximumSize: $0.maximumSize) }
  }

  /// The device cannot go on until it is reset; true if the driver has to be told.
  mutating func setNeedsReset() -> Bool {
    guard !isResetting, !status.contains(.needsReset) else { return false }
    status.formUnion(.needsReset)
    return status.contains(.driverOK)
  }

  // MARK: Queues

  /// The registers of the selected queue, `nil` if there is no such queue.
  package var selectedQueue: Queue? {
    Int(queueSelect) < queues.count ? queues[Int(queueSelect)] : nil
  }

  private var layoutIsPacked: Bool { accepted.contains(.packedRing) }

  /// Changes the selected queue's geometry, if it exists and is not frozen.
  mutating func configureSelectedQueue(_ change: (inout Queue) -> Void) {
    let index = Int(queueSelect)
    guard index < queues.count, !isResetting, !queues[index].isEnabled,
      !status.contains(.driverOK) || queues[index].mayBeReconfigured
    else { return }
    change(&queues[index])
  }

  mutating func setSelectedQueueSize(_ size: UInt16) {
    configureSelectedQueue { queue in
      if size != 0 && size <= queue.maximumSize { queue.size = size }
    }
  }

  mutating func enableSelectedQueue(effects: inout [TransportEffect]) {
    guard status.contains(.featuresOK) else { return }
    let packed = layoutIsPacked
    let index = Int(queueSelect)
    var isNew = false
    configureSelectedQueue { queue in
      guard Self.isSound(queue, packed: packed) else { return }
      queue.isEnabled = true
      queue.mayBeReconfigured = false
      isNew = true
    }
    if isNew, isActive {
      effects.append(.queueEnabled(geometry(ofQueue: index)))
    }
  }

  private static func isSound(_ queue: Queue, packed: Bool) -> Bool {
    if packed {
      return PackedRing.isValid(queueSize: queue.size)
        && queue.descriptors % PackedRing.descriptorRingAlignment == 0
        && queue.driver % PackedRing.eventAlignment == 0 && queue.device % PackedRing.eventAlignment == 0
    }
    return SplitRing.isValid(queueSize: queue.size)
      && queue.descriptors % SplitRing.descriptorTableAlignment == 0
      && queue.driver % SplitRing.availableRingAlignment == 0 && queue.device % SplitRing.usedRingAlignment == 0
  }

  mutating func resetSelectedQueue(effects: inout [TransportEffect]) {
    let index = Int(queueSelect)
    guard accepted.contains(.ringReset), isActive, !isResetting, index < queues.count, queues[index].isEnabled,
      !queues[index].isResetting
    else { return }
    queues[index].isResetting = true
    effects.append(.queueReset(index))
  }

  mutating func completeQueueReset(_ index: Int) {
    guard queues.indices.contains(index), queues[index].isResetting else { return }
    queues[index] = Queue(maximumSize: queues[index].maximumSize)
    queues[index].mayBeReconfigured = true
  }

  // MARK: Vectors

  /// A vector that does not exist is stored as "none", which the driver notices when it reads back.
  private func existing(_ vector: UInt16) -> UInt16 {
    Int(vector) < vectorCount ? vector : VirtioPCI.noVector
  }

  mutating func setConfigurationVector(_ vector: UInt16) {
    guard !isResetting else { return }
    configurationVector = existing(vector)
  }

  mutating func setSelectedQueueVector(_ vector: UInt16, effects: inout [TransportEffect]) {
    let index = Int(queueSelect)
    guard index < queues.count, !isResetting, queues[index].vector != existing(vector) else { return }
    queues[index].vector = existing(vector)
    guard isActive, queues[index].isEnabled else { return }
    effects.append(.queueVectorChanged(queue: index, vector: geometry(ofQueue: index).vector))
  }

  /// Whether a kick of this queue means anything now.
  func acceptsNotification(ofQueue index: Int) -> Bool {
    index < queues.count && isActive && !isResetting && queues[index].isEnabled && !queues[index].isResetting
  }
}
