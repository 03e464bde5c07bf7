import CLinux
import Glibc
import HostSystem
import Sandbox

/// The uids of one VM's processes: each process its own, no two VMs the same.
///
/// Without `--uid-base` the range is found by the supervisor's pid: 60 ids from 0x7000_0000 + 60 * pid. That lies above
/// the container ranges and below those that systemd keeps, and two running supervisors never have one pid. In a user
/// namespace that maps fewer ids, the upper part of its largest mapped range is divided the same way.
package struct Identities: Sendable {
  package static let perVM: UInt32 = 60
  /// What has no id is shown as: another one that is not to be had.
  private static let nobody: UInt32 = 65534
  private static let start: UInt32 = 0x7000_0000

  /// nil: we are not root and keep our ids.
  package let base: UInt32?
  private(set) var used: UInt32 = 0
  /// Of processes that are gone for good.
  private(set) var released: [ChildIdentity] = []

  package init(requested: UInt32?) throws(SupervisionError) {
    guard geteuid() == 0 else {
      if requested != nil { throw .identities("Option --uid-base works only as root; leave it out") }
      base = nil
      return
    }
    let uids = Self.ranges("/proc/self/uid_map")
    let gids = Self.ranges("/proc/self/gid_map")
    func fits(_ first: UInt32) -> Bool {
      Self.contains(uids, first) && Self.contains(gids, first)
    }
    if let requested {
      guard requested > Self.nobody || requested + Self.perVM <= Self.nobody else {
        throw .identities(
          "Among the \(Self.perVM) uids from \(requested) (--uid-base) is \(Self.nobody), which stands for users without an id; choose "
            + "others, such as those from 1900000000")
      }
      guard fits(requested) else {
        throw .identities(
          "The \(Self.perVM) uids from \(requested) (--uid-base) are not all mapped in this user namespace; "
            + "choose a range inside /proc/self/uid_map and gid_map")
      }
      base = requested
      return
    }
    let pid = UInt32(truncatingIfNeeded: getpid()) % 4_194_304
    let usual = Self.start + pid * Self.perVM
    if fits(usual) {
      base = usual
      return
    }
    guard let largest = uids.max(by: { $0.count < $1.count }), largest.count > UInt64(Self.perVM) * 16 else {
      // A namespace with a handful of ids: nothing to change to. The other walls still stand.
      Log.warning("This user namespace maps too few uids; the VM's processes share the supervisor's uid")
      base = nil
      return
    }
    // The lower half stays for the namespace's own users.
    let slots = largest.count / 2 / UInt64(Self.perVM)
    let first = largest.first + largest.count / 2 + UInt64(pid) % slots * UInt64(Self.perVM)
    guard let candidate = UInt32(exactly: first), fits(candidate) else {
      throw .identities("No \(Self.perVM) uids for the VM's processes are mapped in both uid_map and gid_map; use --uid-base")
    }
    base = candidate
  }

  /// One of them, for a trial; nil when ids are kept.
  var example: ChildIdentity? { base.map { ChildIdentity(uid: $0, gid: $0) } }

  /// The next identity; nil when ids are kept.
  package mutating func next() -> ChildIdentity? {
    guard let base else { return nil }
    if let identity = released.popLast() { return identity }
    precondition(used < Self.perVM - 1, "A VM has fewer processes than identities.")
    defer { used += 1 }
    return ChildIdentity(uid: base + used, gid: base + used)
  }

  /// Its process is gone for good; another one may have it.
  package mutating func release(_ identity: ChildIdentity) { released.append(identity) }

  /// The identity with this number; nil when it is not a device's: the core's is the first, the supervisor's own follows those
  /// that were used when its walls went up, or is the last.
  package func identity(of number: UInt32, supervisorIsLast: Bool = false) -> ChildIdentity? {
    guard let base, number > base, number - base < Self.perVM - 1, supervisorIsLast || number != base + used else { return nil }
    return ChildIdentity(uid: number, gid: number)
  }

  /// Those of a VM whose processes have so many of them.
  init(base: UInt32?, used: UInt32, released: [ChildIdentity] = []) {
    self.base = base
    self.used = used
    self.released = released
  }

  /// For one process at a time: one that examines a state, or the supervisor of a VM with a keeper. nil when ids are kept.
  var last: ChildIdentity? { base.map { ChildIdentity(uid: $0 + Self.perVM - 1, gid: $0 + Self.perVM - 1) } }

  private static func contains(_ ranges: [(first: UInt64, count: UInt64)], _ first: UInt32) -> Bool {
    let last = UInt64(first) + UInt64(perVM) - 1
    return ranges.contains { $0.first <= UInt64(first) && last < $0.first + $0.count }
  }

  private static func ranges(_ path: String) -> [(first: UInt64, count: UInt64)] {
    // At most 340 lines (user_namespaces(7)).
    guard let fd = try? OwnedFD.open(path, O_RDONLY), let bytes = try? fd.readToEnd(limit: 16384) else { return [] }
    return String(decoding: bytes, as: UTF8.self).split(separator: "\n").compactMap { line in
      let fields = line.split(separator: " ").compactMap { UInt64($0) }
      return fields.count == 3 ? (fields[0], fields[2]) : nil
    }
  }
}
