import Foundation
import Glibc
import HostSystem
import Sandbox
import Supervision
import TestSupport
import Testing

/// The hostile stand-in behind the real walls, and what it told.
struct Hostile {
  static let canRun = BuiltPrograms.exists("martlet-hostile")
  /// Who serves with which lists.
  static let roles: [(name: String, lists: [SystemCallList])] = [
    ("block", [.base, .device, .block]), ("block-calls", [.base, .device, .blockCalls]),
    ("block-control", [.base, .device, .block, .blockControl]), ("net", [.base, .device, .net]),
    ("template", [.base, .device]),
    ("console", [.base, .device, .console]), ("core", [.base, .core]), ("processor", [.processor]),
    ("supervisor", [.supervisor]), ("guardian", [.guardian]),
    ("guardian-groups", [.guardian, .guardianGroups]),
  ]

  /// Each attack with how it ended: "killed 31", or "got N".
  private(set) var outcomes: [String: String] = [:]
  private(set) var lines: [String] = []

  static var identity: ChildIdentity? { geteuid() == 0 ? ChildIdentity(uid: 1_900_000_100, gid: 1_900_000_100) : nil }

  init(
    _ lists: [SystemCallList], what: String = "attacks", namespaces: Namespaces, files: Bool, victim: Int32,
    identity: ChildIdentity? = Hostile.identity
  ) throws {
    let null = try OwnedFD.open("/dev/null", O_RDWR)
    let program = try OwnedFD.open(BuiltPrograms.path("martlet-hostile"), 0o10000000)  // O_PATH
    let memory = try SharedMemory.sealed(name: "hostile", byteCount: 1 << 16)
    let pair = try UnixSocket.pair(.stream)
    var ends: [CInt] = [-1, -1]
    try #require(pipe(&ends) == 0)
    let reading = try OwnedFD.inherited(ends[0])
    let child: StartedChild
    do {
      let writing = try OwnedFD.inherited(ends[1])
      let launch = ChildLaunch(
        arguments: [
          "martlet-hostile", "--lists=" + lists.map(\.rawValue).joined(separator: ","), "--what=\(what)", "--victim=\(victim)",
          "--files=\(files ? "on" : "off")",
        ],
        descriptors: [null.rawValue, writing.rawValue, 2, memory.rawValue, pair.second.rawValue], identity: identity,
        parentDeathSignal: 0, namespaces: namespaces)
      child = try launch.start(program)
    }
    let text = String(decoding: try reading.readToEnd(limit: 1 << 20), as: UTF8.self)
    check(child.process.waitForEnd() == .exited(code: 0), "the stand-in did not come to its end: \(text)")
    if case .failed(let stage, let errno) = child.poll() { Issue.record("\(stage): \(errno.explanation)") }
    lines = text.split(separator: "\n").map(String.init)
    let last = lines.popLast()
    try #require(last == "end")
    if what == "attacks" {
      for line in lines {
        let parts = line.split(separator: " ", maxSplits: 1)
        outcomes[String(parts[0])] = parts.count > 1 ? String(parts[1]) : ""
      }
    }
    // What was shared has not changed.
    checkEqual(try memory.status().byteCount, 1 << 16)
    checkEqual((SharedMemory.seals(of: memory) ?? 0) & 0xF, SharedMemory.sizeSeals)
  }

  /// Everything that this host can give; the tests of the layers themselves skip where it cannot.
  static let host = HostWalls.probe(identity: identity)
}
