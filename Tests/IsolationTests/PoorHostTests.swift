import Foundation
import Glibc
import TestSupport
import Testing

/// Hosts that cannot build all walls: what is missing is said once with the remedy, and `--hardened` starts nothing there.
/// A kernel without a call is played by a filter in front of it.
@Suite(.enabled(if: Hostile.canRun && BuiltPrograms.exists("martlet-supervisor"), "Needs the programs."))
struct PoorHostTests {
  /// `martlet run` up to the missing kernel file, which ends it: what the host lacks is told before.
  private func run(without calls: [String], _ options: [String] = [], below wrapper: [String] = []) throws -> ProgramResult {
    let words =
      wrapper + [BuiltPrograms.path("martlet-hostile"), "--what=without", "--calls=" + calls.joined(separator: ","), "--"]
      + [BuiltPrograms.path("martlet"), "run", "--kernel", "/nonexistent", "--console", "off", "--serial", "off"] + options
    return try RunningProgram(words[0], Array(words.dropFirst())).wait()
  }

  /// One line says `lack` and the run goes on to the missing kernel; hardened it ends there, nothing opened.
  private func expect(_ lack: String, remedy: String, without calls: [String], below wrapper: [String] = []) throws {
    let result = try run(without: calls, below: wrapper)
    #expect(result.errorLines.count { $0.contains(lack) } == 1, "\(result.errors)")
    #expect(result.errorLines.first { $0.contains(lack) }?.contains(remedy) == true, "\(result.errors)")
    #expect(result.errors.contains("/nonexistent"), "\(result.errors)")
    let hardened = try run(without: calls, ["--hardened"], below: wrapper)
    #expect(hardened.errorLines.count == 1, "\(hardened.errors)")
    #expect(hardened.errors.contains(lack) && hardened.errors.contains(remedy) && hardened.errors.contains("--hardened"))
    #expect(hardened.code != 0 && !hardened.errors.contains("/nonexistent"))
  }

  @Test func aKernelWithoutLandlockIsToldOnce() throws {
    try expect("Landlock is missing", remedy: "CONFIG_SECURITY_LANDLOCK", without: ["landlock_create_ruleset"])
  }

  @Test func aKernelWithoutFiltersIsToldOnce() throws {
    try expect("System calls cannot be filtered", remedy: "CONFIG_SECCOMP_FILTER", without: ["seccomp"])
  }

  /// As root of a user namespace in which no further one may be made, become an ordinary user of the next.
  private static let noUserNamespaces = [
    "/usr/bin/unshare", "-U", "--map-root-user", "/bin/sh", "-c",
    "echo 1 > /proc/sys/user/max_user_namespaces && exec unshare -U --map-user=1000 --map-group=1000 \"$@\"", "sh",
  ]
  private static let canForbid: Bool = {
    let words = noUserNamespaces + ["/bin/sh", "-c", "! unshare -U true && test $(id -u) = 1000"]
    return (try? RunningProgram(words[0], Array(words.dropFirst())).wait().code) == 0
  }()

  @Test(.enabled(if: canForbid, "This host has no user namespaces itself, or does not let them be forbidden in one."))
  func anOrdinaryUserWithoutUserNamespacesIsToldOnce() throws {
    try expect("share the host's namespaces", remedy: "user.max_user_namespaces", without: ["ptrace"], below: Self.noUserNamespaces)
  }

  @Test(.enabled(if: RunningMachineTests.canRun, "Needs KVM and the programs."))
  func withoutRingsTheDiskIsServedByOrdinaryCalls() throws {
    let directory = "/tmp/martlet-poor-\(getpid())"
    defer { try? FileManager.default.removeItem(atPath: directory) }
    try RunningMachineTests.prepare(directory)
    let result = try RunningProgram(
      BuiltPrograms.path("martlet-hostile"),
      ["--what=without", "--calls=io_uring_setup", "--", BuiltPrograms.path("martlet")]
        + RunningMachineTests.command(directory, "test=blk n=50") + ["--hardened"], directory: directory
    ).wait(seconds: 60)
    #expect(result.code == 0, "\(result.errors)")
    #expect(result.errorLines.count == 1 && result.errors.contains("io_uring cannot be used"), "\(result.errors)")
    let serial = try String(contentsOfFile: directory + "/log", encoding: .utf8)
    #expect(serial.contains("MICRO done ok"), "\(serial)")
  }
}
