import ControlProtocol
import Glibc
import HostSystem
import Sandbox

extension Supervisor {
  /// Everything, for the program that takes over.
  func captureState(for asker: Int) -> SupervisorState {
    var state = SupervisorState()
    state.arguments = upgrade.arguments
    state.changes = configuration.changes
    state.extraArguments = extraArguments
    state.rules = upgrade.rules
    state.userID = userID
    state.mode = walls.mode
    state.namespaces = walls.namespaces
    state.log = walls.logNumber
    state.identityBase = identities.base
    state.identitiesUsed = identities.used
    state.identitiesReleased = identities.released
    state.groups = groups?.known
    state.groupsLack = groupsLack
    state.signals = signals.rawValue
    state.guardian = guardian.living
    state.madeNonBlocking = guardian.madeNonBlocking
    state.channel = channel?.number ?? -1
    state.sequence = channel?.sequence ?? 0
    state.coreIndex = coreIndex
    state.processes = processes.map(\.captured)
    state.vacancies = vacancies
    state.assignments = assignments
    state.reports = reports.values.sorted { $0.id < $1.id }
    // One that is to take over has a name that is no device's, and is told of apart.
    state.cares = cares.filter { $0.key == $0.value.id }.values.sorted { $0.id < $1.id }.map(\.captured)
    state.claims = claims.numbers.filter { $0.number >= 0 }.map { .init(disk: $0.disk, file: $0.number) }
    state.conversations = conversations.sorted { $0.key < $1.key }.map { .init(id: $0.key, text: $0.value) }
    state.recordings = recordingCounts.sorted { $0.key < $1.key }.map { .init(id: $0.key, count: UInt64($0.value)) }
    for (id, memory) in statistics.sorted(by: { $0.key < $1.key }) {
      state.statistics.append(.init(id: id, queueCount: UInt16(clamping: memory.queueCount), file: memory.file.number))
    }
    state.escapeLines = escapeLines.sorted { $0.key < $1.key }.map { .init(index: $0.key, line: $0.value.number) }
    state.quietEnds = quietEnds.map { .init(index: $0.index, time: $0.deadline) }
    control?.capture(&state)
    journal.capture(&state)
    for request in pending {
      state.pending.append(
        .init(
          sequence: request.sequence, client: UInt32(clamping: request.client), verb: request.verb, deadline: request.deadline,
          device: request.device))
    }
    state.asker = UInt32(clamping: asker)
    state.upgradeCount = upgrade.count &+ 1
    state.takeoverCount = takeover.count
    return state
  }

  /// The VM goes on where the program before left it.
  convenience init(resuming state: SupervisorState, _ configuration: VMConfiguration, _ spawner: Spawner) throws(SupervisionError) {
    let walls: Walls
    if let log = state.log {
      walls = Walls(mode: state.mode, namespaces: state.namespaces, log: try UpgradedProgram.adopt(log))
    } else {
      walls = Walls(mode: state.mode, namespaces: state.namespaces, log: nil)
    }
    try self.init(
      configuration, userID: state.userID,
      identities: Identities(base: state.identityBase, used: state.identitiesUsed, released: state.identitiesReleased), walls: walls,
      signals: try UpgradedProgram.adopt(state.signals),
      guardian: try TerminalGuard(title: "vm/\(configuration.name)", walls: state.mode, state),
      groups: state.groups.map { ControlGroups($0) }, groupsLack: state.groupsLack)
    phase = .running
    coreIsReady = true
    guestHasStarted = true
    self.spawner = spawner
    upgrade.arguments = state.arguments
    extraArguments = state.extraArguments
    upgrade.rules = configuration.outlivesSupervisor ? Self.ownRules : state.rules
    upgrade.count = state.upgradeCount
    takeover.count = state.takeoverCount
    channel = CoreChannel(try UpgradedProgram.adopt(state.channel), sequence: state.sequence, handledFront: state.unfinished.message)
    coreIndex = state.coreIndex
    for known in state.processes { processes.append(try VMProcess(known)) }
    vacancies = state.vacancies
    assignments = state.assignments
    for report in state.reports { reports[report.id] = report }
    for known in state.cares { cares[known.id] = try DeviceCare(known, configuration) }
    for claim in state.claims { claims.adopt(claim.disk, try UpgradedProgram.adopt(claim.file)) }
    for known in state.conversations { conversations[known.id] = known.text }
    for known in state.recordings { recordingCounts[known.id] = Int(known.count) }
    for known in state.statistics {
      let file = try UpgradedProgram.adopt(known.file)
      do { statistics[known.id] = try StatisticsMemory(adopting: FDBox(file), queueCount: Int(known.queueCount)) } catch {
        throw .system(error)
      }
    }
    for known in state.escapeLines { escapeLines[known.index] = FDBox(try UpgradedProgram.adopt(known.line)) }
    quietEnds = state.quietEnds.map { ($0.index, $0.time) }
    if let listener = state.listener { control = try ControlServer(try UpgradedProgram.adopt(listener), state) }
    pending = state.pending.map {
      PendingRequest(sequence: $0.sequence, client: Int($0.client), verb: $0.verb, deadline: $0.deadline, device: $0.device)
    }
    journal = EventJournal(state)
    try watchAll()
    adjustClients()
  }

