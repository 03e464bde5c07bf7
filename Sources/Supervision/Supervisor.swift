import CLinux
import ControlProtocol
import Glibc
import HostSystem
import Sandbox

/// Runs one VM. Single-threaded: one event loop, no waiting anywhere else once the VM runs.
///
/// 1. `start`: start the core; open everything; configure the core and let it run the guest.
/// 2. Meanwhile the devices are started, as many at a time as there are processors. As each back end says READY its socket
///    goes to the core. The guest waits for them where it looks at the PCI bus, and never for the carrier of its serial port.
/// 3. Watch: processes, the core's reports, signals, `martlet ctl`.
/// 4. `end`: the core first (it takes the rings back), then the devices (the end of their sockets), then what we made.
package final class Supervisor {
  enum Token: Sendable {
    case signals, core, controlListener
    case client(Int)
    case launchReport(Int)
    case ready(Int)
    case processEnd(Int)
    case spawnerEnd
    /// The guardian is gone.
    case guardianEnd
    /// The line on which a console process tells of the escape key.
    case escapeKey(Int)
  }

  enum Phase: Equatable {
    case starting
    case running
    /// The VM is over or ordered to be; the core should exit until the time given.
    case endingCore(MonotonicTime)
    /// The core is gone; devices should exit by themselves until the time given, then after SIGTERM, then by SIGKILL.
    case endingDevices(MonotonicTime, signalled: Bool)
    case ended
  }

  /// A request of a control client that the core has still to answer.
  struct PendingRequest {
    let sequence: UInt32
    let client: Int
    let verb: ControlVerb
    let deadline: MonotonicTime
    /// Of `remove`: the device, and what to say when it takes too long.
    var device: String?
    var lateAnswer: String?
  }

  var configuration: VMConfiguration
  /// Until our own walls stand.
  var programs: Programs?
  /// Where they are.
  var programDirectory = ""
  /// Under which uid the VM was started.
  let userID: UInt32
  var identities: Identities
  /// What the processes are walled in with.
  let walls: Walls
  /// The processes' control groups, or why there are none.
  let groups: ControlGroups?
  let groupsLack: String?
  /// The disks below images, for those whose limits name one.
  var storage: [String: StorageDevice] = [:]
  var loop: EventLoop<Token>
  let signals: OwnedFD
  let guardian: TerminalGuard

  var processes: [VMProcess] = []
  /// What is still to be started, in this order.
  var launches: [PlannedLaunch] = []
  /// All devices, in the order of their slots.
  var assignments: [DeviceAssignment] = []
  /// The core's ends of device sockets that wait for READY, by process index.
  var waitingSockets: [Int: (assignment: DeviceAssignment, socket: FDBox)] = [:]
  /// Devices whose jailed programs have still to make their sockets, by process index.
  var waitingAssignments: [Int: DeviceAssignment] = [:]
  var reports: [String: DeviceReport] = [:]
  /// Our ends of the lines on which consoles at our terminal tell of the escape key, by process index.
  var escapeLines: [Int: FDBox] = [:]
  /// The VM's own part of the locks on its images. Each is where the image was opened: here, or in the spawner.
  let claims = ImageClaims()
  /// A back end that is to take over from one that serves.
  var replacement: Replacement?
  /// In the spawner: those it has opened everything for, by device.
  var candidates: [String: ReplacementPlan] = [:]
  /// Arguments that programs were given behind their own, by device.
  var extraArguments: [String: [String]] = [:]
  /// What is known of every device for the day its back end dies.
  var cares: [String: DeviceCare] = [:]
  /// How each process but the core was started.
  var knownJailed: [String: (device: JailedDevice, identity: ChildIdentity?)] = [:]
  /// Process ids of jailed programs, to find their sockets by.
  var jailedNumbers: [String: Int32] = [:]
  var knownLaunches: [String: (program: String, launch: ChildLaunch)] = [:]
  /// In the spawner: of these no process has been started yet.
  var newLaunches: Set<String> = []
  /// Once our own walls stand.
  var spawner: Spawner?
  /// Where the processes of our own count, by device.
  var statistics: [String: StatisticsMemory] = [:]
  var channel: CoreChannel?
  var coreIndex = 0
  var coreIsReady = false
  /// The guest runs, with all its devices.
  var guestHasStarted = false
  /// When nothing was left to wait for but the core.
  var handOverTime: MonotonicTime?

  /// Devices that come, and those that go, by id.
  var additions: [String: Addition] = [:]
  var departures: [String: Departure] = [:]
  /// Places in `processes` of devices that are gone.
  var vacancies: [Int] = []

  /// Devices that exited with 0 while the VM runs, and when that is worth telling.
  var quietEnds: [(index: Int, deadline: MonotonicTime)] = []

  var phase = Phase.starting
  /// What the VM's end was, first cause wins.
  var outcome: ExitCode?
  var failure: SupervisionError?

  /// An upgrade under way, and what the next one needs.
  var upgrade = UpgradeWork()

  /// Where the state is kept for one that takes over; nil: nobody does.
  var keeper: KeeperMemory?
  var takeover = TakeoverWork()

  var control: ControlServer?
  var journal = EventJournal()
  /// What was said to and by the latest back end that each device has lost.
  var conversations: [String: String] = [:]
  /// How many of them have been written.
  var recordingCounts: [String: Int] = [:]
  var pending: [PendingRequest] = []

  /// Prepares to run; opens nothing of the guest's yet. Signals are blocked from here on.
  package init(_ configuration: VMConfiguration) throws(SupervisionError) {
    self.configuration = configuration
    let programs = try Programs()
    programDirectory = programs.directory
    self.programs = consume programs
    identities = try Identities(requested: configuration.uidBase)
    walls = try Walls(configuration, identities)
    (groups, groupsLack) = try Self.makeGroups(configuration)
    loop = try attempt { () throws(SystemError) in
      try EventLoop<Token>()
    } or: {
      .system($0)
    }
    signals = try attempt { () throws(SystemError) in
      try Signals.descriptor(for: [SIGTERM, SIGINT, SIGHUP, SIGWINCH])
    } or: {
      .system($0)
    }
    Signals.ignoreBrokenPipes()
    guardian = try TerminalGuard(
      title: "vm/\(configuration.name)",
      usesTerminal: configuration.console == .tty || configuration.serial == .tty, walls: walls.mode,
      groups: groups)
    userID = geteuid()
  }

  /// In a program that takes over. Signals are blocked already.
  init(
    _ configuration: VMConfiguration, userID: UInt32, identities: Identities, walls: consuming Walls, signals: consuming OwnedFD,
    guardian: TerminalGuard, groups: ControlGroups?, groupsLack: String?
  ) throws(SupervisionError) {
    self.configuration = configuration
    self.groups = groups
    self.groupsLack = groupsLack
    self.userID = userID
    self.identities = identities
    self.walls = walls
    loop = try attempt { () throws(SystemError) in
      try EventLoop<Token>()
    } or: {
      .system($0)
    }
    self.signals = signals
    self.guardian = guardian
  }

  /// Runs the VM to its end, cleans up, and gives the exit code.
  package func run() -> ExitCode {
    do throws(SupervisionError) {
      if phase == .starting { try start() }
      while phase != .ended {
        let events = try attempt { () throws(SystemError) in
          try loop.wait(timeout: nextDeadline().map { $0.since(.now) })
        } or: {
          .system($0)
        }
        for event in events { try handle(event.token) }
        try checkDeadlines(.now)
        publish()
      }
    } catch { fail(error) }
    for process in processes { process.kill() }
    control = nil
    for console in configuration.consoles { if let spawner { spawner.forget(console.id) } else { forget(console.id) } }
    // A guardian that was killed is stood in for.
    if !guardian.restore() {
      if let spawner { spawner.tidy() } else { guardian.tidy() }
    }
    if let failure {
      if let message = failure.message { say(.error, message) }
      return failure.exitCode
    }
    return outcome ?? .defect
  }

  /// The first failure is the one that is told.
  func fail(_ error: SupervisionError) {
    keeper?.retract()
    if failure == nil, outcome == nil { failure = error }
    phase = .ended
  }

  /// A line for the person at the terminal, which may be in raw mode.
  func say(_ level: Log.Level, _ message: String) {
    switch level {
    case .error: Log.error(message)
    case .warning: Log.warning(message)
    default: Log.write("martlet: \(message)", to: 2)
    }
  }

  var core: VMProcess? { processes.indices.contains(coreIndex) ? processes[coreIndex] : nil }
}
