import CSandbox
import Glibc
import HostSystem
import Sandbox

extension Supervisor {
  /// RLIMIT_NOFILE: a pidfd and a line for each process, the clients of `martlet ctl`, and our own few.
  private static let fileLimit: UInt64 = 256
  /// CAP_KILL: the others have uids of their own. It also carries the signal that they get when we die. Processes whose pidfd
  /// we do not have are out of its reach: the list has no other call that sends signals.
  private static let killCapability: UInt64 = 1 << 5

  /// The walls around the supervisor itself, once every process is started: from here on it opens nothing, starts nothing
  /// and is nobody. Everything it still does goes through descriptors it has; files are unlinked by the guardian, processes
  /// that died are started again by the spawner.
  func raiseWalls() throws(SupervisionError) {
    guard walls.mode != .off else {
      for care in cares.values { openAhead(care) }
      return
    }
    let rules = SystemCallList.supervisor.rules
    upgrade.rules = Self.ownRules
    upgrade.cookie = .random(in: 1 ... .max)
    let installed = keeper == nil ? upgrade.installed : rules
    spawner = try attempt { () throws(SystemError) in
      try Spawner.fork(self)
    } or: {
      .system($0)
    }
    if let spawner { try watch(spawner.endNumber, .spawnerEnd) }
    // The spawner has it now, and nobody else.
    upgrade.cookie = 0
    guardian.seal()
    // Ours to open until the walls stand, and not in the spawner's fork.
    for care in cares.values { openAhead(care, byUs: true) }
    // With a keeper it is one that successors can have too.
    try confine(as: keeper == nil ? identities.next() : identities.last, installed)
  }

  /// What this program's filter allows, as states say it.
  static var ownRules: [SystemCallRule] {
    SystemCallList.supervisor.rules.map {
      SystemCallRule(number: $0.number, conditions: $0.conditions, reason: "in force", failure: $0.failure)
    }
  }

  /// The walls themselves, from here on for ever.
  func confine(as identity: ChildIdentity?, _ installed: [SystemCallRule]) throws(SupervisionError) {
    var confinement = csandbox_confinement(
      // A pid namespace would only be for children.
      namespaces: walls.namespaces.subtracting(.process).rawValue, change_identity: identity == nil ? 0 : 1,
      uid: identity?.uid ?? 0, gid: identity?.gid ?? 0, capabilities: identity == nil ? 0 : Self.killCapability,
      file_limit: Self.fileLimit)
    var step: Int32 = 0
    // SAFETY: both are ours and alive for the call.
    let error = unsafe csandbox_confine(&confinement, &step)
    func failed(_ error: SandboxError) -> SupervisionError { .launch(error.message) }
    if error != 0 {
      let stage = Stage(rawValue: step) ?? .directory
      throw .launch(
        "Cannot \(stage == .fork ? "make namespaces" : stage.action) of martlet-supervisor: \(Errno(error).explanation)\(stage.remedy)")
    }
    // The change of ids has taken it away.
    if let keeper, csandbox_die_with(keeper.processID) != 0 { throw .launch("The keeper has ended") }
    do {
      // With a keeper it is that which becomes another program.
      let directory: CInt =
        switch programs {
        case .some(let programs): keeper == nil ? programs.number : -1
        case .none: -1
        }
      try ProcessWalls.closeFiles(walls.mode, keepsSignals: true, programs: directory)
      // A successor's is not what it was: the number is something else's by now.
      if phase != .starting { programs = nil }
      try ProcessWalls.closeCalls(installed, walls.mode)
    } catch { throw failed(error) }
  }
}
