import VirtioSpec
import VirtioTransport

/// The few steps of a driver that the tests repeat, on a function of two queues.
struct GuestDriver {
  var function: VirtioPCIFunction
  var effects: [TransportEffect] = []

  static let offered: FeatureSet = [.version1, .eventIndex, .indirectDescriptors, .packedRing, .ringReset, .blockFlush]

  init(
    device: DeviceID = .block, offered: FeatureSet = GuestDriver.offered, queueSizes: [UInt16] = [256, 128],
    configuration: [UInt8] = Array(0..<96), writable: [Range<Int>] = [32..<33], baseAddress: UInt64 = 0xC000_0000
  ) throws {
    function = try VirtioPCIFunction(
      .init(
        device: device, offeredFeatures: offered, queueSizes: queueSizes, configuration: configuration,
        writableConfiguration: writable, baseAddress: baseAddress))
  }

  mutating func read(_ offset: Int, _ width: Int = 4) -> UInt64 {
    function.readBAR(offset: UInt64(offset), width: width)
  }

  mutating func write(_ offset: Int, _ value: UInt64, _ width: Int = 4) {
    effects += function.writeBAR(offset: UInt64(offset), width: width, value: value)
  }

  mutating func takeEffects() -> [TransportEffect] {
    defer { effects = [] }
    return effects
  }

  var status: DeviceStatus {
    mutating get { DeviceStatus(rawValue: UInt8(read(VirtioPCI.Common.deviceStatus, 1))) }
    set { write(VirtioPCI.Common.deviceStatus, UInt64(newValue.rawValue), 1) }
  }

  mutating func accept(_ features: FeatureSet) {
    status = [.acknowledge, .driver]
    for half in 0..<2 {
      write(VirtioPCI.Common.driverFeatureSelect, UInt64(half))
      write(VirtioPCI.Common.driverFeature, features.rawValue >> UInt64(32 * half) & 0xFFFF_FFFF)
    }
    status = [.acknowledge, .driver, .featuresOK]
  }

  mutating func setUp(queue: Int, size: UInt16, vector: UInt16 = 1, base: UInt64 = 0x10_0000) {
    write(VirtioPCI.Common.queueSelect, UInt64(queue), 2)
    write(VirtioPCI.Common.queueSize, UInt64(size), 2)
    write(VirtioPCI.Common.queueVector, UInt64(vector), 2)
    let start = base + UInt64(queue) * 0x10_0000
    write(VirtioPCI.Common.queueDescriptors, start & 0xFFFF_FFFF)
    write(VirtioPCI.Common.queueDescriptors + 4, start >> 32)
    write(VirtioPCI.Common.queueDriver, (start + 0x4000) & 0xFFFF_FFFF)
    write(VirtioPCI.Common.queueDriver + 4, (start + 0x4000) >> 32)
    write(VirtioPCI.Common.queueDevice, start + 0x8000, 8)
    write(VirtioPCI.Common.queueEnable, 1, 2)
  }

  /// All the way to DRIVER_OK with both queues.
  mutating func start(_ features: FeatureSet = [.version1, .eventIndex, .ringReset]) {
    accept(features)
    write(VirtioPCI.Common.configurationVector, 0, 2)
    setUp(queue: 0, size: 64, vector: 1)
    setUp(queue: 1, size: 128, vector: 2)
    status = [.acknowledge, .driver, .featuresOK, .driverOK]
  }

  func configuration(_ offset: Int, _ width: Int = 4) -> UInt64 {
    function.space.read(offset: offset, width: width)
  }

  /// Offset of the vendor capability of this type.
  func capability(_ type: VirtioPCI.ConfigurationType) -> Int? {
    var offset = Int(configuration(PCISpec.capabilityPointer, 1))
    for _ in 0..<48 where offset != 0 {
      if configuration(offset, 1) == UInt64(PCISpec.capabilityVendor), configuration(offset + 3, 1) == UInt64(type.rawValue) {
        return offset
      }
      offset = Int(configuration(offset + 1, 1))
    }
    return nil
  }

  var msixCapability: Int { Int(configuration(PCISpec.capabilityPointer, 1)) }

  mutating func writeConfiguration(_ offset: Int, _ value: UInt64, _ width: Int) {
    effects += function.writeConfigurationSpace(offset: offset, width: width, value: value)
  }
}
