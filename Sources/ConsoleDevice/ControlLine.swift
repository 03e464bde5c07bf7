import HostSystem

/// The line to the supervisor: one word and a line feed for each thing that happened here. Without a supervisor there is
/// none.
package struct ControlLine: ~Copyable {
  package enum Event: String, Sendable {
    /// A person typed the escape key: end the VM.
    case quit
  }

  private let fd: OwnedFD

  package init(_ fd: consuming OwnedFD) { self.fd = fd }

  /// False when nobody is there to act on it.
  package borrowing func report(_ event: Event) -> Bool {
    switch UnixSocket.send(fd, Array((event.rawValue + "\n").utf8), waiting: false) {
    // A full socket means that earlier reports have not been read: the supervisor is there and slow.
    case .bytes, .wouldBlock: true
    case .end, .failed: false
    }
  }
}
