import CLinux
import Glibc
import HostSystem

/// How far the request of one slot has come: the same bookkeeping for every engine. A request is one or more steps, and a
/// read or write step is repeated until all bytes have moved.
@safe
struct TransferState {
  enum Step: Equatable {
    case transfer
    case sync
    case allocate(mode: CInt)
    /// An `ioctl` of a block device that takes a range.
    case control(UInt)
  }

  /// After this many interrupted or refused attempts in a row something is wrong with the storage, not with the moment.
  static let retryLimit = 64
  static let bounceByteCount = 256 << 10

  var request = StorageRequest(.flush)
  var step = Step.sync
  /// Pieces still to be moved.
  var vectors: UnsafeMutablePointer<iovec>?
  var vectorCount = 0
  var offset: UInt64 = 0
  var remaining: UInt64 = 0
  var retries = 0
  /// The sync that is under way, or is to begin, is this slot's own.
  var leadsSync = false
  /// Memory that satisfies `O_DIRECT`, for a transfer whose own does not.
  var bounce: UnsafeMutableRawPointer?

  init() { unsafe vectors = nil; unsafe bounce = nil }

  /// Takes a request; the outcome if there is nothing to do for the kernel.
  mutating func begin(_ request: StorageRequest, _ image: DiskImage) -> StorageOutcome? {
    self.request = request
    retries = 0
    leadsSync = false
    offset = request.offset
    remaining = request.byteCount
    unsafe vectors = request.vectors
    vectorCount = request.vectorCount
    // The range lies inside the disk, whose size fits 63 bits.
    if !image.end.allows(offset &+ remaining) { return .failed(.inputOutput) }
    switch request.operation {
    case .read, .write:
      guard remaining > 0 else { return .done }
      step = .transfer
      if image.isDirect { return prepareDirect(image) }
    case .flush:
      step = .sync
      if image.hasFailedSync { return .failed(.inputOutput) }
    case .discard:
      guard image.canPunchHoles else { return .failed(.notSupported) }
      step = .allocate(mode: FallocateMode.punchHole)
    case .secureErase:
      guard image.canSecureErase else { return .failed(.notSupported) }
      step = .control(DeviceControl.secureErase)
    case .zero, .zeroAndUnmap:
      guard image.canWriteZeroes else { return .failed(.notSupported) }
      let makesHole = image.canPunchHoles && (request.operation == .zeroAndUnmap || !image.zeroesRanges)
      step = .allocate(mode: makesHole ? FallocateMode.punchHole : FallocateMode.zeroRange)
    }
    return nil
  }

  enum Next: Equatable {
    /// Do `step` (again).
    case again
    case finished(StorageOutcome)
  }

  /// Takes the kernel's answer to the current step.
  mutating func advance(_ result: Int, _ image: DiskImage) -> Next {
    if result < 0 { return failed(Errno(CInt(-result)), image) }
    switch step {
    case .transfer: return moved(result, image)
    // What an earlier sync failed for may be what this one was asked to make stable.
    case .sync: return finish(image.hasFailedSync ? .failed(.inputOutput) : .done)
    case .allocate, .control:
      // A file system without zeroing of its own: the range is given back and then given storage again.
      if request.operation == .zero, step == .allocate(mode: FallocateMode.punchHole), image.allocatesRanges {
        step = .allocate(mode: FallocateMode.keepSize)
        return .again
      }
      return moveOn(image)
    }
  }

  /// The data is where it belongs; what is to be stable needs a sync, which is one for all (`SyncGate`). A write that the kernel makes
  /// stable by itself (`RWF_DSYNC`) would be told of another's loss in place of the other's flush.
  private mutating func moveOn(_ image: DiskImage) -> Next {
    guard request.isDurable else { return finish(.done) }
    if image.hasFailedSync { return finish(.failed(.inputOutput)) }
    step = .sync
    return .again
  }

  private mutating func failed(_ error: Errno, _ image: DiskImage) -> Next {
    if error == .interrupted || error == .again, retries < Self.retryLimit {
      retries += 1
      return .again
    }
    // What looked aligned was not enough for this storage.
    if error == .invalid, step == .transfer, image.isDirect, unsafe bounce == nil, startBouncing() { return .again }
    // A device that forgets ranges but cannot say that they are zero then.
    if error == .notSupported, step == .allocate(mode: FallocateMode.punchHole), let other = image.insteadOfHole(request.operation) {
      step = other
      return .again
    }
    if error == .notSupported, request.operation == .zero {
      if let other = image.insteadOfZeroing(step) {
        step = other
        return .again
      }
      if step == .allocate(mode: FallocateMode.keepSize) {
        image.noteNoAllocation()
        return moveOn(image)
      }
    }
    if step == .sync { image.noteFailedSync(error) }
    return finish(.failed(error))
  }

  private mutating func moved(_ count: Int, _ image: DiskImage) -> Next {
    // The end of the file where there was more: the image was truncated under us. Never zeros instead of an error.
    guard count > 0 else { return finish(.failed(request.operation == .read ? .inputOutput : .noSpace)) }
    retries = 0
    let moved = min(UInt64(count), remaining)
    if unsafe bounce != nil, request.operation == .read { copyFromBounce(Int(moved)) } else { skip(Int(moved)) }
    offset += moved
    remaining -= moved
    if remaining > 0 {
      if unsafe bounce != nil, request.operation == .write { copyToBounce() }
      return .again
    }
    return request.operation == .write ? moveOn(image) : finish(.done)
  }

