import CLinux
import Glibc
import HostSystem
import Sandbox

/// A back-end program: what it is called, which options it has, and its life from arguments to exit code.
///
/// Exit codes: 0 the front end went away, SIGTERM, or nothing was asked but text; 1 it could not start or had to give up;
/// 2 the command line is wrong. Each failure is one line on standard error.
public struct BackendProgram: Sendable {
  /// The program's own name, for logs and help.
  public let name: String
  /// One line for people, in help and description.
  public let summary: String
  /// The `type` of the capabilities JSON (`docs/interop/vhost-user.json` of QEMU): `block`, `net`, ...
  public let type: String
  /// The `features` of the capabilities JSON.
  public let features: [String]
  public let options: [LaunchOption]

  /// - Parameters:
  ///   - name: by default `martlet-` and the type.
  ///   - summary: by default what the type says.
  public init(name: String? = nil, type: String, summary: String? = nil, features: [String] = [], options: [LaunchOption] = []) {
    self.name = name ?? "martlet-" + type
    self.summary = summary ?? "a vhost-user \(type) device in its own process"
    self.type = type
    self.features = features
    self.options = options
  }

  /// Runs the program; returns its exit code.
  /// - Parameters:
  ///   - arguments: the whole command line, with the program's name first.
  ///   - makeDevice: opens what the device needs. Called before the sandbox closes.
  public func run<Device: DeviceBackend & ~Copyable>(
    _ arguments: [String], makeDevice: (LaunchArguments) throws(BackendError) -> Device
  ) -> CInt {
    run(arguments, alternative: nil) { launch throws(BackendError) in try serve(launch, makeDevice) }
  }

  /// As `run(_:makeDevice:)`, for a device that answers one chain after another.
  public func run<Device: ChainDevice & ~Copyable>(
    _ arguments: [String], serving makeDevice: (LaunchArguments) throws(BackendError) -> Device
  ) -> CInt {
    run(arguments) { launch throws(BackendError) in ChainBackend(try makeDevice(launch)) }
  }

  /// As `run(_:makeDevice:)`, for a program that can do something else than serve a front end.
  /// - Parameters:
  ///   - alternative: the option that asks for it, in place of a connection to a front end.
  ///   - work: does it, and returns the exit code. Gets the descriptor that is readable when the program is to end, and what
  ///     closes the sandbox but for the system calls named and says READY; before any thread is started.
  public func run<Device: DeviceBackend & ~Copyable>(
    _ arguments: [String], alternative: String, makeDevice: (LaunchArguments) throws(BackendError) -> Device,
    work: (LaunchArguments, consuming OwnedFD, (SystemCallNeeds) throws(BackendError) -> Void) throws(BackendError) -> CInt
  ) -> CInt {
    run(arguments, alternative: alternative) { launch throws(BackendError) in
      guard launch.has(alternative) else { return try serve(launch, makeDevice) }
      let ready = try wrap { () throws(SystemError) in
        Signals.ignoreBrokenPipes()
        return ReadyBox(try ReadyPort(launch.readyFD))
      }
      let signals = try wrap { () throws(SystemError) in try Signals.descriptor(for: [SIGTERM, SIGINT]) }
      return try work(launch, signals) { needs throws(BackendError) in
        try wall { () throws(SandboxError) in
          try ProcessWalls.closeFiles(launch.walls)
          try ProcessWalls.closeCalls(SystemCallNeeds([.base, .device]).rules + needs.rules, launch.walls)
        }
        try wrap { () throws(SystemError) in try ready.announce() }
      }
    }
  }

  private func wrap<R: ~Copyable>(_ body: () throws(SystemError) -> R) throws(BackendError) -> R {
    do { return try body() } catch { throw .system(error) }
  }

