import ControlProtocol
import Glibc
import HostSystem

/// A back end on its way to take over from one that serves. There is one at a time.
struct Replacement {
  enum Step: Equatable {
    /// Its process comes up.
    case starting
    /// The core looks at it.
    case examining(sequence: UInt32)
    /// The core changes over.
    case exchanging(sequence: UInt32)
    /// Whichever of the two is not needed any more is to end.
    case ending
  }

  let order: ReplaceOrder
  /// As it came.
  let line: String
  let client: Int
  /// What is known of the new one, as of any device's back end.
  let care: DeviceCare
  /// The VM's configuration with it.
  let configuration: VMConfiguration
  let extraArguments: [String]
  /// The VM has come to own another image for it.
  let hasOtherImage: Bool
  var step = Step.starting
  /// When the step is late.
  var deadline: MonotonicTime?
  var findings: [CoreMessage.Finding] = []
  var exchangeTime = MonotonicTime.now
  /// From the request to stop the old one's rings to the answer that the new one's run.
  var gap = Duration.zero
  /// The new one serves.
  var isDone = false
  /// How its process has ended, as the end of a sentence.
  var candidateEnd = ""
  /// What the client is told when everything has come to its end.
  var answer: JSONValue?

  var id: String { order.id }
}

/// What is needed to start a candidate.
struct ReplacementPlan {
  let care: DeviceCare
  let configuration: VMConfiguration
  let extraArguments: [String]
  /// Of a program of ours: what it is given. Of a back end that runs already: the connection.
  let resources: [FDBox]
}

extension Supervisor {
  /// Under these names the one that comes and the one that goes are kept beside the device's own.
  static func candidateName(_ id: String) -> String { id + " next" }
  static func retiredName(_ id: String) -> String { id + " replaced" }
  /// The device that a process of whatever name serves, or is to.
  static func device(of name: String) -> String { String(name.prefix { $0 != " " }) }

  /// Finds out what the order means for this VM and opens what it names. Nothing has changed afterwards but that the candidate's
  /// image is locked.
  /// - Parameter opened: what the spawner has opened for it; nil to open it here.
  func plan(_ order: ReplaceOrder, opened: [FDBox]?) throws(SupervisionError) -> ReplacementPlan {
    let id = order.id
    guard let old = cares[id] else { throw .launch("There is no device '\(id)'") }
    var configuration = configuration
    var disk = configuration.disks.first { $0.id == id }
    if let keys = order.disk {
      guard let present = disk else {
        throw .launch("\(id) is no disk; only a disk's image can be changed, so leave out --path and --disk")
      }
      do { disk = try present.with(keys: keys, cpuCount: configuration.cpuCount) } catch { throw .launch(error.message) }
    }
    var source = order.source
    var jailed: VMConfiguration.JailedProgram?
    if case .program(let program)? = configuration.external(of: id) { jailed = program }
    // The present program again: as it is installed now, or with another image.
    if source == .same, let jailed { source = .jailed(jailed.words, profile: jailed.profile) }
    switch source {
    case .same:
      guard case .program(let program, let arguments, let isOnTerminal) = old.kind else {
        // What has an image can be served by our own program.
        if order.disk != nil { return try planOwn(id, "martlet-block", [], [], false, disk, configuration, old, opened) }
        let ours = disk == nil ? "" : "--path FILE, "
        throw .launch("The back end of \(id) was started by hand; say who takes over: \(ours)--socket PATH, or -- PROGRAM ARGUMENT ...")
      }
      let extra = extraArguments[id] ?? []
      return try planOwn(
        id, program, Array(arguments.dropLast(extra.count)), extra, isOnTerminal, disk, configuration, old, opened)
    case .program(let words):
      if case .program(_, let arguments, let isOnTerminal) = old.kind {
        let known = Array(arguments.dropLast((extraArguments[id] ?? []).count))
        return try planOwn(id, words[0], known, Array(words.dropFirst()), isOnTerminal, disk, configuration, old, opened)
      }
      guard disk != nil else {
        throw .launch("How \(words[0]) is given what \(id) needs is not known here; start it by hand (--socket), or in a jail (--jail)")
      }
      return try planOwn(id, words[0], [], Array(words.dropFirst()), false, disk, configuration, old, opened)
    case .jailed(let words, let profile):
      var path = jailed?.path
      if case .image(let image, _)? = disk?.source { path = image } else if path == nil { path = old.image?.path }
      if path == nil, words.contains(where: { VMConfiguration.JailedProgram.contains($0, "{path}") }) {
        throw .launch("Nothing says what {path} stands for; add --path FILE")
      }
      let program = VMConfiguration.JailedProgram(words: words, profile: profile, path: path)
      let device = try JailedDevice(program, id: id, vm: configuration.name, host: opened == nil ? hostWalls() : nil)
      device.id = Self.candidateName(id)
      configuration.serve(id, by: .program(program))
      return ReplacementPlan(
        care: DeviceCare(id, .jailed(device), old.policy, image: nil), configuration: configuration, extraArguments: [], resources: [])
    case .socket(let path):
      var socket = opened?.first
      if socket == nil { socket = try connect(candidate: path, id) }
      configuration.serve(id, by: .socket(path))
      return ReplacementPlan(
        care: DeviceCare(id, .external(path: path), old.policy, image: nil), configuration: configuration, extraArguments: [],
        resources: socket.map { [$0] } ?? [])
    }
  }

