import CLinux
import ControlProtocol
import Glibc
import HostSystem
import Sandbox

/// An upgrade under way, and what the next one needs.
struct UpgradeWork {
  /// Those of `martlet run`.
  var arguments: [String] = []
  /// What the supervisor's filter allows; it was made at the VM's start and stays.
  var rules: [SystemCallRule] = []
  /// The number that the one allowed exec carries; only in the spawner.
  var cookie: UInt64 = 0
  /// How often this VM's supervisor has become another program.
  var count: UInt32 = 0
  /// The client who waits for one.
  var asker: Int?
  /// Nothing is to be changed.
  var isTrial = false
  var deadline = MonotonicTime.now

  /// How often is looked whether all processes have settled, and how long.
  static let interval = Duration.milliseconds(5)
  static let patience = Duration.seconds(10)

  /// The rules with that of the exec: execveat(AT_EMPTY_PATH) with the number in an argument that the kernel ignores.
  var installed: [SystemCallRule] {
    rules + [
      SystemCallRule(
        number: 322,
        conditions: [.init(argument: 5, test: .masked(.max, equals: cookie)), .init(argument: 4, test: .masked(.max, equals: 0x1000))],
        reason: "an upgrade")
    ]
  }
}

/// The supervisor becomes the installed program (protocol/upgrade.md).
extension Supervisor {
  func beginUpgrade(_ arguments: [String], for client: Int) {
    guard arguments.isEmpty || arguments == ["--dry-run"] else {
      return refuse(client, "The request is '\(ControlVerb.upgradeSupervisor.usage)'")
    }
    guard phase == .running else { return refuse(client, phase == .starting ? "The VM is still starting; ask again" : "The VM is ending") }
    guard upgrade.asker == nil else { return refuse(client, "An upgrade is under way; ask again") }
    guard spawner != nil else {
      return refuse(client, "The supervisor cannot be upgraded with --sandbox off: it has no spawner, which does half of the work")
    }
    upgrade.asker = client
    upgrade.isTrial = !arguments.isEmpty
    // It begins when everything has been handled that has come by now.
    upgrade.deadline = .now.advanced(by: UpgradeWork.patience)
  }

  /// Processes that are on their way are waited for; then all is done in one go.
  func goOnUpgrading(_ now: MonotonicTime) {
    guard phase == .running, let asker = upgrade.asker else { return }
    if let busy = processes.first(where: { $0.isAlive && !$0.isSettled })?.id ?? cares.values.first(where: \.isStarting)?.id
      ?? additions.keys.first ?? departures.keys.first ?? replacement?.id ?? pending.first(where: { $0.verb == .remove })?.device
    {
      if now < upgrade.deadline { return }
      upgrade.asker = nil
      return refuse(asker, "Not upgraded: device '\(busy)' is on its way; ask again")
    }
    do throws(SupervisionError) {
      try become(asker)
      reply(asker, .record(["ok": .bool(true), "changed": .bool(false)]))
    } catch { refuse(asker, Self.notUpgraded(error)) }
    upgrade.asker = nil
  }

  static func notUpgraded(_ error: SupervisionError) -> String { "Not upgraded, and nothing has changed: \(error.message ?? "it failed")" }

  /// Does not return when it works, unless it was a trial.
  private func become(_ asker: Int) throws(SupervisionError) {
    guard let spawner else { throw Spawner.lost }
    // With a keeper: what is gone back to.
    publish()
    let state = captureState(for: asker)
    let bytes = state.encode()
    // What cannot be read here would not be read there.
    guard (try? SupervisorState.decode(bytes)) == state else { throw .launch("The state of this VM is too large to be handed on") }
    guard (try? state.check()) == configuration else {
      throw .launch("The devices of this VM have been changed in a way that its command line and what was added since do not tell")
    }
    let prepared = try spawner.prepareUpgrade()
    try attempt { () throws(SystemError) in
      try prepared.memory.writeAll(bytes)
    } or: {
      .system($0)
    }
    prepared.memory.close()
    try examine(spawner)
    if upgrade.isTrial { return }
    let successor = try spawner.renew()
    let errno =
      if let keeper { handOver(prepared.program, successor, keeper, for: asker) } else {
        execute(prepared.program, successor, spawner, state)
      }
    throw .launch(errno.sentence)
  }

  /// The new program reads the state, as somebody who is not the supervisor. Nothing happens here meanwhile: what is examined
  /// is what is handed on.
  private func examine(_ spawner: Spawner) throws(SupervisionError) {
    let trial = try spawner.examine()
    guard let child = trial.child.take() else { throw Spawner.lost }
    let end = MonotonicTime.now.advanced(by: .milliseconds(configuration.deadlines.ready))
    var answer: [UInt8] = []
    var isLate = false
    while answer.count < 8192 {
      let left = end.since(.now)
      guard left > .zero, trial.answer.waitUntilReadable(left) else {
        isLate = true
        break
      }
      guard let piece = trial.answer.readOnce(limit: 1024), !piece.isEmpty else { break }
      answer += piece
    }
    // One that has answered has nothing more to do than to end.
    if !isLate { _ = try? child.process.fd.waitUntil(.readable, timeout: max(end.since(.now), .milliseconds(1))) }
    child.process.signal(SIGKILL)
    let outcome = child.process.waitForEnd()
    let text = String(decoding: answer, as: UTF8.self)
    if text == UpgradedProgram.acceptance, outcome == .exited(code: 0) { return }
    if case .failed(let stage, let errno) = child.poll() {
      throw .launch(
        "Cannot \(stage.action) of the installed \(SpawnerUpgrade.programName): \(errno.explanation); install all of Martlet's programs together"
      )
    }
    let who = "The installed \(SpawnerUpgrade.programName)"
    if isLate { throw .launch("\(who) does not say within \(configuration.deadlines.ready) ms whether it can take over") }
    if outcome == .killed(signal: SIGSYS) {
      let call = walls.callThatKilled(child.process.processID) ?? "a system call"
      throw .launch("\(who) calls \(call) when it starts, which the filter around this VM's supervisor does not allow")
    }
    if outcome == .exited(code: Int32(ExitCode.defect.rawValue)), text.last == "\n" {
      throw .launch("\(who) cannot take over. \(text.dropLast())")
    }
    throw .launch("\(who) \(outcome?.description ?? "is gone") before it said whether it can take over")
  }

