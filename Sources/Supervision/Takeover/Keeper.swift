import CSandbox
import ControlProtocol
import Glibc
import HostSystem
import Sandbox

/// The process that was started, where the VM is to outlive its supervisor (protocol/upgrade.md): the parent of all the VM's
/// processes. It collects their ends, hands signals on, and puts another supervisor in the place of one that was killed. Its
/// table of descriptors is the supervisor's, so that nothing is closed when that dies. It reads nothing that anybody sends. In an
/// upgrade it becomes the installed program, and its next child the supervisor.
struct Keeper {
  /// Why there is another supervisor.
  enum Occasion {
    case start, death, upgrade
    /// The program of an upgrade could not be executed.
    case noUpgrade
  }

  private let memory: KeeperMemory
  /// What every supervisor is forked from.
  private let supervisor: Supervisor
  /// Somebody has ordered the end.
  private var isEnding = false
  /// The last such signal.
  private var signal: Int32 = 0
  private var deaths = Deaths()

  /// When a supervisor that dies again and again is given up.
  struct Deaths {
    /// One that has not lived so long counts against its program.
    static let shortLife = Duration.milliseconds(500)
    static let shortLives = 5
    static let window = Duration.seconds(60)
    static let limit = 120

    private var times: [MonotonicTime] = []
    private var shortCount = 0

    init() {}

    /// False: no more.
    mutating func add(_ now: MonotonicTime, life: Duration) -> Bool {
      times.removeAll { now.since($0) > Self.window }
      times.append(now)
      shortCount = life < Self.shortLife ? shortCount + 1 : 0
      return shortCount < Self.shortLives && times.count <= Self.limit
    }
  }

  private init(_ supervisor: Supervisor, inherited: Set<CInt>) throws(SupervisionError) {
    let memory = try KeeperMemory()
    self.memory = memory
    self.supervisor = supervisor
    supervisor.keeper = memory
    supervisor.guardian.startsSibling = true
    supervisor.takeover.inherited = inherited
    // SAFETY: before there is a second thread or process.
    unsafe ProcessHandle.endOfOthers = { memory.end(of: $0, $1, waiting: $2) }
    unsafe OwnedFD.putOffClosing = { memory.putOff($0) }
    // The end of a child waits until it is asked for, and what is to end the VM does not end us first.
    for number in [SIGCHLD, SIGTERM, SIGINT, SIGHUP, SIGWINCH] { Signals.block(number) }
  }

  /// Those that nobody in this program has opened or adopted, but for the first three.
  private static var inheritedDescriptors: Set<CInt> { Set((3..<TakeoverWork.numberLimit).filter { fcntl($0, F_GETFD) == 0 }) }

  /// Becomes the keeper, and in its children the supervisor.
  static func run(_ supervisor: Supervisor) throws(SupervisionError) -> ExitCode {
    var keeper = try Keeper(supervisor, inherited: inheritedDescriptors)
    return try keeper.keep(.start)
  }

  /// The process is a VM's keeper already, and has executed this program.
  static func resume(_ known: KeeperState, _ state: [UInt8]) throws(SupervisionError) -> ExitCode {
    // What the state names came through exec too.
    var keeper = try Keeper(try Supervisor(keeping: known), inherited: inheritedDescriptors.intersection(known.inherited))
    keeper.signal = known.signal
    keeper.isEnding = known.signal != 0
    for end in known.ends { keeper.memory.record(end.process, code: end.code, status: end.status) }
    guard keeper.memory.publish(state) else { throw .launch("The state of this VM is too large to be handed on") }
    keeper.become()
    return try keeper.keep(.upgrade)
  }

  private func become() {
    _ = csandbox_become_keeper()
    ProcessWalls.setTitle("vm/\(supervisor.configuration.name)/keeper")
    Log.setSpeaker("martlet")
  }

