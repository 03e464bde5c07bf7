import ControlProtocol
import HostSystem
import Sandbox

/// Everything the supervisor knows of its VM, as the program that takes its place gets it (protocol/upgrade.md). Descriptors
/// are numbers here; whoever reads a state owns them.
struct SupervisorState: HandedOnState, Equatable {
  /// Raised whenever the state changes its shape, or that of a keeper does.
  static let version: UInt16 = 3
  /// "MLUP"
  static let magic: UInt32 = 0x5055_4C4D
  /// No state is longer.
  static let limit = 1 << 20

  struct Guardian: Equatable {
    var processID: Int32
    var pidfd: CInt
    var pipe: CInt
  }

  /// Handed on when the supervisor is killed; an upgrade makes a new one.
  struct Spawner: Equatable {
    var processID: Int32
    var pidfd: CInt
    var line: CInt
  }

  /// A replacement that the core is carrying out.
  struct Replacement: Equatable {
    var line: String
    var client: UInt32
    var sequence: UInt32
    var care: Care
    var changes: [DeviceChange]
    var extraArguments: [String]
    var hasOtherImage: Bool
  }

  /// What was under way when the supervisor was killed: undone by the one that takes over, or ended.
  struct Unfinished: Equatable {
    /// Processes by their places, that were not yet, or not any more, what they are to be.
    var processes: [Int] = []
    /// Devices that were coming and going.
    var additions: [String] = []
    var departures: [String] = []
    /// The device that was to be given another back end, if the core had not been told.
    var replaced: String?
    /// The core's message that has been handled last, and may still be in its socket.
    var message: [UInt8] = []
  }

  struct Process: Equatable {
    var id: String
    var program: String
    var processID: Int32
    var pidfd: CInt
    var identity: ChildIdentity?
    var isOnTerminal: Bool
    /// The paths that the jail of somebody else's program shows.
    var jailPlaces: [String]?
    /// Nil while it lives.
    var end: ProcessEnd?
    var startTime: MonotonicTime
    var readyTime: MonotonicTime?
  }

  struct Image: Equatable {
    var path: String
    var readOnly: Bool
    var isShared: Bool
    var isSynchronous = false
  }

  struct Care: Equatable {
    enum Kind: Equatable {
      case program(String, arguments: [String], isOnTerminal: Bool)
      case external(path: String)
      case jailed
    }

    var id: String
    var kind: Kind
    var image: Image?
    var resources: [CInt]
    var step: DeviceCare.Step
    var restartCount: UInt32
    var deaths: [MonotonicTime]
    var failureCount: UInt32
    var servedTime: MonotonicTime?
    var shortServices: UInt32
    var replayCount: UInt64
    var lostTime: MonotonicTime?
    /// The open file of the process that serves.
    var lockedImage: CInt?
    /// The process that waits to take over.
    var spare: Spare?
    var spareDue: MonotonicTime?
    var spareFailures: UInt32 = 0
  }

  struct Spare: Equatable {
    var index: Int
    var socket: CInt
    var image: CInt?
  }

  /// The open file by which the VM owns an image.
  struct Claim: Equatable {
    var disk: String
    var file: CInt
  }

  /// What was said to and by a back end that was lost.
  struct Conversation: Equatable {
    var id: String
    var text: String
  }

  /// How many of them have been written to files.
  struct Recordings: Equatable {
    var id: String
    var count: UInt64
  }

  struct Statistics: Equatable {
    var id: String
    var queueCount: UInt16
    var file: CInt
  }

  struct Client: Equatable {
    var id: UInt32
    var socket: CInt
    var received: [UInt8]
    /// What it has still to be sent.
    var outgoing: [UInt8] = []
    var followsEvents = false
    var missedCount: UInt64 = 0

    /// One that has not taken more than this is given up.
    static let longestRest = 60_000
  }

  struct Count: Equatable {
    var device: String
    var kind: SupervisionEvent.Kind
    var number: UInt64
  }

  struct Request: Equatable {
    var sequence: UInt32
    var client: UInt32
    var verb: ControlVerb
    var deadline: MonotonicTime
    var device: String?
  }

  struct IndexedTime: Equatable {
    var index: Int
    var time: MonotonicTime
  }

  struct IndexedLine: Equatable {
    var index: Int
    var line: CInt
  }

