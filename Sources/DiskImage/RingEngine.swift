import CLinux
import Glibc
import HostSystem

/// Storage by io_uring: what was begun is handed over in one system call, which also reaps and sleeps. Watched descriptors
/// are polled inside the ring, so the same call waits for kicks. Made and used in one thread.
@safe
package struct RingEngine: StorageEngine, ~Copyable {
  private let image: DiskImage
  private let depth: Int
  private let slots: UnsafeMutablePointer<TransferState>
  private var ring: IORing
  /// Descriptors whose poll has ended and must begin anew, by token.
  private var watched: [(token: Int, fd: CInt)] = []
  private let cache: CachedReader?
  /// Does what the ring cannot; nil where there is no such thing.
  private let calls: CallPool?
  private let callThread: HostThread?
  private var called: [(slot: UInt16, outcome: StorageOutcome)] = []
  /// What `calls.done` is watched by.
  private static let callsToken = Int(UInt32.max)
  private let port: SyncPort
  /// What `port` is watched by.
  private static let portToken = Int(UInt32.max) - 1
  private let ends: WriteEnds?
  /// The file was looked at since the last time that something was handed over.
  private var hasLooked = false
  /// Completions that lay there when the file was last looked at, and still do.
  private var seenCount: UInt32 = 0
  /// When to wake; the kernel reads it when the ring is entered.
  private let deadline: UnsafeMutablePointer<timespec>
  private var isTimed = false

  /// What a completion belongs to, in the upper half of its user data.
  private enum Kind {
    static let request: UInt64 = 0
    static let watch: UInt64 = 1
    static let unwatch: UInt64 = 2
    static let time: UInt64 = 3
  }

  /// - Parameters:
  ///   - depth: slots.
  ///   - controlFDs: how many descriptors will be watched at most.
  /// - Throws: where io_uring cannot be had.
  package init(_ image: DiskImage, depth: Int, watchLimit: Int = 5) throws(SystemError) {
    // At most one entry per slot is prepared at a time, and two per watched descriptor: the queue never fills up.
    var configuration = IORing.Configuration(capacity: depth + 2 * watchLimit + 1)
    // The image is registered with the ring only when that is wanted: a dying ring gives registered files back only after a grace period
    // of RCU and by way of kernel workers, 20 to 60 ms after the process; until then a successor may find the image locked. A plain
    // descriptor goes with the process, or with the last request that is under way, and costs two atomic additions each.
    if image.isRegistered { configuration.files = [image.file.rawValue] }
    configuration.workerLimit = 16
    var operations: [IOOperation] = [.read, .readVectored, .poll, .pollRemove, .timeout]
    if !image.isReadOnly { operations += [.write, .writeVectored, .sync, .allocate] } else { operations += [.sync] }
    configuration.allowedOperations = operations
    let ring = try IORing(configuration)
    let slots = UnsafeMutablePointer<TransferState>.allocate(capacity: depth)
    unsafe slots.initialize(repeating: TransferState(), count: depth)
    var calls: CallPool?
    var callThread: HostThread?
    let port: SyncPort
    let ends = image.canLoseItsEnd && !image.isReadOnly ? WriteEnds(depth: depth) : nil
    do throws(SystemError) {
      port = try SyncPort(depth: depth)
      image.gate.reserve(depth)
      if image.takesControl {
        let pool = try unsafe CallPool(image, port, ends, slots, depth: depth)
        callThread = try pool.start(threadCount: 1).first
        calls = pool
      }
    } catch {
      unsafe slots.deallocate()
      throw error
    }
    unsafe self.init(image, depth, ring, slots, port, ends, calls, callThread)
    watch(port.event.fd.rawValue, token: Self.portToken)
    if let calls { watch(calls.done.fd.rawValue, token: Self.callsToken) }
  }

  @unsafe
  private init(
    _ image: DiskImage, _ depth: Int, _ ring: consuming IORing, _ slots: UnsafeMutablePointer<TransferState>, _ port: SyncPort,
    _ ends: WriteEnds?, _ calls: CallPool?, _ callThread: HostThread?
  ) {
    self.image = image
    self.depth = depth
    self.ring = ring
    unsafe self.slots = slots
    self.port = port
    self.ends = ends
    if let ends { image.end.join(ends) }
    self.calls = calls
    self.callThread = callThread
    cache = CachedReader(image)
    unsafe deadline = .allocate(capacity: 1)
    unsafe deadline.initialize(to: timespec())
    called.reserveCapacity(depth)
  }

  deinit {
    calls?.end(threadCount: 1)
    callThread?.join()
    if let ends { image.end.leave(ends) }
    unsafe slots.deallocate()
    unsafe deadline.deallocate()
  }

  /// How the ring came out on this kernel.
  package var traits: IORing.Traits { ring.traits }

  package mutating func begin(_ slot: Int, _ request: StorageRequest) -> StorageOutcome? {
    precondition(slot >= 0 && slot < depth, "A slot number is below the depth of the engine.")
    // SAFETY: checked above.
    if image.isNull { return .done }
    if let ends, request.operation == .write {
      if !hasLooked {
        image.lookAtEnd()
        hasLooked = true
      }
      ends.note(request.offset &+ request.byteCount, slot)
    }
    if let outcome = unsafe slots[slot].begin(request, image) { return outcome }
    prepare(slot)
    return nil
  }

  @inline(__always)
  package func foresee(_ request: StorageRequest) -> UnsafeRawPointer? { unsafe cache?.foresee(request) }
  @inline(__always)
  package mutating func copy(_ request: StorageRequest) -> CopyOutcome { cache?.copy(request) ?? .no }

  package var wholeByteCount: UInt64 { image.wholeByteCount }

  package mutating func wake(at time: MonotonicTime) {
    guard !isTimed else { return }
    isTimed = true
    // SAFETY: our own memory; the last wait for it is over.
    unsafe deadline.pointee = timespec(tv_sec: Int(time.nanoseconds / 1_000_000_000), tv_nsec: Int(time.nanoseconds % 1_000_000_000))
    let prepared = unsafe ring.prepareTimeout(deadline, userData: Kind.time << 32)
    precondition(prepared, "The ring has an entry for the time.")
  }

  private mutating func prepare(_ slot: Int) {
    let state = unsafe slots + slot
    let tag = Kind.request << 32 | UInt64(slot)
    let file = image.isRegistered ? IOFile.registered(0) : .descriptor(image.file.rawValue)
    let prepared: Bool
    switch unsafe state.pointee.step {
    case .control:
      calls?.give([UInt16(truncatingIfNeeded: slot)])
      prepared = calls != nil
    case .sync:
      if unsafe !state.pointee.leadsSync {
        guard image.gate.enter(port, UInt16(truncatingIfNeeded: slot)) else { return }
        unsafe state.pointee.leadsSync = true
      }
      prepared = ring.prepareDataSync(file, userData: tag)
    case .allocate(let mode):
      prepared = unsafe ring.prepareAllocate(
        file, mode: UInt32(mode), offset: state.pointee.offset, byteCount: state.pointee.remaining, userData: tag)
    case .transfer:
      let offset = unsafe state.pointee.offset
      let reads = unsafe state.pointee.request.operation == .read
      // SAFETY: the requester keeps memory and pieces until completion.
      if let piece = unsafe state.pointee.nextPiece {
        let length = UInt32(unsafe piece.byteCount)
        prepared =
          reads
          ? unsafe ring.prepareRead(file, into: piece.base, byteCount: length, offset: offset, userData: tag)
          : unsafe ring.prepareWrite(
            file, from: piece.base, byteCount: length, offset: offset, userData: tag)
      } else {
        let count = unsafe state.pointee.vectorCount
        guard let vectors = unsafe state.pointee.vectors else { preconditionFailure("A transfer has memory.") }
        prepared =
          reads
          ? unsafe ring.prepareReadVectored(file, into: vectors, count: count, offset: offset, userData: tag)
          : unsafe ring.prepareWriteVectored(
            file, from: vectors, count: count, offset: offset, userData: tag)
      }
    }
    precondition(prepared, "The ring has an entry for every slot.")
  }

  package mutating func watch(_ fd: CInt, token: Int) {
    watched.append((token, fd))
    arm(fd, token)
  }

  private mutating func arm(_ fd: CInt, _ token: Int) {
    let prepared = ring.preparePoll(
      .descriptor(fd), for: .readable, repeating: true, userData: Kind.watch << 32 | UInt64(UInt32(truncatingIfNeeded: token)))
    precondition(prepared, "The ring has entries for what is watched.")
  }

  package mutating func unwatch(_ fd: CInt, token: Int) {
    guard watched.contains(where: { $0.token == token }) else { return }
    watched.removeAll { $0.token == token }
    let tag = UInt64(UInt32(truncatingIfNeeded: token))
    let prepared = ring.preparePollRemove(Kind.watch << 32 | tag, userData: Kind.unwatch << 32 | tag)
    precondition(prepared, "The ring has entries for what is watched.")
    // At once: the descriptor may be closed after this.
    _ = ring.enter()
  }

  package var hasPrepared: Bool { ring.hasPrepared }
  @inline(__always) package var hasWork: Bool { ring.hasWork }
  package var canBePolled: Bool { ring.showsWork }

  package mutating func turn(waiting: Bool) {
    if !waiting, ring.showsWork, !ring.needsEnter { return }
    hasLooked = false
    // Interrupted, or short of room: the caller takes what is there and comes again.
    _ = ring.enter(waitingFor: waiting ? 1 : 0)
  }

  package mutating func nextEvent() -> StorageEvent? {
    // Each round takes one completion off the ring, whose number the kernel bounds.
    while true {
      if let done = called.popLast() { return .completed(slot: Int(done.slot), done.outcome) }
      guard let completion = ring.nextCompletion() else { return nil }
      let number = Int(UInt32(truncatingIfNeeded: completion.userData))
      let isSeen = seenCount > 0
      if isSeen { seenCount -= 1 }
      switch completion.userData >> 32 {
      case Kind.request:
        // SAFETY: the number is one that `prepare` was given.
        switch unsafe slots[number].advance(Int(completion.result), image) {
        case .again: prepare(number)
        case .finished(let outcome):
          if unsafe slots[number].leadsSync {
            image.gate.leave(completion.result, from: port)
            takeLetters()
          }
          let isLooking = unsafe !isSeen && outcome == .done && slots[number].dependsOnEnd
          // One look is for all that have come.
          if isLooking { seenCount = ring.waitingCount }
          let settled = unsafe slots[number].settled(outcome, image, looks: isLooking, ends, number)
          learn(number, settled)
          return .completed(slot: number, settled)
        }
      case Kind.watch:
        guard let entry = watched.first(where: { $0.token == number }) else { continue }
        if !completion.hasMore, completion.result != -ECANCELED { arm(entry.fd, number) }
        switch number {
        case Self.callsToken: calls?.collect(into: &called)
        case Self.portToken: takeLetters()
        default: if completion.result > 0 { return .readable(token: number) }
        }
      case Kind.time:
        isTimed = false
        return .time
      default: continue
      }
    }
  }

  /// What a request that moved data has put into the host's cache is known to be there.
  @inline(__always)
  private func learn(_ number: Int, _ outcome: StorageOutcome) {
    // SAFETY: the number is below the depth.
    let request = unsafe slots[number].request
    if outcome == .done, request.operation == .read || request.operation == .write { cache?.learn(request, image) }
  }

  /// What the gate says of slots that wait for a sync.
  private mutating func takeLetters() {
    while let (slot, outcome) = unsafe port.next(for: slots, image, ends) {
      guard let outcome else {
        prepare(Int(slot))
        continue
      }
      learn(Int(slot), outcome)
      called.append((slot, outcome))
    }
  }
}
