// Resource descriptors for `_CRS` (ACPI specification 6.5, section 6.4).

extension AML {
  /// `_CRS` with these descriptors and the end tag.
  static func currentResources(_ descriptors: [[UInt8]]) -> Term {
    name("_CRS", buffer(descriptors.flatMap { $0 } + [0x79, 0x00]))
  }

  /// Ports decoded with 16 bits.
  static func ports(_ first: UInt16, count: UInt8) -> [UInt8] {
    var bytes: [UInt8] = [0x47, 0x01]
    bytes.append(u16: first)
    bytes.append(u16: first)
    return bytes + [0x01, count]
  }

  enum Trigger {
    case edge
    case level
  }

  /// An extended interrupt, active high, exclusive, consumed by the device.
  static func interrupt(_ gsi: UInt32, _ trigger: Trigger) -> [UInt8] {
    var bytes: [UInt8] = [0x89, 0x06, 0x00, trigger == .edge ? 0x03 : 0x01, 0x01]
    bytes.append(u32: gsi)
    return bytes
  }

  static func memory32Fixed(_ range: Range<UInt64>) -> [UInt8] {
    var bytes: [UInt8] = [0x86, 0x09, 0x00, 0x01]
    bytes.append(u32: UInt32(range.lowerBound))
    bytes.append(u32: UInt32(range.upperBound - range.lowerBound))
    return bytes
  }

  /// Resource types of the address space descriptors.
  private enum Space: UInt8 {
    case memory = 0
    case port = 1
    case bus = 2
  }

  /// Produced by a bridge, both ends fixed.
  private static let producer: UInt8 = 0x0C

  static func busRange(_ first: UInt16, through last: UInt16) -> [UInt8] {
    word(.bus, flags: 0, first, last)
  }

  static func portWindow(_ first: UInt16, through last: UInt16) -> [UInt8] {
    word(.port, flags: 0x03, first, last)
  }

  private static func word(_ space: Space, flags: UInt8, _ first: UInt16, _ last: UInt16) -> [UInt8] {
    var bytes: [UInt8] = [0x88, 0x0D, 0x00, space.rawValue, producer, flags]
    for value in [0, first, last, 0, last - first + 1] { bytes.append(u16: value) }
    return bytes
  }

  static func memoryWindow32(_ range: Range<UInt64>) -> [UInt8] {
    var bytes: [UInt8] = [0x87, 0x17, 0x00, Space.memory.rawValue, producer, 0x01]
    for value in [0, range.lowerBound, range.upperBound - 1, 0, range.upperBound - range.lowerBound] {
      bytes.append(u32: UInt32(value))
    }
    return bytes
  }

  static func memoryWindow64(_ range: Range<UInt64>) -> [UInt8] {
    var bytes: [UInt8] = [0x8A, 0x2B, 0x00, Space.memory.rawValue, producer, 0x01]
    for value in [0, range.lowerBound, range.upperBound - 1, 0, range.upperBound - range.lowerBound] {
      bytes.append(u64: value)
    }
    return bytes
  }
}