  /// Of `martlet run`, and what has happened to the devices since.
  var arguments: [String] = []
  var changes: [DeviceChange] = []
  /// What programs were given behind their own arguments, by device.
  var extraArguments: [String: [String]] = [:]
  /// What the filter in force allows; it stays.
  var rules: [SystemCallRule] = []
  var userID: UInt32 = 0
  var mode = WallMode.on
  var namespaces: Namespaces = []
  var identityBase: UInt32?
  var identitiesUsed: UInt32 = 0
  var identitiesReleased: [ChildIdentity] = []
  /// The control groups, or why there are none.
  var groups: ControlGroups.Known?
  var groupsLack: String?
  var log: CInt?
  var signals: CInt = -1
  var guardian: Guardian?
  /// Of the first three descriptors, those to be made blocking again at the end.
  var madeNonBlocking: [CInt] = []
  var channel: CInt = -1
  /// The last one used towards the core.
  var sequence: UInt32 = 0
  var coreIndex = 0
  var processes: [Process] = []
  /// Those of them whose places are free.
  var vacancies: [Int] = []
  var assignments: [DeviceAssignment] = []
  var reports: [DeviceReport] = []
  var cares: [Care] = []
  var claims: [Claim] = []
  var conversations: [Conversation] = []
  var recordings: [Recordings] = []
  var statistics: [Statistics] = []
  var escapeLines: [IndexedLine] = []
  var quietEnds: [IndexedTime] = []
  var listener: CInt?
  var nextClient: UInt32 = 0
  var clients: [Client] = []
  var pending: [Request] = []
  var events: [SupervisionEvent] = []
  var eventCounts: [Count] = []
  var nextEvent: UInt64 = 1
  /// Who asked for the upgrade.
  var asker: UInt32 = 0
  var upgradeCount: UInt32 = 0
  var takeoverCount: UInt32 = 0
  var spawner: Spawner?
  var replacement: Replacement?
  var unfinished = Unfinished()

  /// All that survive exec for this state's sake.
  var descriptors: [CInt] {
    var all = [signals, channel] + [log, guardian?.pidfd, guardian?.pipe, listener].compactMap { $0 }
    all += processes.map(\.pidfd) + cares.flatMap(\.resources) + cares.compactMap(\.spare?.socket) + statistics.map(\.file)
    all += claims.map(\.file)
    all += cares.compactMap(\.spare?.image) + cares.compactMap(\.lockedImage)
    all += [replacement?.care.lockedImage].compactMap { $0 }
    all += [spawner?.pidfd, spawner?.line].compactMap { $0 }
    return all + escapeLines.map(\.line) + clients.map(\.socket)
  }
}

