import CLinux
import ControlProtocol
import Glibc
import HostSystem
import Sandbox

/// The spawner's part in an upgrade (protocol/upgrade.md), between its orders.
final class SpawnerUpgrade {
  /// The new program, opened once: what is examined is what is executed.
  private var program: FDBox?
  /// The supervisor's state.
  private var memory: FDBox?
  private var isSealed = false

  static let programName = "martlet-supervisor"
  /// The descriptors that every spawner is given; those of the images it owns follow.
  static let agreedDescriptors = 7

  /// Memory for the state, and the new program.
  func prepare(_ supervisor: Supervisor) throws(SupervisionError) -> [FDBox] {
    let file =
      switch supervisor.programs {
      case .some(let programs): try programs.open(Self.programName)
      case .none: throw .program(name: Self.programName, directory: "", .noEntry)
      }
    let copies = try attempt { () throws(SystemError) in
      let memory = try SharedMemory.growing(name: "state")
      return [FDBox(try memory.duplicate()), FDBox(try file.duplicate()), FDBox(memory)]
    } or: {
      .system($0)
    }
    memory = copies[2]
    isSealed = false
    program = FDBox(file)
    return Array(copies[..<2])
  }

  /// The state, which nobody changes any more, from its beginning and for reading only.
  private func sealedState(limit: Int) throws(SupervisionError) -> OwnedFD {
    guard let memory, program != nil else { throw .launch("No upgrade has been prepared") }
    return try attempt { () throws(SystemError) in
      if !isSealed { try SharedMemory.seal(memory.number) }
      isSealed = true
      let state = try OwnedFD.open("/proc/self/fd/\(memory.number)", O_RDONLY)
      guard try state.status().byteCount <= UInt64(limit) else { throw SystemError("hand on a state", .tooBig) }
      return state
    } or: {
      .system($0)
    }
  }

  /// Starts the new program on the state, behind the walls that are around the supervisor, as a process that is nobody. Its
  /// answer comes through a pipe, the last of the descriptors.
  func examine(null: CInt, _ supervisor: Supervisor) throws(SupervisionError) -> (Int32, [FDBox]) {
    let state = try sealedState(limit: SupervisorState.limit)
    let answer = try Self.pipe()
    var launch = ChildLaunch(
      arguments: [Self.programName, UpgradedProgram.Role.examine.argument], descriptors: [null, answer.writing.number, 2, state.rawValue],
      identity: supervisor.identities.last, namespaces: supervisor.walls.namespaces)
    launch.cookie = supervisor.upgrade.cookie
    // Its own process id is 1 where it has a namespace of its own; where not, `self` is nobody.
    let own: Int32 = supervisor.walls.namespaces.contains(.process) ? 1 : 0
    launch.filter = ProcessWalls.filter(supervisor.upgrade.installed, supervisor.walls.mode, processID: own)?.instructions ?? []
    let child = try start(launch, asSibling: true)
    return (child.process.processID, [try Spawner.copy(child.process.fd), try Spawner.copy(child.report), answer.reading])
  }