  private func run(
    _ arguments: [String], alternative: String?, serve: (LaunchArguments) throws(BackendError) -> CInt
  ) -> CInt {
    Log.setSpeaker(name)
    let launch: LaunchArguments
    do {
      launch = try LaunchArguments.parse(Array(arguments.dropFirst()), options: options, alternative: alternative)
    } catch {
      Log.error("\(error)")
      return 2
    }
    switch launch.request {
    case .help:
      Log.write(helpLines.joined(separator: "\n"))
      return 0
    case .printCapabilities:
      Log.write(capabilities)
      return 0
    case .printDescription:
      Log.write(description(binary: OwnProgram.path ?? name))
      return 0
    case .serve: break
    }
    Log.level = launch.logLevel
    do {
      // From here on the arguments are not read again: the title stands in their place.
      let suffix = launch.isStandby ? Self.standbySuffix : ""
      try wall { () throws(SandboxError) in try ProcessWalls.raise(title: launch.title.map { $0 + suffix }) }
      return try serve(launch)
    } catch {
      Log.error("\(error)")
      return error.isAboutTheCommandLine ? 2 : 1
    }
  }

  /// The start order: signals, connection, device, walls around files, rings and threads, walls around system calls, READY,
  /// service. What needs wide rights comes before the walls; guests are only served behind them.
  private func serve<Device: DeviceBackend & ~Copyable>(
    _ launch: LaunchArguments, _ makeDevice: (LaunchArguments) throws(BackendError) -> Device
  ) throws(BackendError) -> CInt {
    do {
      Signals.ignoreBrokenPipes()
      // Without a supervisor memory need not be sealed; who cuts it off shall lose the connection, not end the program.
      if !launch.isSupervised { clinux_bus_guard() }
      let signals = try Signals.descriptor(for: [SIGTERM, SIGINT, SIGHUP])
      try WaitBreaker.protectThisThread()
      let ready = try ReadyPort(launch.readyFD)
      var context = try BackendContext()
      try context.loop.add(signals, for: .readable, token: .signals)
      var device = try makeDevice(launch)
      // Late, so that a start that fails leaves no socket behind, where that can be: a path is nothing behind the walls.
      var early: Entrance?
      if launch.walls != .off { early = try Entrance(launch) }
      if !launch.isSupervised { try wall { () throws(SandboxError) in try ProcessWalls.giveUpCapabilities(launch.walls) } }
      try wall { () throws(SandboxError) in try ProcessWalls.closeFiles(launch.walls) }
      try device.prepare(&context)
      var calls = SystemCallNeeds([.base, .device]).rules + device.systemCalls.rules
      let entrance: Entrance
      if let early = early.take() { entrance = early } else { entrance = try Entrance(launch) }
      if !launch.isSupervised { calls += SystemCallList.byHand.rules }
      let statistics = try statisticsMemory(launch, queueCount: device.profile.queueCount)
      var server = try BackendServer(device, context, allowsUnsealedMemory: !launch.isSupervised, statistics: statistics)
      if launch.isStandby { server.titleInService = launch.title }
      try wall { () throws(SandboxError) in
        try ProcessWalls.closeCalls(calls, launch.walls)
      }
      try ready.announce()
      if !launch.isSupervised, launch.walls == .off {
        Log.warning("This process is not confined; --sandbox=on confines it, and martlet run does that and more")
      }
      Log.info("Serving")
      return try server.run(entrance, signals)
    } catch { throw BackendError(error) }
  }

  /// Serves one front end on the calling thread until it leaves: no options, no walls, no signals. For tests of a device.
  public static func serve<Device: DeviceBackend & ~Copyable>(
    _ socket: consuming OwnedFD, _ device: consuming Device
  ) throws(BackendError) {
    var device = device
    do {
      let never = try EventFD()
      var context = try BackendContext()
      try device.prepare(&context)
      var server = try BackendServer(device, context, allowsUnsealedMemory: true)
      guard try server.run(.connected(socket), never.fd) == 0 else { throw BackendError.device("The device or its front end failed") }
    } catch { throw BackendError(error) }
  }

