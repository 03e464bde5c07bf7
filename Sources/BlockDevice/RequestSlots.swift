import DiskImage
import Glibc
import HostSystem
import VirtioQueue
import VirtioSpec

/// One request in flight.
@safe
struct RequestSlot {
  var token: ChainToken?
  /// Where the status byte goes, in guest memory.
  var status: UnsafeMutablePointer<UInt8>?
  /// Bytes a read puts before the status byte; 0 for anything else.
  var readByteCount: UInt32 = 0
  var writeByteCount: UInt32 = 0
  /// The data in one piece, the usual case.
  var piece = unsafe iovec()
  /// The block of `VectorPool` that holds the data's pieces; negative: `piece` does.
  var block: Int32 = -1
  /// Ranges still to be done, in the slot's part of the range store, and what is done with them.
  var nextRange: UInt16 = 0
  var rangeCount: UInt16 = 0
  var rangeKind = RangeKind.discard
  var kind = QueueStatistics.Histogram.others
  /// When it was taken, in nanoseconds.
  var begun: UInt64 = 0

  init() { unsafe status = nil }
}

/// Arrays of iovecs for requests with many pieces, made once and handed out again last in, first out: memory is only
/// touched for as many requests as were in flight at once.
@safe
struct VectorPool: ~Copyable {
  /// What one call to the kernel takes (`IOV_MAX`).
  static let vectorsPerBlock = 1024

  private let memory: MemoryMapping
  private let free: UnsafeMutablePointer<Int32>
  private var freeCount: Int

  init(blockCount: Int) throws(SystemError) {
    memory = try MemoryMapping.anonymous(byteCount: blockCount * Self.vectorsPerBlock * (unsafe MemoryLayout<iovec>.stride))
    unsafe free = .allocate(capacity: blockCount)
    for block in 0..<blockCount { unsafe (free + block).initialize(to: Int32(blockCount - 1 - block)) }
    freeCount = blockCount
  }

  deinit { unsafe free.deallocate() }

  /// A block of `vectorsPerBlock`. There is one for every slot.
  mutating func take() -> Int32 {
    precondition(freeCount > 0, "There is a block for every request.")
    freeCount -= 1
    return unsafe free[freeCount]
  }

  mutating func giveBack(_ block: Int32) {
    unsafe free[freeCount] = block
    freeCount += 1
  }

  /// The block's vectors; they stay where they are.
  @unsafe
  func vectors(_ block: Int32) -> UnsafeMutablePointer<iovec> {
    // SAFETY: block < blockCount, as handed out by `take`.
    unsafe memory.baseAddress.assumingMemoryBound(to: iovec.self) + Int(block) * Self.vectorsPerBlock
  }
}
