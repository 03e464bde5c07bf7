import CLinux
import ControlProtocol
import HostSystem
import VirtioSpec

/// One device before its start: what the core is told, and either the program that serves it with its resources opened,
/// or the connected socket of an external back end.
final class DevicePlan {
  enum BackEnd {
    /// Our program, its arguments behind the common ones, and what it is given from descriptor 5 on.
    case program(String, arguments: [String], resources: [FDBox], isOnTerminal: Bool)
    case external(FDBox)
    /// Somebody else's, which we start.
    case jailed(JailedDevice)
  }

  let assignment: DeviceAssignment
  var backEnd: BackEnd

  init(_ assignment: DeviceAssignment, _ backEnd: BackEnd) {
    self.assignment = assignment
    self.backEnd = backEnd
  }
}

/// A process that is started beside the core and the guest.
enum PlannedLaunch {
  case device(DevicePlan)
  /// The carrier of the serial port, with its end of the stream.
  case serial(TerminalPlan, FDBox)
}

/// The first descriptor of a process that is its own resource (launch contract).
let firstResource = 5

/// Where the bytes of a console or serial port go, as arguments and descriptors of a console process.
struct TerminalPlan {
  let arguments: [String]
  let resources: [FDBox]
  let isOnTerminal: Bool
}

/// Opens everything that the devices of a configuration need, in the order of the command line.
struct DevicePlanner {
  let configuration: VMConfiguration
  let guardian: TerminalGuard
  /// What this host has for jails; asked only when there is one.
  let host: () -> HostWalls
  /// Waits so long; false when a signal asks for the end.
  let pause: (Duration) -> Bool
  /// Lines for the person, such as the path of a pseudo-terminal.
  private(set) var announcements: [String] = []
  private var nextSlot: UInt8 = 1
  /// What the spawner has opened, in the order in which it is asked for here; nil: everything is opened here.
  private var opened: [FDBox]?
  private let claims: ImageClaims

  init(
    configuration: VMConfiguration, guardian: TerminalGuard, claims: ImageClaims, host: @escaping () -> HostWalls, opened: [FDBox]? = nil,
    pause: @escaping (Duration) -> Bool = { _ in false }
  ) {
    self.claims = claims
    self.opened = opened
    self.pause = pause
    self.configuration = configuration
    self.guardian = guardian
    self.host = host
  }

  mutating func planDevices() throws(SupervisionError) -> [DevicePlan] {
    var plans: [DevicePlan] = []
    for disk in configuration.disks { plans.append(try plan(disk)) }
    for net in configuration.nets { plans.append(try plan(net)) }
    for fileSystem in configuration.fileSystems { plans.append(try plan(fileSystem)) }
    if let entropy = configuration.entropy { plans.append(try plan(entropy)) }
    for generic in configuration.generics { plans.append(try plan(generic)) }
    if configuration.console != .off {
      plans.append(try plan(console: VMConfiguration.Reserved.console, configuration.console, option: "--console"))
    }
    return plans
  }

  /// One device of the configuration, for a VM that runs; the core chooses its slot.
  mutating func planDevice(_ id: String) throws(SupervisionError) -> DevicePlan {
    nextSlot = DeviceAssignment.anySlot
    for disk in configuration.disks where disk.id == id { return try plan(disk) }
    for net in configuration.nets where net.id == id { return try plan(net) }
    for fileSystem in configuration.fileSystems where fileSystem.id == id { return try plan(fileSystem) }
    for generic in configuration.generics where generic.id == id { return try plan(generic) }
    for console in configuration.consoles where console.id == id {
      return try plan(console: id, console.terminal, option: "console \(id)")
    }
    if let entropy = configuration.entropy, entropy.id == id { return try plan(entropy) }
    throw .launch("There is no device '\(id)' in the configuration")
  }

  /// Opens it here, or takes the next of what has been opened.
  private mutating func open(_ body: () throws(SupervisionError) -> OwnedFD) throws(SupervisionError) -> FDBox {
    guard let next = opened?.first else {
      if opened != nil { throw .launch("The spawner has opened less than the device needs") }
      return FDBox(try body())
    }
    opened?.removeFirst()
    return next
  }

  private mutating func plan(_ generic: VMConfiguration.GenericVhostUser) throws(SupervisionError) -> DevicePlan {
    DevicePlan(assign(generic.id, generic.deviceType, generic.queueSizes), try external(generic.source, generic.id))
  }

