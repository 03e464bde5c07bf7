import HostSystem

/// What the kit's thread waits for.
enum BackendToken: Equatable {
  /// The connection to the front end.
  case control
  /// The listening socket; watched while there is no connection.
  case listener
  case signals
  case kick(queue: Int)
  /// A descriptor of the device's own.
  case device(Int)
}

/// The kit as the device sees it while one of its functions runs: its event loop and what it can ask for.
public struct BackendContext: ~Copyable {
  var loop: EventLoop<BackendToken>
  var configurationHasChanged = false
  var endReason: String?
  /// Queues to be served once more, each once.
  var queuesToServe: [Int] = []

  init() throws(SystemError) { loop = try EventLoop() }

  /// Watches a descriptor of the device's own; `ready(_:_:_:)` is called with `token`. Level-triggered unless asked otherwise.
  /// It must be unwatched before it is closed.
  public mutating func watch(_ fd: borrowing OwnedFD, for readiness: Readiness, token: Int) throws(SystemError) {
    try loop.add(fd, for: readiness, token: .device(token))
  }

  /// Changes what a watched descriptor is watched for; an empty set keeps it registered and silent (save errors).
  public mutating func rewatch(_ fd: borrowing OwnedFD, for readiness: Readiness) throws(SystemError) {
    try loop.modify(fd, for: readiness)
  }

  /// Ends watching; harmless when the descriptor is not watched.
  public mutating func unwatch(_ fd: borrowing OwnedFD) { loop.remove(fd) }

  /// The configuration space has changed by itself (a resize, say): the driver is told after this function.
  public mutating func configurationChanged() { configurationHasChanged = true }

  /// The queue is served once more, after the other events of this turn, as if the driver had kicked: there is input now, or
  /// work is left that would have kept others waiting. For queues that the kit's loop waits for; harmless when it is stopped.
  public mutating func serveAgain(queue index: Int) {
    if !queuesToServe.contains(index) { queuesToServe.append(index) }
  }

  /// The device cannot go on (its tap is gone, say): the program ends with this line and a failure, in order.
  public mutating func end(because reason: String) { if endReason == nil { endReason = reason } }
}
