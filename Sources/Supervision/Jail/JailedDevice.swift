import ControlProtocol
import Glibc
import HostSystem
import Sandbox

/// A device served by somebody else's program, which we start in a jail: everything to start it, once and again.
final class JailedDevice {
  /// Of the device, or the name under which a candidate for it is kept.
  var id: String
  private let configuration: VMConfiguration.JailedProgram
  private let profile: JailProfile
  private let defines: [String: String]
  private let host: HostWalls?
  /// The program's name without its directory, for people.
  let name: String

  /// Where a program that makes its socket itself makes it, inside.
  static let socketDirectory = "/run"
  static let socketPath = "/run/vhost-user.sock"
  private static let descriptor: Int32 = 3

  /// Reads the profile. What stands in it is checked by `plan`. Without the host's walls: what the spawner has planned.
  init(_ configuration: VMConfiguration.JailedProgram, id: String, vm: String, host: HostWalls?) throws(SupervisionError) {
    self.id = id
    self.configuration = configuration
    self.host = host
    name = configuration.words[0].split(separator: "/").last.map(String.init) ?? configuration.words[0]
    guard host != nil else {
      profile = JailProfile(file: configuration.profile)
      defines = [:]
      return
    }
    do throws(JailError) { profile = try JailProgram.load(configuration.profile) } catch { throw .jail(id, error) }
    var defines = ["id": id, "name": vm]
    if let path = configuration.path {
      do { _ = try OwnedFD.openNamed(path, pathOnly) } catch { throw .file(what: "path of \(id)", path: path, error.errno) }
      guard let whole = JailPlan.real(path) else { throw .file(what: "path of \(id)", path: path, Errno.current) }
      defines["path"] = whole
    }
    self.defines = defines
  }

  /// Numbers of those that its program keeps.
  var capabilities: [Int] { profile.capabilities }

  /// The program runs with the caller's ids.
  var keepsIdentity: Bool { profile.user == .keep }

  var convention: VMConfiguration.JailedProgram.Convention { configuration.convention ?? .connected }

  /// Everything checked against this host; nothing is started.
  /// - Parameter socket: what becomes the program's descriptor 3; nil when it makes its socket itself.
  func plan(_ identity: ChildIdentity?, null: CInt, socket: CInt?) throws(SupervisionError) -> JailPlan {
    guard let host else { throw .launch("The jail of \(id) is the spawner's") }
    var values = defines
    values["fd"] = String(Self.descriptor)
    values["listen"] = String(Self.descriptor)
    values["socket"] = Self.socketPath
    var places: [JailProfile.Place] = []
    if convention == .path {
      places.append(JailProfile.Place(kind: .temporary, path: Self.socketDirectory, access: .readWrite, size: 1 << 20))
    }
    // Names that are not ours are the program's own business.
    let words = configuration.words.map { word in
      var word = word
      for (name, value) in values { word = Self.replaced(word, "{\(name)}", value) }
      return word
    }
    let path = unsafe getenv("PATH").map { unsafe String(cString: $0) }
    do throws(JailError) {
      return try JailPlan(
        profile, words: words, defines: defines, descriptors: socket.map { [Self.descriptor: $0] } ?? [:],
        standard: (null, null, 2), extraPlaces: places, identity: identity, host: host, searchPath: path)
    } catch { throw .jail(id, error) }
  }

  private static func replaced(_ text: String, _ part: String, _ value: String) -> String {
    var result = ""
    var rest = text[...]
    while let start = rest.firstIndex(of: "{") {
      result += rest[..<start]
      rest = rest[start...]
      if rest.hasPrefix(part) {
        result += value
        rest = rest.dropFirst(part.count)
      } else {
        result += "{"
        rest = rest.dropFirst()
      }
    }
    return result + rest
  }

  /// The program's socket and our end of the connection: with `{listen}` a socket on which our connection waits already,
  /// so that nothing has to be waited for and no other can come first. Nil: it makes its socket itself.
  func connection() throws(SupervisionError) -> (theirs: FDBox, ours: FDBox)? {
    switch convention {
    case .connected:
      let pair = try Supervisor.pair(.stream)
      return (FDBox(pair.second), FDBox(pair.first))
    case .listening: return try Self.waitingConnection()
    case .path: return nil
    }
  }

  private static func waitingConnection() throws(SupervisionError) -> (theirs: FDBox, ours: FDBox) {
    var template = Array("/tmp/martlet-XXXXXX".utf8CString)
    // SAFETY: the template is ours, NUL-terminated and of the length that mkdtemp keeps; it makes a directory with mode 0700.
    guard unsafe mkdtemp(&template) != nil else { throw .system(SystemError("make a directory in /tmp", Errno.current)) }
    let directory = String(decoding: template.dropLast().map { UInt8(bitPattern: $0) }, as: UTF8.self)
    let path = directory + "/s"
    defer {
      // SAFETY: NUL-terminated copies that live for the calls.
      _ = unsafe unlink(path)
      _ = unsafe rmdir(directory)
    }
    do {
      let listener = try UnixSocket.listen(at: path)
      let ours = try UnixSocket.connect(to: path)
      return (FDBox(listener), FDBox(ours))
    } catch { throw .system(error) }
  }

