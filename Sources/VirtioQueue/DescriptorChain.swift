import CLinux
import Glibc
import VMMemory
import VirtioSpec

/// Names a chain from the moment it is taken from the ring until it is used. Its head is below the size of the queue and
/// unique among the chains in flight, so it can index a fixed array of requests.
public struct ChainToken: Hashable, Sendable {
  /// Index of the first descriptor, or the buffer id of a packed ring.
  public let head: UInt16
  /// Ring entries the chain takes up in a packed ring; 1 in a split ring.
  @usableFromInline let entryCount: UInt16

  @inlinable
  init(head: UInt16, entryCount: UInt16) {
    self.head = head
    self.entryCount = entryCount
  }
}

/// The buffers of one chain as host memory: room that is made once and filled again by every `Virtqueue.next`.
///
/// First come the pieces the device reads, then those it writes; a buffer that crosses memory regions is several pieces.
/// The pieces point into guest memory, which may change at any time: take requests out by copy (`takeReadable`), hand
/// data to the kernel as iovecs, and never look at the same bytes twice. They are valid as long as the queue's memory.
@safe
public struct DescriptorChain: ~Copyable, @unchecked Sendable {
  // @unchecked: the storage has this one owner.

  @usableFromInline let segments: UnsafeMutablePointer<iovec>
  @usableFromInline let capacity: Int
  @usableFromInline var readableStart = 0
  @usableFromInline var readableEnd = 0
  @usableFromInline var writableStart = 0
  @usableFromInline var writableEnd = 0
  @usableFromInline var readableCount = 0
  @usableFromInline var writableCount = 0
  @usableFromInline var storedToken = ChainToken(head: 0, entryCount: 1)
  /// Several processes have been killed with this chain in flight; it is to be answered with an error and not begun again.
  @usableFromInline var storedIsPoisoned = false
  @inlinable public var isPoisoned: Bool { storedIsPoisoned }

  /// Room for `capacity` pieces. A chain with more of them breaks the ring.
  public init(capacity: Int) {
    precondition(capacity > 0, "A chain has at least one piece")
    self.capacity = capacity
    // SAFETY: this structure owns the storage until deinit; an index is used only below `capacity`.
    unsafe segments = .allocate(capacity: capacity)
    unsafe segments.initialize(repeating: iovec(), count: capacity)
  }

  /// Room for every chain that the queue accepts, with a few pieces more for buffers that cross regions.
  public init(for queue: borrowing Virtqueue) {
    self.init(capacity: queue.greatestChainLength + 16)
  }

  deinit { unsafe segments.deallocate() }

  /// The chain to complete.
  @inlinable public var token: ChainToken { storedToken }
  /// Bytes for the device to read that have not been taken yet.
  @inlinable public var readableByteCount: Int { readableCount }
  /// Room for the device to write that has not been used up yet.
  @inlinable public var writableByteCount: Int { writableCount }

  /// The pieces for the device to read that have not been taken yet. Lent until the chain changes.
  @unsafe @inlinable public var readable: UnsafeMutableBufferPointer<iovec> {
    // SAFETY: 0 <= readableStart <= readableEnd <= capacity.
    unsafe UnsafeMutableBufferPointer(start: segments + readableStart, count: readableEnd - readableStart)
  }

  /// The pieces for the device to write that have not been used up yet. Lent until the chain changes.
  @unsafe @inlinable public var writable: UnsafeMutableBufferPointer<iovec> {
    // SAFETY: 0 <= writableStart <= writableEnd <= capacity.
    unsafe UnsafeMutableBufferPointer(start: segments + writableStart, count: writableEnd - writableStart)
  }

  // MARK: Filling, by the queue

  /// An empty chain to be filled. Nothing of it is in this structure before `finish`.
  @inlinable @inline(__always)
  func builder() -> ChainBuilder { unsafe ChainBuilder(segments: segments, capacity: capacity) }

  /// Takes what `QuickWalk` has put into `segments`; false if it has 2^32 bytes or more.
  @inlinable @inline(__always)
  mutating func finish(_ walk: QuickWalk, _ token: ChainToken) -> Bool {
    let border = walk.isWriting ? walk.readableEnd : walk.count
    let readableBytes = walk.isWriting ? walk.readableBytes : walk.bytes
    readableStart = 0
    readableEnd = border
    writableStart = border
    writableEnd = walk.count
    readableCount = readableBytes
    writableCount = walk.bytes &- readableBytes
    storedToken = token
    storedIsPoisoned = false
    return walk.bytes >> 32 == 0
  }

  @inlinable @inline(__always)
  mutating func finish(_ builder: ChainBuilder, _ token: ChainToken) {
    readableStart = 0
    readableEnd = builder.readableEnd
    writableStart = builder.readableEnd
    writableEnd = builder.count
    readableCount = builder.readableCount
    writableCount = builder.writableCount
    storedToken = token
    storedIsPoisoned = false
  }
}