  private mutating func plan(
    console id: String, _ terminal: VMConfiguration.Terminal, option: String
  ) throws(SupervisionError) -> DevicePlan {
    let terminal = try planTerminal(terminal, option: option, lateID: option.hasPrefix("--") ? nil : id)
    return DevicePlan(
      assign(id, .console, [64, 64]),
      .program(
        "martlet-console", arguments: terminal.arguments, resources: terminal.resources, isOnTerminal: terminal.isOnTerminal))
  }

  private mutating func assign(
    _ id: String, _ type: DeviceID, _ queueSizes: [UInt16], own: FeatureSet = [], configuration: [UInt8] = []
  ) -> DeviceAssignment {
    defer { if nextSlot != DeviceAssignment.anySlot { nextSlot += 1 } }
    var assignment = DeviceAssignment(
      id: id, deviceType: type, pciSlot: nextSlot, queueSizes: queueSizes, ownFeatures: own, configuration: configuration)
    let action = self.configuration.deathPolicy(of: id).action
    assignment.isReplaceable = action == .restart || action == .hold
    return assignment
  }

  private mutating func plan(_ disk: VMConfiguration.Disk) throws(SupervisionError) -> DevicePlan {
    let sizes = [UInt16](repeating: disk.queueSize, count: Int(disk.queueCount))
    let assignment = assign(disk.id, .block, sizes)
    switch disk.source {
    case .external(let source): return DevicePlan(assignment, try external(source, disk.id))
    case .image(let path, let readOnly):
      let claims = claims
      let image = try open { () throws(SupervisionError) in
        try HostFiles.image(path, readOnly: readOnly, isShared: disk.isShared, isRaw: disk.isRaw, disk: disk.id, claims)
      }
      var arguments = Self.arguments(disk, readOnly)
      // The process itself sees no /sys, and neither does a supervisor behind its walls: there the spawner's plan counts.
      if opened == nil, let life = StorageLifetime.read(of: try HostFiles.status(image.number)) {
        arguments.append("--lifetime=\(life.text)")
      }
      return DevicePlan(
        assignment, .program("martlet-block", arguments: arguments, resources: [image], isOnTerminal: false))
    }
  }

  /// What the block program is told of a disk.
  static func arguments(_ disk: VMConfiguration.Disk, _ readOnly: Bool) -> [String] {
    var arguments = ["--blk-fd=\(firstResource)", "--blk-locked", "--num-queues=\(disk.queueCount)", "--queue-size=\(disk.queueSize)"]
    if readOnly { arguments.append("--read-only") }
    arguments += disk.backEndArguments
    arguments.append("--serial=\(disk.serial ?? String(disk.id.prefix(VMConfiguration.Limits.serial)))")
    return arguments
  }

  private mutating func plan(_ net: VMConfiguration.Net) throws(SupervisionError) -> DevicePlan {
    var space = NetConfiguration()
    let mac = net.mac ?? Self.derivedMAC(vm: configuration.name, device: net.id)
    space.mac = MACAddress(octets: (mac[0], mac[1], mac[2], mac[3], mac[4], mac[5]))
    space.status = NetSpec.linkUp
    let assignment = assign(
      net.id, .net, [net.queueSize, net.queueSize], own: [.netMAC, .netStatus], configuration: space.encoded())
    switch net.source {
    case .external(let source): return DevicePlan(assignment, try external(source, net.id))
    case .tap(let tap):
      let queue = try open { () throws(SupervisionError) in try Self.attach(tap, net: net.id) }
      return DevicePlan(
        assignment,
        .program("martlet-net", arguments: ["--tap-fd=\(firstResource)"], resources: [queue], isOnTerminal: false))
    }
  }

  /// The descriptor of the tap's queue. Never makes an interface.
  private static func attach(_ tap: String, net: String) throws(SupervisionError) -> OwnedFD {
    do { return try TapDevice.open(tap).takeFD() } catch {
      switch error {
      case .badName, .missing: throw .tapMissing(net: net, tap: tap)
      case .busy: throw .tapBusy(net: net, tap: tap)
      case .notPermitted: throw .tap(net: net, tap: tap, .notPermitted)
      case .wrongKind, .notATap, .wrongFlags: throw .notATap(net: net, tap: tap)
      case .noDriver(let error): throw .noTun(net: net, error.errno)
      case .system(let error): throw .tap(net: net, tap: tap, error.errno)
      }
    }
  }

