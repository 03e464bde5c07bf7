import CLinux
import CSandbox
import ControlProtocol
import Glibc
import HostSystem

/// Orders that name something new of the host. The spawner takes none from the supervisor, which may be somebody else by now:
/// it reads them from the connection of the client who gave them, whose user the kernel vouches for.
extension Spawner {
  /// What an order brought.
  struct Opened {
    /// What the planner asks for, in its order.
    let resources: [FDBox]
    /// For the person, such as the path of a pseudo-terminal.
    let text: String
    /// Whether a process of ours, or one in a jail, takes the id that was offered.
    let takesIdentity: Bool
    /// Where its process counts; nil where none of ours does.
    var statistics: FDBox?
  }

  /// Said of a candidate for which an image was claimed.
  static let otherImage = "other image"
  /// Longer orders are refused.
  static let orderLimit = 4096

  /// The line that waits in a client's connection, without its end; nothing is taken out.
  static func waitingLine(_ client: borrowing OwnedFD) -> [UInt8]? {
    let bytes = UnixSocket.peek(client, limit: orderLimit)
    return bytes.firstIndex(of: 10).map { Array(bytes[..<$0]) }
  }

  /// Who may give orders: root, and whoever started the VM. Nobody of this VM: not the supervisor, which could connect to itself, not what
  /// it has started, which could make a connection for it, and not this process, which makes those to jailed programs.
  static func check(_ client: borrowing OwnedFD, _ supervisor: Supervisor) throws(SupervisionError) {
    guard let peer = try? UnixSocket.peer(of: client), peer.uid == 0 || peer.uid == supervisor.userID else {
      throw .launch("Only root and the user who started the VM can give it programs and files")
    }
    guard isOutside(peer.pid) else {
      throw .launch("Who gives this order cannot be told; only root and the user who started the VM can")
    }
  }

  /// Whether a process is neither this one, nor the one above it, nor comes from that; false for one that is gone. Where supervisors come
  /// and go the one above is theirs as well.
  private static func isOutside(_ process: Int32) -> Bool {
    let above = getppid()
    guard process != getpid() else { return false }
    var process = process
    // More generations than any honest client has.
    for _ in 0..<256 {
      if process == above { return false }
      if process <= 1 { return process == 1 }
      guard let next = parent(of: process) else { return false }
      // A kernel thread, or the first of a namespace that is ours too.
      if next == 0 { return true }
      process = next
    }
    return false
  }

  /// Whether a process is one that this one, or those it works for, has started.
  static func isOfThisVM(_ process: Int32) -> Bool { process > 0 && process != getpid() && parent(of: process) == getppid() }

  /// The parent's process id; nil when there is no such process.
  private static func parent(of process: Int32) -> Int32? {
    guard let bytes = try? OwnedFD.open("/proc/\(process)/stat", O_RDONLY).readToEnd(limit: 4096) else { return nil }
    // A name can hold anything, so what follows its last bracket counts.
    guard let end = bytes.lastIndex(of: UInt8(ascii: ")")) else { return nil }
    let words = String(decoding: bytes[bytes.index(after: end)...], as: UTF8.self).split(separator: " ")
    return words.count > 1 ? Int32(words[1]) : nil
  }

  /// One of this VM's ids that none of its processes has. nil: ids are kept. Where they are not there is no process without one: it would
  /// be root's.
  static func identity(_ text: String, _ supervisor: Supervisor) throws(SupervisionError) -> ChildIdentity? {
    if supervisor.identities.base == nil, text.isEmpty { return nil }
    guard let number = UInt32(text) else { throw .launch("The order offers no id for the device's process, which would be root's") }
    let known = supervisor.knownLaunches.values.map(\.launch.identity) + supervisor.knownJailed.values.map(\.identity)
    let supervisorIsLast = supervisor.configuration.outlivesSupervisor
    guard let identity = supervisor.identities.identity(of: number, supervisorIsLast: supervisorIsLast), !known.contains(identity) else {
      throw .launch("The id \(number) is not free in this VM")
    }
    return identity
  }

  /// Carries out an order in the spawner: opens what it names, and remembers how its process is started.
  static func serve(
    order offered: String, _ client: borrowing OwnedFD, null: CInt, _ supervisor: Supervisor
  ) throws(SupervisionError) -> Opened {
    try check(client, supervisor)
    guard let line = waitingLine(client).flatMap({ String(validating: $0, as: UTF8.self) }) else {
      throw .launch("The order has not come in one piece, or is too long")
    }
    let identity = try identity(offered, supervisor)
    let words = line.split(separator: " ", maxSplits: 1).map(String.init)
    if words.count == 2, words[0] == ReplaceOrder.verb { return try serve(replacement: line, identity, null: null, supervisor) }
    guard words.count == 2, words[0] == DeviceOrder.verb else { throw .launch("This is no order to add a device") }
    let (plan, text) = try supervisor.plan(Supervisor.order(words[1]), opened: nil)
    let id = plan.assignment.id
    do throws(SupervisionError) {
      switch plan.backEnd {
      case .external(let socket): return Opened(resources: [socket], text: text, takesIdentity: false)
      case .jailed(let jailed):
        let identity = jailed.keepsIdentity ? nil : identity
        try checkCapabilities(jailed)
        _ = try jailed.plan(identity, null: null, socket: null)
        supervisor.knownJailed[id] = (jailed, identity)
        return Opened(resources: [], text: text, takesIdentity: !jailed.keepsIdentity)
      case .program(let program, let arguments, let resources, let isOnTerminal):
        let launch = supervisor.backEndLaunch(
          id, program, ["--fd=3"] + arguments, resourceCount: resources.count, queueCount: plan.assignment.queueSizes.count,
          isOnTerminal: isOnTerminal, identity: identity)
        supervisor.knownLaunches[id] = (program, launch)
        supervisor.newLaunches.insert(id)
        // The supervisor has them; here they are counted, for who takes over one day.
        if let care = supervisor.cares[id], care.image == nil { care.resources = resources.map { _ in FDBox() } }
        let statistics = try attempt { () throws(SystemError) in
          try StatisticsMemory(queueCount: plan.assignment.queueSizes.count)
        } or: {
          .system($0)
        }
        return Opened(resources: resources, text: text, takesIdentity: true, statistics: statistics.file)
      }
    } catch {
      supervisor.forget(id)
      throw error
    }
  }
}

