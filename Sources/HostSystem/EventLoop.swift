import CLinux

/// What a descriptor is watched for, and what it turned out to be ready for (`epoll(7)` bits).
public struct Readiness: OptionSet, Sendable {
  public let rawValue: UInt32
  public init(rawValue: UInt32) { self.rawValue = rawValue }

  public static let readable = Readiness(rawValue: 0x001)
  public static let writable = Readiness(rawValue: 0x004)
  /// Reported always, asked for or not.
  public static let error = Readiness(rawValue: 0x008)
  /// The peer closed; reported always.
  public static let hangUp = Readiness(rawValue: 0x010)
  /// One report per edge (`EPOLLET`); only to be asked for.
  public static let edgeTriggered = Readiness(rawValue: 1 << 31)
}

/// An epoll instance whose events come back as the owner's own tokens, usually an enum such as `.kick(queue: 0)`.
/// One thread owns it and everything registered in it. Level-triggered unless asked otherwise.
@safe
public struct EventLoop<Token>: ~Copyable {
  private let epoll: OwnedFD
  /// Token and generation by descriptor number: an event left over from a descriptor that was closed and whose number was
  /// given out again carries an old generation and is dropped.
  private var entries: [Entry?] = []
  private var generation: UInt32 = 0
  private let batch: EventBatch

  private struct Entry {
    var generation: UInt32
    var token: Token
  }

  /// - Parameter batchSize: how many events one `wait` can return.
  public init(batchSize: Int = 64) throws(SystemError) {
    let result = epoll_create1(CInt(EPOLL_CLOEXEC))
    if result < 0 { throw SystemError("create an epoll instance", Errno.current) }
    epoll = OwnedFD(owning: result)
    batch = EventBatch(capacity: batchSize)
  }

  /// Registers a descriptor. It must be removed before it is closed when other descriptors share its open file description.
  public mutating func add(_ fd: borrowing OwnedFD, for readiness: Readiness, token: Token) throws(SystemError) {
    try add(number: fd.rawValue, for: readiness, token: token)
  }

  /// As `add(_:for:token:)`, for a descriptor whose owner cannot be borrowed here.
  public mutating func add(number: CInt, for readiness: Readiness, token: Token) throws(SystemError) {
    generation &+= 1
    try control(EPOLL_CTL_ADD, number, readiness, generation)
    let index = Int(number)
    while entries.count <= index { entries.append(nil) }
    entries[index] = Entry(generation: generation, token: token)
  }

  /// Changes what a registered descriptor is watched for.
  public mutating func modify(_ fd: borrowing OwnedFD, for readiness: Readiness) throws(SystemError) {
    try modify(number: fd.rawValue, for: readiness)
  }

  public mutating func modify(number: CInt, for readiness: Readiness) throws(SystemError) {
    guard Int(number) < entries.count, let entry = entries[Int(number)] else {
      throw SystemError("watch descriptor \(number) differently", .noEntry)
    }
    try control(EPOLL_CTL_MOD, number, readiness, entry.generation)
  }

  /// Ends watching; harmless when the descriptor is not registered.
  public mutating func remove(_ fd: borrowing OwnedFD) { remove(number: fd.rawValue) }

  public mutating func remove(number: CInt) {
    guard Int(number) < entries.count, entries[Int(number)] != nil else { return }
    entries[Int(number)] = nil
    try? control(EPOLL_CTL_DEL, number, [], 0)
  }

  private func control(_ operation: CInt, _ number: CInt, _ readiness: Readiness, _ generation: UInt32) throws(SystemError) {
    let data = UInt64(generation) << 32 | UInt64(UInt32(bitPattern: number))
    let result = clinux_epoll_ctl(epoll.rawValue, operation, number, readiness.rawValue, data)
    _ = try checked(result, "watch descriptor \(number)")
  }

  /// Waits for events and hands each to `body`; returns how many there were. Zero after the timeout or a signal.
  /// `body` may not touch the loop; collect what to change and change it after.
  @discardableResult
  public mutating func wait(timeout: Duration? = nil, _ body: (Token, Readiness) -> Void) throws(SystemError) -> Int {
    let milliseconds = timeout.map { CInt(clamping: ($0.nanoseconds + 999_999) / 1_000_000) } ?? -1
    let count = batch.wait(on: epoll.rawValue, milliseconds)
    if count < 0 {
      if count == -EINTR { return 0 }
      throw SystemError("wait for events", Errno(-count))
    }
    for index in 0..<Int(count) {
      let (readiness, data) = batch[index]
      let number = Int(UInt32(truncatingIfNeeded: data))
      guard number < entries.count, let entry = entries[number], entry.generation == UInt32(data >> 32) else { continue }
      body(entry.token, readiness)
    }
    return Int(count)
  }

  /// As `wait(timeout:_:)`, returning the events, for loops whose handlers change the loop itself.
  public mutating func wait(timeout: Duration? = nil) throws(SystemError) -> [(token: Token, readiness: Readiness)] {
    var events: [(token: Token, readiness: Readiness)] = []
    try wait(timeout: timeout) { token, readiness in events.append((token, readiness)) }
    return events
  }

  /// The epoll descriptor, to be watched by another loop or ring.
  public var rawValue: CInt { epoll.rawValue }
}

/// The kernel's event array, allocated once.
@safe
private final class EventBatch {
  private let events: UnsafeMutablePointer<epoll_event>
  private let capacity: Int

  init(capacity: Int) {
    self.capacity = max(1, capacity)
    unsafe events = .allocate(capacity: self.capacity)
  }

  deinit { unsafe events.deallocate() }

  func wait(on epoll: CInt, _ milliseconds: CInt) -> CInt {
    // SAFETY: the kernel fills at most `capacity` entries, which are ours.
    let count = unsafe epoll_wait(epoll, events, CInt(capacity), milliseconds)
    return count < 0 ? -Errno.current.rawValue : count
  }

  subscript(index: Int) -> (Readiness, UInt64) {
    precondition(index < capacity, "An event index lies inside the batch.")
    // SAFETY: checked above; the entry was filled by the kernel in `wait`.
    return unsafe (Readiness(rawValue: events[index].events), events[index].data.u64)
  }
}

extension Errno {
  /// The calling thread's `errno`.
  @inline(__always)
  package static var current: Errno { Errno(unsafe __errno_location().pointee) }
}
