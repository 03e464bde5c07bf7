import Foundation
import Glibc
import Sandbox
import Supervision
import Testing

/// What a process can still do once its filter stands, by the kernel's own answer.
@Suite(.enabled(if: Hostile.canRun, "The stand-in is not built."))
struct FilterTests {
  /// Attacks that a role's own work needs the call for. The core gives guest memory back itself.
  private static let allowed: [String: [String: String]] = [
    "core": ["punch_memory": "got 0"], "block-calls": ["punch_memory": "got 0"],
    // Its control clients' sockets do not block; the core's end of a shared description is not among what it holds.
    // What the start of a program asks in vain comes back with an error (../../protocol/upgrade.md).
    "supervisor": [
      "make_blocking": "got 0", "open_file": "got -2", "open_root": "got -2", "make_file": "got -2", "open_proc_memory": "got -2",
      "raise_ambient": "got -22", "become_dumpable": "got -22", "outlive_parent": "got -22",
    ],
  ]

  @Test(arguments: Hostile.roles.map(\.name))
  func everyAttackEndsTheProcess(role: String) throws {
    let lists = try #require(Hostile.roles.first { $0.name == role }).lists
    let hostile = try Hostile(lists, namespaces: Hostile.host.namespaces, files: true, victim: getpid())
    #expect(hostile.outcomes.count > 70)
    for (attack, outcome) in hostile.outcomes.sorted(by: { $0.key < $1.key }) {
      #expect(outcome == Self.allowed[role]?[attack] ?? "killed 31", "\(attack) as \(role)")
    }
  }

  @Test(arguments: Hostile.roles.map(\.name))
  func callsOutsideTheListAndAlteredArgumentsEndInSIGSYSAndOthersDoNot(role: String) throws {
    let lists = try #require(Hostile.roles.first { $0.name == role }).lists
    let hostile = try Hostile(lists, what: "sweep", namespaces: Hostile.host.namespaces, files: true, victim: getpid())
    #expect(hostile.lines == [])
  }

  /// What libc and the kernel do of their own accord works with a role's lists, and needs each of these calls.
  @Test(arguments: [("block", 10), ("core", 10), ("processor", 8), ("supervisor", 7)])
  func libcsOwnCallsAreNeeded(role: String, count: Int) throws {
    let lists = try #require(Hostile.roles.first { $0.name == role }).lists
    let hostile = try Hostile(lists, what: "deeds", namespaces: Hostile.host.namespaces, files: true, victim: getpid())
    var needed = 0
    for line in hostile.lines {
      let words = line.split(separator: " ", maxSplits: 3)
      let whole = words[0] == "abort" ? "killed \(SIGABRT)" : "ended 0"
      if words[1] == "without" { needed += 1 }
      #expect(words[3] == (words[1] == "with" ? whole : "killed \(SIGSYS)"), "\(line) as \(role)")
    }
    #expect(needed == count, "\(hostile.lines)")
  }

  @Test func rolesHaveFewCalls() {
    func count(_ lists: [SystemCallList]) -> Int { Set(lists.flatMap(\.rules).map(\.number)).count }
    // Firecracker's vCPU thread has 27 calls.
    #expect(count([.processor]) < 27)
    // crosvm's block device in a process of its own has 78 (protocol/system-calls/README.md).
    #expect(count([.base, .device, .block]) < 78)
    for role in Hostile.roles { #expect(count(role.lists) <= 40, "\(role.name) has \(count(role.lists))") }
  }

  @Test func theDocumentCountsRight() throws {
    let root = URL(fileURLWithPath: #filePath).deletingLastPathComponent().deletingLastPathComponent().deletingLastPathComponent()
    let text = try String(contentsOf: root.appendingPathComponent("protocol/system-calls/README.md"), encoding: .utf8)
    var rows = 0
    for row in text.matches(of: #/\| ([a-z, -]+) \| (\d+) \|/#) {
      let lists = row.1.split(separator: ",").compactMap { SystemCallList(rawValue: $0.trimmingCharacters(in: .whitespaces)) }
      #expect(Set(lists.flatMap(\.rules).map(\.number)).count == Int(row.2), "\(row.0)")
      rows += 1
    }
    #expect(rows == Hostile.roles.count)
  }
}