extension Spawner {
  /// Opens what a candidate needs, and remembers how it is started, beside what is known of the device.
  private static func serve(
    replacement line: String, _ identity: ChildIdentity?, null: CInt, _ supervisor: Supervisor
  ) throws(SupervisionError) -> Opened {
    let order: ReplaceOrder
    do { order = try ReplaceOrder(line: line) } catch { throw .launch(error.message) }
    let id = order.id
    let name = Supervisor.candidateName(id)
    supervisor.dropCandidate(id)
    let plan = try supervisor.plan(order, opened: nil)
    supervisor.candidates[id] = plan
    supervisor.cares[name] = plan.care
    do throws(SupervisionError) {
      switch plan.care.kind {
      case .external: return Opened(resources: plan.resources, text: "", takesIdentity: false)
      case .jailed(let jailed):
        let identity = jailed.keepsIdentity ? nil : identity
        try checkCapabilities(jailed)
        _ = try jailed.plan(identity, null: null, socket: null)
        supervisor.knownJailed[name] = (jailed, identity)
        return Opened(resources: [], text: "", takesIdentity: !jailed.keepsIdentity)
      case .program(let program, let arguments, let isOnTerminal):
        let queueCount = supervisor.assignments.first { $0.id == id }?.queueSizes.count ?? 1
        let launch = supervisor.backEndLaunch(
          name, program, ["--fd=3"] + arguments, resourceCount: plan.resources.count, queueCount: queueCount, isOnTerminal: isOnTerminal,
          identity: identity)
        supervisor.knownLaunches[name] = (program, launch)
        // Of a tap or a terminal the supervisor has its own.
        return Opened(
          resources: plan.care.image == nil ? [] : plan.resources, text: supervisor.claims.has(name) ? otherImage : "", takesIdentity: true)
      }
    } catch {
      supervisor.candidates[id] = nil
      supervisor.dropCandidate(id)
      throw error
    }
  }
}

extension Spawner {
  /// Whether it can start this program, which may be to keep what no program of the VM has kept so far.
  private static func checkCapabilities(_ jailed: JailedDevice) throws(SupervisionError) {
    let missing = jailed.capabilities.filter { csandbox_has_capability(Int32($0)) != 1 }.map { Capabilities.names[$0] }
    guard missing.isEmpty else {
      throw .launch(
        "The profile of \(jailed.id) keeps \(missing.joined(separator: ", ")), which this VM cannot give away any more; take the line out of "
          + "the profile, or start the VM with the device")
    }
  }
}

extension Supervisor {
  static func order(_ words: String) throws(SupervisionError) -> DeviceOrder {
    do { return try DeviceOrder(words: words) } catch { throw .launch(error.message) }
  }

  /// Plans one more device and takes it into the configuration; when that fails, nothing has changed.
  /// - Parameter opened: what the spawner has opened for it; nil to open it here.
  func plan(_ order: DeviceOrder, opened: [FDBox]?) throws(SupervisionError) -> (plan: DevicePlan, text: String) {
    let before = configuration
    let after: (configuration: VMConfiguration, id: String)
    do { after = try before.adding(order) } catch { throw .launch(error.message) }
    do throws(SupervisionError) {
      configuration = after.configuration
      var patient = configuration
      // Others wait meanwhile: who does not accept at once is not there.
      patient.deadlines.connect = min(patient.deadlines.connect, 200)
      if opened == nil { try checkLimits(of: after.id) }
      var planner = DevicePlanner(
        configuration: patient, guardian: guardian, claims: claims, host: { [self] in hostWalls() }, opened: opened)
      let plan = try planner.planDevice(after.id)
      cares[after.id] = try care(for: plan, isOpenedHere: opened == nil)
      return (plan, planner.announcements.joined(separator: "; "))
    } catch {
      configuration = before
      throw error
    }
  }

  /// The device is no longer the VM's.
  func forget(_ id: String) {
    configuration = configuration.removing(id)
    cares[id] = nil
    knownLaunches[id] = nil
    knownJailed[id] = nil
    jailedNumbers[id] = nil
    newLaunches.remove(id)
    storage[id] = nil
    // Behind our walls this is the spawner's.
    if spawner == nil { groups?.drop(id) }
    claims.release(id)
    guardian.forget(id)
  }
}
