import CLinux
import CSandbox
import ControlProtocol
import Glibc
import HostSystem
import Sandbox

/// What it takes to be taken over, and to take over.
struct TakeoverWork {
  /// Something of the spawner's that is about to change, and is undone when nobody comes to finish it.
  enum Intent {
    case addition(String)
    case replacement(String)
  }

  /// How often this VM's supervisor was killed and another took over.
  var count: UInt32 = 0
  var intent: Intent?
  /// Descriptors that were there when the program started.
  var inherited: Set<CInt> = []
  /// The core has been asked how its devices are.
  var look: UInt32?
  var hasWarned = false

  /// All descriptors of a supervisor have smaller numbers.
  static let numberLimit: CInt = 1024
  /// What the supervisor before may have asked the core and not remembered.
  static let sequenceGap: UInt32 = 1 << 12
}

/// The supervisor is killed, and another takes the VM over (protocol/upgrade.md).
extension Supervisor {
  // MARK: before

  /// Remembers how things are, for a successor. Done after every change: what follows from a message is remembered before that
  /// is taken out of its socket, and what the spawner is to change before it is asked.
  func publish() {
    guard let keeper, phase == .running, let spawner else { return }
    var state = captureState(for: upgrade.asker ?? 0)
    state.upgradeCount = upgrade.count
    state.spawner = spawner.captured
    state.unfinished = unfinished
    if let replacement, case .exchanging(let sequence) = replacement.step {
      var care = replacement.care.captured
      // Of a tap or a terminal: those of the one before.
      care.resources = []
      state.replacement = .init(
        line: replacement.line, client: UInt32(clamping: replacement.client), sequence: sequence, care: care,
        changes: replacement.configuration.changes, extraArguments: replacement.extraArguments,
        hasOtherImage: replacement.hasOtherImage)
    }
    guard !keeper.publish(state.encode()), !takeover.hasWarned else { return }
    takeover.hasWarned = true
    say(.warning, "The state of this VM is too large to be kept; it ends when its supervisor is killed")
  }

  private var unfinished: SupervisorState.Unfinished {
    var unfinished = SupervisorState.Unfinished()
    for (index, process) in processes.enumerated() where process.isAlive {
      var isOnItsWay = !process.isSettled
      if let care = cares[process.id], case .succeeding = care.step { isOnItsWay = true }
      if let care = care(ofSpare: process.id), care.spare?.isReady != true { isOnItsWay = true }
      if isOnItsWay { unfinished.processes.append(index) }
    }
    unfinished.additions = additions.keys.sorted()
    unfinished.departures = departures.keys.sorted()
    unfinished.replaced = replacement?.id
    switch takeover.intent {
    case .addition(let id): unfinished.additions.append(id)
    case .replacement(let id): unfinished.replaced = id
    case nil: break
    }
    unfinished.message = channel?.handledFront ?? []
    return unfinished
  }

  /// Ends, for the keeper to become the program of an upgrade. Returns, with everything as it was, when that cannot be.
  func handOver(_ program: FDBox, _ successor: Spawner.Successor, _ keeper: KeeperMemory, for asker: Int) -> Errno {
    var state = captureState(for: asker)
    state.spawner = .init(processID: successor.number, pidfd: successor.process.number, line: successor.line.number)
    state.unfinished = unfinished
    let kept = state.descriptors
    for number in kept { _ = clinux_fcntl(number, F_SETFD, 0) }
    // The table of descriptors is the keeper's too: nothing is closed.
    if keeper.offer(state.encode(), program: program.number) { _exit(0) }
    for number in kept { _ = clinux_fcntl(number, F_SETFD, CLong(FD_CLOEXEC)) }
    successor.end()
    return .tooBig
  }

  // MARK: after

  /// In a keeper that has become another program: what its children are forked from.
  convenience init(keeping known: KeeperState) throws(SupervisionError) {
    let configuration: VMConfiguration
    do { configuration = try VMConfiguration(arguments: known.arguments) } catch { throw .launch(error.message) }
    let signals = try attempt { () throws(SystemError) in
      try Signals.descriptor(for: [])
    } or: {
      .system($0)
    }
    try self.init(
      configuration, userID: known.userID, identities: Identities(base: known.identityBase, used: 0),
      walls: Walls(mode: known.mode, namespaces: known.namespaces, log: nil), signals: signals,
      guardian: TerminalGuard(title: "vm/\(configuration.name)", walls: known.mode, SupervisorState()), groups: nil, groupsLack: nil)
    upgrade.arguments = known.arguments
    programDirectory = known.directory
  }