extension SupervisorState {
  func encode() -> [UInt8] {
    var writer = Self.begin()
    writer.number(Wire.version)
    writer.rules(rules)
    writer.texts(arguments)
    writer.changes(changes)
    writer.extraArguments(extraArguments)
    writer.number(userID)
    writer.text(mode.rawValue)
    writer.number(namespaces.rawValue)
    writer.optional(identityBase) { $0.number($1) }
    writer.number(identitiesUsed)
    writer.list(identitiesReleased) { $0.identity($1) }
    writer.groups(groups)
    writer.optional(groupsLack) { $0.text($1) }
    writer.optional(log) { $0.number($1) }
    writer.number(signals)
    writer.optional(guardian) { writer, guardian in
      writer.number(guardian.processID)
      writer.number(guardian.pidfd)
      writer.number(guardian.pipe)
    }
    writer.list(madeNonBlocking) { $0.number(UInt8($1)) }
    writer.number(channel)
    writer.number(sequence)
    writer.number(UInt16(coreIndex))
    writer.list(processes) { $1.encode(to: &$0) }
    writer.list(vacancies) { $0.number(UInt16($1)) }
    writer.list(assignments) { $0.packet(SupervisorMessage.device($1).encode(sequence: 0)) }
    writer.list(reports) { $0.packet(CoreMessage.device($1).encode(sequence: 0)) }
    writer.list(cares) { $1.encode(to: &$0) }
    writer.list(claims) { writer, claim in
      writer.text(claim.disk)
      writer.number(claim.file)
    }
    writer.list(conversations) { writer, conversation in
      writer.text(conversation.id)
      writer.text(conversation.text, limit: Wire.maximumLength)
    }
    writer.list(recordings) { writer, recordings in
      writer.text(recordings.id)
      writer.number(recordings.count)
    }
    writer.list(statistics) { writer, statistics in
      writer.text(statistics.id)
      writer.number(statistics.queueCount)
      writer.number(statistics.file)
    }
    writer.list(escapeLines) { writer, line in
      writer.number(UInt16(line.index))
      writer.number(line.line)
    }
    writer.list(quietEnds) { writer, end in
      writer.number(UInt16(end.index))
      writer.time(end.time)
    }
    writer.optional(listener) { $0.number($1) }
    writer.number(nextClient)
    writer.list(clients) { writer, client in
      writer.number(client.id)
      writer.number(client.socket)
      writer.packet(client.received)
      writer.packet(client.outgoing)
      writer.flag(client.followsEvents)
      writer.number(client.missedCount)
    }
    writer.list(pending) { writer, request in
      writer.number(request.sequence)
      writer.number(request.client)
      writer.text(request.verb.rawValue)
      writer.time(request.deadline)
      writer.optional(request.device) { $0.text($1) }
    }
    writer.list(events) { writer, event in
      writer.number(event.number)
      writer.number(event.time)
      writer.text(event.kind.rawValue)
      writer.text(event.device)
      writer.text(event.text)
      writer.list(event.values) { writer, value in
        writer.text(value.name)
        writer.number(value.number)
      }
    }
    writer.list(eventCounts) { writer, count in
      writer.text(count.device)
      writer.text(count.kind.rawValue)
      writer.number(count.number)
    }
    writer.number(nextEvent)
    writer.number(asker)
    writer.number(upgradeCount)
    writer.number(takeoverCount)
    writer.optional(spawner) { writer, spawner in
      writer.number(spawner.processID)
      writer.number(spawner.pidfd)
      writer.number(spawner.line)
    }
    writer.optional(replacement) { writer, replacement in
      writer.text(replacement.line)
      writer.number(replacement.client)
      writer.number(replacement.sequence)
      replacement.care.encode(to: &writer)
      writer.changes(replacement.changes)
      writer.texts(replacement.extraArguments)
      writer.flag(replacement.hasOtherImage)
    }
    writer.list(unfinished.processes) { $0.number(UInt16($1)) }
    writer.texts(unfinished.additions)
    writer.texts(unfinished.departures)
    writer.optional(unfinished.replaced) { $0.text($1) }
    writer.packet(unfinished.message)
    return writer.bytes
  }

  static func checkHead(_ reader: inout WireReader) throws(StateError) {
    let core: UInt16
    do throws(MessageError) { core = try reader.number() } catch { throw .broken(error) }
    guard core == Wire.version else { throw .coreVersion(core) }
  }

