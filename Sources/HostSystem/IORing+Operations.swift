import CLinux
import Glibc

/// What a ring's entry works on.
@frozen public enum IOFile: Sendable {
  /// A descriptor of the process.
  case descriptor(CInt)
  /// An index into the files registered when the ring was made.
  case registered(UInt32)
}

/// How an entry ended.
@frozen public struct IOCompletion: Sendable {
  /// What the entry was given.
  public let userData: UInt64
  /// The call's result: bytes moved, poll bits, zero; or a negated errno.
  public let result: Int32
  /// `IORING_CQE_F_MORE`: the entry goes on and will complete again.
  public let hasMore: Bool

  @inlinable
  init(userData: UInt64, result: Int32, hasMore: Bool) {
    self.userData = userData
    self.result = result
    self.hasMore = hasMore
  }
}

extension IORing {
  /// Free submission slots.
  @inlinable
  public var freeSlots: Int {
    // The kernel consumes entries only inside `enter`, so its head is what the last `enter` left.
    // SAFETY: the head lies in the mapping owned by this ring.
    Int(submissionMask &+ 1 &- (submissionTail &- (unsafe clinux_load_acquire_u32(submissionHead))))
  }

  /// Prepares one entry; false when the queue is full (then `enter` first).
  @inlinable @inline(__always)
  mutating func prepare(
    _ operation: IOOperation, _ file: IOFile, offset: UInt64, address: UInt64, length: UInt32, flags: UInt32 = 0, userData: UInt64
  ) -> Bool {
    guard freeSlots > 0 else { return false }
    let number: Int32
    let entryFlags: UInt8
    switch file {
    case .descriptor(let descriptor):
      number = descriptor
      entryFlags = 0
    case .registered(let index):
      number = Int32(bitPattern: index)
      entryFlags = 1  // IOSQE_FIXED_FILE
    }
    // SAFETY: the masked index lies inside the entries' mapping, and the kernel reads no entry before `enter`.
    unsafe entries[Int(submissionTail & submissionMask)] = SubmissionEntry(
      operation: operation.rawValue, flags: entryFlags, file: number, offset: offset, address: address, length: length,
      operationFlags: flags, userData: userData)
    submissionTail &+= 1
    pending &+= 1
    return true
  }

  /// `IORING_OP_READ`: up to `byteCount` bytes at `offset` into `buffer`.
  @unsafe @inlinable @inline(__always)
  public mutating func prepareRead(
    _ file: IOFile, into buffer: UnsafeMutableRawPointer, byteCount: UInt32, offset: UInt64, userData: UInt64
  ) -> Bool {
    prepare(
      .read, file, offset: offset, address: UInt64(UInt(bitPattern: buffer)), length: byteCount, userData: userData)
  }

  /// `IORING_OP_WRITE`: `byteCount` bytes of `buffer` at `offset`.
  @unsafe @inlinable @inline(__always)
  public mutating func prepareWrite(
    _ file: IOFile, from buffer: UnsafeRawPointer, byteCount: UInt32, offset: UInt64, userData: UInt64
  ) -> Bool {
    prepare(
      .write, file, offset: offset, address: UInt64(UInt(bitPattern: buffer)), length: byteCount, userData: userData)
  }

  /// `IORING_OP_READV`: `count` iovecs (at most 1024), which must live until the completion was taken.
  @unsafe @inlinable @inline(__always)
  public mutating func prepareReadVectored(
    _ file: IOFile, into vectors: UnsafePointer<iovec>, count: Int, offset: UInt64, userData: UInt64
  ) -> Bool {
    prepare(
      .readVectored, file, offset: offset, address: UInt64(UInt(bitPattern: vectors)), length: UInt32(count), userData: userData)
  }

  /// `IORING_OP_WRITEV`, as the two above.
  @unsafe @inlinable @inline(__always)
  public mutating func prepareWriteVectored(
    _ file: IOFile, from vectors: UnsafePointer<iovec>, count: Int, offset: UInt64, userData: UInt64
  ) -> Bool {
    prepare(
      .writeVectored, file, offset: offset, address: UInt64(UInt(bitPattern: vectors)), length: UInt32(count),
      userData: userData)
  }

  /// `IORING_OP_FSYNC` with `IORING_FSYNC_DATASYNC`: `fdatasync(2)`.
  @inlinable
  public mutating func prepareDataSync(_ file: IOFile, userData: UInt64) -> Bool {
    prepare(.sync, file, offset: 0, address: 0, length: 0, flags: 1, userData: userData)
  }

  /// `IORING_OP_FALLOCATE` with the mode bits of `fallocate(2)`.
  @inlinable
  public mutating func prepareAllocate(_ file: IOFile, mode: UInt32, offset: UInt64, byteCount: UInt64, userData: UInt64) -> Bool {
    prepare(.allocate, file, offset: offset, address: byteCount, length: mode, userData: userData)
  }

