import Glibc
import VirtioQueue

/// Buffers taken from a receive queue and not used yet: chains in ring order, each with the pieces it consists of.
@safe
struct ReceiveWindow: ~Copyable {
  struct Entry {
    let token: ChainToken
    /// Bytes the chain can hold.
    let byteCount: Int
    /// Where its pieces lie in `pieces`.
    let firstPiece: Int
    let pieceCount: Int
  }

  /// Chains the window may hold: a frame of 64 KiB in buffers of 256 bytes.
  static let mostChains = 256
  /// Pieces of all of them; with header and spill not more than `IOV_MAX`.
  static let mostPieces = 1022

  private var entries: [Entry] = []
  private var first = 0
  private let pieces: UnsafeMutablePointer<iovec>
  private var pieceEnd = 0
  /// Bytes all chains of the window can hold.
  private(set) var byteCount = 0

  init() {
    entries.reserveCapacity(Self.mostChains)
    unsafe pieces = .allocate(capacity: Self.mostPieces)
    unsafe pieces.initialize(repeating: iovec(), count: Self.mostPieces)
  }

  deinit { unsafe pieces.deallocate() }

  var count: Int { entries.count - first }
  var isEmpty: Bool { count == 0 }

  subscript(index: Int) -> Entry { entries[first + index] }

  /// Puts a chain behind the others; false when there is no room for it here.
  mutating func append(_ chain: inout DescriptorChain) -> Bool {
    let source = unsafe chain.writable
    if isEmpty {
      entries.removeAll(keepingCapacity: true)
      first = 0
      pieceEnd = 0
    }
    guard entries.count < Self.mostChains, pieceEnd + source.count <= Self.mostPieces else { return false }
    // SAFETY: the room was just checked.
    if let base = source.baseAddress { unsafe (pieces + pieceEnd).update(from: base, count: source.count) }
    entries.append(
      Entry(token: chain.token, byteCount: chain.writableByteCount, firstPiece: pieceEnd, pieceCount: source.count))
    pieceEnd += source.count
    byteCount += chain.writableByteCount
    return true
  }

  /// Takes the oldest chain out.
  mutating func removeFirst() -> Entry {
    let entry = entries[first]
    first += 1
    byteCount -= entry.byteCount
    return entry
  }

  /// Takes the newest chain out: to give it back to the ring.
  mutating func removeLast() -> Entry? {
    guard !isEmpty else { return nil }
    let entry = entries.removeLast()
    byteCount -= entry.byteCount
    pieceEnd = entry.firstPiece
    return entry
  }

  /// Lists the window's room from `skipping` bytes on in `target`, which has room for all pieces; returns how many there are.
  @unsafe
  func list(skipping: Int, in target: UnsafeMutablePointer<iovec>) -> Int {
    guard first < entries.count else { return 0 }
    var left = skipping
    var done = 0
    for index in entries[first].firstPiece..<pieceEnd {
      // SAFETY: index < pieceEnd, and `target` has room for as many as `pieces`.
      var piece = unsafe pieces[index]
      if left > 0 {
        let skipped = unsafe min(left, piece.iov_len)
        left -= skipped
        unsafe piece.iov_base = unsafe piece.iov_base.map { unsafe $0 + skipped }
        unsafe piece.iov_len -= skipped
        if unsafe piece.iov_len == 0 { continue }
      }
      unsafe target[done] = piece
      done += 1
    }
    return done
  }

  /// Copies bytes into the window at `offset` bytes from its start; they must fit.
  @unsafe
  func copyIn(_ bytes: UnsafeRawBufferPointer, at offset: Int) {
    unsafe walk(offset, bytes.count) { host, done, length in
      // SAFETY: `walk` stays inside the pieces and inside `bytes`.
      if let source = bytes.baseAddress { unsafe host.copyMemory(from: source + done, byteCount: length) }
    }
  }

  /// Copies bytes out of the window; they must be there.
  @unsafe
  func copyOut(_ bytes: UnsafeMutableRawBufferPointer, from offset: Int) {
    unsafe walk(offset, bytes.count) { host, done, length in
      // SAFETY: as above.
      if let target = bytes.baseAddress { unsafe (target + done).copyMemory(from: host, byteCount: length) }
    }
  }

  private func walk(_ offset: Int, _ length: Int, _ body: (UnsafeMutableRawPointer, Int, Int) -> Void) {
    precondition(offset >= 0 && length >= 0 && offset + length <= byteCount, "A copy stays within the window")
    guard length > 0 else { return }
    var skip = offset
    var done = 0
    for index in entries[first].firstPiece..<pieceEnd where done < length {
      // SAFETY: index < pieceEnd.
      let pieceByteCount = unsafe pieces[index].iov_len
      if skip >= pieceByteCount {
        skip -= pieceByteCount
        continue
      }
      let count = min(pieceByteCount - skip, length - done)
      if let base = unsafe pieces[index].iov_base { unsafe body(base + skip, done, count) }
      skip = 0
      done += count
    }
  }
}