  init(from reader: inout WireReader) throws(MessageError) {
    rules = try reader.rules("rules")
    arguments = try reader.texts("arguments", limit: 1024)
    changes = try reader.changes()
    extraArguments = try reader.extraArguments()
    userID = try reader.number()
    guard let mode = WallMode(rawValue: try reader.text("mode", limit: 8)) else { throw .badField("mode") }
    self.mode = mode
    namespaces = Namespaces(rawValue: try reader.number())
    identityBase = try reader.identityBase()
    identitiesUsed = try reader.number()
    guard identitiesUsed <= Identities.perVM else { throw .badField("identities") }
    identitiesReleased = try reader.list("identities", limit: Int(Identities.perVM)) { reader throws(MessageError) in
      try reader.identity()
    }
    groups = try reader.groups()
    groupsLack = try reader.optional("groups") { reader throws(MessageError) in try reader.text("groups") }
    log = try reader.optional("log") { reader throws(MessageError) in try reader.descriptor("log") }
    signals = try reader.descriptor("signals")
    guardian = try reader.optional("guardian") { reader throws(MessageError) in
      Guardian(
        processID: try reader.processID("guardian"), pidfd: try reader.descriptor("guardian"), pipe: try reader.descriptor("guardian"))
    }
    madeNonBlocking = try reader.list("madeNonBlocking", limit: 3) { reader throws(MessageError) in
      let number = try reader.number(UInt8.self)
      guard number < 3 else { throw .badField("madeNonBlocking") }
      return CInt(number)
    }
    channel = try reader.descriptor("channel")
    sequence = try reader.number()
    coreIndex = Int(try reader.number(UInt16.self))
    processes = try reader.list("processes", limit: 256) { reader throws(MessageError) in try Process(from: &reader) }
    guard processes.indices.contains(coreIndex) else { throw .badField("coreIndex") }
    let freeLimit = processes.count
    vacancies = try reader.list("vacancies", limit: 256) { reader throws(MessageError) in
      let index = Int(try reader.number(UInt16.self))
      guard index < freeLimit else { throw .badField("vacancies") }
      return index
    }
    for index in vacancies where processes[index].end == nil { throw .badField("vacancies") }
    assignments = try reader.list("assignments", limit: 31) { reader throws(MessageError) in
      guard case .device(let device) = try SupervisorMessage.decode(reader.packet("assignments"), descriptorCount: 1).message else {
        throw .badField("assignments")
      }
      return device
    }
    reports = try reader.list("reports", limit: 256) { reader throws(MessageError) in
      guard case .device(let report) = try CoreMessage.decode(reader.packet("reports")).message else { throw .badField("reports") }
      return report
    }
    cares = try reader.list("cares", limit: 256) { reader throws(MessageError) in try Care(from: &reader) }
    for care in cares { if let spare = care.spare, spare.index >= processes.count { throw .badField("spare") } }
    claims = try reader.list("claims", limit: 256) { reader throws(MessageError) in
      Claim(disk: try reader.identifier(), file: try reader.descriptor("claims"))
    }
    conversations = try reader.list("conversations", limit: 256) { reader throws(MessageError) in
      Conversation(id: try reader.identifier(), text: try reader.text("conversations", limit: Wire.maximumLength))
    }
    recordings = try reader.list("recordings", limit: 256) { reader throws(MessageError) in
      let id = try reader.identifier()
      return Recordings(id: id, count: try reader.counter("recordings"))
    }
    statistics = try reader.list("statistics", limit: 256) { reader throws(MessageError) in
      let id = try reader.identifier()
      let queueCount = try reader.number(UInt16.self)
      guard (1...1024).contains(queueCount) else { throw .badField("statistics") }
      return Statistics(id: id, queueCount: queueCount, file: try reader.descriptor("statistics"))
    }
    let processCount = processes.count
    func index(_ reader: inout WireReader, _ name: MessageError.StaticName) throws(MessageError) -> Int {
      let index = Int(try reader.number(UInt16.self))
      guard index < processCount else { throw .badField(name) }
      return index
    }
    escapeLines = try reader.list("escapeLines", limit: 8) { reader throws(MessageError) in
      IndexedLine(index: try index(&reader, "escapeLines"), line: try reader.descriptor("escapeLines"))
    }
    quietEnds = try reader.list("quietEnds", limit: 256) { reader throws(MessageError) in
      IndexedTime(index: try index(&reader, "quietEnds"), time: try reader.time())
    }
    listener = try reader.optional("listener") { reader throws(MessageError) in try reader.descriptor("listener") }
    nextClient = try reader.number()
    clients = try reader.list("clients", limit: ControlServer.clientLimit) { reader throws(MessageError) in
      Client(
        id: try reader.number(), socket: try reader.descriptor("clients"),
        received: try reader.packet("clients", limit: ControlServer.lineLimit),
        outgoing: try reader.packet("clients", limit: Client.longestRest), followsEvents: try reader.flag("clients"),
        missedCount: try reader.counter("clients"))
    }
    pending = try reader.list("pending", limit: 1024) { reader throws(MessageError) in
      let sequence: UInt32 = try reader.number()
      let client: UInt32 = try reader.number()
      guard let verb = ControlVerb(rawValue: try reader.text("pending", limit: 64)) else { throw .badField("pending") }
      return Request(
        sequence: sequence, client: client, verb: verb, deadline: try reader.time(),
        device: try reader.optional("pending") { reader throws(MessageError) in try reader.text("pending") })
    }
    func kind(_ reader: inout WireReader) throws(MessageError) -> SupervisionEvent.Kind {
      guard let kind = SupervisionEvent.Kind(rawValue: try reader.text("events", limit: 64)) else { throw .badField("events") }
      return kind
    }
    events = try reader.list("events", limit: EventJournal.capacity) { reader throws(MessageError) in
      SupervisionEvent(
        number: try reader.counter("events"), time: try reader.number(), kind: try kind(&reader), device: try reader.text("events"),
        text: try reader.text("events"),
        values: try reader.list("events", limit: 64) { reader throws(MessageError) in
          SupervisionEvent.Value(try reader.text("events"), try reader.number())
        })
    }
    eventCounts = try reader.list("eventCounts", limit: 4096) { reader throws(MessageError) in
      Count(device: try reader.text("eventCounts"), kind: try kind(&reader), number: try reader.counter("eventCounts"))
    }
    nextEvent = try reader.counter("events")
    guard nextEvent > events.count else { throw .badField("events") }
    asker = try reader.number()
    upgradeCount = try reader.number()
    takeoverCount = try reader.number()
    spawner = try reader.optional("spawner") { reader throws(MessageError) in
      Spawner(
        processID: try reader.processID("spawner"), pidfd: try reader.descriptor("spawner"), line: try reader.descriptor("spawner"))
    }
    replacement = try reader.optional("replacement") { reader throws(MessageError) in
      Replacement(
        line: try reader.text("replacement"), client: try reader.number(), sequence: try reader.number(), care: try Care(from: &reader),
        changes: try reader.changes(), extraArguments: try reader.texts("replacement", limit: 256),
        hasOtherImage: try reader.flag("replacement"))
    }
    unfinished.processes = try reader.list("unfinished", limit: 256) { reader throws(MessageError) in try index(&reader, "unfinished") }
    for list in [\Unfinished.additions, \.departures] {
      unfinished[keyPath: list] = try reader.list("unfinished", limit: 256) { reader throws(MessageError) in try reader.identifier() }
    }
    unfinished.replaced = try reader.optional("unfinished") { reader throws(MessageError) in try reader.identifier() }
    unfinished.message = try reader.packet("unfinished")
    guard Set(descriptors).count == descriptors.count else { throw .badField("descriptors") }
  }
}

