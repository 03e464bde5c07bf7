import HostSystem
import VirtioSpec

/// Memory in which a queue records what it has taken and not answered yet, so that the next process to serve the ring can
/// go on where this one was killed (vhost-user, "Inflight I/O tracking"). Shared: it outlives the process that writes it,
/// and what is found in it is foreign.
@safe
public struct InflightRegion: @unchecked Sendable {
  // @unchecked: the address never changes; what lies behind it is shared memory and treated as such.
  let base: UnsafeMutableRawPointer
  let byteCount: Int
  /// Keeps the memory.
  let mapping: MemoryMapping

  /// The region of one queue in a mapping; nil unless it lies wholly inside, at a multiple of 64 bytes.
  public init?(_ mapping: MemoryMapping, offset: Int, byteCount: Int) {
    guard offset >= 0, byteCount > 0, offset % 64 == 0, byteCount <= mapping.byteCount, offset <= mapping.byteCount - byteCount,
      unsafe UInt(bitPattern: mapping.baseAddress) % 64 == 0
    else { return nil }
    self.mapping = mapping
    self.byteCount = byteCount
    // SAFETY: inside the mapping, which this structure keeps.
    unsafe base = mapping.baseAddress + offset
  }

  /// Bytes of the region of a queue of `size` entries, a multiple of 64: a header of 16 or 32 bytes, and as many for every
  /// entry.
  public static func byteCount(size: UInt16, packed: Bool) -> Int {
    let unit = packed ? 32 : 16
    return (unit * (Int(size) + 1) + 63) & ~63
  }

  /// One number at a time, each loaded once. Offsets are the layout's and checked against `byteCount` by whoever makes a
  /// recorder.
  func load16(_ offset: Int) -> UInt16 { unsafe clinuxLoad16(base + offset) }
  func load32(_ offset: Int) -> UInt32 { unsafe clinuxLoad32(base + offset) }
  func load64(_ offset: Int) -> UInt64 { unsafe clinuxLoad64(base + offset) }
}

/// Offsets, from the region's start or from that of an entry.
@usableFromInline
enum InflightLayout {
  @inlinable static var version: UInt16 { 1 }

  @inlinable static var versionOffset: Int { 8 }
  @inlinable static var sizeOffset: Int { 10 }

  /// 16 bytes of header, 16 an entry.
  @usableFromInline
  enum Split {
    @inlinable static var unit: Int { 16 }
    @inlinable static var lastBatchHead: Int { 12 }
    @inlinable static var usedIndex: Int { 14 }
    @inlinable static func entry(_ index: Int) -> Int { unit &+ unit &* index }
    /// In flight (one byte), and in its padding the number of replays (one byte of ours).
    @inlinable static var state: Int { 0 }
    @inlinable static var next: Int { 6 }
    @inlinable static var counter: Int { 8 }
  }

  /// 32 bytes of header, 32 an entry.
  @usableFromInline
  enum Packed {
    @inlinable static var unit: Int { 32 }
    /// The free list's head and, in the next two bytes, its committed value.
    @inlinable static var freeHead: Int { 12 }
    /// Used slot, committed used slot, used wrap counter, committed wrap counter: 2, 2, 1 and 1 byte.
    @inlinable static var used: Int { 16 }
    @inlinable static func entry(_ index: Int) -> Int { unit &+ unit &* index }
    @inlinable static var state: Int { 0 }
    @inlinable static var next: Int { 2 }
    /// Last entry and number of entries of a list, 2 bytes each, in its first entry.
    @inlinable static var extent: Int { 4 }
    @inlinable static var counter: Int { 8 }
    /// A copy of the descriptor: id, flags, length, address.
    @inlinable static var idFlagsLength: Int { 16 }
    @inlinable static var address: Int { 24 }
  }
}