  /// `IORING_OP_POLL_ADD`: completes with the ready bits; `repeating` keeps reporting, once per wake-up, while completions
  /// have `hasMore`. For an eventfd that is one completion per signal without its counter ever being read.
  @inlinable
  public mutating func preparePoll(_ file: IOFile, for readiness: Readiness, repeating: Bool, userData: UInt64) -> Bool {
    prepare(.poll, file, offset: 0, address: 0, length: repeating ? 1 : 0, flags: readiness.rawValue, userData: userData)
  }

  /// `IORING_OP_POLL_REMOVE`: ends the poll with that `userData`, which completes with `-ECANCELED` once more.
  @inlinable
  public mutating func preparePollRemove(_ target: UInt64, userData: UInt64) -> Bool {
    prepare(.pollRemove, .descriptor(-1), offset: 0, address: target, length: 0, userData: userData)
  }

  /// `IORING_OP_TIMEOUT`: completes with `-ETIME` at `deadline`, a time on `CLOCK_MONOTONIC` that lives until then.
  @inlinable
  public mutating func prepareTimeout(_ deadline: UnsafePointer<timespec>, userData: UInt64) -> Bool {
    prepare(
      .timeout, .descriptor(-1), offset: 0, address: UInt64(UInt(bitPattern: deadline)), length: 1, flags: 1,  // IORING_TIMEOUT_ABS
      userData: userData)
  }

  /// Hands over all prepared entries and runs completion work; sleeps until `completions` of them wait to be taken.
  /// Returns zero, or a negated errno: `-EINTR` and `-EBUSY`/`-EAGAIN` are to be answered by taking completions and
  /// entering again; the entries not taken stay prepared.
  @inlinable
  public mutating func enter(waitingFor completions: UInt32 = 0) -> Int32 {
    // SAFETY: the tail lies in the mapping owned by this ring. Release: pairs with the kernel's acquire of the tail.
    unsafe clinux_store_release_u32(submissionTailPointer, submissionTail)
    let result = clinux_io_uring_enter(fd.rawValue, pending, completions, 1)  // IORING_ENTER_GETEVENTS
    // How much was taken shows in the head even when the wait was interrupted.
    pending = submissionTail &- (unsafe clinux_load_acquire_u32(submissionHead))
    // SAFETY: tail and flags lie in mappings owned by this ring.
    unsafe flagsMisled =
      clinux_load_relaxed_u32(submissionFlags) & 4 != 0  // IORING_SQ_TASKRUN
      && completionHead == clinux_load_acquire_u32(completionTailPointer)
    return result < 0 ? result : 0
  }

  /// Flags that say there is something to enter for. The kernel sets TASKRUN after it has put the work in its place: if the work is
  /// done by then (it came from another processor), the flag stays until there is more, and entering for it brings nothing, again and again.
  @inlinable @inline(__always)
  var workFlags: UInt32 { flagsMisled ? 2 : 6 }  // IORING_SQ_CQ_OVERFLOW, IORING_SQ_TASKRUN

  /// Whether `enter` would do anything without waiting: entries prepared, completions the kernel holds back for want of
  /// room, or work of its that waits for us (seen with `Traits.showsTaskWork`).
  @inlinable
  public var needsEnter: Bool {
    pending > 0 || (unsafe clinux_load_relaxed_u32(submissionFlags)) & workFlags != 0
  }

  /// Entries prepared and not handed over yet.
  @inlinable public var hasPrepared: Bool { pending > 0 }

  /// Whether completions wait to be taken, or work that may bring some waits for `enter`. Never a system call; without
  /// `showsWork` the second half stays unseen.
  @inlinable @inline(__always)
  public var hasWork: Bool {
    // SAFETY: tail and flags lie in mappings owned by this ring.
    unsafe completionHead != clinux_load_acquire_u32(completionTailPointer) || clinux_load_relaxed_u32(submissionFlags) & workFlags != 0
  }

  /// Whether `hasWork` tells the whole truth: the kernel shows waiting work, and its flag means something now.
  @inlinable @inline(__always)
  public var showsWork: Bool { traits.showsTaskWork && !flagsMisled }

  /// Completions that wait to be taken. Never a system call.
  public var waitingCount: UInt32 { unsafe clinux_load_acquire_u32(completionTailPointer) &- completionHead }

  /// The next completion, or nil when none waits. Never a system call.
  @inlinable @inline(__always)
  public mutating func nextCompletion() -> IOCompletion? {
    // SAFETY: acquire pairs with the kernel's release of the tail; the masked index lies inside the mapping.
    let tail = unsafe clinux_load_acquire_u32(completionTailPointer)
    guard completionHead != tail else { return nil }
    let entry = unsafe completions + Int(completionHead & completionMask) * 16
    let completion = unsafe IOCompletion(
      userData: clinux_load_relaxed_u64(entry),
      result: Int32(bitPattern: clinux_load_relaxed_u32(entry + 8)),
      hasMore: clinux_load_relaxed_u32(entry + 12) & 2 != 0)  // IORING_CQE_F_MORE
    completionHead &+= 1
    // Release: the slot is read before the kernel may fill it again.
    unsafe clinux_store_release_u32(completionHeadPointer, completionHead)
    return completion
  }
}