extension SupervisorState.Process {
  fileprivate func encode(to writer: inout WireWriter) {
    writer.text(id)
    writer.text(program)
    writer.number(processID)
    writer.number(pidfd)
    writer.optional(identity) { $0.identity($1) }
    writer.flag(isOnTerminal)
    writer.optional(jailPlaces) { $0.texts($1) }
    switch end {
    case nil: writer.number(UInt8(0))
    case .exited(let code):
      writer.number(UInt8(1))
      writer.number(UInt32(bitPattern: code))
    case .killed(let signal):
      writer.number(UInt8(2))
      writer.number(UInt32(bitPattern: signal))
    }
    writer.time(startTime)
    writer.optional(readyTime) { $0.time($1) }
  }

  fileprivate init(from reader: inout WireReader) throws(MessageError) {
    // That of a spare is no device's.
    id = try reader.text("process", limit: 128)
    program = try reader.text("program")
    processID = try reader.processID("process")
    pidfd = try reader.descriptor("process")
    identity = try reader.optional("identity") { reader throws(MessageError) in try reader.identity() }
    isOnTerminal = try reader.flag("isOnTerminal")
    jailPlaces = try reader.optional("jail") { reader throws(MessageError) in try reader.texts("jail", limit: 1024) }
    switch try reader.number(UInt8.self) {
    case 0: end = nil
    case 1: end = .exited(code: Int32(bitPattern: try reader.number()))
    case 2: end = .killed(signal: Int32(bitPattern: try reader.number()))
    default: throw .badField("end")
    }
    startTime = try reader.time()
    readyTime = try reader.optional("readyTime") { reader throws(MessageError) in try reader.time() }
  }
}

extension SupervisorState.Care {
  fileprivate func encode(to writer: inout WireWriter) {
    writer.text(id)
    switch kind {
    case .program(let program, let arguments, let isOnTerminal):
      writer.number(UInt8(0))
      writer.text(program)
      writer.texts(arguments)
      writer.flag(isOnTerminal)
    case .external(let path):
      writer.number(UInt8(1))
      writer.text(path)
    case .jailed: writer.number(UInt8(2))
    }
    writer.optional(image) { writer, image in
      writer.text(image.path)
      writer.flag(image.readOnly)
      writer.flag(image.isShared)
      writer.flag(image.isSynchronous)
    }
    writer.optional(lockedImage) { $0.number($1) }
    writer.list(resources) { $0.number($1) }
    // A process on its way is waited for before a state is taken.
    switch step {
    case .none, .succeeding: writer.number(UInt8(0))
    case .due(let time):
      writer.number(UInt8(1))
      writer.time(time)
    case .reattaching(let sequence):
      writer.number(UInt8(2))
      writer.number(sequence)
    case .held: writer.number(UInt8(3))
    case .givenUp: writer.number(UInt8(4))
    }
    writer.number(restartCount)
    writer.list(deaths) { $0.time($1) }
    writer.number(failureCount)
    writer.optional(servedTime) { $0.time($1) }
    writer.number(shortServices)
    writer.number(replayCount)
    writer.optional(lostTime) { $0.time($1) }
    writer.optional(spare) { writer, spare in
      writer.number(UInt16(spare.index))
      writer.number(spare.socket)
      writer.optional(spare.image) { $0.number($1) }
    }
    writer.optional(spareDue) { $0.time($1) }
    writer.number(spareFailures)
  }

