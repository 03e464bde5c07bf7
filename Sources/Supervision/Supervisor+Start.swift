import CLinux
import ControlProtocol
import Glibc
import HostSystem
import Sandbox

extension Supervisor {
  /// RLIMIT_NOFILE of the core: sockets, and an eventfd pair for each queue and vector.
  private static let coreFileLimit: UInt64 = 16384
  /// Of a back end: up to 256 queues with kick, call and error, and its own few.
  private static let deviceFileLimit: UInt64 = 1024
  /// RLIMIT_NPROC of a back end: for each queue a thread and the kernel's workers of its ring (16 of each of two kinds).
  private static let threadsPerQueue: UInt64 = 33
  private static let spareThreads: UInt64 = 16

  /// Starts the core, which has nothing to do yet, and opens everything beside it. No guest and no device is started before
  /// everything that can be missing has been found.
  func start() throws(SupervisionError) {
    try watch(signals.rawValue, .signals)
    if let directory = configuration.flightRecorder { try HostFiles.checkDirectory(directory, what: "directory of --flight-recorder") }
    let kvm = try HostFiles.kvm()
    let null = try HostFiles.null()
    try startCore(null)
    let kernel = FDBox(
      try HostFiles.payload(configuration.kernel, what: "kernel", memory: configuration.memorySize))
    var initramfs: FDBox?
    if let path = configuration.initramfs {
      initramfs = FDBox(try HostFiles.payload(path, what: "initramfs", memory: configuration.memorySize))
    }
    var planner = DevicePlanner(
      configuration: configuration, guardian: guardian, claims: claims, host: { [self] in hostWalls() },
      pause: { [self] time in (try? signals.waitUntil(.readable, timeout: time)) == false })
    let devices = try planner.planDevices()
    assignments = devices.map(\.assignment)
    for device in devices { cares[device.assignment.id] = try care(for: device) }
    var serial: TerminalPlan?
    if configuration.serial != .off, configuration.serial != .null {
      serial = try planner.planTerminal(configuration.serial, option: "--serial")
    }
    if let path = configuration.control {
      let listener = try guardian.listen(at: path, option: "--control")
      let server = ControlServer(listener)
      try watch(server.number, .controlListener)
      control = server
    }

    for device in devices { if case .jailed(let jailed) = device.backEnd { try check(jailed, null) } }
    try configureCore(kvm, kernel, initramfs)
    launches = devices.map { .device($0) }
    if let serial { try connectSerial(serial) }
    try send(.start(deviceCount: UInt16(devices.count)))
    // A disk may be given to our own program later. Not before the guardian's fork, which has no use for this memory.
    for device in devices where device.assignment.deviceType == .block {
      _ = try statisticsMemory(of: device.assignment.id, queueCount: device.assignment.queueSizes.count)
    }
    try startNext()
    for line in planner.announcements { say(.info, line) }
  }

  func watch(_ number: CInt, _ token: Token) throws(SupervisionError) {
    try attempt { () throws(SystemError) in
      try loop.add(number: number, for: .readable, token: token)
    } or: {
      .system($0)
    }
  }

  private func startCore(_ null: borrowing OwnedFD) throws(SupervisionError) {
    let pair = try Self.pair(.sequencedPacket)
    var launch = ChildLaunch(
      arguments: ["martlet-core", "--fd=3"] + walls.arguments + ["--title=vm/\(configuration.name)/core"],
      descriptors: [null.rawValue, null.rawValue, 2, pair.second.rawValue], identity: identities.next(),
      namespaces: walls.namespaces)
    launch.fileLimit = Self.coreFileLimit
    // KVM makes a thread of its own in the process that runs guests.
    launch.threadLimit = UInt64(configuration.cpuCount) + Self.spareThreads
    coreIndex = processes.count
    try launchProcess(VMConfiguration.Reserved.core, "martlet-core", launch, readyPipe: nil, isOnTerminal: false)
    let channel = CoreChannel(pair.first)
    channel.isPeeking = keeper != nil
    self.channel = channel
    try watch(channel.number, .core)
  }

  private func configureCore(_ kvm: borrowing OwnedFD, _ kernel: FDBox, _ initramfs: FDBox?) throws(SupervisionError) {
    let message = SupervisorMessage.configure(
      CoreConfiguration(
        name: configuration.name, cpuCount: UInt16(configuration.cpuCount), memorySize: configuration.memorySize,
        commandLine: configuration.commandLine, hasInitramfs: initramfs != nil, hasSerial: configuration.serial != .off,
        restartsOnReset: configuration.restartsOnReset, replyDeadline: configuration.deadlines.reply))
    var descriptors = [kvm.rawValue, kernel.number]
    if let initramfs { descriptors.append(initramfs.number) }
    try send(message, descriptors)
  }

  /// Starts what is next, as long as no more processes come up at a time than there are processors: more would only be in
  /// each other's way, and in the core's.
  func startNext() throws(SupervisionError) {
    let limit = max(2, Int(clinux_processor_count()))
    while !launches.isEmpty, processes.count(where: { $0.state == .starting }) < limit {
      switch launches.removeFirst() {
      case .device(let plan): try start(plan, HostFiles.null())
      case .serial(let plan, let socket): try startSerial(plan, socket)
      }
    }
    if launches.isEmpty, waitingSockets.isEmpty, waitingAssignments.isEmpty, coreIsReady, handOverTime == nil { handOverTime = .now }
  }

