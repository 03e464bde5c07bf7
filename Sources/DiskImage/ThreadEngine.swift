import CLinux
import Glibc
import HostSystem

/// Storage by ordinary calls in a few threads, for hosts without io_uring. Made and used in one thread.
@safe
package struct ThreadEngine: StorageEngine, ~Copyable {
  /// Requests of one queue that are done at the same time.
  package static let threadCount = 8

  private let image: DiskImage
  private let depth: Int
  private let slots: UnsafeMutablePointer<TransferState>
  private let pool: CallPool
  private let port: SyncPort
  private let ends: WriteEnds?
  private let threads: [HostThread]
  private let cache: CachedReader?
  /// Begun, and not handed over yet.
  private var prepared: [UInt16] = []
  private var completed: [(slot: UInt16, outcome: StorageOutcome)] = []
  private var completedPosition = 0
  private var watched: [(token: Int, fd: CInt)] = []
  /// Tokens reported by the last turn and not taken yet.
  private var ready: [Int] = []
  private var entries: [pollfd] = []
  private var wakeTime: MonotonicTime?

  /// - Parameter threadCount: all of them run when this returns.
  package init(_ image: DiskImage, depth: Int, threadCount: Int = ThreadEngine.threadCount) throws(SystemError) {
    let slots = UnsafeMutablePointer<TransferState>.allocate(capacity: depth)
    unsafe slots.initialize(repeating: TransferState(), count: depth)
    let pool: CallPool
    let threads: [HostThread]
    let port: SyncPort
    let ends = image.canLoseItsEnd && !image.isReadOnly ? WriteEnds(depth: depth) : nil
    do throws(SystemError) {
      port = try SyncPort(depth: depth)
      image.gate.reserve(depth)
      pool = try unsafe CallPool(image, port, ends, slots, depth: depth)
      threads = try pool.start(threadCount: threadCount)
    } catch {
      unsafe slots.deallocate()
      throw error
    }
    self.image = image
    self.depth = depth
    unsafe self.slots = slots
    self.pool = pool
    self.port = port
    self.ends = ends
    if let ends { image.end.join(ends) }
    self.threads = threads
    cache = CachedReader(image)
    prepared.reserveCapacity(depth)
    completed.reserveCapacity(depth)
  }

  deinit {
    pool.end(threadCount: threads.count)
    for thread in threads { thread.join() }
    if let ends { image.end.leave(ends) }
    unsafe slots.deallocate()
  }

  package var hasPrepared: Bool { !prepared.isEmpty }
  package var hasWork: Bool { !ready.isEmpty || completedPosition < completed.count }
  package var canBePolled: Bool { false }

  package mutating func begin(_ slot: Int, _ request: StorageRequest) -> StorageOutcome? {
    precondition(slot >= 0 && slot < depth, "A slot number is below the depth of the engine.")
    if image.isNull { return .done }
    // SAFETY: checked above; a free slot is ours.
    if let outcome = unsafe slots[slot].begin(request, image) { return outcome }
    prepared.append(UInt16(truncatingIfNeeded: slot))
    return nil
  }

  package func foresee(_ request: StorageRequest) -> UnsafeRawPointer? { unsafe cache?.foresee(request) }
  package mutating func copy(_ request: StorageRequest) -> CopyOutcome { cache?.copy(request) ?? .no }
  package var wholeByteCount: UInt64 { image.wholeByteCount }
  package mutating func wake(at time: MonotonicTime) { if wakeTime == nil { wakeTime = time } }

  package mutating func watch(_ fd: CInt, token: Int) { watched.append((token, fd)) }

  package mutating func unwatch(_ fd: CInt, token: Int) {
    watched.removeAll { $0.token == token }
    ready.removeAll { $0 == token }
  }

  package mutating func turn(waiting: Bool) {
    if !prepared.isEmpty {
      pool.give(prepared)
      prepared.removeAll(keepingCapacity: true)
    }
    guard !hasWork else { return }
    entries.removeAll(keepingCapacity: true)
    for fd in [pool.done.fd.rawValue, port.event.fd.rawValue] { entries.append(pollfd(fd: fd, events: Int16(POLLIN), revents: 0)) }
    for entry in watched { entries.append(pollfd(fd: entry.fd, events: Int16(POLLIN), revents: 0)) }
    // SAFETY: the array is not changed during the call.
    guard unsafe poll(&entries, nfds_t(entries.count), waiting ? timeout() : 0) > 0 else { return }
    for (index, entry) in entries.enumerated() where entry.revents != 0 {
      // Taken here, because the kernel would report it for ever.
      var value: UInt64 = 0
      if entry.revents & Int16(POLLIN) != 0 { _ = unsafe read(entry.fd, &value, 8) }
      switch index {
      case 0: pool.collect(into: &completed)
      case 1: takeLetters()
      default: ready.append(watched[index - 2].token)
      }
    }
  }

  /// What the gate says of slots that wait for a sync.
  private mutating func takeLetters() {
    while let (slot, outcome) = unsafe port.next(for: slots, image, ends) {
      if let outcome { completed.append((slot, outcome)) } else { pool.give([slot]) }
    }
  }

  /// Milliseconds to the time of `wake`, rounded up.
  private func timeout() -> CInt {
    guard let wakeTime else { return -1 }
    return CInt(clamping: (wakeTime.since(.now).nanoseconds + 999_999) / 1_000_000)
  }

  package mutating func nextEvent() -> StorageEvent? {
    if completedPosition < completed.count {
      let (slot, outcome) = completed[completedPosition]
      completedPosition += 1
      if completedPosition == completed.count {
        completed.removeAll(keepingCapacity: true)
        completedPosition = 0
      }
      // SAFETY: slots are below the depth; this one is ours again.
      let request = unsafe slots[Int(slot)].request
      if outcome == .done, request.operation == .read || request.operation == .write { cache?.learn(request, image) }
      return .completed(slot: Int(slot), outcome)
    }
    if let time = wakeTime, time <= .now {
      wakeTime = nil
      return .time
    }
    return ready.isEmpty ? nil : .readable(token: ready.removeFirst())
  }
}
