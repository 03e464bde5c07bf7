import HostSystem

/// Carries the bytes of the core's serial port: a connected stream socket on one side, a port on the other. Lives until
/// the socket ends, a signal asks for it, or a person types the escape key and nobody else can end the VM.
package final class SerialCarrier {
  private enum Token {
    static let stream = 0
    static let signals = 1
  }

  /// Why the carrier ended.
  package enum End: Equatable, Sendable { case streamEnded, signalled, quit }

  private let stream: OwnedFD
  private let signals: OwnedFD
  private let port: ConsolePort
  private var control: ControlLine?
  private var watcher: LoopWatcher
  private var streamWatch = Watch()
  /// Taken from the stream, refused by the port.
  private var held: [UInt8] = []
  private var heldStart = 0
  private var streamHasEnded = false
  private var streamIsFull = false

  /// - Parameters:
  ///   - signals: readable when the carrier should end (`Signals.descriptor`).
  ///   - control: where the escape key is reported; without it the carrier ends.
  package static func make(
    stream: consuming OwnedFD, port: ConsolePort, signals: consuming OwnedFD, control: consuming ControlLine?
  ) throws(SystemError) -> SerialCarrier {
    let watcher = try LoopWatcher()
    try stream.setNonBlocking(true)
    return SerialCarrier(stream, port, signals, control, watcher)
  }

  private init(
    _ stream: consuming OwnedFD, _ port: ConsolePort, _ signals: consuming OwnedFD, _ control: consuming ControlLine?,
    _ watcher: consuming LoopWatcher
  ) {
    self.stream = stream
    self.port = port
    self.signals = signals
    self.control = control
    self.watcher = watcher
  }

  /// Carries until the end.
  package func run() throws(SystemError) -> End {
    try watcher.watch(signals, for: .readable, token: Token.signals)
    while true {
      port.watch(with: &watcher)
      if port.readUnwatchableInput().contains(.input) { sendInput() }
      watchStream()
      for event in try watcher.loop.wait() {
        switch event.token {
        case Token.signals:
          finish()
          return .signalled
        case Token.stream:
          if event.readiness.contains(.writable) { streamIsFull = false }
          if !event.readiness.isDisjoint(with: [.readable, .hangUp, .error]) { readStream() }
        default:
          let outcome = port.ready(event.token, event.readiness)
          if outcome.contains(.quit), !reportQuit() {
            finish()
            return .quit
          }
          passOn()
        }
        sendInput()
      }
      if streamHasEnded, heldStart == held.count {
        finish()
        return .streamEnded
      }
    }
  }

  private func reportQuit() -> Bool {
    control?.report(.quit) ?? false
  }

  private func watchStream() {
    var wanted: Readiness = held.isEmpty && !streamHasEnded ? .readable : []
    if streamIsFull { wanted.insert(.writable) }
    // While the port is full the core's bytes wait in the socket; its end is seen when there is room again.
    streamWatch.set(wanted.isEmpty ? nil : wanted, stream, token: Token.stream, &watcher)
  }

  private func readStream() {
    // Bounded, so that the terminal gets its turn: 16 pieces of 4 KiB.
    for _ in 0..<16 where held.isEmpty && !streamHasEnded {
      var transfer = Transfer.wouldBlock
      // SAFETY: the closure says how many bytes of the buffer were filled.
      let bytes = unsafe [UInt8](unsafeUninitializedCapacity: 4096) { buffer, count in
        transfer = unsafe stream.read(into: UnsafeMutableRawBufferPointer(buffer))
        if case .bytes(let read) = transfer { count = read } else { count = 0 }
      }
      switch transfer {
      case .bytes:
        held = bytes
        heldStart = 0
        passOn()
      case .wouldBlock: return
      case .end, .failed: streamHasEnded = true
      }
    }
  }

  /// Gives the port what it refused before.
  private func passOn() {
    guard heldStart < held.count else { return }
    // SAFETY: heldStart is below the count.
    heldStart += unsafe held.withUnsafeBytes { all in unsafe port.write(UnsafeRawBufferPointer(rebasing: all[heldStart...])) }
    if heldStart == held.count {
      held.removeAll(keepingCapacity: true)
      heldStart = 0
    }
  }

  private func sendInput() {
    // Bounded by the port's input buffer: each turn takes some out. Only as much is taken as the socket will take.
    while port.inputCount > 0, !streamIsFull, !streamHasEnded {
      var sent = Transfer.wouldBlock
      unsafe port.withInput { bytes in
        sent = unsafe UnixSocket.send(stream, bytes, waiting: false)
        if case .bytes(let count) = sent { return count }
        return 0
      }
      switch sent {
      case .bytes: break
      case .wouldBlock: streamIsFull = true
      case .end, .failed: streamHasEnded = true
      }
    }
  }

  /// Gives the sink a last chance to take what is left.
  private func finish() {
    if heldStart < held.count {
      // SAFETY: heldStart is below the count.
      unsafe held.withUnsafeBytes { all in unsafe port.writeOrDrop(UnsafeRawBufferPointer(rebasing: all[heldStart...])) }
    }
    port.finish()
  }
}