  /// Starts the new program as a spawner that knows what this one knows. Gives its end of the order line, its pidfd, and the
  /// supervisor's state; and the number that exec wants. When it does not come up: only its pidfd, because it is the
  /// supervisor's child to collect, and why.
  func renew(null: CInt, _ supervisor: Supervisor) throws(SupervisionError) -> (Int32, [FDBox], String) {
    let state = try sealedState(limit: SupervisorState.limit)
    let held = supervisor.claims.numbers.map(\.number).filter { $0 >= 0 }
    guard Self.agreedDescriptors + held.count <= ChildLaunch.descriptorLimit else {
      throw .launch("Too many images have been added to this VM to be handed on")
    }
    let own = try attempt { () throws(SystemError) in
      let memory = try SharedMemory.growing(name: "spawner")
      try memory.writeAll(supervisor.capturedSpawner.encode())
      try SharedMemory.seal(memory.rawValue)
      return try OwnedFD.open("/proc/self/fd/\(memory.rawValue)", O_RDONLY)
    } or: {
      .system($0)
    }
    let pair = try Supervisor.pair(.sequencedPacket)
    let directory: CInt =
      switch supervisor.programs {
      case .some(let programs): programs.number
      case .none: -1
      }
    let title = "--title=vm/\(supervisor.configuration.name)/spawner"
    var launch = ChildLaunch(
      arguments: [Self.programName, UpgradedProgram.Role.spawner.argument, title],
      descriptors: [
        supervisor.guardian.isOnTerminal ? 0 : null, null, 2, pair.second.rawValue, own.rawValue, directory, null,
      ] + held)
    launch.isHelper = true
    let child = try start(launch, asSibling: true)
    let ours = FDBox(pair.first)
    // The other end is the child's alone: its end is told by it.
    _ = consume pair.second
    guard let line = ours.take() else { throw Spawner.lost }
    let pidfd = try Spawner.copy(child.process.fd)
    var why = "its spawner says nothing"
    if (try? line.waitUntil(.readable, timeout: .milliseconds(supervisor.configuration.deadlines.ready))) == true {
      let (answer, _) = Spawner.receive(line)
      if answer == [1] { return (child.process.processID, [pidfd, FDBox(line), FDBox(state)], String(supervisor.upgrade.cookie)) }
      why = answer.map { String(decoding: $0.dropFirst(), as: UTF8.self) } ?? "its spawner ended before it was ready"
      if case .failed(let stage, let errno) = child.poll() { why = "cannot \(stage.action): \(errno.explanation)" }
    }
    // Before its line ends: it would do what this one has still to do.
    withExtendedLifetime(line) { child.process.signal(SIGKILL) }
    return (child.process.processID, [pidfd], why)
  }

  private func start(_ launch: ChildLaunch, asSibling: Bool) throws(SupervisionError) -> StartedChild {
    guard let program else { throw .launch("No upgrade has been prepared") }
    do { return try launch.start(program.number, asSibling: asSibling) } catch { throw .launch(error.message) }
  }

  static func pipe() throws(SupervisionError) -> (reading: FDBox, writing: FDBox) {
    var ends: [CInt] = [-1, -1]
    // SAFETY: room for the two numbers that the call stores.
    let result = unsafe clinux_pipe(&ends, O_CLOEXEC)
    if result < 0 { throw .system(SystemError("make a pipe", Errno(-result))) }
    return (FDBox(OwnedFD(owning: ends[0])), FDBox(OwnedFD(owning: ends[1])))
  }
}

extension Supervisor {
  /// What a spawner's successor must know, seen from inside the spawner.
  var capturedSpawner: SpawnerState {
    var state = SpawnerState()
    state.arguments = upgrade.arguments
    state.changes = configuration.changes
    state.extraArguments = extraArguments
    state.rules = upgrade.rules
    state.cookie = upgrade.cookie
    state.userID = userID
    state.mode = walls.mode
    state.namespaces = walls.namespaces
    state.identityBase = identities.base
    state.identitiesUsed = identities.used
    switch programs {
    case .some: state.directory = programDirectory
    case .none: break
    }
    state.launches = knownLaunches.sorted { $0.key < $1.key }.map { .init(id: $0.key, program: $0.value.program, launch: $0.value.launch) }
    state.jailed = knownJailed.sorted { $0.key < $1.key }.map {
      .init(id: $0.key, identity: $0.value.identity, processID: UInt32(bitPattern: jailedNumbers[$0.key] ?? 0))
    }
    for care in cares.values.sorted(by: { $0.id < $1.id }) {
      if case .program(let program, let arguments, let isOnTerminal) = care.kind {
        var image: SpawnerState.Image?
        if let known = care.image, let status = known.status {
          image = .init(
            readOnly: known.readOnly, isShared: known.isShared,
            file: .init(path: known.path, numbers: .init(status)))
        }
        state.own.append(
          .init(
            id: care.id, program: program, arguments: arguments, isOnTerminal: isOnTerminal,
            resourceCount: UInt8(clamping: care.resources.count), image: image))
      }
      if case .external(let path) = care.kind { state.externals.append(.init(id: care.id, path: path)) }
    }
    state.assignments = assignments
    state.claims = claims.numbers.map { claim in
      .init(
        disk: claim.disk, isHeld: claim.number >= 0, file: claims.status(claim.disk).map { .init($0) })
    }
    state.hasGuardian = guardian.hasGuardian
    state.isOnTerminal = guardian.isOnTerminal
    state.settings = guardian.settingBytes
    state.files = guardian.files.map { .init(path: $0.path, numbers: .init($0.status)) }
    state.added = guardian.added.map { .init(id: $0.id, file: .init(path: $0.path, numbers: .init($0.status))) }
    state.groups = groups?.known
    state.storage = storage.sorted { $0.key < $1.key }.map { .init(id: $0.key, major: $0.value.major, minor: $0.value.minor) }
    return state
  }

