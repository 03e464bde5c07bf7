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
    var state = captureState(for: 0)
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

  // MARK: after

  /// In a new child of the keeper, where nothing has happened since the keeper was started: behind the walls first, the state then.
  func takeOver() -> ExitCode {
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
      try successor.finishTakeover(state)
      return successor.run()
    } catch {
      Log.error("The supervisor that takes over cannot: \(error.message ?? "it failed"); the VM has ended")
      return .defect
    }
  }

  /// What was open and is in no state was on its way; processes among it are ended.
  private func closeStrays(keeping kept: Set<CInt>) {
    for number in 3..<TakeoverWork.numberLimit where !kept.contains(number) {
      _ = clinux_pidfd_send_signal(number, SIGKILL)
      close(number)
    }
  }

  private func finishTakeover(_ state: SupervisorState) throws(SupervisionError) {
    takeover.count &+= 1
    channel?.isPeeking = true
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
    tellClients()
    note(.takenOver, "", "the supervisor was killed", ["pid": UInt64(getpid()), "takeovers": UInt64(takeover.count)])
    say(.info, "Another supervisor (pid \(getpid())) has taken over; the VM goes on")
    if case .sent(let sequence)? = channel?.send(.look) { takeover.look = sequence }
    publish()
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
  private func tellClients() {
    guard let control else { return }
    let waiting = Set(pending.map(\.client) + (replacement.map { [$0.client] } ?? []))
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