  private mutating func keep(_ first: Occasion) throws(SupervisionError) -> ExitCode {
    var occasion = first
    while true {
      let start = MonotonicTime.now
      memory.withdrawOffer()
      let process = csandbox_fork_sharing()
      if process == 0 {
        ProcessWalls.setTitle("vm/\(supervisor.configuration.name)/supervisor")
        Log.setSpeaker("martlet")
        return occasion == .start ? supervisor.run() : supervisor.takeOver(occasion)
      }
      guard process > 0 else { throw .system(SystemError("fork the supervisor", Errno(-process))) }
      if occasion == .start { become() }
      // One that came while there was no supervisor.
      if occasion != .start, signal != 0 { kill(process, signal) }
      let end = wait(for: process)
      guard case .killed(let number) = end else {
        if let offer = memory.offered, memory.hasState {
          memory.obstacle = execute(offer.program, offer.state)
          occasion = .noUpgrade
          continue
        }
        if case .exited(let code) = end { return ExitCode(rawValue: code) }
        return .defect
      }
      let who = "The supervisor (pid \(process)) was killed by signal \(number)"
      guard !isEnding, memory.hasState else {
        Log.error("\(who) while the VM was \(isEnding ? "ending" : "starting or ending"); the VM has ended")
        return .signal(number)
      }
      let now = MonotonicTime.now
      guard deaths.add(now, life: now.since(start)) else {
        Log.error("\(who), too often; the VM has ended")
        return .signal(number)
      }
      Log.warning("\(who); another takes over")
      occasion = .death
    }
  }

  /// Becomes the installed program, which is to be the one behind the descriptor `examined`. Nobody but us has our table of
  /// descriptors now. Returns when that does not work.
  private func execute(_ examined: CInt, _ state: [UInt8]) -> Errno {
    var known = KeeperState()
    known.arguments = supervisor.upgrade.arguments
    known.userID = supervisor.userID
    known.mode = supervisor.walls.mode
    known.namespaces = supervisor.walls.namespaces
    known.identityBase = supervisor.identities.base
    known.directory = supervisor.programDirectory
    known.inherited = supervisor.takeover.inherited.sorted()
    known.signal = signal
    known.ends = memory.ends
    do {
      // By its path: which descriptor is which, the supervisor may have changed.
      let program = try OwnedFD.open("\(known.directory)/\(SpawnerUpgrade.programName)", pathOnly)
      let file = OwnedFD(owning: examined)
      let status = try? file.status()
      _ = file.release()
      guard let status, status.isSameFile(as: try program.status()) else { return .stale }
      let own = try Self.memory("keeper", known.encode())
      let theirs = try Self.memory("state", state)
      for file in [own.rawValue, theirs.rawValue] { _ = fcntl(file, F_SETFD, 0) }
      let arguments = [
        SpawnerUpgrade.programName, UpgradedProgram.Role.keep.argument, "--keeper=\(own.rawValue)", "--state=\(theirs.rawValue)",
        "--title=vm/\(supervisor.configuration.name)/supervisor",
      ]
      // SAFETY: the words live for the call.
      let result = unsafe ArgumentVector.lend(arguments) { words in unsafe csandbox_become_program(program.rawValue, words) }
      return Errno(-result)
    } catch { return error.errno }
  }

  private static func memory(_ name: String, _ bytes: [UInt8]) throws(SystemError) -> OwnedFD {
    let memory = try SharedMemory.growing(name: name)
    try memory.writeAll(bytes)
    return try OwnedFD.open("/proc/self/fd/\(memory.rawValue)", O_RDONLY)
  }

  /// Collects every child, and hands signals on, until the supervisor has ended.
  private mutating func wait(for supervisor: Int32) -> ProcessEnd {
    while true {
      var code: CInt = 0
      var status: CInt = 0
      // SAFETY: both are ours and alive for the call.
      let process = unsafe csandbox_collect_any(&code, &status)
      if process > 0 {
        memory.record(process, code: code, status: status)
        if process == supervisor { return code == CLD_EXITED ? .exited(code: status) : .killed(signal: status) }
        continue
      }
      var isTerminal: CInt = 0
      // SAFETY: as above.
      let number = unsafe csandbox_wait_signal(&isTerminal)
      // A terminal sends to the supervisor as well.
      guard number > 0, number != SIGCHLD else { continue }
      if number != SIGWINCH { signal = number }
      guard isTerminal == 0 else { continue }
      if number != SIGWINCH { isEnding = true }
      kill(supervisor, number)
    }
  }
}
