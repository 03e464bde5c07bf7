import CLinux
import ControlProtocol
import HostSystem
import Sandbox

/// One process of the VM: what it is, how far it has come, how it ended.
final class VMProcess {
  enum State: Equatable {
    case starting, ready
    case ended(ProcessEnd)
  }

  /// The device's id, or `core`, or `serial`. Of a spare it has a mark behind it, until the spare takes over.
  var id: String
  let program: String
  let identity: ChildIdentity?
  let processID: Int32
  /// Whether it is told of changes of the terminal's size.
  let isOnTerminal: Bool
  /// Of somebody else's program: the jail it was put into.
  let jail: JailWalls?
  private(set) var state = State.starting
  let startTime: MonotonicTime
  var readyTime: MonotonicTime?

  private let process: ProcessHandle
  /// Until exec has succeeded.
  private var report: OwnedFD?
  /// Reading end of the ready pipe; nil for the core, which says it on its channel.
  private var readyPipe: OwnedFD?
  private var readyText: [UInt8] = []

  init(
    id: String, program: String, identity: ChildIdentity?, isOnTerminal: Bool, child: consuming StartedChild,
    readyPipe: consuming OwnedFD?, startTime: MonotonicTime, jail: JailWalls? = nil
  ) {
    self.jail = jail
    self.id = id
    self.program = program
    self.identity = identity
    self.isOnTerminal = isOnTerminal
    processID = child.process.processID
    process = child.process
    report = consume child.report
    self.readyPipe = readyPipe
    self.startTime = startTime
  }

  /// One that was there before an upgrade.
  init(_ known: SupervisorState.Process) throws(SupervisionError) {
    id = known.id
    program = known.program
    identity = known.identity
    isOnTerminal = known.isOnTerminal
    processID = known.processID
    process = ProcessHandle(processID: known.processID, adopting: try UpgradedProgram.adopt(known.pidfd))
    report = nil
    readyPipe = nil
    startTime = known.startTime
    readyTime = known.readyTime
    hasExecuted = true
    state = known.end.map { .ended($0) } ?? .ready
    if let places = known.jailPlaces {
      let walls = JailWalls()
      walls.places = places.map { .init(kind: 0, rights: 0, path: $0, size: 0) }
      jail = walls
    } else {
      jail = nil
    }
  }

  /// The same, to be handed on.
  var captured: SupervisorState.Process {
    var end: ProcessEnd?
    if case .ended(let how) = state { end = how }
    return SupervisorState.Process(
      id: id, program: program, processID: processID, pidfd: endNumber, identity: identity, isOnTerminal: isOnTerminal,
      jailPlaces: jail?.places.map(\.path), end: end, startTime: startTime, readyTime: readyTime)
  }

  /// It is on its way, and knows descriptors that are no longer needed once it has come.
  var isSettled: Bool { state != .starting && reportNumber == nil && readyNumber == nil }

  var isAlive: Bool { if case .ended = state { false } else { true } }

  var endNumber: CInt { process.fd.rawValue }
  var reportNumber: CInt? {
    switch report {
    case .some(let pipe): pipe.rawValue
    case .none: nil
    }
  }
  var readyNumber: CInt? {
    switch readyPipe {
    case .some(let pipe): pipe.rawValue
    case .none: nil
    }
  }

  func launchOutcome() -> LaunchOutcome {
    switch report {
    case .some(let pipe): LaunchOutcome(reading: pipe)
    case .none: .executed
    }
  }

  /// Exec has succeeded.
  private(set) var hasExecuted = false
  func markExecuted() { hasExecuted = true }

  func closeReport() { _ = report.take() }

  /// Reads the ready pipe. True once the whole word has come.
  func takeReadyWord() -> Bool {
    var buffer = [UInt8](repeating: 0, count: 16)
    // SAFETY: the buffer is lent for the call.
    let transfer =
      switch readyPipe {
      case .some(let pipe): unsafe buffer.withUnsafeMutableBytes { bytes in unsafe pipe.read(into: bytes) }
      case .none: Transfer.end
      }
    if case .bytes(let count) = transfer { readyText += buffer[..<count] }
    guard readyText == Array("READY\n".utf8) else { return false }
    state = .ready
    return true
  }

  func closeReadyPipe() { _ = readyPipe.take() }

  func markReady() { state = .ready }

  /// Collects it if it has ended.
  func collect() -> ProcessEnd? {
    guard isAlive, let end = process.collect() else { return nil }
    state = .ended(end)
    return end
  }

  /// Its device is gone for good. It has no name any more; whoever comes next may have its ids.
  func retire() -> ChildIdentity? {
    id = ""
    return identity
  }

  var isRetired: Bool { id.isEmpty }

  func signal(_ number: CInt) { if isAlive { process.signal(number) } }

  /// Kills and collects it.
  func kill() {
    guard isAlive else { return }
    process.signal(SIGKILL)
    if let end = process.waitForEnd() { state = .ended(end) }
  }
}
