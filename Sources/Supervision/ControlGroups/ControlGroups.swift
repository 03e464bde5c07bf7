import CSandbox
import ControlProtocol
import Glibc
import HostSystem

/// The control groups (cgroups(7), version 2) of one VM: a directory with a group for every process.
///
///     PARENT/martlet-NAME-PID/process-core
///     PARENT/martlet-NAME-PID/process-ID       ID: the device's
///     PARENT/martlet-supervisor-NAME-PID       the supervisor itself, where PARENT is the group that it was started in
///
/// A process is born in its group (CLONE_INTO_CGROUP). The guardian takes all groups away at the end, also when the
/// supervisor was killed; what both have left behind, the next VM with the same parent does.
package final class ControlGroups {
  /// Controllers that we use, by the names of the kernel.
  package enum Controller: String, CaseIterable, Sendable {
    case cpu, memory, io, pids
  }

  let parent: String
  /// Below `parent`.
  let name: String
  /// What the processes' groups have.
  let controllers: Set<Controller>
  /// Where the supervisor has moved, below `parent`; nil when it stayed where it was.
  let ownName: String?

  var directory: String { "\(parent)/\(name)" }

  /// Groups that are there, for a state.
  struct Known: Equatable {
    var parent: String
    var name: String
    /// Each once, in the order of their names.
    var controllers: [Controller]
    var ownName: String?
  }

  var known: Known {
    Known(parent: parent, name: name, controllers: controllers.sorted { $0.rawValue < $1.rawValue }, ownName: ownName)
  }

  /// Those of a VM that runs.
  init(_ known: Known) {
    parent = known.parent
    name = known.name
    controllers = Set(known.controllers)
    ownName = known.ownName
  }

  static let prefix = "martlet-"
  private static let ownPrefix = "martlet-supervisor-"
  static let memberPrefix = "process-"

  /// Why there are none.
  struct Lack: Error {
    let sentence: String
  }

  init(_ hierarchy: ControlGroupHierarchy, parent: String, isOwn: Bool, vm: String) throws(Lack) {
    self.parent = parent
    let process = getpid()
    name = "\(Self.prefix)\(vm)-\(process)"
    Self.sweep(parent)
    let own = "\(Self.ownPrefix)\(vm)-\(process)"
    ownName = try Self.makeRoom(hierarchy, parent, isOwn: isOwn, own) ? own : nil
    // SAFETY: NUL-terminated copies that live for the calls, here and below.
    guard unsafe mkdir("\(parent)/\(name)", 0o755) == 0 else {
      let error = Errno.current
      if let ownName { Self.leave(parent, ownName, []) }
      throw Lack(sentence: "No control group can be made in \(parent): \(error.explanation)")
    }
    let offered = Self.words("\(parent)/cgroup.controllers").compactMap(Controller.init(rawValue:))
    _ = Self.enable(offered, in: parent)
    let had = Self.words("\(parent)/\(name)/cgroup.controllers").compactMap(Controller.init(rawValue:))
    _ = Self.enable(had, in: "\(parent)/\(name)")
    controllers = Set(Self.words("\(parent)/\(name)/cgroup.subtree_control").compactMap(Controller.init(rawValue:)))
    if controllers.isEmpty {
      remove()
      throw Lack(
        sentence: offered.isEmpty
          ? "The control group \(parent) has none of the controllers cpu, memory, io and pids"
          : "The control group \(parent) hands no controllers down")
    }
  }

  /// A group with processes of its own hands no controllers down, but for the root of all. It must not even be asked to: the
  /// kernel would hand down those that count threads, and below such a group no process may live. Alone there, we go one deeper.
  /// - Returns: whether we went.
  private static func makeRoom(
    _ hierarchy: ControlGroupHierarchy, _ parent: String, isOwn: Bool, _ own: String
  ) throws(Lack) -> Bool {
    let isRoot = unsafe access("\(parent)/cgroup.type", F_OK) != 0
    guard !isRoot, !words("\(parent)/cgroup.procs").isEmpty else { return false }
    guard isOwn, hierarchy.isAlone(in: parent) else {
      throw Lack(sentence: "The control group \(parent) hands no controllers down, because there are other processes in it")
    }
    guard unsafe mkdir("\(parent)/\(own)", 0o755) == 0 else {
      throw Lack(sentence: "No control group can be made in \(parent): \(Errno.current.explanation)")
    }
    guard write("\(getpid())", to: "\(parent)/\(own)/cgroup.procs") else {
      let error = Errno.current
      _ = unsafe rmdir("\(parent)/\(own)")
      throw Lack(sentence: "The control group \(parent) cannot be left for one below it: \(error.explanation)")
    }
    return true
  }

  /// Why a limit cannot be kept here; nil when all can.
  func lack(of id: String, _ limits: ResourceLimits) -> String? {
    // A disk is not known yet; which one does not matter here.
    let settings = Self.settings(limits, StorageDevice(major: 1, minor: 0))
    return settings.first { !controllers.contains($0.controller) }.map {
      "\($0.key) of \(id) cannot be kept: the control group \(parent) has no controller '\($0.controller.rawValue)'"
    }
  }

  /// One by one: one that cannot be had must not keep the others away. True when all are there.
  private static func enable(_ wanted: [Controller], in directory: String) -> Bool {
    let path = "\(directory)/cgroup.subtree_control"
    let there = Set(words(path))
    var isComplete = true
    for controller in wanted where !there.contains(controller.rawValue) {
      if !write("+\(controller.rawValue)", to: path) { isComplete = false }
    }
    return isComplete
  }

  // MARK: Members

  /// The group of a process, made if it is not there, with its limits set. Held open for the start only.
  func group(_ id: String, _ limits: ResourceLimits, storage: StorageDevice?) throws(SupervisionError) -> OwnedFD {
    let path = member(id)
    if unsafe mkdir(path, 0o755) != 0, Errno.current != .exists {
      throw .limits("Cannot make the control group \(path): \(Errno.current.explanation)")
    }
    for setting in Self.settings(limits, storage) {
      guard Self.write(setting.text, to: "\(path)/\(setting.file)") else {
        throw .limits(
          "Cannot set \(setting.key) of \(id) (\(setting.file) '\(setting.text)'): \(Errno.current.explanation)")
      }
    }
    return try attempt { () throws(SystemError) in
      try OwnedFD.open(path, O_RDONLY | O_DIRECTORY)
    } or: {
      .system($0)
    }
  }

  /// The device is gone, and its process.
  func drop(_ id: String) { _ = unsafe rmdir(member(id)) }

  func member(_ id: String) -> String { "\(directory)/\(Self.memberPrefix)\(id)" }

  /// What each limit is in the kernel's files.
  package struct Setting: Equatable {
    let key: String
    let controller: Controller
    package let file: String
    package let text: String
  }

  package static func settings(_ limits: ResourceLimits, _ storage: StorageDevice?) -> [Setting] {
    var settings: [Setting] = []
    func add(_ key: String, _ controller: Controller, _ file: String, _ text: String) {
      settings.append(Setting(key: key, controller: controller, file: file, text: text))
    }
    // Of every 100 ms; 1 % is the least quota that the kernel takes.
    if let percent = limits.processorPercent { add("cpu-limit", .cpu, "cpu.max", "\(percent * 1000) 100000") }
    if let weight = limits.processorWeight { add("cpu-weight", .cpu, "cpu.weight", "\(weight)") }
    if let bytes = limits.memory {
      // Not by way of swap: guest memory stays off the disk.
      add("memory-limit", .memory, "memory.max", "\(bytes)")
      add("memory-limit", .memory, "memory.swap.max", "0")
      // A program of several processes ends whole.
      add("memory-limit", .memory, "memory.oom.group", "1")
    }
    if let count = limits.threads { add("pids-limit", .pids, "pids.max", "\(count)") }
    if let weight = limits.storageWeight { add("io-weight", .io, "io.weight", "default \(weight)") }
    if let storage {
      if let rate = limits.readRate { add("io-read-limit", .io, "io.max", "\(storage) rbps=\(rate)") }
      if let rate = limits.writeRate { add("io-write-limit", .io, "io.max", "\(storage) wbps=\(rate)") }
    }
    return settings
  }

  /// Whether the kernel has killed in that group for want of memory.
  func hasExceededMemory(_ id: String) -> Bool {
    let words = Self.words("\(member(id))/memory.events")
    guard let place = words.firstIndex(of: "oom_kill"), place + 1 < words.count else { return false }
    return words[place + 1] != "0"
  }

  // MARK: The end

  /// Ends whatever still runs in the groups and takes them away. The guardian does the same by descriptors.
  func remove() {
    _ = Self.write("1", to: "\(directory)/cgroup.kill")
    for _ in 0..<200 {
      if Self.removeGroups(directory) { break }
      usleep(5000)
    }
    if let ownName { Self.leave(parent, ownName, controllers) }
  }

  /// What the guardian needs for that, opened while we can.
  func withGuarded(_ body: (UnsafePointer<csandbox_guarded_groups>) -> Int32) -> Int32 {
    func opened(_ path: String, _ flags: CInt) -> FDBox? { do { return FDBox(try OwnedFD.open(path, flags)) } catch { return nil } }
    let files = [
      opened(directory, O_RDONLY | O_DIRECTORY), opened("\(directory)/cgroup.kill", O_WRONLY),
      opened(parent, O_RDONLY | O_DIRECTORY), opened("\(parent)/cgroup.subtree_control", O_WRONLY),
      opened("\(parent)/cgroup.procs", O_WRONLY),
    ]
    let numbers = files.map { $0?.number ?? -1 }
    let isOwn = ownName != nil
    // SAFETY: both names live for the call.
    return unsafe name.withCString { name in
      unsafe (ownName ?? "").withCString { own in
        var guarded = unsafe csandbox_guarded_groups(
          directory: numbers[0], kill: numbers[1], parent: numbers[2], control: isOwn ? numbers[3] : -1,
          members: isOwn ? numbers[4] : -1, name: name, own_name: isOwn ? own : nil)
        defer { for file in files { file?.close() } }
        return unsafe body(&guarded)
      }
    }
  }

  /// Back to where we came from.
  private static func leave(_ parent: String, _ own: String, _ controllers: Set<Controller>) {
    for controller in controllers { _ = write("-\(controller.rawValue)", to: "\(parent)/cgroup.subtree_control") }
    _ = write("0", to: "\(parent)/cgroup.procs")
    _ = unsafe rmdir("\(parent)/\(own)")
  }

  /// What VMs that were killed together with their guardians have left: groups of ours without a process.
  private static func sweep(_ parent: String) {
    for entry in names(in: parent) where entry.hasPrefix(prefix) {
      guard let number = entry.split(separator: "-").last.flatMap({ Int32($0) }), number > 0 else { continue }
      // Its supervisor lives, and may just be making it.
      guard kill(number, 0) != 0, Errno.current == .noSuchProcess else { continue }
      _ = removeGroups("\(parent)/\(entry)")
    }
  }

  /// False while a process is in one of them.
  private static func removeGroups(_ directory: String) -> Bool {
    for entry in names(in: directory) where entry.hasPrefix(memberPrefix) { _ = unsafe rmdir("\(directory)/\(entry)") }
    return unsafe rmdir(directory) == 0 || Errno.current == .noEntry
  }

  private static func names(in directory: String) -> [String] {
    // SAFETY: the stream is open until closedir; each entry is copied before the next one is read.
    guard let stream = unsafe opendir(directory) else { return [] }
    defer { unsafe closedir(stream) }
    var names: [String] = []
    while let entry = unsafe readdir(stream) {
      let name = unsafe withUnsafeBytes(of: &entry.pointee.d_name) { bytes in
        unsafe String(decoding: bytes.prefix { $0 != 0 }, as: UTF8.self)
      }
      names.append(name)
    }
    return names
  }

  // MARK: Files of the kernel

  static func words(_ path: String) -> [String] {
    guard let fd = try? OwnedFD.open(path, O_RDONLY), let bytes = try? fd.readToEnd(limit: 65536) else { return [] }
    return String(decoding: bytes, as: UTF8.self).split { $0 == " " || $0 == "\n" }.map(String.init)
  }

  /// One system call, because such a file takes its text at once; errno is the kernel's answer.
  static func write(_ text: String, to path: String) -> Bool {
    guard let fd = try? OwnedFD.open(path, O_WRONLY) else { return false }
    let bytes = Array(text.utf8)
    // SAFETY: the buffer is lent for the call.
    let count = unsafe bytes.withUnsafeBytes { unsafe Glibc.write(fd.rawValue, $0.baseAddress, $0.count) }
    let error = errno
    defer { errno = error }
    return count == bytes.count
  }
}
