import ControlProtocol
import HostSystem

extension Supervisor {
  /// The control groups of this VM, or why there are none. Without limits that is not worth a line: `martlet ctl info` tells.
  static func makeGroups(_ configuration: VMConfiguration) throws(SupervisionError) -> (ControlGroups?, String?) {
    let groups: ControlGroups
    do throws(ControlGroups.Lack) { groups = try ControlGroupHierarchy.groups(configuration.controlGroup, name: configuration.name) } catch
    {
      let wants = configuration.limits.keys.sorted().first
      if case .below = configuration.controlGroup { throw .limits("\(error.sentence); name another one with --cgroup, or leave it out") }
      if let wants { throw .limits("The limits of \(wants) cannot be kept. \(error.sentence); \(remedy)") }
      return (nil, error.sentence)
    }
    for (id, limits) in configuration.limits.sorted(by: { $0.key < $1.key }) {
      guard let lack = groups.lack(of: id, limits) else { continue }
      groups.remove()
      throw .limits("\(lack); \(remedy)")
    }
    return (groups, nil)
  }

  /// Of a device that is added while the VM runs.
  func checkLimits(of id: String) throws(SupervisionError) {
    guard let limits = configuration.limits[id] else { return }
    let lack: String?
    if let groups {
      lack = groups.lack(of: id, limits)
    } else {
      lack = "The limits of \(id) cannot be kept" + (groupsLack.map { ". \($0)" } ?? "")
    }
    if let lack { throw .limits("\(lack); \(Self.remedy)") }
  }

  static let remedy =
    "start as 'systemd-run --scope -p Delegate=yes martlet run ...' (with --user when not root), name a group with --cgroup, "
    + "or leave the limits out"

  /// The group in which a process is to be born, which is its device's, whether it serves, waits as a spare, or is to take over;
  /// nil where there are none. Held open for the start only, so that it can be made here or in the spawner.
  func openGroup(_ name: String) throws(SupervisionError) -> FDBox? {
    guard let groups else { return nil }
    let id = Self.device(of: name)
    return FDBox(try groups.group(id, configuration.limits(of: id), storage: storage[name] ?? storage[id]))
  }

  /// The disk below the image of a device whose transfer rate the kernel is to limit.
  func findStorage(_ name: String, _ path: String, _ status: FileStatus) throws(SupervisionError) {
    let id = Self.device(of: name)
    let limits = configuration.limits(of: id)
    guard limits.readRate != nil || limits.writeRate != nil else { return }
    guard let found = StorageDevice(status) else {
      throw .limits(
        "'\(path)' of \(id) lies on a file system without a disk of its own, so that io-read-limit and io-write-limit mean "
          + "nothing; use bw_size=")
    }
    storage[name] = found
  }

  /// The same for somebody else's program, which opens its image itself.
  func findStorage(ofJailed id: String) throws(SupervisionError) {
    let limits = configuration.limits(of: id)
    guard limits.readRate != nil || limits.writeRate != nil else { return }
    guard case .program(let program)? = configuration.external(of: id), let path = program.path else {
      throw .limits("io-read-limit and io-write-limit of \(id) are of the disk below its path=; name it, or leave the limits out")
    }
    let status = try attempt { () throws(SystemError) in
      try OwnedFD.openNamed(path, pathOnly).status()
    } or: {
      .file(what: "path of \(id)", path: path, $0.errno)
    }
    try findStorage(id, path, status)
  }

  /// What a process uses; behind our own walls the spawner looks, because there is neither /proc nor a group to be seen.
  func usage(of process: VMProcess) -> ProcessUsage? {
    guard process.isAlive else { return nil }
    let id = Self.device(of: process.id)
    if let spawner { return spawner.usage(id, process.processID).map { ProcessUsage($0) } }
    return ProcessUsage(ProcessUsage.text(of: process.processID, group: groups?.member(id)))
  }
}
