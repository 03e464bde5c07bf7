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

  /// Opens, then starts. Nothing is started before everything that can be missing has been found.
  func start() throws(SupervisionError) {
    try watch(signals.rawValue, .signals)
    let kvm = try HostFiles.kvm()
    let kernel = FDBox(
      try HostFiles.payload(configuration.kernel, what: "kernel", memory: configuration.memorySize))
    var initramfs: FDBox?
    if let path = configuration.initramfs {
      initramfs = FDBox(try HostFiles.payload(path, what: "initramfs", memory: configuration.memorySize))
    }
    var planner = DevicePlanner(configuration: configuration, guardian: guardian)
    devices = try planner.planDevices()
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

    let null = try HostFiles.null()
    try startCore(null, kvm, kernel, initramfs)
    for device in devices { try start(device, null) }
    if let serial { try connectSerial(serial) }
    for line in planner.announcements { say(.info, line) }
    try sendStartIfComplete()
  }

  func watch(_ number: CInt, _ token: Token) throws(SupervisionError) {
    try attempt { () throws(SystemError) in
      try loop.add(number: number, for: .readable, token: token)
    } or: {
      .system($0)
    }
  }

  private func startCore(
    _ null: borrowing OwnedFD, _ kvm: borrowing OwnedFD, _ kernel: FDBox, _ initramfs: FDBox?
  ) throws(SupervisionError) {
    let pair = try Self.pair(.sequencedPacket)
    var launch = ChildLaunch(
      arguments: ["martlet-core", "--fd=3"] + walls.arguments + ["--title=vm/\(configuration.name)/core"],
      descriptors: [null.rawValue, null.rawValue, 2, pair.second.rawValue], identity: identities.next(),
      namespaces: walls.namespaces)
    launch.fileLimit = Self.coreFileLimit
    // KVM makes a thread of its own in the process that runs guests.
    launch.threadLimit = UInt64(configuration.cpuCount) + Self.spareThreads
    coreIndex = processes.count
    try launchProcess("core", "martlet-core", launch, readyPipe: nil, isOnTerminal: false)
    let channel = CoreChannel(pair.first)
    self.channel = channel
    try watch(channel.number, .core)
    let message = SupervisorMessage.configure(
      CoreConfiguration(
        name: configuration.name, cpuCount: UInt16(configuration.cpuCount), memorySize: configuration.memorySize,
        commandLine: configuration.commandLine, hasInitramfs: initramfs != nil, hasSerial: configuration.serial != .off,
        restartsOnReset: configuration.restartsOnReset, replyDeadline: configuration.deadlines.reply))
    var descriptors = [kvm.rawValue, kernel.number]
    if let initramfs { descriptors.append(initramfs.number) }
    try send(message, descriptors)
  }

  private func start(_ device: DevicePlan, _ null: borrowing OwnedFD) throws(SupervisionError) {
    switch device.backEnd {
    case .external(let socket):
      // Connected already, so it counts as ready.
      try send(.device(device.assignment), [socket.number])
      socket.close()
    case .program(let program, let arguments, let resources, let isOnTerminal):
      let pair = try Self.pair(.stream)
      let index = try startBackEnd(
        device.assignment.id, program, ["--fd=3"] + arguments, socket: pair.second.rawValue, resources, null,
        queueCount: device.assignment.queueSizes.count, isOnTerminal: isOnTerminal)
      cares[device.assignment.id]?.started(resources)
      waitingSockets[index] = (device.assignment, FDBox(pair.first))
    }
  }

  /// The core's end of the serial stream goes to the core. What the guest writes waits in it until the carrier is up.
  private func connectSerial(_ plan: TerminalPlan) throws(SupervisionError) {
    let pair = try Self.pair(.stream)
    try send(.stream(.serial), [pair.first.rawValue])
    waitingSerial = (plan, FDBox(pair.second))
  }

  /// Not before the devices are ready: they are what the guest waits for, and processors are few.
  private func startSerial() throws(SupervisionError) {
    guard let (plan, socket) = waitingSerial else { return }
    waitingSerial = nil
    _ = try startBackEnd(
      VMConfiguration.Reserved.serial, "martlet-console", ["--stream-fd=3"] + plan.arguments, socket: socket.number,
      plan.resources, try HostFiles.null(), isOnTerminal: plan.isOnTerminal)
    for resource in plan.resources { resource.close() }
    socket.close()
  }

  /// Starts a device program. Our copies of its resources are the caller's to close.
  /// - Parameter dead: the process whose place it takes.
  func startBackEnd(
    _ id: String, _ program: String, _ arguments: [String], socket: CInt, _ resources: [FDBox],
    _ null: borrowing OwnedFD, queueCount: Int = 1, isOnTerminal: Bool, inPlaceOf dead: Int? = nil
  ) throws(SupervisionError) -> Int {
    let threadLimit = UInt64(queueCount) * Self.threadsPerQueue + Self.spareThreads
    var ends: [CInt] = [-1, -1]
    // SAFETY: room for the two numbers that the call stores.
    let result = unsafe clinux_pipe(&ends, O_CLOEXEC | O_NONBLOCK)
    if result < 0 { throw .system(SystemError("make a pipe", Errno(-result))) }
    let reading = OwnedFD(owning: ends[0])
    let writing = OwnedFD(owning: ends[1])
    var arguments = arguments
    var resources = resources
    var escapeLine: FDBox?
    if isOnTerminal {
      let pair = try Self.pair(.stream)
      arguments.append("--control-fd=\(firstResource + resources.count)")
      resources.append(FDBox(pair.second))
      escapeLine = FDBox(pair.first)
    }
    let launch = ChildLaunch(
      arguments: [program] + arguments + walls.arguments + ["--ready-fd=4", "--title=vm/\(configuration.name)/\(id)"],
      descriptors: [null.rawValue, null.rawValue, 2, socket, writing.rawValue] + resources.map(\.number),
      identity: dead.map { processes[$0].identity } ?? identities.next(), fileLimit: Self.deviceFileLimit,
      parentDeathSignal: isOnTerminal ? SIGTERM : SIGKILL, namespaces: walls.namespaces, threadLimit: threadLimit)
    let index = try launchProcess(id, program, launch, readyPipe: reading, isOnTerminal: isOnTerminal, inPlaceOf: dead)
    if let escapeLine {
      // The other end, which was made here.
      resources.last?.close()
      try watch(escapeLine.number, .escapeKey(index))
      escapeLines[index] = escapeLine
    }
    return index
  }

  @discardableResult
  private func launchProcess(
    _ id: String, _ program: String, _ launch: ChildLaunch, readyPipe: consuming OwnedFD?, isOnTerminal: Bool,
    inPlaceOf dead: Int? = nil
  ) throws(SupervisionError) -> Int {
    let executable = try programs.open(program)
    let child: StartedChild
    do { child = try launch.start(executable) } catch {
      throw .launch(error.message + (walls.mode == .off ? "" : Stage.fork.remedy))
    }
    let process = VMProcess(
      id: id, program: program, identity: launch.identity, isOnTerminal: isOnTerminal, child: child,
      readyPipe: readyPipe, startTime: .now)
    let index = dead ?? processes.count
    if let dead { processes[dead] = process } else { processes.append(process) }
    if let number = process.reportNumber { try watch(number, .launchReport(index)) }
    try watch(process.endNumber, .processEnd(index))
    if let number = process.readyNumber { try watch(number, .ready(index)) }
    return index
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
    guard let waiting = waitingSockets.removeValue(forKey: index) else { return try handOverSuccessor(processes[index].id) }
    try send(.device(waiting.assignment), [waiting.socket.number])
    waiting.socket.close()
  }

  /// Once the core and all devices are ready.
  func sendStartIfComplete() throws(SupervisionError) {
    guard phase == .starting, coreIsReady, !startIsSent, waitingSockets.isEmpty,
      processes.allSatisfy({ $0.state == .ready })
    else { return }
    startIsSent = true
    startSequence = try send(.start)
    try startSerial()
  }

  /// Once the guest has started and everybody is ready.
  func beRunningIfComplete() {
    guard phase == .starting, guestHasStarted, processes.allSatisfy({ $0.state == .ready }) else { return }
    phase = .running
    becameRunning()
  }
}