  /// The spawner's view of the VM, in its successor.
  convenience init(spawning state: SpawnerState, programs directory: consuming OwnedFD) throws(SupervisionError) {
    var configuration: VMConfiguration
    do {
      configuration = try VMConfiguration(arguments: state.arguments)
      try configuration.follow(state.changes)
    } catch { throw .launch(error.message) }
    let groups = state.groups.map { ControlGroups($0) }
    let signals = try attempt { () throws(SystemError) in
      try Signals.descriptor(for: [])
    } or: {
      .system($0)
    }
    try self.init(
      configuration, userID: state.userID, identities: Identities(base: state.identityBase, used: state.identitiesUsed),
      walls: Walls(mode: state.mode, namespaces: state.namespaces, log: nil), signals: signals,
      guardian: TerminalGuard(title: "vm/\(configuration.name)", walls: state.mode, state, groups), groups: groups, groupsLack: nil)
    programs = Programs(adopting: directory, directory: state.directory)
    programDirectory = state.directory
    upgrade.arguments = state.arguments
    // With a keeper the supervisor is a new process of this program, and not one behind the walls of before.
    upgrade.rules = configuration.outlivesSupervisor ? Self.ownRules : state.rules
    upgrade.cookie = state.cookie
    for known in state.launches { knownLaunches[known.id] = (known.program, known.launch) }
    assignments = state.assignments
    var next = CInt(SpawnerUpgrade.agreedDescriptors)
    for claim in state.claims {
      guard claim.isHeld else {
        claims.know(claim.disk, claim.file?.status)
        continue
      }
      claims.take(claim.disk, try UpgradedProgram.adopt(next))
      next += 1
    }
    extraArguments = state.extraArguments
    for known in state.storage { storage[known.id] = StorageDevice(major: known.major, minor: known.minor) }
    for own in state.own {
      let image = own.image.map { image in
        DeviceCare.Image(
          path: image.file.path, readOnly: image.readOnly, isShared: image.isShared, status: image.file.numbers.status)
      }
      let care = DeviceCare(
        own.id, .program(own.program, arguments: own.arguments, isOnTerminal: own.isOnTerminal),
        configuration.deathPolicy(of: own.id), image: image)
      // The supervisor has them; here they are counted.
      care.resources = (0..<Int(own.resourceCount)).map { _ in FDBox() }
      cares[own.id] = care
    }
    for external in state.externals {
      let policy = configuration.deathPolicy(of: external.id)
      cares[external.id] = DeviceCare(external.id, .external(path: external.path), policy, image: nil)
    }
    for known in state.jailed {
      guard let program = configuration.jailedProgram(of: known.id) else { throw .launch("There is no program of \(known.id)") }
      let device = try JailedDevice(program, id: known.id, vm: configuration.name, host: hostWalls())
      knownJailed[known.id] = (device, known.identity)
      if known.processID != 0 { jailedNumbers[known.id] = Int32(bitPattern: known.processID) }
      cares[known.id] = DeviceCare(known.id, .jailed(device), configuration.deathPolicy(of: known.id), image: nil)
    }
  }
}
