import Foundation
import Glibc
import HostSystem
import Supervision
import TestSupport
import Testing

/// Other people's back ends, watched once by `martlet jail --learn` while they serve, and then serving from the jail that came of
/// it, to `martlet probe check`, which starts them anew for each of its cases.
@Suite(
  .enabled(
    if: BuiltPrograms.exists("martlet-jail") && BuiltPrograms.exists("martlet-probe")
      && HostWalls.probe(identity: nil).namespaces.isSuperset(of: [.mount, .process]),
    "Needs the programs and a host that can build a jail."))
struct JailLearnTests {
  /// One back end: the words of its command, with `{place}` for a directory of the test's, and what it is asked.
  struct BackEnd: Sendable, CustomTestStringConvertible {
    let program: String
    let words: [String]
    let check: [String]
    /// Nothing without root.
    var isRoots = false
    var testDescription: String { program }
  }

  static let backEnds = [
    BackEnd(
      program: "/usr/bin/qemu-storage-daemon",
      words: [
        "--blockdev", "driver=file,node-name=f,filename={place}/image", "--export",
        "type=vhost-user-blk,id=e,node-name=f,writable=on,addr.type=unix,addr.path={place}/sockets/s",
      ], check: ["--type", "blk", "--writes", "--only", "blk.write,blk.read,blk.flush"]),
    BackEnd(
      program: "/usr/lib/qemu/virtiofsd",
      words: ["--socket-path={place}/sockets/s", "-o", "source={place}/share", "-o", "sandbox=chroot"],
      check: ["--type", "fs", "--only", "ring.split-indirect"], isRoots: true),
  ]

  static let cases: [(BackEnd, [String])] = backEnds.filter { access($0.program, X_OK) == 0 }.flatMap { backEnd in
    JailTests.users.filter { !backEnd.isRoots || ($0.isEmpty && geteuid() == 0) }.map { (backEnd, $0) }
  }

  @Test(arguments: cases)
  func whatWasLearnedServes(backEnd: BackEnd, user: [String]) throws {
    let place = try JailTests.Place(isEverybodys: !user.isEmpty)
    for name in ["sockets", "share"] {
      try FileManager.default.createDirectory(atPath: "\(place.path)/\(name)", withIntermediateDirectories: true)
    }
    try Data(count: 8 << 20).write(to: URL(fileURLWithPath: place.path + "/image"))
    if !user.isEmpty { for name in ["sockets", "share", "image"] { chown("\(place.path)/\(name)", 65531, 65531) } }
    func check(_ mode: [String]) throws -> ProgramResult {
      let jail =
        [BuiltPrograms.path("martlet"), "jail", "--profile", place.path + "/p"] + mode
        + [
          "--define", "path=\(place.path)/image", "--define", "sockets=\(place.path)/sockets", "--define", "share=\(place.path)/share",
          "--",
        ]
      let words = user + jail + [backEnd.program] + backEnd.words.map { $0.replacing("{place}", with: place.path) }
      let socket = place.path + "/sockets/s"
      var probe = ["check", "--timeout", "60", "--socket", socket] + backEnd.check
      // One that ends with its front end is started by the probe; the others must be asked to end, or nothing is written.
      if backEnd.isRoots { probe += ["--"] + words }
      unlink(socket)
      let running = backEnd.isRoots ? nil : try RunningProgram(words[0], Array(words.dropFirst()), directory: place.path)
      let end = Date().addingTimeInterval(120)
      while let running, access(socket, F_OK) != 0, running.isRunning, Date() < end { usleep(5000) }
      let result = try JailTests.probe(probe, of: running, until: end, seconds: 180, directory: place.path)
      if let running {
        running.signal(SIGTERM)
        let ended = running.wait(seconds: 60)
        #expect(ended.code == 0 || ended.code == 128 + SIGTERM, "\(ended)")
      }
      return result
    }
    // Watched, and on a machine with other work, it may take longer for a message than a front end waits; what was learned adds up.
    func patiently(_ mode: [String]) throws -> ProgramResult {
      var result = try check(mode)
      for _ in 0..<8 where result.code == 1 && result.output.contains("in time") { result = try check(mode) }
      return result
    }
    let learned = try patiently(["--learn"])
    try #require(learned.code == 0 && learned.output.contains(" 0 failed"), "\(learned.output)\(learned.errors)")
    var profile = try String(contentsOfFile: place.path + "/p", encoding: .utf8)
    #expect(profile.contains("directory {sockets} rw") && profile.contains("refuse clone3 ENOSYS"), "\(profile)")
    // What it made for itself is no part of what it needs.
    if !backEnd.isRoots { #expect(!profile.contains("sockets/s "), "\(profile)") }
    if backEnd.isRoots {
      // These are not learned (protocol/jail.md).
      let written = try String(contentsOfFile: JailTests.profiles + "virtiofsd.jail", encoding: .utf8)
      profile += written.split(separator: "\n").filter { $0.hasPrefix("capability ") }.joined(separator: "\n") + "\n"
      try profile.write(toFile: place.path + "/p", atomically: true, encoding: .utf8)
    }
    let jailed = try patiently([])
    #expect(jailed.code == 0 && jailed.output.contains(" 0 failed"), "\(jailed.output)\(jailed.errors)\(profile)")
    // Not somebody else's files: one that was not seen is not there.
    #expect(!jailed.errors.contains("sandbox violation"), "\(jailed.errors)")
  }

  /// A program chooses the names of its files, and none of them adds a line.
  @Test func namesOfFilesCannotWriteTheProfile() throws {
    let place = try JailTests.Place()
    let names = ["a\ncapability CAP_SYS_ADMIN # x", "b # c", "d{e}", "f\"g", "plain file"]
    for name in names { try #require(FileManager.default.createFile(atPath: place.path + "/" + name, contents: Data("x".utf8))) }
    let learned = try RunningProgram(
      BuiltPrograms.path("martlet"), ["jail", "--profile", "p", "--learn", "--", "/bin/cat"] + names.map { place.path + "/" + $0 },
      directory: place.path
    ).wait(seconds: 60)
    #expect(learned.code == 0 && learned.output == "xxxxx", "\(learned)")
    let text = try String(contentsOfFile: place.path + "/p", encoding: .utf8)
    let profile = try JailProfile(text, file: "p")
    #expect(profile.capabilities.isEmpty, "\(text)")
    #expect(profile.places.map(\.path).filter { $0.hasPrefix(place.path) } == [place.path + "/plain file"], "\(text)")
    #expect(text.split(separator: "\n").count { $0.hasPrefix("# left out") } == 4, "\(text)")
    // Once more brings nothing new.
    let again = try RunningProgram(
      BuiltPrograms.path("martlet"), ["jail", "--profile", "p", "--learn", "--", "/bin/cat", place.path + "/plain file"],
      directory: place.path
    ).wait(seconds: 60)
    #expect(again.code == 0, "\(again)")
    #expect(try String(contentsOfFile: place.path + "/p", encoding: .utf8) == text)
  }
}