  private mutating func finish(_ outcome: StorageOutcome) -> Next {
    if let memory = unsafe bounce { unsafe free(memory) }
    unsafe bounce = nil
    return .finished(outcome)
  }

  /// Not begun after all, because the file has been cut off.
  mutating func giveUp() -> StorageOutcome {
    _ = finish(.failed(.inputOutput))
    return .failed(.inputOutput)
  }

  /// What the request has come to, after the file has been looked at (by this, if it `looks`) where that matters. From then on the slot
  /// has no write under way.
  @inline(__always)
  func settled(_ outcome: StorageOutcome, _ image: DiskImage, looks: Bool, _ ends: WriteEnds?, _ slot: Int) -> StorageOutcome {
    defer { if request.operation == .write { ends?.note(0, slot) } }
    guard outcome == .done, image.canLoseItsEnd, dependsOnEnd else { return outcome }
    if looks { image.lookAtEnd() }
    return image.end.allows(request.offset &+ request.byteCount) ? outcome : .failed(.inputOutput)
  }

  /// Whether the answer to what has just been done depends on the file being as long as the disk: a write may have made it longer,
  /// and zeros may be what a file reads as where nothing was written.
  @inline(__always)
  var dependsOnEnd: Bool {
    switch request.operation {
    case .write: true
    case .read:
      unsafe request.vectorCount != 1 || request.byteCount > 1 << 20 || request.vectors.map { unsafe showsZeros($0.pointee) } ?? true
    default: false
    }
  }

  /// Whether the piece's last byte in any page of the image is zero. A guest that changes it meanwhile deceives itself.
  @inline(__always)
  private func showsZeros(_ piece: iovec) -> Bool {
    // Moved along, because it came back short.
    guard unsafe UInt64(piece.iov_len) == request.byteCount else { return true }
    return unsafe !CachedReader.showsNoEnd(piece, request.offset)
  }

  // MARK: Pieces

  /// Bytes and memory of the next transfer, when it is in one piece.
  var nextPiece: (base: UnsafeMutableRawPointer, byteCount: Int)? {
    if let memory = unsafe bounce { return unsafe (memory, min(Int(clamping: remaining), Self.bounceByteCount)) }
    guard vectorCount == 1, let vector = unsafe vectors, let base = unsafe vector.pointee.iov_base else { return nil }
    // More than the kernel moves in one call comes back short and goes on.
    return unsafe (base, min(vector.pointee.iov_len, 0x7FFF_F000))
  }

  /// Moves the pieces along by what was transferred. Bounded by the number of pieces.
  private mutating func skip(_ byteCount: Int) {
    var rest = byteCount
    while rest > 0, vectorCount > 0, let vector = unsafe vectors {
      // SAFETY: `vectors` points to `vectorCount` pieces of the requester's, which live until completion.
      let length = unsafe vector.pointee.iov_len
      if rest < length {
        unsafe vector.pointee.iov_base = vector.pointee.iov_base.map { unsafe $0 + rest }
        unsafe vector.pointee.iov_len = length - rest
        return
      }
      rest -= length
      unsafe vectors = vector + 1
      vectorCount -= 1
    }
  }

  // MARK: Direct access

  private mutating func prepareDirect(_ image: DiskImage) -> StorageOutcome? {
    let unit = UInt64(image.logicalBlockSize)
    // Part of a block would be a read, a change and a write, which two queues could do at the same time.
    guard offset % unit == 0, remaining % unit == 0 else { return .failed(.invalid) }
    var isAligned = true
    for index in 0..<vectorCount {
      guard let vector = unsafe vectors else { break }
      let piece = unsafe vector[index]
      if UInt(bitPattern: unsafe piece.iov_base) % 512 != 0 || (unsafe piece.iov_len) % image.logicalBlockSize != 0 { isAligned = false }
    }
    if !isAligned, !startBouncing() { return .failed(.noMemory) }
    return nil
  }

  private mutating func startBouncing() -> Bool {
    var memory: UnsafeMutableRawPointer?
    // SAFETY: `memory` is ours; on success it is freed by `finish`.
    guard unsafe posix_memalign(&memory, 4096, Self.bounceByteCount) == 0, unsafe memory != nil else { return false }
    unsafe bounce = memory
    if request.operation == .write { copyToBounce() }
    return true
  }

  /// Gathers the next bytes of the pieces; they are moved along only when they were transferred.
  private func copyToBounce() {
    guard var target = unsafe bounce, let pieces = unsafe vectors else { return }
    var rest = min(Int(clamping: remaining), Self.bounceByteCount)
    for index in 0..<vectorCount where rest > 0 {
      // SAFETY: as in `skip`; at most `bounceByteCount` bytes are copied.
      let piece = unsafe pieces[index]
      let length = min(rest, unsafe piece.iov_len)
      if let base = unsafe piece.iov_base { unsafe target.copyMemory(from: base, byteCount: length) }
      unsafe target += length
      rest -= length
    }
  }

  private mutating func copyFromBounce(_ byteCount: Int) {
    guard var source = unsafe bounce else { return }
    var rest = byteCount
    while rest > 0, vectorCount > 0, let vector = unsafe vectors {
      // SAFETY: as above.
      let length = min(rest, unsafe vector.pointee.iov_len)
      if let base = unsafe vector.pointee.iov_base { unsafe base.copyMemory(from: source, byteCount: length) }
      unsafe source += length
      rest -= length
      skip(length)
    }
  }
}