  private func watchAll() throws(SupervisionError) {
    try watch(signals.rawValue, .signals)
    if let spawner { try watch(spawner.endNumber, .spawnerEnd) }
    if let number = guardian.endNumber { try watch(number, .guardianEnd) }
    if let channel { try watch(channel.number, .core) }
    for (index, process) in processes.enumerated() where process.isAlive { try watch(process.endNumber, .processEnd(index)) }
    for (index, line) in escapeLines { try watch(line.number, .escapeKey(index)) }
    if let control {
      try watch(control.number, .controlListener)
      for (id, number) in control.connections { try watch(number, .client(id)) }
    }
  }
}

extension DeviceCare {
  var captured: SupervisorState.Care {
    let kind: SupervisorState.Care.Kind =
      switch self.kind {
      case .program(let program, let arguments, let isOnTerminal): .program(program, arguments: arguments, isOnTerminal: isOnTerminal)
      case .external(let path): .external(path: path)
      case .jailed: .jailed
      }
    return SupervisorState.Care(
      id: id, kind: kind,
      image: image.map { .init(path: $0.path, readOnly: $0.readOnly, isShared: $0.isShared, isSynchronous: $0.isSynchronous) },
      resources: resources.map(\.number).filter { $0 >= 0 }, step: step, restartCount: UInt32(clamping: restartCount), deaths: deaths,
      failureCount: UInt32(clamping: failureCount), servedTime: servedTime, shortServices: UInt32(clamping: shortServices),
      replayCount: replayCount, lostTime: lostTime, lockedImage: lockedImage.map(\.number).flatMap { $0 >= 0 ? $0 : nil },
      spare: spare.map { .init(index: $0.index, socket: $0.socket.number, image: $0.image.map(\.number)) }, spareDue: spareDue,
      spareFailures: UInt32(clamping: spareFailures))
  }

  convenience init(_ known: SupervisorState.Care, _ configuration: VMConfiguration) throws(SupervisionError) {
    let kind: Kind
    switch known.kind {
    case .program(let program, let arguments, let isOnTerminal): kind = .program(program, arguments: arguments, isOnTerminal: isOnTerminal)
    case .external(let path): kind = .external(path: path)
    case .jailed:
      guard let program = configuration.jailedProgram(of: known.id) else { throw .launch("There is no program of \(known.id)") }
      // The spawner has its profile.
      kind = .jailed(try JailedDevice(program, id: known.id, vm: configuration.name, host: nil))
    }
    self.init(
      known.id, kind, configuration.deathPolicy(of: known.id),
      image: known.image.map {
        .init(path: $0.path, readOnly: $0.readOnly, isShared: $0.isShared, status: nil, isSynchronous: $0.isSynchronous)
      })
    lockedImage = try known.lockedImage.map { number throws(SupervisionError) in FDBox(try UpgradedProgram.adopt(number)) }
    for number in known.resources { resources.append(FDBox(try UpgradedProgram.adopt(number))) }
    step = known.step
    restartCount = Int(known.restartCount)
    deaths = known.deaths
    failureCount = Int(known.failureCount)
    servedTime = known.servedTime
    shortServices = Int(min(known.shortServices, 4))
    replayCount = known.replayCount
    lostTime = known.lostTime
    if let spare = known.spare {
      self.spare = Spare(
        index: spare.index, socket: FDBox(try UpgradedProgram.adopt(spare.socket)),
        image: try spare.image.map { number throws(SupervisionError) in FDBox(try UpgradedProgram.adopt(number)) }, isReady: true)
    }
    spareDue = known.spareDue
    spareFailures = Int(known.spareFailures)
  }
}
