import Glibc
import HostSystem

/// What is to be done with a range of an image.
package enum StorageOperation: UInt8, Sendable {
  case read, write
  /// Completed writes become stable.
  case flush
  /// The range's content is no longer needed; it may be given back.
  case discard
  /// The range reads as zeros and keeps its storage.
  case zero
  /// The range reads as zeros and may be given back.
  case zeroAndUnmap
  /// The range's content is destroyed, with all copies that the device keeps of it.
  case secureErase
}

/// One operation. The range lies inside the image: whoever makes it has checked that.
@safe
package struct StorageRequest {
  package var operation: StorageOperation
  /// Completion means stable.
  package var isDurable: Bool
  /// Bytes from the start of the image.
  package var offset: UInt64
  package var byteCount: UInt64
  /// The memory of a read or write, `byteCount` bytes in all, at most 1024 pieces. Pieces and memory live until
  /// completion; the engine moves the pieces along when a transfer comes back short.
  package var vectors: UnsafeMutablePointer<iovec>?
  package var vectorCount: Int

  @unsafe
  package init(
    _ operation: StorageOperation, offset: UInt64, byteCount: UInt64, vectors: UnsafeMutablePointer<iovec>?, vectorCount: Int,
    isDurable: Bool = false
  ) {
    self.operation = operation
    self.isDurable = isDurable
    self.offset = offset
    self.byteCount = byteCount
    unsafe self.vectors = vectors
    self.vectorCount = vectorCount
  }

  /// An operation without memory.
  package init(_ operation: StorageOperation, offset: UInt64 = 0, byteCount: UInt64 = 0, isDurable: Bool = false) {
    unsafe self.init(operation, offset: offset, byteCount: byteCount, vectors: nil, vectorCount: 0, isDurable: isDurable)
  }
}

package enum StorageOutcome: Equatable, Sendable {
  /// All of it.
  case done
  /// Not all of it; how much is not said.
  case failed(Errno)
}

/// What became of an attempt to copy a read.
package enum CopyOutcome: Equatable, Sendable {
  /// It is to be begun as any other.
  case no
  /// Done, if `wholeByteCount` says afterwards that the image still has as many bytes.
  case ifLongEnough
  case whole
}

/// What an engine reports.
package enum StorageEvent: Equatable, Sendable {
  case completed(slot: Int, StorageOutcome)
  /// A watched descriptor became readable.
  case readable(token: Int)
  /// The time of `wake` has come.
  case time
}

/// One thread's way to an image. Requests live in numbered slots, one each; a slot is free again when its completion was
/// taken. Nothing here allocates between `begin` and completion, save for a transfer that needs a bounce buffer.
package protocol StorageEngine: ~Copyable {
  /// Starts a request in a free slot. The outcome when it is already known, else nil, and an event will tell.
  mutating func begin(_ slot: Int, _ request: StorageRequest) -> StorageOutcome?
  /// Where the data of a read lies if it can be done by `copy`, as far as is known: an address to be asked for in advance, nothing else.
  func foresee(_ request: StorageRequest) -> UnsafeRawPointer?
  /// Does a read at once, if the host has the data cached and an engine has a way around the kernel.
  mutating func copy(_ request: StorageRequest) -> CopyOutcome
  /// Bytes of the disk that are in the image now, at least. One system call.
  var wholeByteCount: UInt64 { get }
  /// Reports `.time` once, when the time has come. One at a time: a later call has no effect until then.
  mutating func wake(at time: MonotonicTime)
  /// Watches a descriptor for being readable; reported at least once after it was watched if it is readable then, and at
  /// least once after every change to readable. Eventfds need not be read.
  mutating func watch(_ fd: CInt, token: Int)
  mutating func unwatch(_ fd: CInt, token: Int)
  /// Lets things happen: hands over what was begun and, if `waiting`, sleeps until there is an event. One system call.
  mutating func turn(waiting: Bool)
  mutating func nextEvent() -> StorageEvent?
  /// Whether something was begun that `turn` has still to hand over.
  var hasPrepared: Bool { get }
  /// Whether `nextEvent` has something, or `turn` would bring something without sleeping. Never a system call.
  var hasWork: Bool { get }
  /// Whether `hasWork` sees everything, so that looking can stand in for sleeping.
  var canBePolled: Bool { get }
}

extension StorageEngine where Self: ~Copyable {
  package func foresee(_ request: StorageRequest) -> UnsafeRawPointer? { nil }
  package mutating func copy(_ request: StorageRequest) -> CopyOutcome { .no }
  package var wholeByteCount: UInt64 { 0 }
}
