import CSandbox
import ControlProtocol
import Glibc
import HostSystem
import Sandbox

/// The process that was started, where the VM is to outlive its supervisor (protocol/upgrade.md): the parent of all the VM's
/// processes. It collects their ends, hands signals on, and puts another supervisor in the place of one that was killed. Its
/// table of descriptors is the supervisor's, so that nothing is closed when that dies. It reads nothing that anybody sends.
struct Keeper {
  private let memory: KeeperMemory
  /// Somebody has ordered the end.
  private var isEnding = false
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

  private init(_ memory: KeeperMemory) { self.memory = memory }

  /// Becomes the keeper, and in its children the supervisor.
  static func run(_ supervisor: Supervisor) throws(SupervisionError) -> ExitCode {
    let memory = try KeeperMemory()
    supervisor.keeper = memory
    supervisor.guardian.startsSibling = true
    supervisor.takeover.inherited = Set((3..<TakeoverWork.numberLimit).filter { fcntl($0, F_GETFD) == 0 })
    // SAFETY: before there is a second thread or process.
    unsafe ProcessHandle.endOfOthers = { memory.end(of: $0, $1, waiting: $2) }
    unsafe OwnedFD.putOffClosing = { memory.putOff($0) }
    // The end of a child waits until it is asked for, and what is to end the VM does not end us first.
    for number in [SIGCHLD, SIGTERM, SIGINT, SIGHUP, SIGWINCH] { Signals.block(number) }
    var keeper = Keeper(memory)
    var isFirst = true
    while true {
      let start = MonotonicTime.now
      let process = csandbox_fork_sharing()
      if process == 0 {
        ProcessWalls.setTitle("vm/\(supervisor.configuration.name)/supervisor")
        Log.setSpeaker("martlet")
        return isFirst ? supervisor.run() : supervisor.takeOver()
      }
      guard process > 0 else { throw .system(SystemError("fork the supervisor", Errno(-process))) }
      if isFirst {
        _ = csandbox_become_keeper()
        ProcessWalls.setTitle("vm/\(supervisor.configuration.name)/keeper")
        Log.setSpeaker("martlet")
      }
      isFirst = false
      let end = keeper.wait(for: process)
      guard case .killed(let signal) = end else {
        if case .exited(let code) = end { return ExitCode(rawValue: code) }
        return .defect
      }
      let who = "The supervisor (pid \(process)) was killed by signal \(signal)"
      guard !keeper.isEnding, memory.hasState else {
        Log.error("\(who) while the VM was \(keeper.isEnding ? "ending" : "starting or ending"); the VM has ended")
        return .signal(signal)
      }
      let now = MonotonicTime.now
      guard keeper.deaths.add(now, life: now.since(start)) else {
        Log.error("\(who), too often; the VM has ended")
        return .signal(signal)
      }
      Log.warning("\(who); another takes over")
    }
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
      guard number > 0, number != SIGCHLD, isTerminal == 0 else { continue }
      if number != SIGWINCH { isEnding = true }
      kill(supervisor, number)
    }
  }
}
