import CLinux
import Glibc

/// A kernel event counter (`eventfd(2)`), close-on-exec and non-blocking: kicks, calls, wake-ups.
@safe
public struct EventFD: ~Copyable, Sendable {
  public let fd: OwnedFD

  public init() throws(SystemError) {
    let result = eventfd(0, CInt(EFD_CLOEXEC) | CInt(EFD_NONBLOCK))
    if result < 0 { throw SystemError("create an eventfd", Errno.current) }
    fd = OwnedFD(owning: result)
  }

  /// Adopts a received descriptor. Its blocking mode is shared with the sender and left alone, so every wait here asks
  /// for readiness first.
  public init(adopting fd: consuming OwnedFD) { self.fd = fd }

  public borrowing func duplicate() throws(SystemError) -> EventFD { EventFD(adopting: try fd.duplicate()) }

  /// Adds one to the counter. A full counter already means "signalled", so nothing is lost when it cannot be added.
  @inline(__always)
  public borrowing func signal() {
    var one: UInt64 = 1
    // SAFETY: eight bytes of ours.
    _ = unsafe Glibc.write(fd.rawValue, &one, 8)
  }

  /// As `signal`, for an event whose description a distrusted peer shares: whatever the peer does to it, this comes back. On
  /// the thread that `WaitBreaker` protects within milliseconds; on others it is asked first whether there is room, and a peer
  /// can win the race against that.
  @inline(__always)
  public borrowing func signalDistrusted() { fd.signalDistrusted() }

  /// Takes the counter's value and resets it; 0 when it was not signalled. Asks for readiness first, because the peer may
  /// have made the shared description blocking; against a peer that empties it just then there is the `WaitBreaker`.
  @discardableResult
  public borrowing func drain() -> UInt64 {
    guard isSignalled else { return 0 }
    var value: UInt64 = 0
    let isProtected = clinux_breaker_begin() != 0
    // SAFETY: eight bytes of ours.
    let count = unsafe Glibc.read(fd.rawValue, &value, 8)
    if isProtected { clinux_breaker_end() }
    return count == 8 ? value : 0
  }

  /// Takes the value when the loop has just reported the descriptor readable and nobody else reads it.
  @inline(__always)
  public borrowing func drainAfterReport() {
    var value: UInt64 = 0
    // SAFETY: eight bytes of ours.
    _ = unsafe Glibc.read(fd.rawValue, &value, 8)
  }

  /// Whether the counter is above zero, without changing it.
  public borrowing func isSignalledNow() -> Bool { isSignalled }

  /// Whether a signal could be added without waiting: for events whose description a distrusted peer shares.
  public borrowing func hasRoomNow() -> Bool { isReady(Int16(POLLOUT)) }

  /// Lets go whoever waits in `signal`: a peer that shares the description can make it blocking and its counter full. What
  /// the counter held is lost, to that peer alone.
  public borrowing func makeRoom() { if !hasRoomNow() { drain() } }

  private var isSignalled: Bool { isReady(Int16(POLLIN)) }

  private borrowing func isReady(_ events: Int16) -> Bool {
    var entry = pollfd(fd: fd.rawValue, events: events, revents: 0)
    // SAFETY: one pollfd, alive for the call.
    return unsafe poll(&entry, 1, 0) > 0 && entry.revents & events != 0
  }
}

extension OwnedFD {
  /// As `EventFD.signalDistrusted`, for the descriptor of an event that others share.
  @inline(__always)
  package borrowing func signalDistrusted() {
    var one: UInt64 = 1
    let isProtected = clinux_breaker_begin() != 0
    if !isProtected {
      var entry = pollfd(fd: rawValue, events: Int16(POLLOUT), revents: 0)
      // SAFETY: one pollfd, alive for the call.
      guard unsafe poll(&entry, 1, 0) > 0, entry.revents & Int16(POLLOUT) != 0 else { return }
    }
    // SAFETY: eight bytes of ours.
    _ = unsafe Glibc.write(rawValue, &one, 8)
    if isProtected { clinux_breaker_end() }
  }
}

/// Ends waits of one thread that a peer can cause by what it does to a shared open file description.
public enum WaitBreaker {
  /// Protects the calling thread; each has a timer of its own. Before its system calls are filtered.
  public static func protectThisThread() throws(SystemError) {
    _ = try checked(clinux_breaker_prepare(), "make a timer")
  }
}
