import CLinux
import Glibc
import HostSystem
import VhostUser

/// Where front ends come from.
enum Entrance: ~Copyable {
  /// One front end, connected already; the program ends with it.
  case connected(OwnedFD)
  /// Front ends one after another; the socket's path is removed at the end.
  case listening(OwnedFD, path: String)

  init(_ launch: LaunchArguments) throws(BackendError) {
    do {
      switch launch.connection {
      case .descriptor(let number):
        let fd = try OwnedFD.inherited(number)
        // QEMU's convention allows an inherited socket that listens as well.
        guard Self.isListening(fd) else {
          self = .connected(fd)
          return
        }
        // Now, because walls do not let it be done later; here and below.
        try fd.setNonBlocking(true)
        self = .listening(fd, path: "")
      // Behind walls no file can be removed: the socket's stays, and the next one that listens there takes its place.
      case .listen(let path):
        let fd = try UnixSocket.listen(at: path)
        try fd.setNonBlocking(true)
        self = .listening(fd, path: launch.walls == .off ? path : "")
      case nil: throw BackendError.noConnection
      }
    } catch { throw BackendError(error) }
  }

  private static func isListening(_ fd: borrowing OwnedFD) -> Bool {
    var value: CInt = 0
    var size = socklen_t(MemoryLayout<CInt>.size)
    // SAFETY: both are ours and alive for the call.
    return unsafe getsockopt(fd.rawValue, SOL_SOCKET, SO_ACCEPTCONN, &value, &size) == 0 && value != 0
  }
}

/// The kit's event loop.
extension BackendServer where Device: ~Copyable {
  /// Why the loop over one connection ended.
  private enum End {
    case frontEndLeft
    /// The front end broke the protocol; a warning was logged.
    case frontEndBroke
    /// SIGTERM or SIGINT.
    case asked
    case failed(String)
  }

  /// Serves until asked to end, until the only front end leaves, or until the device gives up; returns the exit code.
  mutating func run(_ entrance: consuming Entrance, _ signals: borrowing OwnedFD) throws(SystemError) -> CInt {
    switch consume entrance {
    case .connected(let socket):
      return exitCode(try serve(socket, signals))
    case .listening(let listener, let path):
      defer { if !path.isEmpty { _ = unsafe unlink(path) } }
      // Each round serves one front end to its end.
      while true {
        guard let socket = try nextConnection(listener, signals) else { return exitCode(.asked) }
        let end = try serve(socket, signals)
        switch end {
        case .frontEndLeft, .frontEndBroke: continue
        case .asked, .failed: return exitCode(end)
        }
      }
    }
  }

  private func exitCode(_ end: End) -> CInt {
    switch end {
    case .frontEndLeft, .asked: return 0
    case .frontEndBroke: return 1
    case .failed(let why):
      Log.error(why)
      return 1
    }
  }

  /// Waits for a front end; nil when asked to end. The device's own descriptors are served meanwhile.
  private mutating func nextConnection(_ listener: borrowing OwnedFD, _ signals: borrowing OwnedFD) throws(SystemError) -> OwnedFD? {
    try context.loop.add(listener, for: .readable, token: .listener)
    defer { context.loop.remove(listener) }
    while true {
      var hasVisitor = false
      for event in try context.loop.wait() {
        switch event.token {
        case .listener: hasVisitor = true
        case .signals: if isEnding(signals) { return nil }
        case .device(let token): device.ready(token, event.readiness, &context)
        case .control, .kick: break
        }
      }
      // Without a front end there is nobody to be told.
      context.configurationHasChanged = false
      if let why = context.endReason {
        Log.error(why)
        return nil
      }
      if hasVisitor, let socket = try UnixSocket.accept(listener) { return socket }
    }
  }

  private mutating func serve(_ socket: consuming OwnedFD, _ signals: borrowing OwnedFD) throws(SystemError) -> End {
    var connection = BackEndConnection(socket, offer: offer)
    let number = connection.socketNumber
    try context.loop.add(number: number, for: .readable, token: .control)
    clinux_bus_peer(number)
    defer { clinux_bus_peer(-1) }
    let end = try loop(&connection, signals)
    context.loop.remove(number: number)
    do { try disconnect() } catch { return .failed("The device cannot be stopped: \(error.why)") }
    return end
  }

  private mutating func loop(_ connection: inout BackEndConnection, _ signals: borrowing OwnedFD) throws(SystemError) -> End {
    // Kept between rounds, so that a wake-up allocates nothing.
    var events: [(token: BackendToken, readiness: Readiness)] = []
    events.reserveCapacity(64)
    var again: [Int] = []
    while true {
      events.removeAll(keepingCapacity: true)
      // What is asked for from now on has its turn after the next look at everybody else.
      again.removeAll(keepingCapacity: true)
      swap(&again, &context.queuesToServe)
      let timeout = again.isEmpty ? timeout(connection.deadline) : .zero
      try context.loop.wait(timeout: timeout) { token, readiness in events.append((token, readiness)) }
      for event in events {
        switch event.token {
        case .kick(let index):
          // The ring may have been taken back by an event of this very round.
          guard rings[index].isWithDevice else { continue }
          rings[index].ports.counters.kicks.add(1)
          device.kicked(queue: index, &context)
        case .device(let token): device.ready(token, event.readiness, &context)
        case .signals:
          if isEnding(signals) { return .asked }
        case .control:
          if let title = titleInService.take() { _ = unsafe clinux_change_title(title) }
          do { try connection.receive(now: .now, &self) } catch { return ended(by: error) }
        case .listener: break
        }
      }
      for index in again where rings[index].isWithDevice && profile.kickWaiter == .loop { device.kicked(queue: index, &context) }
      lookAtPolledRings()
      do { try connection.checkDeadline(now: .now) } catch { return ended(by: error) }
      if context.configurationHasChanged {
        context.configurationHasChanged = false
        connection.notifyConfigurationChange()
      }
      if let why = context.endReason { return .failed(why) }
    }
  }

  /// How long there may be nothing to do.
  private func timeout(_ deadline: MonotonicTime?) -> Duration? {
    let ofMessage = deadline.map { $0.since(.now) + .milliseconds(1) }
    guard let ofLook = nextLook?.since(.now) else { return ofMessage }
    return ofMessage.map { min($0, ofLook) } ?? ofLook
  }

  /// Takes a signal; true if it asks for the end. SIGHUP: whatever the device stands on may have changed.
  private mutating func isEnding(_ signals: borrowing OwnedFD) -> Bool {
    switch Signals.next(from: signals) {
    case nil: return false
    case SIGHUP:
      device.lookAgain(&context)
      return false
    default: return true
    }
  }

  private func ended(by error: VhostUserError) -> End {
    if case .closed(midMessage: false) = error {
      Log.info("The front end left")
      return .frontEndLeft
    }
    Log.warning("Connection closed: \(error)")
    return .frontEndBroke
  }
}