  private func start(_ device: DevicePlan, _ null: borrowing OwnedFD) throws(SupervisionError) {
    switch device.backEnd {
    case .external(let socket):
      // Connected already, so it counts as ready.
      try send(.device(device.assignment), [socket.number])
      socket.close()
    case .jailed(let jailed):
      let (index, ours) = try startJailed(jailed, null: null.rawValue)
      if let ours { waitingSockets[index] = (device.assignment, ours) } else { waitingAssignments[index] = device.assignment }
    case .program(let program, let arguments, let resources, let isOnTerminal):
      let pair = try Self.pair(.stream)
      let index = try startBackEnd(
        device.assignment.id, program, ["--fd=3"] + arguments, socket: pair.second.rawValue, resources, null: null.rawValue,
        queueCount: device.assignment.queueSizes.count, isOnTerminal: isOnTerminal)
      cares[device.assignment.id]?.started(resources)
      waitingSockets[index] = (device.assignment, FDBox(pair.first))
    }
  }

  /// The core's end of the serial stream goes to the core. What the guest writes waits in it until the carrier is up.
  private func connectSerial(_ plan: TerminalPlan) throws(SupervisionError) {
    let pair = try Self.pair(.stream)
    try send(.stream(.serial), [pair.first.rawValue])
    // Last: the devices are what the guest waits for.
    launches.append(.serial(plan, FDBox(pair.second)))
  }

  func startSerial(_ plan: TerminalPlan, _ socket: FDBox) throws(SupervisionError) {
    let null = try HostFiles.null()
    _ = try startBackEnd(
      VMConfiguration.Reserved.serial, "martlet-console", ["--stream-fd=3"] + plan.arguments, socket: socket.number,
      plan.resources, null: null.rawValue, isOnTerminal: plan.isOnTerminal)
    for resource in plan.resources { resource.close() }
    socket.close()
  }

  /// Starts a device program. Our copies of its resources are the caller's to close.
  /// - Parameters:
  ///   - null: /dev/null; -1 behind our walls, where the spawner has it.
  ///   - dead: the process whose place in the list it takes.
  ///   - spareOf: the process beside which it waits, and whose id it has.
  ///   - isNew: it is the first of its device, with this identity, whatever had its place in the list.
  func startBackEnd(
    _ id: String, _ program: String, _ arguments: [String], socket: CInt, _ resources: [FDBox],
    null: CInt, queueCount: Int = 1, isOnTerminal: Bool, inPlaceOf dead: Int? = nil, spareOf served: Int? = nil,
    isNew: Bool = false, identity: ChildIdentity? = nil
  ) throws(SupervisionError) -> Int {
    var ends: [CInt] = [-1, -1]
    // SAFETY: room for the two numbers that the call stores.
    let result = unsafe clinux_pipe(&ends, O_CLOEXEC | O_NONBLOCK)
    if result < 0 { throw .system(SystemError("make a pipe", Errno(-result))) }
    let reading = OwnedFD(owning: ends[0])
    let writing = OwnedFD(owning: ends[1])
    let isFirst = isNew || (dead == nil && served == nil)
    let identity = isNew ? identity : isFirst ? identities.next() : processes[served ?? dead ?? 0].identity
    var launch = backEndLaunch(
      id, program, arguments, resourceCount: resources.count, queueCount: queueCount, isOnTerminal: isOnTerminal, identity: identity)
    if !isFirst { launch.arguments.append(Self.standbyArgument) }
    var resources = resources
    var escapeLine: FDBox?
    if cares[id] != nil, let memory = try statisticsMemory(of: id, queueCount: queueCount) { resources.append(memory.file) }
    if isOnTerminal {
      let pair = try Self.pair(.stream)
      resources.append(FDBox(pair.second))
      escapeLine = FDBox(pair.first)
    }
    launch.descriptors = [null, null, 2, socket, writing.rawValue] + resources.map(\.number)
    let index = try launchProcess(
      id, program, launch, readyPipe: reading, isOnTerminal: isOnTerminal, inPlaceOf: dead, isSpare: served != nil)
    if let escapeLine {
      // The other end, which was made here.
      resources.last?.close()
      try watch(escapeLine.number, .escapeKey(index))
      escapeLines[index] = escapeLine
    }
    return index
  }

  /// Said to every process of a device but its first.
  static let standbyArgument = "--standby"

