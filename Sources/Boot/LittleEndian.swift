// Building and reading little-endian bytes. Everything here works on arrays of our own, never on guest memory.

extension [UInt8] {
  mutating func append(u16 value: UInt16) {
    append(UInt8(truncatingIfNeeded: value))
    append(UInt8(truncatingIfNeeded: value >> 8))
  }

  mutating func append(u32 value: UInt32) {
    append(u16: UInt16(truncatingIfNeeded: value))
    append(u16: UInt16(truncatingIfNeeded: value >> 16))
  }

  mutating func append(u64 value: UInt64) {
    append(u32: UInt32(truncatingIfNeeded: value))
    append(u32: UInt32(truncatingIfNeeded: value >> 32))
  }

  mutating func store(u16 value: UInt16, at offset: Int) {
    self[offset] = UInt8(truncatingIfNeeded: value)
    self[offset + 1] = UInt8(truncatingIfNeeded: value >> 8)
  }

  mutating func store(u32 value: UInt32, at offset: Int) {
    store(u16: UInt16(truncatingIfNeeded: value), at: offset)
    store(u16: UInt16(truncatingIfNeeded: value >> 16), at: offset + 2)
  }

  mutating func store(u64 value: UInt64, at offset: Int) {
    store(u32: UInt32(truncatingIfNeeded: value), at: offset)
    store(u32: UInt32(truncatingIfNeeded: value >> 32), at: offset + 4)
  }

  func u16(at offset: Int) -> UInt16 {
    UInt16(self[offset]) | UInt16(self[offset + 1]) << 8
  }

  func u32(at offset: Int) -> UInt32 {
    UInt32(u16(at: offset)) | UInt32(u16(at: offset + 2)) << 16
  }

  func u64(at offset: Int) -> UInt64 {
    UInt64(u32(at: offset)) | UInt64(u32(at: offset + 4)) << 32
  }
}
