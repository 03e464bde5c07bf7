extension VMConfiguration {
  /// What has been read so far. Ids may still be missing, defaults still open.
  package struct Draft: Sendable {
    enum Device: Sendable {
      case disk(Disk)
      case net(Net)
      case fileSystem(FileSystem)
      case entropy(Entropy)
      case console(Console)
      case generic(GenericVhostUser)
    }

    var result = VMConfiguration()
    var hasKernel = false
    /// In the order of the command line; an empty id is filled in by `finish`.
    var devices: [(device: Device, id: String?, place: String, limits: ResourceLimits)] = []
    var console: Terminal?
    var serial: Terminal?

    mutating func add(_ device: Device, id: String?, option: String, limits: ResourceLimits = ResourceLimits()) {
      devices.append((device, id, "--\(option) number \(devices.count { $0.place.hasPrefix("--\(option) ") } + 1)", limits))
    }

    mutating func limit(_ id: String, _ limits: ResourceLimits) { if !limits.isEmpty { result.limits[id] = limits } }

    /// Gives ids to devices without one, then makes the checks that need the whole command line.
    func finish() throws(ConfigurationError) -> VMConfiguration {
      guard hasKernel else { throw .missingOption("kernel", example: "--kernel bzImage") }
      var result = result
      var places = [Reserved.core: "the core process", Reserved.serial: "the serial port", Reserved.console: "the console"]
      // Devices that are there already: one is being added.
      for id in result.deviceIDs where id != Reserved.console { places[id] = "a device of the VM" }
      for entry in devices {
        guard let id = entry.id else { continue }
        if let first = places.updateValue(entry.place, forKey: id) {
          throw .duplicateID(id, first: first, second: entry.place)
        }
      }
      for entry in devices {
        var id = ""
        switch entry.device {
        case .disk(var disk):
          id = entry.id ?? Self.freeID("blk", &places)
          disk.id = id
          if disk.queueCount == 0 { disk.queueCount = UInt16(min(result.cpuCount, Limits.defaultDiskQueues)) }
          result.disks.append(disk)
        case .net(var net):
          id = entry.id ?? Self.freeID("net", &places)
          net.id = id
          result.nets.append(net)
        case .fileSystem(var fileSystem):
          id = entry.id ?? Self.freeID("fs", &places)
          fileSystem.id = id
          result.fileSystems.append(fileSystem)
        case .entropy(var entropy):
          if let other = result.entropy {
            throw .conflict("entropy device \(other.id)", "another one", remedy: "remove the first")
          }
          id = entry.id ?? Self.freeID("rng", &places)
          entropy.id = id
          result.entropy = entropy
        case .console(var console):
          id = entry.id ?? Self.freeID("con", &places)
          console.id = id
          result.consoles.append(console)
        case .generic(var generic):
          id = entry.id ?? Self.freeID(generic.deviceType.description, &places)
          generic.id = id
          result.generics.append(generic)
        }
        if !entry.limits.isEmpty { result.limits[id] = entry.limits }
      }
      if console == .tty, serial == .tty {
        throw .conflict("--console tty", "--serial tty", remedy: "give one of them pty, file=, socket=, null or off")
      }
      if result.isHardened, let mode = result.sandbox, mode != .on {
        throw .conflict("--hardened", "--sandbox \(mode.rawValue)", remedy: "leave out one of them")
      }
      if result.outlivesSupervisor, result.sandbox == .off {
        throw .conflict(
          "--on-supervisor-death continue", "--sandbox off",
          remedy: "leave out one of them: what takes over needs the spawner, which there is only with the sandbox")
      }
      // The terminal goes to the console unless the serial port asked for it.
      result.console = console ?? (serial == .tty ? .null : .tty)
      result.serial = serial ?? .null
      try result.checkPaths()
      try result.checkLimits()
      if result.deviceCount > Limits.devices {
        throw .tooMany(what: "devices", count: result.deviceCount, limit: Limits.devices)
      }
      return result
    }

    private static func freeID(_ stem: String, _ places: inout [String: String]) -> String {
      // Bounded: there are fewer devices than numbers tried.
      for number in 0...places.count {
        let id = "\(stem)\(number)"
        if places[id] == nil {
          places[id] = "\(id), numbered by us"
          return id
        }
      }
      preconditionFailure("One of count + 1 different ids is free among count")
    }
  }

  /// Ids of processes that are not asked for by an option of their own.
  package enum Reserved {
    package static let core = "core"
    package static let serial = "serial"
    package static let console = "con0"
  }

  /// One path must not be used for two things: two writers of one image, or two sockets in one place.
  private func checkPaths() throws(ConfigurationError) {
    var sockets: [(path: String, place: String)] = []
    if let control { sockets.append((control, "--control")) }
    for (terminal, option) in [(console, "--console"), (serial, "--serial")] + consoles.map({ ($0.terminal, "console \($0.id)") }) {
      switch terminal {
      case .socket(let path): sockets.append((path, "\(option) socket"))
      case .file(let path): sockets.append((path, "\(option) file"))
      default: break
      }
    }
    for (id, place) in disks.map({ ($0.id, "disk \($0.id)") }) + nets.map({ ($0.id, "net \($0.id)") })
      + fileSystems.map({ ($0.id, "file system \($0.id)") }) + generics.map({ ($0.id, "device \($0.id)") })
    {
      if let path = externalSocket(of: id) { sockets.append((path, place)) }
    }
    try Self.checkUnique(sockets, remedy: "give each a path of its own, not both")
    for (index, fileSystem) in fileSystems.enumerated() {
      if let other = fileSystems[..<index].first(where: { $0.tag == fileSystem.tag }) {
        throw .conflict(
          "file system \(other.id)", "file system \(fileSystem.id) (both tag=\(fileSystem.tag))", remedy: "give each a tag of its own")
      }
    }

    var images: [(path: String, place: String, readOnly: Bool)] = []
    for disk in disks {
      if case .image(let path, let readOnly) = disk.source { images.append((path, "disk \(disk.id)", readOnly)) }
      if case .external(.program(let program)) = disk.source, let path = program.path {
        images.append((path, "disk \(disk.id)", false))
      }
    }
    for (index, image) in images.enumerated() {
      for other in images[..<index] where other.path == image.path && !(other.readOnly && image.readOnly) {
        throw .conflict(
          "\(other.place)", "\(image.place) (both \(image.path))",
          remedy: "give each its own image or write readonly=on on both")
      }
    }
    let taps: [(path: String, place: String)] = nets.compactMap {
      if case .tap(let name) = $0.source { (name, "net \($0.id)") } else { nil }
    }
    try Self.checkUnique(taps, remedy: "give each a tap of its own, not both")
  }

  private static func checkUnique(
    _ uses: [(path: String, place: String)], remedy: String
  ) throws(ConfigurationError) {
    for (index, use) in uses.enumerated() {
      if let other = uses[..<index].first(where: { $0.path == use.path }) {
        throw .conflict(other.place, "\(use.place) (both \(use.path))", remedy: remedy)
      }
    }
  }
}
