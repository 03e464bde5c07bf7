import CLinux
import HostSystem
import Synchronization

/// The descriptors of one queue. The front end may replace the call descriptor at any moment, also while a thread of the
/// device uses it: so the number stays the same for life, and a new descriptor is put under it atomically (`dup3`).
public final class QueuePorts: Sendable {
  private let callPort: EventFD
  private let errorPort: EventFD
  private let hasError = Atomic<Bool>(false)
  public let counters: QueueCounters

  init() throws(SystemError) {
    // Dummies until the front end sends its own: a call before that goes nowhere, as the protocol has it.
    callPort = try EventFD()
    errorPort = try EventFD()
    counters = QueueCounters()
  }

  /// Notifies the driver (the ring decided that it wants it).
  @inline(__always)
  public func call() {
    callPort.signal()
    counters.calls.add(1)
  }

  /// Tells the front end that the ring is broken, once.
  func signalError() {
    if !hasError.exchange(true, ordering: .relaxed) { errorPort.signal() }
  }

  func replaceCall(_ fd: consuming OwnedFD?) throws(SystemError) { try Self.replace(callPort, with: fd) }

  func replaceError(_ fd: consuming OwnedFD?) throws(SystemError) {
    hasError.store(false, ordering: .relaxed)
    try Self.replace(errorPort, with: fd)
  }

  private static func replace(_ port: borrowing EventFD, with fd: consuming OwnedFD?) throws(SystemError) {
    if let fd {
      try put(fd.rawValue, under: port.fd.rawValue)
    } else {
      let dummy = try EventFD()
      try put(dummy.fd.rawValue, under: port.fd.rawValue)
    }
  }

  private static func put(_ fd: CInt, under number: CInt) throws(SystemError) {
    // EBUSY and EINTR are the races dup2(2) names; both mean "again".
    for _ in 0..<100 {
      let result = clinux_dup3(fd, number)
      if result >= 0 { return }
      let error = Errno(-result)
      if error != .busy && error != .interrupted { throw SystemError("replace a notification descriptor", error) }
    }
    throw SystemError("replace a notification descriptor", .busy)
  }
}