  /// The daemon knows the files; name and queues are said to the guest by us.
  private mutating func plan(_ fileSystem: VMConfiguration.FileSystem) throws(SupervisionError) -> DevicePlan {
    let space = FileSystemConfiguration(tag: fileSystem.tag, requestQueueCount: UInt32(fileSystem.queueCount))
    let sizes = [UInt16](repeating: fileSystem.queueSize, count: 1 + Int(fileSystem.queueCount))
    return DevicePlan(
      assign(fileSystem.id, .fileSystem, sizes, configuration: space?.encoded() ?? []),
      try external(fileSystem.source, fileSystem.id))
  }

  private mutating func plan(_ entropy: VMConfiguration.Entropy) throws(SupervisionError) -> DevicePlan {
    let source = try open { () throws(SupervisionError) in try HostFiles.randomSource(entropy.source) }
    return DevicePlan(
      assign(entropy.id, .entropy, [64]),
      .program("martlet-template", arguments: ["--source-fd=\(firstResource)"], resources: [source], isOnTerminal: false))
  }

  private mutating func external(_ source: VMConfiguration.External, _ id: String) throws(SupervisionError) -> DevicePlan.BackEnd {
    let path: String
    switch source {
    case .socket(let socket): path = socket
    case .program(let program):
      // Behind our walls its profile cannot be read, and is not needed.
      let host = opened == nil ? host() : nil
      return .jailed(try JailedDevice(program, id: id, vm: configuration.name, host: host))
    }
    let timeout = Duration.milliseconds(configuration.deadlines.connect)
    let end = MonotonicTime.now.advanced(by: .milliseconds(Int64(configuration.deathPolicy(of: id).patience ?? 0)))
    let pause = pause
    let socket = try open { () throws(SupervisionError) in
      // Until the time is over.
      while true {
        do throws(SystemError) { return try UnixSocket.connect(to: path, timeout: timeout) } catch {
          guard error.errno == .noEntry || error.errno == .connectionRefused, .now < end, pause(.milliseconds(20)) else {
            throw .backendSocket(device: id, path: path, error.errno)
          }
        }
      }
    }
    return .external(socket)
  }

  /// The host side of a console.
  /// - Parameter id: of a device that is added while the VM runs.
  mutating func planTerminal(
    _ terminal: VMConfiguration.Terminal, option: String, lateID id: String? = nil
  ) throws(SupervisionError) -> TerminalPlan {
    let n = firstResource
    switch terminal {
    case .off, .null: return TerminalPlan(arguments: ["--null"], resources: [], isOnTerminal: false)
    case .tty:
      // Our standard input and output, whatever they are; closed ones read as ended.
      let input = FDBox(try guardian.inherited(0))
      let output = FDBox(try guardian.inherited(1))
      return TerminalPlan(
        arguments: ["--tty-in-fd=\(n)", "--tty-out-fd=\(n + 1)"], resources: [input, output], isOnTerminal: true)
    case .pty:
      var path = ""
      let master = try open { () throws(SupervisionError) in
        let pty = try PseudoTerminal(option: option)
        path = pty.path
        return pty.take()
      }
      if !path.isEmpty { announcements.append("\(option.hasPrefix("--") ? String(option.dropFirst(2)) : option): \(path)") }
      return TerminalPlan(arguments: ["--pty-fd=\(n)"], resources: [master], isOnTerminal: false)
    case .file(let path):
      let file = try open { () throws(SupervisionError) in try HostFiles.consoleFile(path, option: option) }
      return TerminalPlan(arguments: ["--file-fd=\(n)"], resources: [file], isOnTerminal: false)
    case .socket(let path):
      let listener = try open { [guardian] () throws(SupervisionError) in
        guard let id else { return try guardian.listen(at: path, option: "\(option) socket") }
        return try guardian.listenLate(at: path, id: id)
      }
      return TerminalPlan(arguments: ["--listen-fd=\(n)"], resources: [listener], isOnTerminal: false)
    }
  }

  /// Always the same for the same names: locally administered, unicast, five bytes of an FNV-1a hash.
  static func derivedMAC(vm: String, device: String) -> [UInt8] {
    var hash: UInt64 = 0xCBF2_9CE4_8422_2325
    for byte in "\(vm)/\(device)".utf8 { hash = (hash ^ UInt64(byte)) &* 0x100_0000_01B3 }
    return [0x02] + (0..<5).map { UInt8(truncatingIfNeeded: hash >> (8 * UInt64($0))) }
  }
}

extension PseudoTerminal {
  consuming func take() -> OwnedFD { master }
}
