import VirtioSpec

/// Where the structures of a virtio function lie in its BAR 0, which is 64-bit memory of 64 KiB. The notify registers
/// have pages of their own.
package enum VirtioPCILayout {
  package static let bar = 0
  package static let barByteCount: UInt64 = 0x1_0000
  package static let common = 0x0000
  package static let isr = 0x1000
  package static let device = 0x2000
  package static let notify = 0x4000
  package static let table = 0x8000
  package static let pending = 0xC000
  /// `notify_off_multiplier`: every queue has a notify register of its own.
  package static let notifyMultiplier = 4

  package static let queueLimit = (table - notify) / notifyMultiplier
  package static let vectorLimit = (pending - table) / PCISpec.msixTableEntryByteCount
  package static let configurationLimit = notify - device

  /// Offset in BAR 0 of the notify register of a queue: where an ioeventfd belongs.
  package static func notifyOffset(ofQueue index: Int) -> UInt64 {
    UInt64(notify + notifyMultiplier * index)
  }
}

/// A virtio device as a PCI function (virtio 1.4, section 4.1), modern dialect, MSI-X and no INTx.
///
/// One owner at a time (it is a value: put it under the lock of its device). Every access is total: any offset, width 1
/// to 8 and value has an answer.
package struct VirtioPCIFunction: Sendable {
  /// What a function is built from.
  package struct Description: Sendable {
    package var device: DeviceID
    /// Bits of vhost-user itself are removed, `version1` is added.
    package var offeredFeatures: FeatureSet
    /// The greatest size of every queue.
    package var queueSizes: [UInt16]
    /// The device configuration at the start; its length is what the guest sees for good.
    package var configuration: [UInt8]
    /// Bytes of it that a driver may write.
    package var writableConfiguration: [Range<Int>]
    /// MSI-X vectors: by default one for configuration changes and one per queue.
    package var vectorCount: Int
    /// Where BAR 0 is before the guest moves it.
    package var baseAddress: UInt64

    package init(
      device: DeviceID, offeredFeatures: FeatureSet, queueSizes: [UInt16], configuration: [UInt8] = [],
      writableConfiguration: [Range<Int>] = [], vectorCount: Int? = nil, baseAddress: UInt64 = 0
    ) {
      self.device = device
      self.offeredFeatures = offeredFeatures
      self.queueSizes = queueSizes
      self.configuration = configuration
      self.writableConfiguration = writableConfiguration
      self.vectorCount = vectorCount ?? min(queueSizes.count + 1, VirtioPCILayout.vectorLimit)
      self.baseAddress = baseAddress
    }
  }

  package internal(set) var space: PCIConfigurationSpace
  package internal(set) var state: VirtioDeviceState
  package internal(set) var msix: MSIXTable
  package internal(set) var configuration: DeviceConfiguration
  /// ISR status: only its configuration bit can be set, for there is no INTx.
  var isr: UInt8 = 0
  let offsets: CapabilityOffsets
  private let pristineSpace: PCIConfigurationSpace

  package init(_ description: Description) throws(TransportError) {
    try Self.check(description)
    state = VirtioDeviceState(
      device: description.device, offered: Self.offerable(description.offeredFeatures), queueSizes: description.queueSizes,
      vectorCount: description.vectorCount)
    msix = MSIXTable(vectorCount: description.vectorCount)
    configuration = DeviceConfiguration(
      bytes: description.configuration, writable: description.writableConfiguration)
    (space, offsets) = Self.makeSpace(description, commonByteCount: state.commonByteCount)
    space.setAddress(description.baseAddress, ofBAR: VirtioPCILayout.bar)
    pristineSpace = space
  }

  /// Bit 30 and the dirty log are between front end and back end (a guest that saw them could switch them on), and doorbells
  /// carry no data that would reach a back end through an eventfd.
  private static func offerable(_ features: FeatureSet) -> FeatureSet {
    let unwanted: FeatureSet = [.notificationData, .notificationConfigData, .adminQueue, .suspend, .singleRootIO]
    return features.subtracting(.vhostOnlyMask).subtracting(unwanted).union(.version1)
  }

  private static func check(_ description: Description) throws(TransportError) {
    guard (1...DeviceID.greatest).contains(description.device.rawValue) else { throw .device(description.device) }
    let count = description.queueSizes.count
    guard (1...VirtioPCILayout.queueLimit).contains(count) else {
      throw .queueCount(count, limit: VirtioPCILayout.queueLimit)
    }
    for (index, size) in description.queueSizes.enumerated() where !SplitRing.isValid(queueSize: size) {
      throw .queueSize(index: index, size: size)
    }
    guard (1...VirtioPCILayout.vectorLimit).contains(description.vectorCount) else {
      throw .vectorCount(description.vectorCount, limit: VirtioPCILayout.vectorLimit)
    }
    guard description.configuration.count <= VirtioPCILayout.configurationLimit else {
      throw .configurationByteCount(description.configuration.count, limit: VirtioPCILayout.configurationLimit)
    }
    guard description.baseAddress % VirtioPCILayout.barByteCount == 0 else {
      throw .baseAddress(description.baseAddress)
    }
  }

  // MARK: What the device side says

  /// Another back end has other features: the next driver is offered these. Which registers there are stays as it was.
  package mutating func offer(_ features: FeatureSet) {
    var features = Self.offerable(features)
    if state.offered.contains(.ringReset) { features.formUnion(.ringReset) } else { features.subtract(.ringReset) }
    state.offered = features
  }

  /// The back end has stopped all queues after `.reset`.
  package mutating func resetCompleted() {
    guard state.isResetting else { return }
    state.completeReset()
    isr = 0
  }

  /// The back end has stopped queue `index` after `.queueReset`.
  package mutating func queueResetCompleted(_ index: Int) {
    state.completeQueueReset(index)
  }

  /// New bytes of the device configuration, from `offset` on. An equal copy changes nothing, and interrupts nobody unless the
  /// device itself announced a change.
  package mutating func updateConfiguration(
    from offset: Int = 0, with bytes: [UInt8], isAnnounced: Bool = false
  ) -> [TransportEffect] {
    let isChanged = configuration.replace(from: offset, with: bytes)
    guard isChanged || isAnnounced, state.status.contains(.driverOK) else { return [] }
    return configurationInterrupt()
  }

  /// The device cannot go on (dead back end, broken ring): DEVICE_NEEDS_RESET, and the driver is told.
  package mutating func setNeedsReset() -> [TransportEffect] {
    state.setNeedsReset() ? configurationInterrupt() : []
  }

  private mutating func configurationInterrupt() -> [TransportEffect] {
    isr |= VirtioPCI.ISR.configuration
    let vector = state.configurationVector
    return vector == VirtioPCI.noVector || !msix.isEnabled ? [] : [.signal(vector: Int(vector))]
  }

  /// As after power-on, for a reboot of the machine: decoding off, BAR where it was at first, vectors masked. An active
  /// device is asked to stop (`.reset`) and still needs `resetCompleted()`.
  package mutating func powerOnReset() -> [TransportEffect] {
    var effects: [TransportEffect] = []
    state.beginReset(effects: &effects)
    msix.reset(effects: &effects)
    let before = decodedAddress
    space = pristineSpace
    isr = 0
    if before != nil { effects.append(.barMoved(from: before, to: nil)) }
    return effects
  }

  /// Where BAR 0 answers now, `nil` while memory decoding is off.
  package var decodedAddress: UInt64? { space.decodedAddress(ofBAR: VirtioPCILayout.bar) }
}
