import Glibc

/// How worn a disk says it is, in the terms that eMMC, UFS and virtio share: three small numbers, 0 for "not said".
public struct StorageLifetime: Equatable, Sendable {
  /// Reserved blocks: 1 normal, 2 warning, 3 urgent.
  public var endOfLife: UInt16
  /// Life used of the two kinds of memory, in tenths rounded up: 1 to 10, 11 beyond.
  public var typeA: UInt16
  public var typeB: UInt16

  public init(endOfLife: UInt16, typeA: UInt16, typeB: UInt16) {
    self.endOfLife = endOfLife
    self.typeA = typeA
    self.typeB = typeB
  }

  /// `EOL,A,B`, each 0 to 65535.
  public init?(_ text: String) {
    let numbers = text.split(separator: ",", omittingEmptySubsequences: false).map { UInt16($0) }
    guard numbers.count == 3, let first = numbers[0], let second = numbers[1], let third = numbers[2] else { return nil }
    self.init(endOfLife: first, typeA: second, typeB: third)
  }

  public var text: String { "\(endOfLife),\(typeA),\(typeB)" }

  /// What the kernel knows of a block device or of the disk that a partition lies on; nil where the disk does not say.
  /// - Parameter root: where `/sys` is.
  public static func read(of file: FileStatus, root: String = "/sys") -> StorageLifetime? {
    guard file.kind == .blockDevice else { return nil }
    let number = file.specialDevice
    let major = (number >> 8) & 0xFFF
    let minor = (number & 0xFF) | ((number >> 12) & 0xFFF00)
    let device = "\(root)/dev/block/\(major):\(minor)"
    for disk in [device, device + "/.."] {
      // eMMC: both kinds in one file.
      if let life = numbers(disk + "/device/life_time"), life.count == 2 {
        return StorageLifetime(
          endOfLife: numbers(disk + "/device/pre_eol_info")?.first ?? 0, typeA: life[0], typeB: life[1])
      }
      // UFS: at the controller, three levels above the disk.
      let health = disk + "/device/../../../health_descriptor"
      if let first = numbers(health + "/life_time_estimation_a")?.first, let second = numbers(health + "/life_time_estimation_b")?.first {
        return StorageLifetime(endOfLife: numbers(health + "/eol_info")?.first ?? 0, typeA: first, typeB: second)
      }
    }
    return nil
  }

  /// Hexadecimal numbers with blanks between them.
  private static func numbers(_ path: String) -> [UInt16]? {
    guard let fd = try? OwnedFD.open(path, O_RDONLY), let bytes = try? fd.readToEnd(limit: 64) else { return nil }
    var found: [UInt16] = []
    for word in String(decoding: bytes, as: UTF8.self).split(whereSeparator: { $0 == " " || $0 == "\n" }) {
      guard word.hasPrefix("0x"), let number = UInt16(word.dropFirst(2), radix: 16) else { return nil }
      found.append(number)
    }
    return found.isEmpty ? nil : found
  }
}