  fileprivate init(from reader: inout WireReader) throws(MessageError) {
    id = try reader.identifier()
    switch try reader.number(UInt8.self) {
    case 0:
      let program = try reader.text("program")
      let arguments = try reader.texts("arguments", limit: 256)
      kind = .program(program, arguments: arguments, isOnTerminal: try reader.flag("isOnTerminal"))
    case 1: kind = .external(path: try reader.text("path"))
    case 2: kind = .jailed
    default: throw .badField("kind")
    }
    image = try reader.optional("image") { reader throws(MessageError) in
      SupervisorState.Image(
        path: try reader.text("image"), readOnly: try reader.flag("image"), isShared: try reader.flag("image"),
        isSynchronous: try reader.flag("image"))
    }
    lockedImage = try reader.optional("image") { reader throws(MessageError) in try reader.descriptor("image") }
    resources = try reader.list("resources", limit: ChildLaunch.descriptorLimit) { reader throws(MessageError) in
      try reader.descriptor("resources")
    }
    switch try reader.number(UInt8.self) {
    case 0: step = .none
    case 1: step = .due(try reader.time())
    case 2: step = .reattaching(sequence: try reader.number())
    case 3: step = .held
    case 4: step = .givenUp
    default: throw .badField("step")
    }
    restartCount = try reader.number()
    deaths = try reader.list("deaths", limit: 4096) { reader throws(MessageError) in try reader.time() }
    failureCount = try reader.number()
    servedTime = try reader.optional("servedTime") { reader throws(MessageError) in try reader.time() }
    shortServices = try reader.number()
    replayCount = try reader.counter("replayCount")
    lostTime = try reader.optional("lostTime") { reader throws(MessageError) in try reader.time() }
    spare = try reader.optional("spare") { reader throws(MessageError) in
      SupervisorState.Spare(
        index: Int(try reader.number(UInt16.self)), socket: try reader.descriptor("spare"),
        image: try reader.optional("spare") { reader throws(MessageError) in try reader.descriptor("spare") })
    }
    spareDue = try reader.optional("spareDue") { reader throws(MessageError) in try reader.time() }
    spareFailures = try reader.number()
  }
}

/// Why a state cannot be taken over. Somebody reads the sentence who knows nothing of states.
enum StateError: Error, Equatable {
  case version(UInt16)
  case coreVersion(UInt16)
  case broken(MessageError)
  case arguments(String)
  /// The new program would be killed for it.
  case call(String)

  var message: String {
    switch self {
    case .version(let number):
      "It reads states of version \(SupervisorState.version), and this VM's supervisor writes version \(number)"
    case .coreVersion(let number):
      "It speaks version \(Wire.version) of the control channel, and this VM's core speaks version \(number)"
    case .broken(let error): "The state is broken: \(error.message)"
    case .arguments(let sentence): "It does not understand this VM's command line: \(sentence)"
    case .call(let name):
      "It needs the system call \(name), which the filter around this VM's supervisor does not allow, or not like that"
    }
  }
}

extension SupervisorState {
  /// What the program that runs must be able to do with it: the command line, and live behind the filter.
  func check() throws(StateError) -> VMConfiguration {
    var configuration: VMConfiguration
    do {
      configuration = try VMConfiguration(arguments: arguments)
      try configuration.follow(changes)
    } catch { throw .arguments(error.message) }
    // With a keeper it is another process, behind a filter of its own.
    if mode == .on, !configuration.outlivesSupervisor {
      for rule in SystemCallList.supervisor.rules where !SystemCallRule.covers(rules, rule) {
        throw .call(SystemCall.name(rule.number))
      }
    }
    return configuration
  }
}
