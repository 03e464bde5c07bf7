/// The namespaces a process gets of its own (`namespaces(7)`); the values are the `CLONE_NEW...` of linux/sched.h.
package struct Namespaces: OptionSet, Hashable, Sendable {
  package let rawValue: UInt64
  package init(rawValue: UInt64) { self.rawValue = rawValue }

  package static let mount = Namespaces(rawValue: 0x0002_0000)
  package static let controlGroup = Namespaces(rawValue: 0x0200_0000)
  package static let hostName = Namespaces(rawValue: 0x0400_0000)
  package static let ipc = Namespaces(rawValue: 0x0800_0000)
  /// Only for launchers that are not root: it is what gives them the right to make the others.
  package static let user = Namespaces(rawValue: 0x1000_0000)
  package static let process = Namespaces(rawValue: 0x2000_0000)
  package static let network = Namespaces(rawValue: 0x4000_0000)

  /// What every process of a VM gets, in the order of people's interest.
  package static let all: Namespaces = [.mount, .process, .network, .ipc, .hostName, .controlGroup]

  /// Names as in `/proc/PID/ns`.
  package static let named: [(name: String, namespace: Namespaces)] = [
    ("mnt", .mount), ("pid", .process), ("net", .network), ("ipc", .ipc), ("uts", .hostName), ("cgroup", .controlGroup),
    ("user", .user),
  ]

  package var names: [String] { Self.named.filter { contains($0.namespace) }.map(\.name) }
}
