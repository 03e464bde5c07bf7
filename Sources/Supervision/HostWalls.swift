import CLinux
import Glibc
import HostSystem
import Sandbox

/// What this host has to build walls with; found once, before the first process is started.
package struct HostWalls: Sendable {
  /// What processes can be given, `.user` among them when we are not root.
  package private(set) var namespaces: Namespaces
  /// Level of Landlock (1 and up), 0 for none.
  package private(set) var landlockLevel: Int
  /// Whether system calls can be filtered, with the process killed.
  package private(set) var hasFilters: Bool
  /// What is missing, a sentence each, with the remedy. Empty: the full set.
  package private(set) var lacks: [String] = []

  /// The least level of Landlock that covers truncation of files; without it an open file could be cut.
  package static let wantedLandlockLevel = 3

  /// Looks, and where looking does not tell, tries: with a process that walks through all steps and ends.
  package static func probe(identity: ChildIdentity?) -> HostWalls {
    var walls = HostWalls(namespaces: [], landlockLevel: 0, hasFilters: false)
    walls.findNamespaces(identity)
    let level = clinux_landlock_abi()
    walls.landlockLevel = max(0, Int(level))
    if level < 1 {
      walls.lacks.append("Landlock is missing (kernel option CONFIG_SECURITY_LANDLOCK, and landlock in lsm=)")
    } else if walls.landlockLevel < wantedLandlockLevel {
      walls.lacks.append("Landlock has level \(level), not \(wantedLandlockLevel); Linux 6.2 or newer has it")
    }
    walls.hasFilters = clinux_seccomp_can_kill() == 1
    if !walls.hasFilters { walls.lacks.append("System calls cannot be filtered (kernel option CONFIG_SECCOMP_FILTER)") }
    return walls
  }

  private mutating func findNamespaces(_ identity: ChildIdentity?) {
    var known: Namespaces = []
    for (name, namespace) in Namespaces.named where unsafe access("/proc/self/ns/\(name)", F_OK) == 0 {
      known.insert(namespace)
    }
    let missing = Namespaces.all.subtracting(known)
    if !missing.isEmpty {
      lacks.append("The kernel has no namespaces of kind \(missing.names.joined(separator: ", ")), or /proc is not mounted")
    }
    var wanted = known.intersection(.all)
    if clinux_may_administer() != 1 {
      // The right to make the others comes with a user namespace; then ids are kept.
      guard known.contains(.user), identity == nil else {
        lacks.append(
          identity == nil
            ? "The kernel has no user namespaces (CONFIG_USER_NS): processes see the host's files, processes and networks"
            : "Root without CAP_SYS_ADMIN cannot give processes namespaces of their own: grant it, or start as an ordinary user")
        return
      }
      wanted.insert(.user)
    }
    // Root with the capabilities is not tried: that would cost each start as much as one process. What a container or
    // service manager forbids all the same is told by the first process that meets it.
    guard wanted.contains(.user) else {
      namespaces = wanted
      return
    }
    let trial = ChildLaunch(arguments: ["trial"], descriptors: [], identity: identity, namespaces: wanted)
    do throws(SandboxError) {
      guard let (stage, errno) = try trial.attempt() else {
        namespaces = wanted
        return
      }
      lack("Cannot \(stage.action) of a process with its own namespaces: \(errno.explanation)", wanted)
    } catch { lack(error.message, wanted) }
  }

  private mutating func lack(_ reason: String, _ wanted: Namespaces) {
    lacks.append(
      "Processes share the host's namespaces. \(reason); allow user namespaces (sysctl user.max_user_namespaces, "
        + "kernel.unprivileged_userns_clone, kernel.apparmor_restrict_unprivileged_userns), or start as root")
  }
}

extension Stage {
  /// What to do when the step fails for want of a right.
  var remedy: String {
    switch self {
    case .fork, .userMap, .directory, .hostName:
      "; the container or service manager around Martlet must allow clone3, mount and pivot_root, or --sandbox off"
    case .secureBits, .identity:
      "; root needs CAP_SETUID, CAP_SETGID, CAP_SETPCAP and CAP_KILL for that: the container or service manager around Martlet must leave "
        + "them to it, or start it as an ordinary user"
    default: ""
    }
  }
}
