import CLinux
import HostSystem
import Synchronization

/// Watches that an image's file stays as long as the disk. A write behind the end of a file that somebody has cut off would make it
/// longer again, and zeros would be read where data was; so the file is looked at before writes are begun, and again before one is
/// answered, or a read that brought zeros.
final class FileEnd: Sendable {
  /// Requests have to end here; where the file is whole, nothing is in the way.
  private let limit = Atomic<UInt64>(.max)
  private let engines = Mutex<[WriteEnds]>([])

  var allowed: UInt64 { limit.load(ordering: .relaxed) }

  @inline(__always)
  func allows(_ end: UInt64) -> Bool { end <= allowed }

  func join(_ ends: WriteEnds) { engines.withLock { $0.append(ends) } }
  func leave(_ ends: WriteEnds) { engines.withLock { $0.removeAll { $0 === ends } } }

  /// The file has `found` bytes, fewer than `expected()`. True if that is news.
  func isShort(_ found: UInt64, _ expected: () -> UInt64) -> Bool {
    engines.withLock { engines in
      guard found < expected() else { return false }
      // A write that was under way when the file was cut off may have made it longer again, up to its own end. Where it was cut off
      // nobody knows then.
      let end = engines.contains { $0.contains(found) } ? 0 : found
      let before = limit.load(ordering: .relaxed)
      if end < before { limit.store(end, ordering: .relaxed) }
      return before == .max
    }
  }

  /// The file is taken as it is from now on: `accept` says how long it is.
  func reset<Failure: Error, Result>(_ accept: () throws(Failure) -> Result) throws(Failure) -> Result {
    try engines.withLock { _ throws(Failure) in
      let result = try accept()
      limit.store(.max, ordering: .relaxed)
      return result
    }
  }
}

/// Where an engine's writes end that are, or were last, under way: one number for each slot.
@safe
final class WriteEnds: @unchecked Sendable {
  // @unchecked: the memory is constant, and what it holds is atomic.
  private let ends: UnsafeMutablePointer<Atomic<UInt64>>
  private let depth: Int

  init(depth: Int) {
    self.depth = depth
    unsafe ends = .allocate(capacity: depth)
    for slot in 0..<depth { unsafe (ends + slot).initialize(to: Atomic(0)) }
  }

  deinit { unsafe ends.deallocate() }

  @inline(__always)
  func note(_ end: UInt64, _ slot: Int) {
    // SAFETY: whoever has a slot has checked that it is below the depth.
    unsafe ends[slot].store(end, ordering: .relaxed)
  }

  func contains(_ end: UInt64) -> Bool {
    for slot in 0..<depth where unsafe ends[slot].load(ordering: .relaxed) == end { return true }
    return false
  }
}
