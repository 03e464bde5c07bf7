import CLinux
import Glibc
import HostSystem

/// What an ELF file (elf(5)) says it needs before its first instruction: its loader and its libraries.
struct ProgramFile {
  private(set) var interpreter: String?
  private(set) var libraries: [String] = []
  private(set) var isELF = false
  /// Begins with `#!`.
  private(set) var isScript = false

  /// Reads headers only; a damaged file needs nothing here and is the loader's to refuse.
  init(path: String) throws(SystemError) {
    let fd = try OwnedFD.open(path, O_RDONLY)
    let head = Self.read(fd, 0, 64)
    isScript = head.starts(with: [0x23, 0x21])
    guard head.count == 64, head.starts(with: [0x7F, 0x45, 0x4C, 0x46, 2, 1]) else { return }
    isELF = true
    let count = Int(Self.number(head, 56, 2))
    guard Self.number(head, 54, 2) == 56, count <= 128 else { return }
    let table = Self.read(fd, Self.number(head, 32, 8), count * 56)
    guard table.count == count * 56 else { return }
    var loads: [(address: UInt64, offset: UInt64, size: UInt64)] = []
    var dynamic: (offset: UInt64, size: UInt64)?
    for index in 0..<count {
      let at = index * 56
      let offset = Self.number(table, at + 8, 8)
      let size = Self.number(table, at + 32, 8)
      switch Self.number(table, at, 4) {
      case 1: loads.append((Self.number(table, at + 16, 8), offset, size))  // PT_LOAD
      case 2: dynamic = (offset, size)  // PT_DYNAMIC
      case 3:  // PT_INTERP
        interpreter = String(decoding: Self.read(fd, offset, Int(min(size, 4096))).prefix { $0 != 0 }, as: UTF8.self)
      default: break
      }
    }
    guard let dynamic else { return }
    readLibraries(fd, Self.read(fd, dynamic.offset, Int(min(dynamic.size, 1 << 16))), loads)
  }

  private mutating func readLibraries(
    _ fd: borrowing OwnedFD, _ entries: [UInt8], _ loads: [(address: UInt64, offset: UInt64, size: UInt64)]
  ) {
    var names: [UInt64] = []
    var strings: UInt64 = 0
    for at in stride(from: 0, to: entries.count - 15, by: 16) {
      let value = Self.number(entries, at + 8, 8)
      switch Self.number(entries, at, 8) {
      case 1: names.append(value)  // DT_NEEDED
      case 5: strings = value  // DT_STRTAB
      default: break
      }
    }
    guard let load = loads.first(where: { $0.address <= strings && strings - $0.address < $0.size }) else { return }
    let (base, overflow) = load.offset.addingReportingOverflow(strings - load.address)
    guard !overflow else { return }
    for name in names.prefix(512) {
      let (at, overflow) = base.addingReportingOverflow(name)
      guard !overflow else { continue }
      let text = Self.read(fd, at, 256).prefix { $0 != 0 }
      if !text.isEmpty { libraries.append(String(decoding: text, as: UTF8.self)) }
    }
  }

  private static func read(_ fd: borrowing OwnedFD, _ offset: UInt64, _ count: Int) -> [UInt8] {
    guard let start = Int(exactly: offset), count > 0 else { return [] }
    var bytes = [UInt8](repeating: 0, count: count)
    let number = fd.rawValue
    // SAFETY: the array is lent for the call and has the given size.
    let got = unsafe bytes.withUnsafeMutableBytes { unsafe pread(number, $0.baseAddress, count, start) }
    return got > 0 ? Array(bytes[..<got]) : []
  }

  private static func number(_ bytes: [UInt8], _ at: Int, _ size: Int) -> UInt64 {
    var value: UInt64 = 0
    for index in (0..<size).reversed() { value = value << 8 | UInt64(bytes[at + index]) }
    return value
  }
}
