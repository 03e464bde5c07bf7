/// The kind of a virtio device (virtio 1.4, section 5): the "Device ID" of the specification.
public struct DeviceID: RawRepresentable, Hashable, Sendable {
  public let rawValue: UInt16

  @inlinable
  public init(rawValue: UInt16) { self.rawValue = rawValue }

  public static let net = DeviceID(rawValue: 1)
  public static let block = DeviceID(rawValue: 2)
  public static let console = DeviceID(rawValue: 3)
  public static let entropy = DeviceID(rawValue: 4)
  public static let balloon = DeviceID(rawValue: 5)
  public static let scsi = DeviceID(rawValue: 8)
  public static let plan9 = DeviceID(rawValue: 9)
  public static let gpu = DeviceID(rawValue: 16)
  public static let clock = DeviceID(rawValue: 17)
  public static let input = DeviceID(rawValue: 18)
  public static let vsock = DeviceID(rawValue: 19)
  public static let crypto = DeviceID(rawValue: 20)
  public static let iommu = DeviceID(rawValue: 23)
  public static let memory = DeviceID(rawValue: 24)
  public static let sound = DeviceID(rawValue: 25)
  public static let fileSystem = DeviceID(rawValue: 26)
  public static let persistentMemory = DeviceID(rawValue: 27)
  public static let i2c = DeviceID(rawValue: 34)
  public static let can = DeviceID(rawValue: 36)
  public static let gpio = DeviceID(rawValue: 41)

  /// Every device with a name here, and that name as people type and read it.
  public static let named: [(id: DeviceID, name: String)] = [
    (.net, "net"), (.block, "block"), (.console, "console"), (.entropy, "rng"), (.balloon, "balloon"),
    (.scsi, "scsi"), (.plan9, "9p"), (.gpu, "gpu"), (.clock, "rtc"), (.input, "input"), (.vsock, "vsock"),
    (.crypto, "crypto"), (.iommu, "iommu"), (.memory, "mem"), (.sound, "sound"), (.fileSystem, "fs"),
    (.persistentMemory, "pmem"), (.i2c, "i2c"), (.can, "can"), (.gpio, "gpio"),
  ]

  /// The greatest id that fits the PCI device ids reserved for virtio, 0x1040 to 0x107F.
  public static let greatest: UInt16 = 0x3F

  /// The name people use, or `nil` for an id without one.
  public var name: String? { Self.named.first { $0.id == self }?.name }

  /// A device by its name ("net", "block" or "blk", "fs", ...) or by its number in decimal or 0x form, 1 to 63.
  public init?(nameOrNumber text: String) {
    if let match = Self.named.first(where: { $0.name == text }) {
      self = match.id
      return
    }
    switch text {
    case "blk": self = .block
    case "entropy": self = .entropy
    default:
      let number = text.hasPrefix("0x") ? UInt16(text.dropFirst(2), radix: 16) : UInt16(text)
      guard let number, number >= 1, number <= Self.greatest else { return nil }
      self.init(rawValue: number)
    }
  }

  /// The PCI device id of a modern ("non-transitional") virtio function.
  @inlinable
  public var pciDeviceID: UInt16 { VirtioPCI.firstDeviceID &+ rawValue }

  /// PCI class code (class, subclass, programming interface; 24 bits) that this device shows. Virtio drivers ignore it.
  public var pciClassCode: UInt32 {
    switch self {
    case .net: 0x02_0000
    case .block: 0x01_8000
    case .scsi: 0x01_0000
    case .console: 0x07_8000
    case .gpu: 0x03_8000
    case .sound: 0x04_0100
    case .input: 0x09_8000
    case .fileSystem: 0x01_8000
    case .memory, .persistentMemory: 0x05_8000
    default: 0xFF_0000
    }
  }
}

extension DeviceID: CustomStringConvertible {
  public var description: String { name ?? "virtio-\(rawValue)" }
}
