import Testing
import TestSupport
import VMMemory
import VirtioQueue
import VirtioSpec

@Suite("Bytes of a chain")
struct ChainBytesTests {
  private let place = GuestFixture.buffers

  /// A block request of 16 + 24 readable bytes cut into pieces in every way of two cuts, and its header taken out.
  @Test func headerMayBeCutAnywhere() throws {
    let bytes = (0..<40).map { UInt8($0 + 1) }
    for features in [split, packed] {
      for first in 1..<39 {
        for second in first..<40 {
          var pair = try QueuePair(size: 8, features)
          check(pair.memory.copyIn(bytes, at: GuestAddress(GuestFixture.border - 20)))
          let start = GuestFixture.border - 20
          var buffers = [readable(start, UInt32(first))]
          if second > first { buffers.append(readable(start + UInt64(first), UInt32(second - first))) }
          buffers.append(readable(start + UInt64(second), UInt32(40 - second)))
          _ = pair.offer(buffers)
          checkEqual(pair.next(), .chain)
          let header = try unwrap(pair.chain.takeReadable(BlockRequestHeader.self))
          checkEqual(header.type.rawValue, 0x0403_0201)
          checkEqual(header.sector, 0x100F_0E0D_0C0B_0A09)
          checkEqual(pair.chain.readableByteCount, 24)
          var rest = [UInt8](repeating: 0, count: 24)
          rest.withUnsafeMutableBytes { pair.chain.takeReadable(into: $0) }
          checkEqual(rest, Array(bytes[16...]))
          checkEqual(pair.chain.pieces(), [])
        }
      }
    }
  }

  @Test func tooShortAHeaderTakesNothing() throws {
    var pair = try QueuePair(size: 8, split)
    _ = pair.offer([readable(place, 8), readable(place, 7)])
    checkEqual(pair.next(), .chain)
    checkEqual(pair.chain.takeReadable(BlockRequestHeader.self), nil)
    checkEqual(pair.chain.readableByteCount, 15)
    checkEqual(pair.chain.takeReadable(UInt64.self), 0)
    checkEqual(pair.chain.readableByteCount, 7)
  }

  @Test func lastWritableByteIsTakenOffWhereverItLies() throws {
    for (lengths, left) in [([1], 0), ([512, 1], 512), ([512], 511), ([1, 1, 1], 2)] as [([UInt32], Int)] {
      var pair = try QueuePair(size: 8, split)
      _ = pair.offer(lengths.enumerated().map { writable(place + UInt64($0.offset * 1024), $0.element) })
      checkEqual(pair.next(), .chain)
      let expected = try unwrap(
        pair.memory.translate(
          GuestAddress(place + UInt64(1024 * (lengths.count - 1)) + UInt64(lengths[lengths.count - 1] - 1)), byteCount: 1))
      checkEqual(pair.chain.takeLastWritableByte(), expected)
      checkEqual(pair.chain.writableByteCount, left)
      checkEqual(pair.chain.pieces().reduce(0) { $0 + $1.count }, left)
    }
    var pair = try QueuePair(size: 8, split)
    _ = pair.offer([readable(place, 16)])
    checkEqual(pair.next(), .chain)
    checkEqual(pair.chain.takeLastWritableByte(), nil)
  }

  @Test func putFillsPiecesInTurnAndStopsAtTheEnd() throws {
    var pair = try QueuePair(size: 8, split)
    _ = pair.offer([writable(place, 3), writable(place + 100, 5), writable(place + 200, 4)])
    checkEqual(pair.next(), .chain)
    let bytes = (1...20).map { UInt8($0) }
    checkEqual(bytes.withUnsafeBytes { pair.chain.put(UnsafeRawBufferPointer(rebasing: $0[..<4])) }, 4)
    check(pair.chain.put(UInt32(0x0807_0605)))
    checkEqual(pair.chain.writableByteCount, 4)
    check(!pair.chain.put(UInt64(0)))
    checkEqual(bytes.withUnsafeBytes { pair.chain.put(UnsafeRawBufferPointer(rebasing: $0[8...])) }, 4)
    checkEqual(pair.chain.writableByteCount, 0)
    checkEqual(pair.memory.bytes(at: GuestAddress(place), count: 3), [1, 2, 3])
    checkEqual(pair.memory.bytes(at: GuestAddress(place + 100), count: 6), [4, 5, 6, 7, 8, 0])
    checkEqual(pair.memory.bytes(at: GuestAddress(place + 200), count: 5), [9, 10, 11, 12, 0])
  }

  @Test func droppingMovesAcrossPieces() throws {
    var pair = try QueuePair(size: 8, split)
    let buffers = [readable(place, 10), readable(place + 100, 10), writable(place + 200, 10), writable(place + 300, 10)]
    _ = pair.offer(buffers)
    checkEqual(pair.next(), .chain)
    pair.chain.dropReadable(13)
    pair.chain.dropWritable(10)
    checkEqual(pair.chain.pieces(), pair.memory.expectedPieces([readable(place + 103, 7), writable(place + 300, 10)]))
    pair.chain.dropReadable(100)
    pair.chain.dropWritable(100)
    checkEqual(pair.chain.pieces(), [])
    checkEqual(pair.chain.readableByteCount + pair.chain.writableByteCount, 0)
  }
}