  private func planOwn(
    _ id: String, _ program: String, _ known: [String], _ extra: [String], _ isOnTerminal: Bool, _ disk: VMConfiguration.Disk?,
    _ configuration: VMConfiguration, _ old: DeviceCare, _ opened: [FDBox]?
  ) throws(SupervisionError) -> ReplacementPlan {
    var configuration = configuration
    guard var disk else {
      let care = DeviceCare(id, .program(program, arguments: known + extra, isOnTerminal: isOnTerminal), old.policy, image: nil)
      care.started(old.resources)
      return ReplacementPlan(care: care, configuration: configuration, extraArguments: extra, resources: old.resources)
    }
    if case .external(let external) = disk.source {
      guard case .program(let jailed) = external, let path = jailed.path else {
        throw .launch("Which image \(program) is to serve is not known; add --path FILE")
      }
      disk.source = .image(path: path, readOnly: false)
    }
    guard case .image(let path, let readOnly) = disk.source else { throw .launch("\(id) has no image") }
    configuration.serve(disk)
    let image: FDBox
    var status: FileStatus?
    var arguments = DevicePlanner.arguments(disk, readOnly)
    if let opened {
      guard let first = opened.first else { throw .launch("The spawner has opened less than the device needs") }
      image = first
    } else {
      let present = presentImage(id, old)
      image = FDBox(
        try HostFiles.imageBeside(
          path, readOnly: readOnly, isShared: disk.isShared, isRaw: disk.isRaw, disk: id, candidate: Self.candidateName(id),
          present: [present, claims.status(id)].compactMap { $0 }, claims))
      let new = try HostFiles.status(image.number)
      try findStorage(Self.candidateName(id), path, new)
      status = new
      if let life = lifetime(new, present, old), !extra.contains(where: { $0.hasPrefix(Self.lifetimeOption) }) {
        arguments.append(Self.lifetimeOption + life.text)
      }
    }
    let known = DeviceCare.Image(path: path, readOnly: readOnly, isShared: disk.isShared, status: status)
    arguments += extra
    return ReplacementPlan(
      care: DeviceCare(id, .program(program, arguments: arguments, isOnTerminal: false), old.policy, image: known),
      configuration: configuration, extraArguments: extra, resources: [image])
  }

  private static let lifetimeOption = "--lifetime="

  /// How worn the new image's storage is. A guest that has agreed to ask goes on asking: where the storage does not say, it hears what it
  /// has heard before, or of another image that nothing is known.
  private func lifetime(_ new: FileStatus, _ present: FileStatus?, _ old: DeviceCare) -> StorageLifetime? {
    if let life = StorageLifetime.read(of: new) { return life }
    guard case .program(_, let arguments, _) = old.kind, let text = arguments.last(where: { $0.hasPrefix(Self.lifetimeOption) }),
      let life = StorageLifetime(String(text.dropFirst(Self.lifetimeOption.count)))
    else { return nil }
    return present?.isSameFile(as: new) == true ? life : StorageLifetime(endOfLife: 0, typeA: 0, typeB: 0)
  }

  /// What file the disk has now, whoever serves it; nil where that is not known.
  private func presentImage(_ id: String, _ old: DeviceCare) -> FileStatus? {
    if let status = old.image?.status { return status }
    guard case .program(let program)? = configuration.external(of: id), let path = program.path else { return nil }
    return (try? OwnedFD.open(path, pathOnly))?.fileStatus
  }

  /// Connects to a back end that was started by hand, unless it is plainly somebody else's.
  private func connect(candidate path: String, _ id: String) throws(SupervisionError) -> FDBox {
    for other in assignments.map(\.id) where configuration.externalSocket(of: other) == path {
      throw .launch("The back end at '\(path)' serves \(other) of this VM already")
    }
    if configuration.control == path { throw .launch("'\(path)' is this VM's own control socket") }
    let socket = try attempt { () throws(SystemError) in
      try UnixSocket.connect(to: path, timeout: .milliseconds(200))
    } or: {
      .backendSocket(device: id, path: path, $0.errno)
    }
    // Who listens there; processes of VMs carry their VM's name.
    if let peer = try? UnixSocket.peer(of: socket),
      let title = try? OwnedFD.open("/proc/\(peer.pid)/cmdline", O_RDONLY).readToEnd(limit: 256)
    {
      let words = String(decoding: title.prefix { $0 != 0 }, as: UTF8.self).split(separator: "/")
      if words.count == 3, words[0] == "vm" {
        throw .launch("'\(path)' belongs to the VM \(words[1]) (its process \(words[2])), and is no back end that could take over")
      }
    }
    return FDBox(socket)
  }

  /// The candidate becomes the device's back end in what is remembered, and with it for the day it dies.
  func adopt(_ id: String, _ care: DeviceCare, _ configuration: VMConfiguration, _ extra: [String]) {
    let name = Self.candidateName(id)
    if case .jailed(let device) = care.kind { device.id = id }
    cares[name] = nil
    cares[id] = care
    knownLaunches[id] = knownLaunches.removeValue(forKey: name)
    knownJailed[id] = knownJailed.removeValue(forKey: name)
    jailedNumbers[id] = jailedNumbers.removeValue(forKey: name)
    if let disk = storage.removeValue(forKey: name) { storage[id] = disk }
    // Another image. The lock on one that somebody else's program has now stays as it was: it may well be the same.
    if claims.has(name) { claims.move(name, to: id) }
    extraArguments[id] = extra
    self.configuration = configuration
  }

  /// The candidate does not come to it.
  func dropCandidate(_ id: String) {
    let name = Self.candidateName(id)
    cares[name] = nil
    knownLaunches[name] = nil
    knownJailed[name] = nil
    jailedNumbers[name] = nil
    storage[name] = nil
    claims.release(name)
  }
}

extension OwnedFD {
  fileprivate var fileStatus: FileStatus? { try? status() }
}
