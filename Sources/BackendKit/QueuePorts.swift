import CLinux
import HostSystem
import Synchronization

/// The descriptors of one queue. The front end may replace the call descriptor at any moment, also while a thread of the
/// device uses it: so the number stays the same for life, and a new descriptor is put under it atomically (`dup3`).
public final class QueuePorts: Sendable {
  @usableFromInline let callPort: EventFD
  private let errorPort: EventFD
  /// Where calls and errors go that nobody hears; made once, so that a process that serves makes no descriptors.
  private let nowhere: EventFD
  private let hasSignalledError = Atomic<Bool>(false)
  public let counters: QueueCounters
  /// The thread that calls is the one that hears the front end. It must not wait in a call: a front end can make its eventfd
  /// blocking and full. A thread of the device's own is let go by `makeRoomForCalls`.
  @usableFromInline let isServedByLoop: Bool

  init(_ counters: QueueCounters, isServedByLoop: Bool) throws(SystemError) {
    self.isServedByLoop = isServedByLoop
    // Dummies until the front end sends its own: a call before that goes nowhere, as the protocol has it.
    callPort = try EventFD()
    errorPort = try EventFD()
    nowhere = try EventFD()
    self.counters = counters
  }

  @inlinable @inline(__always)
  func call() {
    if isServedByLoop { callPort.signalDistrusted() } else { callPort.signal() }
    counters.calls.add(1)
  }

  /// Lets go a thread that waits in a call, by taking what the front end has filled its own eventfd with. Called again while
  /// the thread does not come back.
  public func makeRoomForCalls() { callPort.makeRoom() }

  /// Tells the front end that the ring is broken; false when it was told already.
  func signalError() -> Bool {
    let isFirst = !hasSignalledError.exchange(true, ordering: .relaxed)
    if isFirst { errorPort.signalDistrusted() }
    return isFirst
  }

  /// What a device that waits for kicks watches while the ring is polled. A call that nobody hears wakes it as well, to no harm.
  var lookNumber: CInt { nowhere.fd.rawValue }

  /// Lets a device that waits for kicks look at its ring.
  func askForLook() { nowhere.signal() }

  /// A ring starts: what is broken from now on is news.
  func forgetError() { hasSignalledError.store(false, ordering: .relaxed) }

  /// Nil: the driver polls, and calls go nowhere.
  func replaceCall(_ fd: borrowing OwnedFD?) throws(SystemError) {
    switch fd {
    case .some(let fd): try Self.put(fd.rawValue, under: callPort.fd.rawValue)
    case .none: try Self.put(nowhere.fd.rawValue, under: callPort.fd.rawValue)
    }
    // Covers a call that was lost between the old descriptor and the new one; a needless call is allowed.
    callPort.signalDistrusted()
  }

  func replaceError(_ fd: borrowing OwnedFD) throws(SystemError) { try Self.put(fd.rawValue, under: errorPort.fd.rawValue) }

  func dropError() throws(SystemError) { try Self.put(nowhere.fd.rawValue, under: errorPort.fd.rawValue) }

  private static func put(_ fd: CInt, under number: CInt) throws(SystemError) {
    // EBUSY and EINTR are the races that dup2(2) names; both mean "again".
    for _ in 0..<100 {
      let result = clinux_dup3(fd, number)
      if result >= 0 { return }
      let error = Errno(-result)
      if error != .busy && error != .interrupted { throw SystemError("replace a notification descriptor", error) }
    }
    throw SystemError("replace a notification descriptor", .busy)
  }
}