  /// As above, for a device that answers one chain after another.
  public static func serve<Device: ChainDevice & ~Copyable>(
    _ socket: consuming OwnedFD, _ device: consuming Device
  ) throws(BackendError) {
    try serve(socket, ChainBackend(device))
  }

  /// Behind the title of a process that waits for its turn.
  private static let standbySuffix = " (spare)"

  private func statisticsMemory(_ launch: LaunchArguments, queueCount: Int) throws(BackendError) -> MemoryMapping? {
    guard let number = launch.statisticsFD else { return nil }
    do {
      let file = try OwnedFD.inherited(number)
      let size = queueCount * QueueStatistics.pageByteCount
      guard try file.status().byteCount >= UInt64(size) else {
        throw BackendError.badOption("--stats-fd", why: "is too small for \(queueCount) queues")
      }
      return try .shared(file, byteCount: size)
    } catch let error as SystemError {
      throw .system(error)
    } catch {
      throw error as? BackendError ?? .badOption("--stats-fd", why: "cannot be used")
    }
  }

  private func wall(_ body: () throws(SandboxError) -> Void) throws(BackendError) {
    do { try body() } catch { throw .device(error.message) }
  }

  /// The capabilities as one JSON object.
  public var capabilities: String {
    // Names are ours and need no escaping.
    let list = features.map { "\"\($0)\"" }.joined(separator: ", ")
    return "{\"type\": \"\(type)\"" + (features.isEmpty ? "}" : ", \"features\": [\(list)]}")
  }

  /// The description file by which management tools find back-end programs (`docs/interop/vhost-user.json` of QEMU,
  /// `VHostUserBackend`): installed as `share/qemu/vhost-user/50-NAME.json`.
  /// - Parameter binary: the program's absolute path.
  public func description(binary: String) -> String {
    "{\n  \"description\": \(Self.quoted("\(name): \(summary)")),\n  \"type\": \(Self.quoted(type)),\n"
      + "  \"binary\": \(Self.quoted(binary))\n}"
  }

  /// A JSON string (RFC 8259, section 7).
  private static func quoted(_ text: String) -> String {
    var result = "\""
    for scalar in text.unicodeScalars {
      switch scalar {
      case "\"", "\\": result += "\\\(scalar)"
      case "\u{0}"..<" ": result += "\\u00" + (scalar.value < 16 ? "0" : "") + String(scalar.value, radix: 16)
      default: result.unicodeScalars.append(scalar)
      }
    }
    return result + "\""
  }

  var helpLines: [String] {
    let all = LaunchArguments.common + options
    let names = all.map { "--" + $0.name + ($0.argument.map { "=" + $0 } ?? "") }
    let width = (names.map(\.utf8.count).max() ?? 0) + 2
    return ["\(name): \(summary)", ""]
      + zip(names, all).map { name, option in
        "  " + name + String(repeating: " ", count: width - name.utf8.count) + option.help
      }
  }
}

/// Where READY is said, once; whoever waits there sees the end if it never is.
private struct ReadyPort: ~Copyable {
  private let fd: OwnedFD?

  init(_ number: CInt?) throws(SystemError) {
    if let number { fd = try .inherited(number) } else { fd = nil }
  }

  consuming func announce() throws(SystemError) { try fd?.writeAll(Array("READY\n".utf8)) }
}

extension Log {
  /// Text on standard output, for the options that ask for it.
  static func write(_ text: String) {
    let output = OwnedFD(owning: 1)
    try? output.writeAll(Array((text + "\n").utf8))
    _ = output.release()
  }
}

/// A ready port for a closure, which cannot consume what it captures.
private final class ReadyBox {
  private var port: ReadyPort?
  init(_ port: consuming ReadyPort) { self.port = consume port }
  func announce() throws(SystemError) { try port.take()?.announce() }
}