  /// Becomes the program. Returns, with everything as it was, when that does not work.
  private func execute(_ program: FDBox, _ successor: Spawner.Successor, _ spawner: Spawner, _ state: SupervisorState) -> Errno {
    let kept = state.descriptors + [successor.state.number, successor.line.number, successor.process.number, spawner.endNumber]
    for number in kept { _ = clinux_fcntl(number, F_SETFD, 0) }
    let arguments = [
      SpawnerUpgrade.programName, UpgradedProgram.Role.takeOver.argument, "--state=\(successor.state.number)",
      "--line=\(successor.line.number)", "--spawner=\(successor.process.number)", "--spawner-pid=\(successor.number)",
      "--predecessor=\(spawner.endNumber)", "--title=vm/\(configuration.name)/supervisor",
    ]
    // Swift's runtime would look for its crash reporter.
    let environment = ["SWIFT_BACKTRACE=enable=no,swift-backtrace=/"]
    // SAFETY: both vectors live for the call.
    let result = unsafe ArgumentVector.lend(arguments) { words in
      unsafe ArgumentVector.lend(environment) { variables in unsafe clinux_become(program.number, words, variables, successor.cookie) }
    }
    for number in kept { _ = clinux_fcntl(number, F_SETFD, CLong(FD_CLOEXEC)) }
    successor.end()
    return Errno(-result)
  }

  /// In the new program, when it has taken over: a guardian of its own, and the answer.
  func finishUpgrade(_ state: SupervisorState) {
    if guardian.hasGuardian, let spawner {
      do throws(SupervisionError) {
        let new = try spawner.renewGuardian()
        if let process = new.process.take(), let pipe = new.pipe.take() {
          if let number = guardian.endNumber { loop.remove(number: number) }
          let old = guardian.replace(by: ProcessHandle(processID: new.number, adopting: process), pipe)
          // Before it there are two, and one of them is in a state.
          publish()
          old?.end()
          if let number = guardian.endNumber { try watch(number, .guardianEnd) }
        }
      } catch { say(.warning, "The guardian of before stays: \(error.message ?? "it failed")") }
    }
    say(.info, "The supervisor has been upgraded; the VM goes on")
    note(.upgraded, "", "the supervisor")
    reply(Int(state.asker), .record(["ok": .bool(true), "changed": .bool(true), "upgrades": .unsigned(UInt64(upgrade.count))]))
    for care in cares.values { openAhead(care) }
  }
}

extension Spawner {
  /// The spawner that takes this one's place.
  struct Successor {
    let number: Int32
    let process: FDBox
    let line: FDBox
    let state: FDBox
    let cookie: UInt64

    /// It is not wanted after all.
    func end() {
      if let fd = process.take() {
        let handle = ProcessHandle(processID: number, adopting: fd)
        handle.signal(SIGKILL)
        _ = handle.waitForEnd()
      }
      // At the end of its line it would do what the spawner of before has still to do.
      line.close()
    }
  }

  func prepareUpgrade() throws(SupervisionError) -> (memory: FDBox, program: FDBox) {
    let (_, _, received, _) = try askAll(.prepare)
    guard received.count == 2 else { throw Self.lost }
    return (received[0], received[1])
  }

  func examine() throws(SupervisionError) -> (child: FDChild, answer: FDBox) {
    let (_, number, received, _) = try askAll(.examine)
    guard received.count == 3, let pidfd = received[0].take(), let report = received[1].take() else { throw Self.lost }
    return (FDChild(StartedChild(process: ProcessHandle(processID: number, adopting: pidfd), report: report)), received[2])
  }

  func renew() throws(SupervisionError) -> Successor {
    let (_, number, received, text) = try askAll(.renew)
    guard received.count == 3, let cookie = UInt64(text) else {
      if received.count == 1, let fd = received[0].take() {
        let handle = ProcessHandle(processID: number, adopting: fd)
        handle.signal(SIGKILL)
        _ = handle.waitForEnd()
        throw .launch("The installed \(SpawnerUpgrade.programName) cannot take over: \(text)")
      }
      throw Self.lost
    }
    return Successor(number: number, process: received[0], line: received[1], state: received[2], cookie: cookie)
  }

  func renewGuardian() throws(SupervisionError) -> (number: Int32, process: FDBox, pipe: FDBox) {
    let (_, number, received, _) = try askAll(.renewGuardian)
    guard received.count == 2 else { throw Self.lost }
    return (number, received[0], received[1])
  }
}

extension Errno {
  /// Why the program of an upgrade was not executed.
  var sentence: String {
    self == .stale
      ? "The installed \(SpawnerUpgrade.programName) is another one than a moment ago; ask again"
      : "The new program cannot be executed: \(explanation)"
  }
}
