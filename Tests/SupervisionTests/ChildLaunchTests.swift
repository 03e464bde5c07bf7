import Foundation
import Glibc
import HostSystem
import Sandbox
import Supervision
import TestSupport
import Testing

/// Runs `script` by /bin/sh as a launched child and gives what it printed on descriptor 1.
private func run(_ script: String, identity: ChildIdentity? = nil, extra: [CInt] = []) throws -> String {
  let null = try OwnedFD.open("/dev/null", O_RDWR)
  let shell = try OwnedFD.open("/bin/sh", pathOnly)
  var ends: [CInt] = [-1, -1]
  try #require(pipe(&ends) == 0)
  let reading = try OwnedFD.inherited(ends[0])
  let child: StartedChild
  do {
    let writing = try OwnedFD.inherited(ends[1])
    let launch = ChildLaunch(
      arguments: ["sh", "-c", script], descriptors: [null.rawValue, writing.rawValue, 2] + extra, identity: identity)
    child = try launch.start(shell)
  }
  let bytes = try reading.readToEnd(limit: 1 << 16)
  check(child.process.waitForEnd() == .exited(code: 0), "the script failed")
  check(child.poll() == .executed)
  return String(decoding: bytes, as: UTF8.self)
}

private let pathOnly: CInt = 0o10000000  // O_PATH

private func field(_ name: String, of status: String) -> String? {
  for line in status.split(separator: "\n") where line.hasPrefix(name + ":") {
    return line.dropFirst(name.count + 1).split(whereSeparator: \.isWhitespace).joined(separator: " ")
  }
  return nil
}

@Suite struct ChildLaunchTests {
  @Test func childHasTheAgreedDescriptorsAndNoOthers() throws {
    let first = try OwnedFD.open("/etc/passwd", O_RDONLY)
    let second = try OwnedFD.open("/etc/group", O_RDONLY)
    let text = try run(
      "for n in 3 4; do readlink /proc/$$/fd/$n; done; for n in 0 1 2 3 4 5 6 7 8 9 10; do test -e /proc/$$/fd/$n && printf \"$n \"; done; true",
      extra: [second.rawValue, first.rawValue])
    #expect(text == "/etc/group\n/etc/passwd\n0 1 2 3 4 ")
  }

  @Test func overlappingNumbersArePutInPlace() throws {
    // The child's numbers 0... are also sources here: 0 becomes 4 and so on.
    let text = try run("readlink /proc/$$/fd/3 /proc/$$/fd/5 | sort -u | wc -l", extra: [1, 0, 1])
    #expect(text.trimmingCharacters(in: .whitespacesAndNewlines) == "1")
  }

  @Test(.enabled(if: geteuid() == 0, "Changing the uid needs root."))
  func identityIsChangedWhollyAndForGood() throws {
    let status = try run("cat /proc/$$/status", identity: ChildIdentity(uid: 1_900_000_001, gid: 1_900_000_002))
    #expect(field("Uid", of: status) == "1900000001 1900000001 1900000001 1900000001")
    #expect(field("Gid", of: status) == "1900000002 1900000002 1900000002 1900000002")
    #expect(field("Groups", of: status) == "")
    for name in ["CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"] {
      #expect(field(name, of: status) == "0000000000000000", "\(name)")
    }
    #expect(field("NoNewPrivs", of: status) == "1")
  }

  @Test func withoutIdentityCapabilitiesGoAllTheSame() throws {
    let status = try run("cat /proc/$$/status")
    for name in ["CapInh", "CapPrm", "CapEff", "CapAmb"] {
      #expect(field(name, of: status) == "0000000000000000", "\(name)")
    }
    #expect(field("NoNewPrivs", of: status) == "1")
    #expect(field("Uid", of: status)?.hasPrefix("\(getuid()) ") == true)
  }

  @Test func environmentIsEmptySessionIsItsOwnAndNoCoreIsWritten() throws {
    let text = try run("tr '\\0' '\\n' < /proc/$$/environ | wc -l; ps -o sid= -p $$; echo $$; ulimit -c; ulimit -Hn; pwd")
    let lines = text.split(separator: "\n").map { $0.trimmingCharacters(in: .whitespaces) }
    try #require(lines.count == 6)
    #expect(lines[0] == "1")
    #expect(lines[1] == lines[2])
    #expect(lines[3...] == ["0", "256", "/"])
  }

  @Test func ignoredAndBlockedSignalsAreReset() throws {
    signal(SIGUSR2, SIG_IGN)
    defer { signal(SIGUSR2, SIG_DFL) }
    let status = try run("cat /proc/self/status")
    #expect(field("SigIgn", of: status) == "0000000000000000")
    #expect(field("SigBlk", of: status) == "0000000000000000")
  }

  @Test func programThatCannotBeExecutedIsReportedWithItsStep() throws {
    let file = try OwnedFD.open("/etc/passwd", pathOnly)
    let null = try OwnedFD.open("/dev/null", O_RDWR)
    let child = try ChildLaunch(arguments: ["x"], descriptors: [null.rawValue]).start(file)
    check(child.process.waitForEnd() == .exited(code: 127))
    check(child.poll() == .failed(.exec, .accessDenied))
  }

  @Test func closedSourceDescriptorIsReportedWithItsStep() throws {
    let shell = try OwnedFD.open("/bin/sh", pathOnly)
    let child = try ChildLaunch(arguments: ["sh"], descriptors: [999]).start(shell)
    check(child.process.waitForEnd() == .exited(code: 127))
    check(child.poll() == .failed(.descriptors, Errno(EBADF)))
  }

  @Test func stagesAreInTheOrderOfTheirNumbers() {
    #expect(Stage.allCases.map(\.rawValue) == Array(1...Int32(Stage.allCases.count)))
  }
}
