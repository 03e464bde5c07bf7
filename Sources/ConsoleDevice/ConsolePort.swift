import HostSystem

/// The host side of one console: a sink, and between it and the guest two bounded buffers.
///
/// The owner calls `write` with output and `takeInput` for input, hands every event of the port's tokens to `ready`, and after
/// each of these calls `watch`, which tells its loop what to wait for now. Nothing here ever blocks.
package final class ConsolePort {
  /// What the port's descriptors are registered as; the owner uses smaller numbers.
  package enum Token {
    package static let input = 100
    package static let output = 101
    package static let listener = 102
    package static let patience = 103
  }

  /// What an event came to, for the owner.
  package struct Outcome: OptionSet, Sendable {
    package let rawValue: Int
    package init(rawValue: Int) { self.rawValue = rawValue }
    /// There is more input than before.
    package static let input = Outcome(rawValue: 1)
    /// Output that `write` refused may be taken now.
    package static let room = Outcome(rawValue: 2)
    /// The escape key: end the VM.
    package static let quit = Outcome(rawValue: 4)
  }

  enum Reader {
    case present
    /// Nobody there, or nobody who reads: the newest output is kept, the rest dropped.
    case absent
  }

  package static let outputByteCount = 64 << 10
  package static let inputByteCount = 4 << 10
  /// How long a reader may take nothing before it counts as absent. A Linux guest spins while its console holds it up, so
  /// this must stay far below what its watchdogs allow.
  package static let patience = Duration.milliseconds(500)

  let sink: ConsoleSink
  let kind: ConsoleSink.Kind
  var client: OwnedFD?
  /// The client writes no more, but may still read.
  var clientInputHasEnded = false
  /// The client is gone; what it sent before is still to be read.
  var clientHasHungUp = false

  var output = ByteRing(capacity: outputByteCount)
  var reader: Reader
  var outputHasEnded = false
  let patienceTimer: Timer
  var patienceIsRunning = false

  var input = ByteRing(capacity: inputByteCount)
  var escape: EscapeFilter?
  var inputHasEnded = false
  /// A regular file or `/dev/null` as input: always readable, never watchable.
  var inputIsUnwatchable = false

  var inputWatch = Watch()
  var outputWatch = Watch()
  var listenerWatch = Watch()
  var clientWatch = Watch()
  var timerWatch = Watch()
  var complaints = RateLimit(burst: 2, per: .seconds(60))
  /// Bytes of output that nobody will see.
  package internal(set) var droppedByteCount: UInt64 = 0

  package convenience init(_ sink: ConsoleSink) throws(SystemError) {
    let timer = try Timer()
    self.init(sink, timer)
  }

  private init(_ sink: ConsoleSink, _ timer: consuming Timer) {
    patienceTimer = timer
    kind = sink.kind
    escape = kind == .terminal ? EscapeFilter() : nil
    reader = kind == .socket || kind == .null ? .absent : .present
    inputHasEnded = kind == .file || kind == .null
    self.sink = sink
  }

  /// Whether a person's terminal is behind this port, so that there is an escape key and a window size.
  package var isTerminal: Bool { escape != nil }

  /// The size of the terminal, where there is one.
  package var windowSize: WindowSize? { sink.windowSize }

  package var hasClient: Bool { client != nil }

  /// An event of one of the port's tokens.
  package func ready(_ token: Int, _ readiness: Readiness) -> Outcome {
    switch token {
    case Token.input:
      var outcome: Outcome = []
      // Sockets and pseudo-terminals read and write through one descriptor.
      if readiness.contains(.writable) { outcome.formUnion(flush()) }
      if !readiness.isDisjoint(with: [.readable, .hangUp, .error]) { outcome.formUnion(readInput()) }
      if client != nil, !readiness.isDisjoint(with: [.hangUp, .error]) { clientHasHungUp = true }
      if clientHasHungUp, clientInputHasEnded { disconnect() }
      return outcome
    case Token.output: return readiness.isDisjoint(with: [.hangUp, .error]) ? flush() : flush().union(endOutput())
    case Token.listener: return accept()
    case Token.patience: return losePatience()
    default: return []
    }
  }

  /// Tells the loop what to wait for now.
  package func watch<W: DescriptorWatcher & ~Copyable>(with watcher: inout W) {
    let wantsInput = input.freeCount > 1 && !inputHasEnded
    let wantsOutput = !output.isEmpty && !outputHasEnded
    switch kind {
    case .terminal, .pipes:
      if !inputIsUnwatchable, !inputWatch.set(wantsInput ? .readable : nil, optional: sink.input, token: Token.input, &watcher) {
        inputIsUnwatchable = true
      }
      // Descriptors that cannot be watched never refuse a write either.
      outputWatch.set(wantsOutput ? .writable : nil, optional: sink.output, token: Token.output, &watcher)
    case .pseudoTerminal:
      var wanted: Readiness = wantsInput ? .readable : []
      if wantsOutput { wanted.insert(.writable) }
      inputWatch.set(wanted.isEmpty ? nil : wanted, optional: sink.input, token: Token.input, &watcher)
    case .file: outputWatch.set(wantsOutput ? .writable : nil, optional: sink.output, token: Token.output, &watcher)
    case .socket:
      listenerWatch.set(client == nil ? .readable : nil, optional: sink.input, token: Token.listener, &watcher)
      watchClient(with: &watcher)
    case .null: break
    }
    timerWatch.set(patienceIsRunning ? .readable : nil, patienceTimer.fd, token: Token.patience, &watcher)
  }

  private func watchClient<W: DescriptorWatcher & ~Copyable>(with watcher: inout W) {
    guard client != nil else {
      // The closed descriptor has left the loop by itself.
      clientWatch = Watch()
      return
    }
    var wanted: Readiness = input.freeCount > 1 && !clientInputHasEnded ? .readable : []
    if !output.isEmpty, !clientHasHungUp { wanted.insert(.writable) }
    // A client that is still there stays registered: its end is seen without asking.
    let interest = wanted.isEmpty && clientHasHungUp ? nil : wanted
    clientWatch.set(interest, optional: client, token: Token.input, &watcher)
  }
}