  /// In a new child of the keeper, where nothing has happened since the keeper was started: behind the walls first, the state then.
  func takeOver(_ occasion: Keeper.Occasion) -> ExitCode {
    // Everything this object has is the successor's now, under the same numbers.
    _ = unsafe Unmanaged.passRetained(self)
    do throws(SupervisionError) {
      guard let keeper else { return .defect }
      try confine(as: identities.last, SystemCallList.supervisor.rules)
      let state: SupervisorState
      let configuration: VMConfiguration
      do throws(StateError) {
        state = try SupervisorState.decode(keeper.state)
        configuration = try state.check()
      } catch { throw .launch(error.message) }
      guard let known = state.spawner else { throw .launch("The state has no spawner") }
      keeper.putOffClosing()
      closeStrays(keeping: takeover.inherited.union(state.descriptors))
      let spawner = Spawner(
        try UpgradedProgram.adopt(known.line), ProcessHandle(processID: known.processID, adopting: try UpgradedProgram.adopt(known.pidfd)))
      let successor = try Supervisor(resuming: state, configuration, spawner)
      successor.keeper = keeper
      successor.takeover.inherited = takeover.inherited
      successor.channel?.isPeeking = true
      if occasion == .upgrade { successor.finishUpgrade(state) } else { try successor.finishTakeover(state, occasion) }
      // Its new size may have been told to one that was not there any more.
      for process in successor.processes where process.isOnTerminal { process.signal(SIGWINCH) }
      successor.publish()
      return successor.run()
    } catch {
      Log.error("The supervisor that takes over cannot: \(error.message ?? "it failed"); the VM has ended")
      return .defect
    }
  }

  /// What was open and is in no state was on its way; processes among it are ended.
  private func closeStrays(keeping kept: Set<CInt>) {
    let strays = (3..<TakeoverWork.numberLimit).filter { !kept.contains($0) }
    // Spawners and guardians first: the end of a line or a pipe would be their order to tidy up.
    for number in strays { _ = clinux_pidfd_send_signal(number, SIGKILL) }
    for number in strays { close(number) }
  }

  private func finishTakeover(_ state: SupervisorState, _ occasion: Keeper.Occasion) throws(SupervisionError) {
    channel?.skip(TakeoverWork.sequenceGap)
    if spawner?.synchronize() != true {
      say(.warning, "The spawner has ended or does not answer; device processes that die are not started again")
    }
    if let known = state.replacement { try resume(known) }
    // Their ends are handled as any process's: by the policy of their devices.
    for index in state.unfinished.processes { processes[index].signal(SIGKILL) }
    if state.replacement == nil { undoReplacement(state.unfinished.replaced) }
    for id in state.unfinished.additions where departures[id] == nil {
      _ = channel?.send(.unplug(id: id, isForced: true))
      for index in processIndices(of: id) { processes[index].signal(SIGKILL) }
      depart(id, [])
    }
    for id in state.unfinished.departures { depart(id, []) }
    if occasion == .noUpgrade {
      refuse(Int(state.asker), Self.notUpgraded(.launch(keeper?.obstacle.sentence ?? "it failed")))
    } else {
      takeover.count &+= 1
      note(.takenOver, "", "the supervisor was killed", ["pid": UInt64(getpid()), "takeovers": UInt64(takeover.count)])
      say(.info, "Another supervisor (pid \(getpid())) has taken over; the VM goes on")
    }
    tellClients(but: occasion == .noUpgrade ? Int(state.asker) : nil)
    if case .sent(let sequence)? = channel?.send(.look) { takeover.look = sequence }
    for care in cares.values { openAhead(care) }
  }

  /// The core changes over, or has: its answer comes.
  private func resume(_ known: SupervisorState.Replacement) throws(SupervisionError) {
    let order: ReplaceOrder
    var configuration: VMConfiguration
    do {
      order = try ReplaceOrder(line: known.line)
      configuration = try VMConfiguration(arguments: upgrade.arguments)
      try configuration.follow(known.changes)
    } catch { throw .launch(error.message) }
    let care = try DeviceCare(known.care, configuration)
    if case .jailed(let device) = care.kind { device.id = Self.candidateName(order.id) }
    if care.image == nil, case .program = care.kind { care.started(cares[order.id]?.resources ?? []) }
    cares[Self.candidateName(order.id)] = care
    replacement = Replacement(
      order: order, line: known.line, client: Int(known.client), care: care, configuration: configuration,
      extraArguments: known.extraArguments, hasOtherImage: known.hasOtherImage, step: .exchanging(sequence: known.sequence),
      deadline: .now.advanced(by: Self.exchangeGrace))
  }

  /// Whoever was to take over, or has been replaced, ends; the device's back end is who it is.
  private func undoReplacement(_ id: String?) {
    guard let id else { return }
    for index in processes.indices where [Self.candidateName(id), Self.retiredName(id)].contains(processes[index].id) {
      loop.remove(number: processes[index].endNumber)
      processes[index].kill()
      if let identity = processes[index].retire() { identities.release(identity) }
      vacancies.append(index)
    }
    spawner?.drop(id)
    _ = channel?.send(.forget(id: id))
  }

  /// Whose request the core works on gets the answer. The others may or may not have been served.
  private func tellClients(but asker: Int?) {
    guard let control else { return }
    let waiting = Set(pending.map(\.client) + (replacement.map { [$0.client] } ?? []) + (asker.map { [$0] } ?? []))
    for id in control.unclear where !waiting.contains(id) {
      refuse(id, "The supervisor was killed meanwhile, and another has taken over; look whether it was done, and ask again if not")
      if let number = control.drop(id) { loop.remove(number: number) }
    }
  }

  /// The core has said how its devices are. A back end that it has, and we believed lost: the answer to that was not remembered.
  func reconcile(_ report: DeviceReport) {
    guard takeover.look != nil, report.state == .connected || report.state == .active, let care = cares[report.id],
      case .external = care.kind, case .due = care.step
    else { return }
    care.succeeded()
  }
}
