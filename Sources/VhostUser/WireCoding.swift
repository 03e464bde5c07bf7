/// Reads a payload whose size was checked when the reader was made; integers are in host byte order, which on the only
/// architecture we run on is little-endian.
struct WireReader {
  private let bytes: [UInt8]
  private var offset = 0

  /// The size is checked here once, so that the fields that follow cannot run out of bytes.
  init(_ bytes: some Collection<UInt8>, of what: String, exactly count: Int) throws(VhostUserError) {
    guard bytes.count == count else { throw .wrongSize(of: what, expected: count, actual: bytes.count) }
    self.bytes = Array(bytes)
  }

  mutating func u8() -> UInt8 { UInt8(integer(1)) }
  mutating func u16() -> UInt16 { UInt16(integer(2)) }
  mutating func u32() -> UInt32 { UInt32(integer(4)) }
  mutating func u64() -> UInt64 { integer(8) }

  /// Padding: its content is not looked at.
  mutating func skip(_ count: Int) {
    precondition(offset + count <= bytes.count, "A reader was made for fewer bytes than are read from it")
    offset += count
  }

  mutating func bytes(_ count: Int) -> [UInt8] {
    precondition(offset + count <= bytes.count, "A reader was made for fewer bytes than are read from it")
    defer { offset += count }
    return Array(bytes[offset..<offset + count])
  }

  private mutating func integer(_ count: Int) -> UInt64 {
    precondition(offset + count <= bytes.count, "A reader was made for fewer bytes than are read from it")
    var value: UInt64 = 0
    for index in 0..<count { value |= UInt64(bytes[offset + index]) << (8 * index) }
    offset += count
    return value
  }
}

/// Checks of what payloads say about ranges; each names the field that is wrong.
enum WireRange {
  /// A range of addresses must not wrap around.
  static func check(_ start: UInt64, _ size: UInt64, _ field: String) throws(VhostUserError) {
    guard !start.addingReportingOverflow(size).overflow else { throw .invalidValue(field: field, value: start) }
  }

  /// A range of a file: offsets are signed for the kernel.
  static func checkFile(_ offset: UInt64, _ size: UInt64, _ field: String) throws(VhostUserError) {
    let (end, overflow) = offset.addingReportingOverflow(size)
    guard !overflow, end <= UInt64(Int64.max) else { throw .invalidValue(field: field, value: offset) }
  }
}

/// Collects a payload.
struct WireWriter {
  var bytes: [UInt8] = []

  mutating func u8(_ value: UInt8) { bytes.append(value) }
  mutating func u16(_ value: UInt16) { integer(UInt64(value), 2) }
  mutating func u32(_ value: UInt32) { integer(UInt64(value), 4) }
  mutating func u64(_ value: UInt64) { integer(value, 8) }
  mutating func zeros(_ count: Int) { bytes.append(contentsOf: repeatElement(0, count: count)) }

  private mutating func integer(_ value: UInt64, _ count: Int) {
    for index in 0..<count { bytes.append(UInt8(truncatingIfNeeded: value >> (8 * index))) }
  }
}

/// A payload that always has the same size.
public protocol FixedPayload: Equatable, Sendable {
  /// Bytes on the wire, tail padding included.
  static var byteCount: Int { get }
  /// Fails on another size than `byteCount` and on values the field cannot hold by itself; what depends on the session
  /// (queue counts, negotiated features) is checked there.
  init(decoding bytes: some Collection<UInt8>) throws(VhostUserError)
  var encoded: [UInt8] { get }
}
