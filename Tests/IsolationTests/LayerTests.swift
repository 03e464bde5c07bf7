import Foundation
import Glibc
import HostSystem
import Sandbox
import Supervision
import TestSupport
import Testing

/// The walls behind the filter, each without it: were the filter to fail, these still stand.
@Suite(.enabled(if: Hostile.canRun, "The stand-in is not built."))
struct LayerTests {
  private func expect(_ hostile: Hostile, _ expected: [String: Int32]) {
    for (attack, errno) in expected.sorted(by: { $0.key < $1.key }) {
      #expect(hostile.outcomes[attack] == "got \(-errno)", "\(attack)")
    }
  }

  @Test(.enabled(if: Hostile.host.namespaces.isSuperset(of: .all), "This host gives no namespaces."))
  func namespacesAndIdentityHoldWithoutFilterAndLandlock() throws {
    let hostile = try Hostile([], namespaces: Hostile.host.namespaces, files: false, victim: getpid())
    expect(
      hostile,
      [
        // The root is empty and read-only.
        "open_file": ENOENT, "open_old": ENOENT, "make_file": EROFS, "make_directory": EROFS, "make_device": EROFS,
        "open_proc_memory": ENOENT, "exec_shell": ENOENT,
        // The victim has no number here.
        "trace_victim": ESRCH, "read_victim": ESRCH, "write_victim": ESRCH, "signal_victim": ESRCH, "signal_thread": ESRCH,
        "pidfd_victim": ESRCH, "compare_victim": ESRCH,
        // The network is empty, and its loopback is down.
        "connect_loopback": ENETUNREACH, "connect_abstract": ECONNREFUSED,
        // Privileges are gone for good.
        "new_namespaces": EPERM, "mount_proc": EPERM, "mount_new": EPERM, "unmount_root": EPERM, "change_root": EPERM,
        "pivot": EPERM, "become_root": EPERM, "become_root_group": EPERM, "join_groups": EPERM, "regain_capabilities": EPERM,
        "raise_ambient": EPERM, "rename_host": EPERM, "reboot_host": EPERM, "raise_limit": EPERM,
        "raise_priority": EACCES, "real_time": EPERM, "read_kernel_log": EPERM,
        // The seals.
        "shrink_memory": EPERM, "grow_memory": EPERM, "seal_memory": EPERM,
      ])
  }

  @Test(.enabled(if: Hostile.host.namespaces.isSuperset(of: .all) && geteuid() == 0, "Needs root and namespaces."))
  func theSupervisorsOwnWallsHoldWithoutItsFilterAndLandlock() throws {
    let result = try RunningProgram(
      BuiltPrograms.path("martlet-hostile"), ["--confine=1900000101", "--files=off", "--what=attacks", "--victim=\(getpid())"]
    ).wait(seconds: 60)
    try #require(result.code == 0 && result.output.hasSuffix("end\n"), "\(result.errors)")
    var outcomes: [String: String] = [:]
    for line in result.output.split(separator: "\n") {
      let words = line.split(separator: " ", maxSplits: 1)
      if words.count == 2 { outcomes[String(words[0])] = String(words[1]) }
    }
    let expected: [String: Int32] = [
      "open_file": ENOENT, "open_old": ENOENT, "make_file": EROFS, "make_directory": EROFS, "make_device": EROFS,
      "open_proc_memory": ENOENT, "exec_shell": ENOENT,
      // It sees the processes of its pid namespace; a stranger's memory is out of its reach all the same.
      "trace_victim": EPERM, "read_victim": EPERM, "write_victim": EPERM, "compare_victim": EPERM,
      "connect_loopback": ENETUNREACH, "connect_abstract": ECONNREFUSED,
      // It starts nothing any more.
      "fork_process": EAGAIN,
      "new_namespaces": EPERM, "mount_proc": EPERM, "mount_new": EPERM, "unmount_root": EPERM, "change_root": EPERM,
      "pivot": EPERM, "become_root": EPERM, "become_root_group": EPERM, "join_groups": EPERM, "regain_capabilities": EPERM,
      "raise_ambient": EPERM, "rename_host": EPERM, "reboot_host": EPERM, "raise_limit": EPERM,
      "raise_priority": EACCES, "real_time": EPERM, "read_kernel_log": EPERM,
      "shrink_memory": EPERM, "grow_memory": EPERM, "seal_memory": EPERM,
      // The one right it keeps; its filter lets it signal by pidfd only, and make none.
      "signal_victim": 0,
    ]
    for (attack, errno) in expected.sorted(by: { $0.key < $1.key }) {
      #expect(outcomes[attack] == "got \(-errno)", "\(attack)")
    }
  }

  @Test(.enabled(if: Hostile.host.landlockLevel >= 6, "This host's Landlock has no scopes."))
  func landlockHoldsWithoutFilterAndNamespaces() throws {
    // An abstract socket outside, for it to connect to.
    let listener = socket(AF_UNIX, Int32(SOCK_STREAM.rawValue), 0)
    defer { close(listener) }
    var address = sockaddr_un()
    address.sun_family = sa_family_t(AF_UNIX)
    let name = Array("\0martlet-isolation-test".utf8)
    withUnsafeMutableBytes(of: &address.sun_path) { $0.copyBytes(from: name) }
    let bound = withUnsafePointer(to: &address) { pointer in
      pointer.withMemoryRebound(to: sockaddr.self, capacity: 1) { bind(listener, $0, socklen_t(2 + name.count)) }
    }
    try #require(bound == 0 && listen(listener, 1) == 0)
    // With our own uid, so that nothing but Landlock stands between it and this process.
    let hostile = try Hostile([], namespaces: [], files: true, victim: getpid(), identity: nil)
    expect(
      hostile,
      [
        "open_file": EACCES, "make_directory": EACCES, "exec_shell": EACCES, "signal_victim": EPERM,
        "connect_abstract": EPERM, "trace_victim": EPERM, "mount_proc": EPERM,
      ])
  }

  @Test func sealedMemoryKeepsItsSizeWhateverAHolderTries() throws {
    let hostile = try Hostile([], namespaces: [], files: false, victim: getpid())
    expect(hostile, ["shrink_memory": EPERM, "grow_memory": EPERM, "seal_memory": EPERM])
  }
}
