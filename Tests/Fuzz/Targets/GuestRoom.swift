import CFuzz
import Glibc
import HostSystem
import VMMemory
import VirtioQueue
import VirtioSpec

/// Guest memory for a target, made once: three regions, two of which touch for the guest and lie apart for the host. Each has a
/// poisoned page before and behind it, so that any access of ours outside a region is a finding.
struct GuestRoom: @unchecked Sendable {
  static let first: UInt64 = 0x1_0000
  static let border: UInt64 = 0x1_8000
  /// From `buffers` on there is room for 64 of the longest buffers that a target offers, so that none lies over another.
  static let end: UInt64 = 0x3_0000
  static let far: UInt64 = 0x1_0000_0000
  static let farEnd: UInt64 = 0x1_0000_2000
  static let ring: UInt64 = first
  /// Behind any ring of up to 64 entries.
  static let tables: UInt64 = first + 0x2000
  static let buffers: UInt64 = first + 0x4000

  private struct Piece {
    let guest: UInt64
    let base: UnsafeMutableRawPointer
    let count: Int
  }

  let memory: GuestMemory
  private let pieces: [Piece]

  init() {
    var pieces: [Piece] = []
    var regions: [MemoryRegion] = []
    for (start, end) in [(Self.first, Self.border), (Self.border, Self.end), (Self.far, Self.farEnd)] {
      let count = Int(end - start)
      let mapping = sure { try MemoryMapping.anonymous(byteCount: count + 8192) }
      cfuzz_poison(mapping.baseAddress, 4096)
      cfuzz_poison(mapping.baseAddress + 4096 + count, 4096)
      regions.append(
        sure {
          try MemoryRegion(
            guestAddress: GuestAddress(start), byteCount: UInt64(count), frontEndAddress: 0x7F00_0000_0000 + start, fileOffset: 0,
            mapping: mapping, mappingOffset: 4096)
        })
      pieces.append(Piece(guest: start, base: mapping.baseAddress + 4096, count: count))
    }
    memory = sure { try GuestMemory(regions: regions) }
    self.pieces = pieces
  }

  func clear() { for piece in pieces { memset(piece.base, 0, piece.count) } }

  /// Whether host memory belongs wholly to one region.
  func contains(_ base: UnsafeMutableRawPointer?, _ count: Int) -> Bool {
    guard let base else { return false }
    return pieces.contains { base >= $0.base && count <= $0.count && base - $0.base <= $0.count - count }
  }

  /// Every piece lent by a chain must be guest memory, in the order and number it says.
  func check(_ chain: borrowing DescriptorChain) {
    var readable = 0
    var writable = 0
    for piece in chain.readable {
      demand(piece.iov_len > 0 && contains(piece.iov_base, piece.iov_len), "a readable piece is not guest memory")
      readable += piece.iov_len
    }
    for piece in chain.writable {
      demand(piece.iov_len > 0 && contains(piece.iov_base, piece.iov_len), "a writable piece is not guest memory")
      writable += piece.iov_len
    }
    demand(readable == chain.readableByteCount && writable == chain.writableByteCount, "a chain miscounts its bytes")
    demand((readable + writable) >> 32 == 0, "a chain has 4 GiB")
  }

  /// An address that is memory, or at its edge, or anything.
  static func address(_ script: inout Script) -> UInt64 {
    switch script.byte() & 15 {
    case 0...8: buffers + UInt64(script.below(0x3000))
    case 9: border &- UInt64(script.below(64))
    case 10: end &- UInt64(script.below(64))
    case 11: far + UInt64(script.below(0x2000))
    case 12: farEnd &- UInt64(script.below(64))
    case 13: first + UInt64(script.below(0x4000))
    case 14: first &- UInt64(script.below(64))
    default: script.number()
    }
  }

  static func length(_ script: inout Script) -> UInt32 {
    switch script.byte() & 7 {
    case 0...3: UInt32(script.byte()) + 1
    case 4: UInt32(script.u16() & 0x1FFF)
    case 5: 512 * UInt32(script.byte() & 7)
    case 6: 0
    default: UInt32(truncatingIfNeeded: script.number())
    }
  }

  /// Any bytes anywhere in guest memory.
  func scribble(_ script: inout Script) {
    let place = GuestAddress(Self.ring + UInt64(script.below(0x3000)))
    switch script.byte() & 3 {
    case 0: _ = memory.store(script.byte(), at: place)
    case 1: _ = memory.store(script.u16(), at: place)
    case 2: _ = memory.store(script.u32(), at: place)
    default: _ = memory.copyIn(script.take(Int(script.byte() & 31)), at: place)
    }
  }
}
