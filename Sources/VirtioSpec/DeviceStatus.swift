/// The device status field (virtio 1.4, section 2.1).
public struct DeviceStatus: OptionSet, Hashable, Sendable {
  public let rawValue: UInt8

  @inlinable
  public init(rawValue: UInt8) { self.rawValue = rawValue }

  /// `ACKNOWLEDGE`: the guest has seen the device.
  @inlinable public static var acknowledge: DeviceStatus { DeviceStatus(rawValue: 1) }
  /// `DRIVER`: the guest has a driver for it.
  @inlinable public static var driver: DeviceStatus { DeviceStatus(rawValue: 2) }
  /// `DRIVER_OK`: the driver is ready; the queues live.
  @inlinable public static var driverOK: DeviceStatus { DeviceStatus(rawValue: 4) }
  /// `FEATURES_OK`: both sides agree on the features.
  @inlinable public static var featuresOK: DeviceStatus { DeviceStatus(rawValue: 8) }
  /// `SUSPEND` (only with the feature of that name).
  @inlinable public static var suspend: DeviceStatus { DeviceStatus(rawValue: 16) }
  /// `DEVICE_NEEDS_RESET`: the device cannot go on; set by the device only.
  @inlinable public static var needsReset: DeviceStatus { DeviceStatus(rawValue: 64) }
  /// `FAILED`: the driver gave up.
  @inlinable public static var failed: DeviceStatus { DeviceStatus(rawValue: 128) }
}

extension DeviceStatus: CustomStringConvertible {
  public var description: String {
    let names: [(DeviceStatus, String)] = [
      (.acknowledge, "ACKNOWLEDGE"), (.driver, "DRIVER"), (.featuresOK, "FEATURES_OK"), (.driverOK, "DRIVER_OK"),
      (.suspend, "SUSPEND"), (.needsReset, "NEEDS_RESET"), (.failed, "FAILED"),
    ]
    let present = names.filter { contains($0.0) }.map(\.1)
    return present.isEmpty ? "RESET" : present.joined(separator: "|")
  }
}
