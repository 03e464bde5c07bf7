import ControlProtocol
import Glibc
import HostSystem

/// Where this host has its control groups of version 2, and in which of them we run.
package struct ControlGroupHierarchy {
  /// Of the cgroup2 file system.
  package let mountPoint: String
  /// Our own group's directory; nil when it lies outside of what is mounted.
  package let own: String?

  /// - Parameters: the texts of /proc/self/mountinfo and /proc/self/cgroup. Nil: there is no version 2 here.
  package init?(mounts: String, groups: String) {
    var found: (point: String, root: String)?
    for line in mounts.split(separator: "\n") {
      // "29 22 0:26 ROOT POINT options ... - cgroup2 source options"
      guard let dash = line.firstRange(of: " - cgroup2 ") else { continue }
      let words = line[..<dash.lowerBound].split(separator: " ")
      guard words.count >= 5 else { continue }
      found = (Self.unescape(words[4]), Self.unescape(words[3]))
    }
    guard let found else { return nil }
    mountPoint = found.point
    var own: String?
    for line in groups.split(separator: "\n") where line.hasPrefix("0::/") {
      let path = String(line.dropFirst(3))
      guard !path.hasPrefix("/..") else { continue }
      if found.root == "/" {
        own = path == "/" ? found.point : found.point + path
      } else if path == found.root || path.hasPrefix(found.root + "/") {
        own = found.point + path.dropFirst(found.root.count)
      }
    }
    self.own = own
  }

  static func ofThisHost() -> ControlGroupHierarchy? {
    ControlGroupHierarchy(mounts: text("/proc/self/mountinfo"), groups: text("/proc/self/cgroup"))
  }

  private static func text(_ path: String) -> String {
    guard let fd = try? OwnedFD.open(path, O_RDONLY), let bytes = try? fd.readToEnd(limit: 4 << 20) else { return "" }
    return String(decoding: bytes, as: UTF8.self)
  }

  /// Blanks and the like are octal in mountinfo.
  private static func unescape(_ text: Substring) -> String {
    var bytes: [UInt8] = []
    var rest = Array(text.utf8)[...]
    while let byte = rest.popFirst() {
      let digits = rest.prefix(3)
      if byte == UInt8(ascii: "\\"), digits.count == 3, let code = UInt8(String(decoding: digits, as: UTF8.self), radix: 8) {
        bytes.append(code)
        rest = rest.dropFirst(3)
      } else {
        bytes.append(byte)
      }
    }
    return String(decoding: bytes, as: UTF8.self)
  }

  /// No process but this one is in the group.
  func isAlone(in directory: String) -> Bool {
    ControlGroups.words("\(directory)/cgroup.procs") == ["\(getpid())"]
  }

  /// The groups for a VM or a jail of that name, or why there are none.
  static func groups(_ place: VMConfiguration.ControlGroup, name: String) throws(ControlGroups.Lack) -> ControlGroups {
    guard let hierarchy = ofThisHost() else {
      throw ControlGroups.Lack(
        sentence: "This host has no control groups of version 2 mounted (boot with systemd.unified_cgroup_hierarchy=1)")
    }
    switch place {
    case .off: throw ControlGroups.Lack(sentence: "There are no control groups with --cgroup off")
    case .own:
      guard let own = hierarchy.own else { throw ControlGroups.Lack(sentence: "Our own control group cannot be seen from here") }
      return try ControlGroups(hierarchy, parent: own, isOwn: true, vm: name)
    case .below(let path):
      // As the kernel names it, or as the file system does.
      let whole = path == hierarchy.mountPoint || path.hasPrefix(hierarchy.mountPoint + "/") ? path : hierarchy.mountPoint + "/" + path
      var parent = whole
      while parent.hasSuffix("/") { parent.removeLast() }
      // SAFETY: a NUL-terminated copy that lives for the call.
      guard unsafe access(parent + "/cgroup.procs", F_OK) == 0, !parent.contains("/../") else {
        throw ControlGroups.Lack(sentence: "There is no control group '\(path)' below \(hierarchy.mountPoint)")
      }
      return try ControlGroups(hierarchy, parent: parent, isOwn: parent == hierarchy.own, vm: name)
    }
  }
}

/// The whole disk below a file, as the io controller names it.
package struct StorageDevice: Equatable, CustomStringConvertible {
  let major: UInt32
  let minor: UInt32

  package var description: String { "\(major):\(minor)" }

  package init(major: UInt32, minor: UInt32) {
    self.major = major
    self.minor = minor
  }

  /// Nil where a file system has no disk of its own (overlay, btrfs, the network).
  init?(_ status: FileStatus) {
    let number = status.kind == .blockDevice ? status.representedDevice : status.device
    let major = UInt32((number >> 8) & 0xFFF) | UInt32((number >> 32) & 0xFFFF_F000)
    let minor = UInt32(number & 0xFF) | UInt32((number >> 12) & 0xFFFF_FF00)
    guard major != 0 else { return nil }
    // A partition has a file of that name, and the disk is the directory above it.
    let place = "/sys/dev/block/\(major):\(minor)"
    // SAFETY: a NUL-terminated copy that lives for the call.
    if unsafe access("\(place)/partition", F_OK) == 0 {
      guard let text = ControlGroups.words("\(place)/../dev").first else { return nil }
      let numbers = text.split(separator: ":").compactMap { UInt32($0) }
      guard numbers.count == 2 else { return nil }
      self.init(major: numbers[0], minor: numbers[1])
      return
    }
    self.init(major: major, minor: minor)
  }
}
