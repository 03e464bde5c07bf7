import CLinux
import CSandbox
import ConsoleDevice
import Foundation
import Glibc
import HostSystem
import Sandbox
import TestSupport
import Testing

/// The guardian's work at the end of a VM, with directories that stand for control groups: with its lists it does all of it, and
/// without any single entry of them it does not.
@Suite(.enabled(if: clinux_seccomp_can_kill() == 1, "Needs a kernel with seccomp filters."))
struct GuardianTests {
  /// Each entry with each of the values it names; nil: all are there.
  static let missing: [SystemCallRule?] =
    [nil]
    + [SystemCallList.guardian, .guardianGroups].flatMap(\.rules).flatMap { rule -> [SystemCallRule?] in
      guard case .anyOf(let values)? = rule.conditions.first?.test else { return [rule] }
      return values.map { value in
        var one = rule
        one.conditions[0].test = .anyOf([value])
        return one
      }
    }

  /// The lists without that entry.
  private static func rules(without missing: SystemCallRule?) -> [SystemCallRule] {
    [SystemCallList.guardian, .guardianGroups].flatMap(\.rules).compactMap { rule in
      guard let missing, rule.number == missing.number else { return rule }
      guard case .anyOf(let values)? = rule.conditions.first?.test, case .anyOf(let gone)? = missing.conditions.first?.test else {
        return nil
      }
      var rest = rule
      rest.conditions[0].test = .anyOf(values.filter { !gone.contains($0) })
      return rest
    }
  }

  @Test(arguments: missing.indices)
  func everyCallOfTheGuardianIsNeeded(index: Int) throws {
    let missing = Self.missing[index]
    let place = NSTemporaryDirectory() + "martlet-guardian-\(UUID().uuidString)"
    let groups = place + "/martlet-vm-1"
    for path in [place, place + "/own", groups, groups + "/process-a", groups + "/process-b"] {
      try FileManager.default.createDirectory(atPath: path, withIntermediateDirectories: true)
    }
    defer { try? FileManager.default.removeItem(atPath: place) }
    // What keeps the directory from going at first, as a process does that was only just killed.
    for file in ["kill", "control", "members", "socket", "martlet-vm-1/busy"] {
      try #require(FileManager.default.createFile(atPath: "\(place)/\(file)", contents: nil))
    }
    let terminal = try Terminal()
    var settings = try terminal.settings()
    let before = settings.c_lflag
    try terminal.set(settings.c_lflag & ~tcflag_t(ECHO))

    var pidfd: CInt = -1
    var pipe: CInt = -1
    let filter = SystemCallFilter(Self.rules(without: missing), processID: 0).instructions
    let started: Int32
    do {
      let files = try ["martlet-vm-1", "kill", "", "control", "members"].map { name in
        try OwnedFDBox("\(place)/\(name)", name.isEmpty || name == "martlet-vm-1" ? O_RDONLY | O_DIRECTORY : O_WRONLY)
      }
      started = "martlet-vm-1".withCString { name in
        "own".withCString { own in
          "guardian".withCString { title in
            filter.withUnsafeBytes { program in
              withUnsafePointer(to: &settings) { settings in
                var guarded = csandbox_guarded_groups(
                  directory: files[0].number, kill: files[1].number, parent: files[2].number, control: files[3].number,
                  members: files[4].number, name: name, own_name: own)
                return withUnsafePointer(to: &guarded) { guarded in
                  var guardian = csandbox_guardian(
                    title: title, terminal: terminal.number, settings: settings, filter: program.baseAddress,
                    filter_length: UInt16(filter.count), groups: guarded, drops_privileges: 0, is_sibling: 0)
                  return csandbox_start_guardian(&guardian, &pidfd, &pipe)
                }
              }
            }
          }
        }
      }
    }
    try #require(started > 0)
    let process = ProcessHandle(processID: started, adopting: OwnedFD(owning: pidfd))
    try tell(pipe, place + "/socket")
    // Its parent has ended.
    close(pipe)
    // It gives up after three seconds and more of looking; this takes an instant.
    while FileManager.default.contents(atPath: place + "/kill")?.isEmpty == true,
      (try? process.fd.waitUntil(.readable, timeout: .milliseconds(1))) != true
    {}
    // Without its pause it must come to one.
    if missing.map({ SystemCall.name($0.number) }) != "poll" { unlink(place + "/martlet-vm-1/busy") }
    let end = process.waitForEnd()
    guard let missing else {
      check(end == .exited(code: 0), "it ended otherwise: \(end as Any)")
      for gone in ["martlet-vm-1", "own", "socket"] {
        #expect(!FileManager.default.fileExists(atPath: place + "/" + gone), "\(gone) is still there")
      }
      #expect(FileManager.default.contents(atPath: place + "/control") == Data("-cpu-memory-io-pids".utf8))
      #expect(try terminal.settings().c_lflag == before)
      return
    }
    check(end == .killed(signal: SIGSYS), "without \(SystemCall.name(missing.number)) it ends as well: \(end as Any)")
  }

  /// The file's identity, as the supervisor writes it.
  private func tell(_ pipe: CInt, _ path: String) throws {
    var status = stat()
    try #require(stat(path, &status) == 0)
    var bytes = [UInt8](repeating: 0, count: MemoryLayout<csandbox_guarded>.stride)
    withUnsafeBytes(of: UInt64(status.st_dev)) { bytes.replaceSubrange(0..<8, with: $0) }
    withUnsafeBytes(of: UInt64(status.st_ino)) { bytes.replaceSubrange(8..<16, with: $0) }
    let text = Array(path.utf8)
    try #require(text.count < 108)
    bytes.replaceSubrange(16..<16 + text.count, with: text)
    try #require(write(pipe, bytes, bytes.count) == bytes.count)
  }

  private struct OwnedFDBox {
    let number: CInt
    private let owner: Owner

    final class Owner {
      let number: CInt
      init(_ number: CInt) { self.number = number }
      deinit { close(number) }
    }

    init(_ path: String, _ flags: CInt) throws {
      number = open(path, flags | O_CLOEXEC)
      try #require(number >= 0, "\(path)")
      owner = Owner(number)
    }
  }

  /// A terminal that nobody sits at.
  private final class Terminal {
    private let peer: OwnedFD
    private let other: OwnedFD
    var number: CInt { peer.rawValue }

    init() throws {
      let terminal = try PseudoTerminal.make()
      peer = try PseudoTerminal.openPeer(of: terminal.master)
      other = try terminal.master.duplicate()
    }

    func settings() throws -> termios {
      var settings = termios()
      try #require(tcgetattr(number, &settings) == 0)
      return settings
    }

    func set(_ flags: tcflag_t) throws {
      var settings = try settings()
      settings.c_lflag = flags
      try #require(tcsetattr(number, TCSANOW, &settings) == 0)
    }
  }
}