  /// How a device program is started, but for its descriptors: behind its own come that of its statistics and, on a terminal,
  /// the line of the escape key.
  func backEndLaunch(
    _ id: String, _ program: String, _ arguments: [String], resourceCount: Int, queueCount: Int, isOnTerminal: Bool,
    identity: ChildIdentity?
  ) -> ChildLaunch {
    var arguments = arguments
    var next = firstResource + resourceCount
    if cares[id] != nil {
      arguments.append("--stats-fd=\(next)")
      next += 1
    }
    if isOnTerminal { arguments.append("--control-fd=\(next)") }
    var threadLimit = UInt64(queueCount) * Self.threadsPerQueue + Self.spareThreads
    // They are counted by uid.
    if cares[id]?.policy.hasSpare == true { threadLimit *= 2 }
    return ChildLaunch(
      arguments: [program] + arguments + walls.arguments + ["--ready-fd=4", "--title=vm/\(configuration.name)/\(Self.device(of: id))"],
      descriptors: [], identity: identity, fileLimit: Self.deviceFileLimit, parentDeathSignal: isOnTerminal ? SIGTERM : SIGKILL,
      namespaces: walls.namespaces, threadLimit: threadLimit)
  }

  @discardableResult
  private func launchProcess(
    _ id: String, _ program: String, _ launch: ChildLaunch, readyPipe: consuming OwnedFD?, isOnTerminal: Bool,
    inPlaceOf dead: Int? = nil, isSpare: Bool = false
  ) throws(SupervisionError) -> Int {
    let child: StartedChild
    if let spawner {
      child = try spawner.start(id, Array(launch.descriptors.dropFirst(Spawner.ownDescriptors)))
    } else {
      child = try start(launch, program, of: id, asSibling: keeper != nil)
      if knownLaunches[id] == nil { knownLaunches[id] = (program, launch) }
    }
    return try enlist(
      VMProcess(
        id: isSpare ? Self.spareName(id) : id, program: program, identity: launch.identity, isOnTerminal: isOnTerminal, child: child,
        readyPipe: readyPipe,
        startTime: .now), inPlaceOf: dead)
  }

  /// A process that has been forked is watched from here on.
  func enlist(_ process: VMProcess, inPlaceOf dead: Int?) throws(SupervisionError) -> Int {
    let index = dead ?? processes.count
    if let dead { processes[dead] = process } else { processes.append(process) }
    if let number = process.reportNumber { try watch(number, .launchReport(index)) }
    try watch(process.endNumber, .processEnd(index))
    if let number = process.readyNumber { try watch(number, .ready(index)) }
    return index
  }

  /// The start itself: here before our own walls stand, afterwards in the spawner.
  func start(_ launch: ChildLaunch, _ program: String, of id: String, asSibling: Bool = false) throws(SupervisionError) -> StartedChild {
    let executable: OwnedFD
    if program.contains("/") {
      do { executable = try OwnedFD.open(program, pathOnly) } catch { throw .file(what: "program", path: program, error.errno) }
    } else {
      switch programs {
      case .some(let programs): executable = try programs.open(program)
      case .none: throw .program(name: program, directory: "", .noEntry)
      }
    }
    let group = try openGroup(id)
    var launch = launch
    launch.group = group?.number
    defer { group?.close() }
    do { return try launch.start(executable, asSibling: asSibling) } catch {
      throw .launch(error.message + (walls.mode == .off ? "" : Stage.fork.remedy))
    }
  }

  static func pair(_ kind: UnixSocket.Kind) throws(SupervisionError) -> SocketPair {
    try attempt { () throws(SystemError) in
      try UnixSocket.pair(kind)
    } or: {
      .system($0)
    }
  }

  @discardableResult
  func send(_ message: SupervisorMessage, _ descriptors: [CInt] = []) throws(SupervisionError) -> UInt32 {
    switch channel?.send(message, descriptors: descriptors) {
    case .sent(let sequence): return sequence
    // Its last message and its pidfd are about to tell why.
    case .gone, nil: return 0
    case .full: throw .core(.defect, "The core process takes no messages")
    }
  }

  /// A back end said READY: its socket goes to the core, and our copy is closed.
  func handOver(_ index: Int) throws(SupervisionError) {
    if isCandidate(index) { return candidateIsReady() }
    guard let waiting = waitingSockets.removeValue(forKey: index) else { return try successorIsReady(index) }
    if phase == .running { return try handOverAddition(waiting.assignment.id, waiting.socket) }
    guard phase == .starting else { return }
    try send(.device(waiting.assignment), [waiting.socket.number])
    waiting.socket.close()
  }

  /// Somebody is ready: the next processes are started. When nobody is left and the guest has all its devices, the VM runs.
  func goOnStarting() throws(SupervisionError) {
    guard phase == .starting else { return }
    try startNext()
    guard guestHasStarted, launches.isEmpty, processes.allSatisfy({ $0.state == .ready }) else { return }
    phase = .running
    // Not before: the guest waits for its devices, and they wait for us.
    try raiseWalls()
    if let number = guardian.endNumber { try watch(number, .guardianEnd) }
    startSpares(.now)
  }

  /// The guest has ended before everything was started: only its last words on the serial port still need somebody.
  func startSerialAfterAll() {
    let waiting = launches
    launches = []
    waitingSockets = [:]
    waitingAssignments = [:]
    for case .serial(let plan, let socket) in waiting {
      do throws(SupervisionError) { try startSerial(plan, socket) } catch {
        if let message = error.message { say(.warning, message) }
      }
    }
  }
}
