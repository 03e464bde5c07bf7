import VirtioSpec

/// The registers of virtio-pci's common configuration structure (virtio 1.4, section 4.1.4.3), at any width and
/// alignment: a read assembles bytes, a write is merged into each field it touches and applied to them in order.
extension VirtioDeviceState {
  /// One register: offset, width in bytes, and what it reads as.
  private static let fields: [(offset: Int, width: Int)] = [
    (VirtioPCI.Common.deviceFeatureSelect, 4), (VirtioPCI.Common.deviceFeature, 4),
    (VirtioPCI.Common.driverFeatureSelect, 4), (VirtioPCI.Common.driverFeature, 4),
    (VirtioPCI.Common.configurationVector, 2), (VirtioPCI.Common.queueCount, 2),
    (VirtioPCI.Common.deviceStatus, 1), (VirtioPCI.Common.configurationGeneration, 1),
    (VirtioPCI.Common.queueSelect, 2), (VirtioPCI.Common.queueSize, 2), (VirtioPCI.Common.queueVector, 2),
    (VirtioPCI.Common.queueEnable, 2), (VirtioPCI.Common.queueNotifyOffset, 2),
    // The driver may write the halves of an address separately, hence two fields each.
    (VirtioPCI.Common.queueDescriptors, 4), (VirtioPCI.Common.queueDescriptors + 4, 4),
    (VirtioPCI.Common.queueDriver, 4), (VirtioPCI.Common.queueDriver + 4, 4),
    (VirtioPCI.Common.queueDevice, 4), (VirtioPCI.Common.queueDevice + 4, 4),
    (VirtioPCI.Common.queueNotifyConfigData, 2), (VirtioPCI.Common.queueReset, 2),
  ]

  /// Bytes of the structure: the queue reset register exists only where that feature is offered.
  package var commonByteCount: Int {
    offered.contains(.ringReset) ? VirtioPCI.Common.resetByteCount : VirtioPCI.Common.baseByteCount
  }

  func readCommon(offset: Int, width: Int, generation: UInt8) -> UInt64 {
    var value: UInt64 = 0
    for field in Self.fields {
      let touched = (field.offset..<(field.offset + field.width)).clamped(to: offset..<(offset + width))
        .clamped(to: 0..<commonByteCount)
      guard !touched.isEmpty else { continue }
      let content = UInt64(register(at: field.offset, generation: generation))
      for index in touched {
        value |= (content >> UInt64(8 * (index - field.offset)) & 0xFF) << UInt64(8 * (index - offset))
      }
    }
    return value
  }

  mutating func writeCommon(
    offset: Int, width: Int, value: UInt64, generation: UInt8, effects: inout [TransportEffect]
  ) {
    for field in Self.fields {
      let touched = (field.offset..<(field.offset + field.width)).clamped(to: offset..<(offset + width))
        .clamped(to: 0..<commonByteCount)
      guard !touched.isEmpty else { continue }
      var content = register(at: field.offset, generation: generation)
      for index in touched {
        let shift = UInt32(8 * (index - field.offset))
        let byte = UInt32(truncatingIfNeeded: value >> UInt64(8 * (index - offset)) & 0xFF)
        content = content & ~(0xFF << shift) | byte << shift
      }
      setRegister(at: field.offset, to: content, effects: &effects)
    }
  }

  private func register(at offset: Int, generation: UInt8) -> UInt32 {
    let queue = selectedQueue
    return switch offset {
    case VirtioPCI.Common.deviceFeatureSelect: deviceFeatureSelect
    case VirtioPCI.Common.deviceFeature: selectedDeviceFeatures
    case VirtioPCI.Common.driverFeatureSelect: driverFeatureSelect
    case VirtioPCI.Common.driverFeature: selectedDriverFeatures
    case VirtioPCI.Common.configurationVector: UInt32(configurationVector)
    case VirtioPCI.Common.queueCount: UInt32(queues.count)
    case VirtioPCI.Common.deviceStatus: UInt32(status.rawValue)
    case VirtioPCI.Common.configurationGeneration: UInt32(generation)
    case VirtioPCI.Common.queueSelect: UInt32(queueSelect)
    case VirtioPCI.Common.queueSize: UInt32(queue?.size ?? 0)
    case VirtioPCI.Common.queueVector: UInt32(queue?.vector ?? VirtioPCI.noVector)
    case VirtioPCI.Common.queueEnable: queue?.isEnabled == true ? 1 : 0
    // With its own register per queue, the number of the queue is the offset.
    case VirtioPCI.Common.queueNotifyOffset: queue == nil ? 0 : UInt32(queueSelect)
    case VirtioPCI.Common.queueDescriptors: UInt32(truncatingIfNeeded: queue?.descriptors ?? 0)
    case VirtioPCI.Common.queueDescriptors + 4: UInt32(truncatingIfNeeded: (queue?.descriptors ?? 0) >> 32)
    case VirtioPCI.Common.queueDriver: UInt32(truncatingIfNeeded: queue?.driver ?? 0)
    case VirtioPCI.Common.queueDriver + 4: UInt32(truncatingIfNeeded: (queue?.driver ?? 0) >> 32)
    case VirtioPCI.Common.queueDevice: UInt32(truncatingIfNeeded: queue?.device ?? 0)
    case VirtioPCI.Common.queueDevice + 4: UInt32(truncatingIfNeeded: (queue?.device ?? 0) >> 32)
    case VirtioPCI.Common.queueReset: queue?.isResetting == true ? 1 : 0
    default: 0
    }
  }

  private mutating func setRegister(at offset: Int, to value: UInt32, effects: inout [TransportEffect]) {
    let half = UInt16(truncatingIfNeeded: value)
    let low: (inout UInt64) -> Void = { $0 = $0 & 0xFFFF_FFFF_0000_0000 | UInt64(value) }
    let high: (inout UInt64) -> Void = { $0 = $0 & 0xFFFF_FFFF | UInt64(value) << 32 }
    switch offset {
    case VirtioPCI.Common.deviceFeatureSelect: deviceFeatureSelect = value
    case VirtioPCI.Common.driverFeatureSelect: driverFeatureSelect = value
    case VirtioPCI.Common.driverFeature: setSelectedDriverFeatures(value)
    case VirtioPCI.Common.configurationVector: setConfigurationVector(half)
    case VirtioPCI.Common.deviceStatus:
      writeStatus(DeviceStatus(rawValue: UInt8(truncatingIfNeeded: value)), effects: &effects)
    case VirtioPCI.Common.queueSelect: queueSelect = half
    case VirtioPCI.Common.queueSize: setSelectedQueueSize(half)
    case VirtioPCI.Common.queueVector: setSelectedQueueVector(half, effects: &effects)
    case VirtioPCI.Common.queueEnable: if half == 1 { enableSelectedQueue(effects: &effects) }
    case VirtioPCI.Common.queueDescriptors: configureSelectedQueue { low(&$0.descriptors) }
    case VirtioPCI.Common.queueDescriptors + 4: configureSelectedQueue { high(&$0.descriptors) }
    case VirtioPCI.Common.queueDriver: configureSelectedQueue { low(&$0.driver) }
    case VirtioPCI.Common.queueDriver + 4: configureSelectedQueue { high(&$0.driver) }
    case VirtioPCI.Common.queueDevice: configureSelectedQueue { low(&$0.device) }
    case VirtioPCI.Common.queueDevice + 4: configureSelectedQueue { high(&$0.device) }
    case VirtioPCI.Common.queueReset: if half == 1 { resetSelectedQueue(effects: &effects) }
    default: break
    }
  }
}