  /// Connects to the socket that the program has made; nil while there is none.
  static func connect(_ processID: Int32) -> FDBox? {
    // A link that the program has put there would lead to a socket of ours.
    guard let place = try? OwnedFD.open("/proc/\(processID)/root\(socketPath)", pathOnly | noFollow), (try? place.status().kind) == .socket,
      let socket = try? UnixSocket.connect(to: "/proc/self/fd/\(place.rawValue)", timeout: .milliseconds(1))
    else { return nil }
    return FDBox(socket)
  }

  static let connectInterval = Duration.milliseconds(10)
}

/// A new child on its way through places that cannot hold what is not copyable.
final class FDChild {
  private var child: StartedChild?
  init(_ child: consuming StartedChild) { self.child = consume child }
  func take() -> StartedChild? { child.take() }
}

extension Supervisor {
  /// The VM's host walls with what a jail needs to know.
  func hostWalls() -> HostWalls { HostWalls.probe(identity: identities.example) }

  /// Before anything is started: what the program's jail lacks is found now.
  func check(_ device: JailedDevice, _ null: borrowing OwnedFD) throws(SupervisionError) {
    let plan = try device.plan(identities.example, null: null.rawValue, socket: null.rawValue)
    _ = plan.launch.arguments
  }

  /// Starts the program; what connects it to the core goes there when the program runs.
  /// - Parameters:
  ///   - null: /dev/null; -1 behind our walls, where the spawner has it.
  ///   - dead: the process whose place it takes.
  ///   - isNew: the place is that of another device.
  func startJailed(
    _ device: JailedDevice, null: CInt, inPlaceOf dead: Int? = nil, isNew: Bool = false, identity given: ChildIdentity? = nil
  ) throws(SupervisionError) -> (index: Int, ours: FDBox?) {
    let started: (child: FDChild, ours: FDBox?, walls: JailWalls?)
    let identity: ChildIdentity?
    if let spawner {
      identity = isNew ? given : dead.flatMap { processes[$0].identity }
      let (child, ours) = try spawner.startJailed(device.id)
      started = (child, ours, isNew ? JailWalls() : dead.flatMap { processes[$0].jail })
    } else {
      identity = knownJailed[device.id]?.identity ?? (device.keepsIdentity ? nil : given ?? identities.next())
      let (child, ours, walls) = try launchJailed(device, identity, null: null, asSibling: keeper != nil)
      knownJailed[device.id] = (device, identity)
      started = (child, ours, walls)
    }
    guard let child = started.child.take() else { preconditionFailure("A child is taken once.") }
    jailedNumbers[device.id] = child.process.processID
    let process = VMProcess(
      id: device.id, program: device.name, identity: identity, isOnTerminal: false, child: child, readyPipe: nil, startTime: .now,
      jail: started.walls)
    return (try enlist(process, inPlaceOf: dead), started.ours)
  }

  /// The start itself: here before our own walls stand, afterwards in the spawner.
  func launchJailed(
    _ device: JailedDevice, _ identity: ChildIdentity?, null: CInt, asSibling: Bool
  ) throws(SupervisionError) -> (child: FDChild, ours: FDBox?, walls: JailWalls) {
    let connection = try device.connection()
    var plan = try device.plan(identity, null: null, socket: connection?.theirs.number)
    let group = try openGroup(device.id)
    plan.launch.group = group?.number
    defer { group?.close() }
    do throws(JailError) {
      let child = FDChild(try plan.start(asSibling: asSibling))
      connection?.theirs.close()
      return (child, connection?.ours, plan.walls)
    } catch { throw .jail(device.id, error) }
  }

  /// A connection to the socket that a jailed program has made; nil while there is none.
  func connectToJailed(_ id: String, _ processID: Int32) -> FDBox? {
    // Behind our walls a call to make a socket would be our end.
    if let spawner { return spawner.connect(id) }
    return JailedDevice.connect(processID)
  }

  /// The program has been executed, or its socket may have appeared: when the connection is there, it is ready.
  func jailedMayBeReady(_ index: Int) throws(SupervisionError) {
    let process = processes[index]
    guard process.jail != nil, process.state == .starting, process.hasExecuted else { return }
    let hasSocket = waitingSockets[index]?.socket != nil || cares[process.id]?.socket != nil
    if !hasSocket {
      guard let socket = connectToJailed(process.id, process.processID) else { return }
      if let assignment = waitingAssignments.removeValue(forKey: index) {
        waitingSockets[index] = (assignment, socket)
      } else {
        cares[process.id]?.socket = socket
      }
    }
    process.markReady()
    process.readyTime = .now
    try handOver(index)
    try goOnStarting()
  }

  /// Programs whose socket is waited for.
  var expectsSockets: Bool { processes.contains { $0.jail != nil && $0.state == .starting && $0.hasExecuted } }

  func lookForSockets() throws(SupervisionError) {
    for index in processes.indices { try jailedMayBeReady(index) }
  }

  /// Programs of others do not end when their connection does.
  func endJailed() {
    for process in processes where process.jail != nil && process.isAlive {
      // Behind our walls nothing of /proc can be asked; one that has no handler is killed after its time.
      if spawner == nil { JailProgram.end(process.processID, process.signal) } else { process.signal(SIGTERM) }
    }
  }
}
