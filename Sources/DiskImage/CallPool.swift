import CLinux
import Glibc
import HostSystem
import Synchronization

/// Threads that do requests by ordinary calls, several at a time. Whoever has a slot number owns the slot's state: the
/// engine, then the list of what is to be done, then one thread, then the list of what is done.
@safe
final class CallPool: @unchecked Sendable {
  // @unchecked: slots change hands under the locks below; all else is constant.

  private struct Lists: ~Copyable {
    /// First in, first out: `count` slot numbers from `first` on.
    var waiting: [UInt16]
    var first = 0
    var count = 0
    var done: [(slot: UInt16, outcome: StorageOutcome)] = []
    var isEnding = false
  }

  private let image: DiskImage
  private let port: SyncPort
  private let ends: WriteEnds?
  private let slots: UnsafeMutablePointer<TransferState>
  private let lists: Mutex<Lists>
  /// Counts what waits (`EFD_SEMAPHORE`): every read takes one.
  private let waiting: OwnedFD
  /// Readable when something is done.
  let done: EventFD

  init(
    _ image: DiskImage, _ port: SyncPort, _ ends: WriteEnds?, _ slots: UnsafeMutablePointer<TransferState>, depth: Int
  ) throws(SystemError) {
    let number = eventfd(0, CInt(EFD_CLOEXEC) | CInt(EFD_SEMAPHORE))
    if number < 0 { throw SystemError("create an eventfd", Errno.current) }
    waiting = OwnedFD(owning: number)
    done = try EventFD()
    self.image = image
    self.port = port
    self.ends = ends
    unsafe self.slots = slots
    var start = Lists(waiting: [UInt16](repeating: 0, count: depth))
    start.done.reserveCapacity(depth)
    lists = Mutex(start)
  }

  /// Starts the threads; all of them run when this returns.
  func start(threadCount: Int) throws(SystemError) -> [HostThread] {
    // One heap for all: a thread's own is made when it first allocates, which may be behind the walls, and makes calls of its own.
    clinux_use_one_heap()
    var threads: [HostThread] = []
    let started = try EventFD()
    let port = started.fd.rawValue
    for number in 0..<threadCount {
      threads.append(
        try HostThread.start(name: "calls \(number)") {
          var one: UInt64 = 1
          // SAFETY: eight bytes of ours. The descriptor lives until every thread has written.
          _ = unsafe write(port, &one, 8)
          self.work()
        })
    }
    var running: UInt64 = 0
    while running < UInt64(threadCount) {
      try started.fd.waitUntil(.readable)
      running += started.drain()
    }
    return threads
  }

  /// Gives slots to the threads, in order. One system call.
  func give(_ numbers: [UInt16]) {
    lists.withLock { lists in
      for number in numbers {
        lists.waiting[(lists.first + lists.count) % lists.waiting.count] = number
        lists.count += 1
      }
    }
    add(UInt64(numbers.count))
  }

  /// Moves what is done into `events`.
  func collect(into events: inout [(slot: UInt16, outcome: StorageOutcome)]) {
    lists.withLock { lists in
      events.append(contentsOf: lists.done)
      lists.done.removeAll(keepingCapacity: true)
    }
  }

  /// Lets the threads finish what waits and end.
  func end(threadCount: Int) {
    lists.withLock { $0.isEnding = true }
    add(UInt64(threadCount))
  }

  private func add(_ count: UInt64) {
    var count = count
    // SAFETY: eight bytes of ours.
    _ = unsafe write(waiting.rawValue, &count, 8)
  }

  /// The body of one thread.
  func work() {
    while true {
      var one: UInt64 = 0
      // SAFETY: eight bytes of ours.
      guard unsafe read(waiting.rawValue, &one, 8) == 8 || Errno.current == .interrupted else { return }
      let next = lists.withLock { lists -> (slot: Int?, isEnding: Bool) in
        guard lists.count > 0 else { return (nil, lists.isEnding) }
        let slot = lists.waiting[lists.first]
        lists.first = (lists.first + 1) % lists.waiting.count
        lists.count -= 1
        return (Int(slot), false)
      }
      if next.isEnding { return }
      guard let slot = next.slot else { continue }
      guard let outcome = perform(slot) else { continue }
      lists.withLock { $0.done.append((UInt16(truncatingIfNeeded: slot), outcome)) }
      done.signal()
    }
  }

  /// Nil where the slot is the gate's now.
  private func perform(_ slot: Int) -> StorageOutcome? {
    // SAFETY: slot < depth, and it is this thread's until it is on the list of what is done, or with the gate.
    let state = unsafe slots + slot
    if let ends, unsafe state.pointee.request.operation == .write, unsafe state.pointee.step == .transfer {
      image.lookAtEnd()
      unsafe ends.note(state.pointee.offset &+ state.pointee.remaining, slot)
      if unsafe !image.end.allows(state.pointee.offset &+ state.pointee.remaining) { return unsafe state.pointee.giveUp() }
    }
    // Each round moves bytes, finishes a step, or uses up one of a bounded number of retries.
    while true {
      if unsafe state.pointee.step == .sync, unsafe !state.pointee.leadsSync {
        guard image.gate.enter(port, UInt16(truncatingIfNeeded: slot)) else { return nil }
        unsafe state.pointee.leadsSync = true
      }
      let result = unsafe call(state.pointee)
      guard case .finished(let outcome) = unsafe state.pointee.advance(result, image) else { continue }
      if unsafe state.pointee.leadsSync { image.gate.leave(CInt(clamping: result), from: nil) }
      return unsafe state.pointee.settled(outcome, image, looks: true, ends, slot)
    }
  }

  private func call(_ state: TransferState) -> Int {
    let fd = image.file.rawValue
    switch state.step {
    case .sync:
      return fdatasync(fd) == 0 ? 0 : -Int(Errno.current.rawValue)
    case .allocate(let mode):
      return Int(clinux_fallocate(fd, mode, Int(state.offset), Int(state.remaining)))
    case .control(let order):
      return DeviceControl.give(order, image.file, offset: state.offset, byteCount: state.remaining)
    case .transfer:
      // SAFETY: the requester keeps memory and pieces until completion.
      if let piece = unsafe state.nextPiece {
        var one = unsafe iovec(iov_base: piece.base, iov_len: piece.byteCount)
        return unsafe transfer(state, &one, 1)
      }
      guard let vectors = unsafe state.vectors else { preconditionFailure("A transfer has memory.") }
      return unsafe transfer(state, vectors, state.vectorCount)
    }
  }

  @unsafe
  private func transfer(_ state: TransferState, _ pieces: UnsafePointer<iovec>, _ count: Int) -> Int {
    let fd = image.file.rawValue
    if state.request.operation == .read {
      let result = unsafe preadv(fd, pieces, CInt(count), Int(state.offset))
      return result < 0 ? -Int(Errno.current.rawValue) : result
    }
    return unsafe clinux_pwritev2(fd, pieces, CInt(count), Int(state.offset), 0)
  }
}
