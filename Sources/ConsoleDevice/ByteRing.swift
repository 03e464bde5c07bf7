/// A bounded first-in-first-out buffer of bytes.
package struct ByteRing: ~Copyable {
  private var storage: [UInt8]
  private var start = 0
  package private(set) var count = 0

  package init(capacity: Int) {
    precondition(capacity > 0, "A byte ring holds at least one byte.")
    storage = [UInt8](repeating: 0, count: capacity)
  }

  package var capacity: Int { storage.count }
  package var freeCount: Int { storage.count - count }
  package var isEmpty: Bool { count == 0 }

  /// Appends as many bytes as fit; returns how many.
  package mutating func append(_ bytes: UnsafeRawBufferPointer) -> Int {
    let taken = min(bytes.count, freeCount)
    var done = 0
    // At most two pieces: up to the end of the storage, and from its beginning.
    while done < taken {
      let position = (start + count) % storage.count
      let piece = min(taken - done, storage.count - position)
      // SAFETY: `position + piece` lies within the storage, `done + piece` within `bytes`.
      unsafe storage.withUnsafeMutableBytes { all in
        unsafe UnsafeMutableRawBufferPointer(rebasing: all[position..<position + piece])
          .copyMemory(from: UnsafeRawBufferPointer(rebasing: bytes[done..<done + piece]))
      }
      done += piece
      count += piece
    }
    return taken
  }

  /// Appends all bytes and gives up the oldest for them; returns how many bytes were lost (old ones, or, of more bytes
  /// than the ring can hold, the first of `bytes`).
  package mutating func appendDroppingOldest(_ bytes: UnsafeRawBufferPointer) -> Int {
    let skipped = max(0, bytes.count - storage.count)
    let lost = max(0, bytes.count - skipped - freeCount)
    removeFirst(lost)
    // SAFETY: `skipped` is at most the count.
    _ = unsafe append(UnsafeRawBufferPointer(rebasing: bytes[skipped...]))
    return skipped + lost
  }

  /// Lends the oldest bytes that lie in one piece (all of them, or up to where the ring wraps).
  package borrowing func withOldest<R>(_ body: (UnsafeRawBufferPointer) -> R) -> R {
    let piece = min(count, storage.count - start)
    // SAFETY: `start + piece` lies within the storage, which is not changed meanwhile.
    return unsafe storage.withUnsafeBytes { all in
      unsafe body(UnsafeRawBufferPointer(rebasing: all[start..<start + piece]))
    }
  }

  /// Forgets the oldest bytes; at most `count`.
  package mutating func removeFirst(_ number: Int) {
    precondition(number >= 0 && number <= count, "Only bytes that are there can be removed.")
    start = (start + number) % storage.count
    count -= number
    if count == 0 { start = 0 }
  }

  /// Moves the oldest bytes into `target`; returns how many.
  package mutating func take(into target: UnsafeMutableRawBufferPointer) -> Int {
    var done = 0
    // At most two pieces, as in `append`.
    while done < target.count, count > 0 {
      let piece = unsafe withOldest { oldest in
        let length = min(oldest.count, target.count - done)
        // SAFETY: `done + length` lies within `target`, `length` within `oldest`.
        unsafe UnsafeMutableRawBufferPointer(rebasing: target[done..<done + length])
          .copyMemory(from: UnsafeRawBufferPointer(rebasing: oldest[..<length]))
        return length
      }
      removeFirst(piece)
      done += piece
    }
    return done
  }
}
