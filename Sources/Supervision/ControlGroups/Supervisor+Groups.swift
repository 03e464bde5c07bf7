import ControlProtocol
import HostSystem

extension Supervisor {
  /// The control groups of this VM, or why there are none. Without limits that is not worth a line: `martlet ctl info` tells.
  static func makeGroups(_ configuration: VMConfiguration) throws(SupervisionError) -> (ControlGroups?, String?) {
    let groups: ControlGroups
    do throws(ControlGroups.Lack) { groups = try ControlGroupHierarchy.groups(configuration) } catch {
      let wants = configuration.limits.keys.sorted().first
      if case .below = configuration.controlGroup { throw .limits("\(error.sentence); name another one with --cgroup, or leave it out") }
      if let wants { throw .limits("The limits of \(wants) cannot be kept. \(error.sentence); \(remedy)") }
      return (nil, error.sentence)
    }
    for (id, limits) in configuration.limits.sorted(by: { $0.key < $1.key }) {
      for setting in ControlGroups.settings(limits, nil) where !groups.controllers.contains(setting.controller) {
        let parent = groups.parent
        groups.remove()
        throw .limits(
          "\(setting.key) of \(id) cannot be kept: the control group \(parent) has no controller "
            + "'\(setting.controller.rawValue)'; \(remedy)")
      }
      guard limits.readRate != nil || limits.writeRate != nil else { continue }
      guard groups.controllers.contains(.io) else {
        let parent = groups.parent
        groups.remove()
        throw .limits("The transfer limits of \(id) cannot be kept: the control group \(parent) has no controller 'io'; \(remedy)")
      }
    }
    return (groups, nil)
  }

  private static let remedy =
    "start as 'systemd-run --scope -p Delegate=yes martlet run ...' (with --user when not root), name a group with --cgroup, "
    + "or leave the limits out"

  /// The group in which a process is to be born; nil where there are none. Held open for the start only, so that it can be
  /// made here or in the spawner.
  func openGroup(_ id: String) throws(SupervisionError) -> FDBox? {
    guard let groups else { return nil }
    return FDBox(try groups.group(id, configuration.limits(of: id), storage: storage[id]))
  }

  /// The disk below the image of a device whose transfer rate the kernel is to limit.
  func findStorage(_ id: String, _ path: String, _ status: FileStatus) throws(SupervisionError) {
    let limits = configuration.limits(of: id)
    guard limits.readRate != nil || limits.writeRate != nil else { return }
    guard let found = StorageDevice(status) else {
      throw .limits(
        "'\(path)' of \(id) lies on a file system without a disk of its own, so that io-read-limit and io-write-limit mean "
          + "nothing; use bw_size=")
    }
    storage[id] = found
  }

  /// What a process uses; behind our own walls the spawner looks, because there is neither /proc nor a group to be seen.
  func usage(of process: VMProcess) -> ProcessUsage? {
    guard process.isAlive else { return nil }
    // A spare is in its device's group.
    let id = process.id.split(separator: " ").first.map(String.init) ?? process.id
    if let spawner { return spawner.usage(id, process.processID).map { ProcessUsage($0) } }
    return ProcessUsage(ProcessUsage.text(of: process.processID, group: groups?.member(id)))
  }
}
