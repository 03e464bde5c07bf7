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
    BackEnd(
      program: "/usr/bin/dpdk-testpmd",
      words: [
        "--no-huge", "-m", "256", "--no-pci", "--no-telemetry", "--no-shconf", "--lcores", "0@0,1@1", "--vdev",
        "net_vhost0,iface={place}/sockets/s,queues=1", "--", "--no-mlockall", "--total-num-mbufs=8192", "--stats-period", "3600",
      ], check: ["--type", "net", "--only", "net.,ring.split-chain"]),
    // By a name that does not say where it is, which is the same place in the jail.
    BackEnd(
      program: "/usr/bin/python3", words: ["entropy.py", "--socket-path", "sockets/s"],
      check: ["--type", "rng", "--only", "rng.,ring.split-chain"]),
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
    try FileManager.default.copyItem(atPath: JailTests.examples + "entropy.py", toPath: place.path + "/entropy.py")
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
    let hasThreads = !backEnd.program.hasSuffix("python3")
    #expect(profile.contains("directory {sockets} rw") && profile.contains("refuse clone3 ENOSYS") == hasThreads, "\(profile)")
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

  /// Links are files by themselves in the jail, so that a loader that resolves them maps by another name there than it did here.
  /// And a directory that is only asked for is there, empty.
  @Test(.enabled(if: access("/usr/bin/python3", X_OK) == 0, "Needs python3."))
  func whatIsMappedByOneNameMayBeMappedByAll() throws {
    let place = try JailTests.Place()
    try FileManager.default.copyItem(atPath: "/lib/x86_64-linux-gnu/libm.so.6", toPath: place.path + "/real.so")
    try FileManager.default.createSymbolicLink(atPath: place.path + "/first.so", withDestinationPath: "second.so")
    try FileManager.default.createSymbolicLink(atPath: place.path + "/second.so", withDestinationPath: "real.so")
    for name in ["asked", "listed"] {
      try FileManager.default.createDirectory(atPath: place.path + "/" + name, withIntermediateDirectories: true)
      try place.write(name + "/secret", "")
    }
    try place.write(
      "program.py",
      """
      import ctypes, os
      os.stat("first.so")
      ctypes.CDLL(os.path.realpath("first.so")).cos
      print(os.path.isdir("asked"), len(os.listdir("listed")))
      """)
    let words = ["jail", "--profile", "p", "--learn", "--", "/usr/bin/python3", "-I", "-S", "program.py"]
    let learned = try RunningProgram(BuiltPrograms.path("martlet"), words, directory: place.path).wait(seconds: 60)
    #expect(learned.code == 0 && learned.output == "True 1\n", "\(learned)")
    let profile = try String(contentsOfFile: place.path + "/p", encoding: .utf8)
    #expect(profile.contains("file \(place.path)/first.so run\n") && profile.contains("temporary \(place.path)/asked 4K "), "\(profile)")
    let again = words.filter { $0 != "--learn" }
    let jailed = try RunningProgram(BuiltPrograms.path("martlet"), again, directory: place.path).wait(seconds: 60)
    #expect(jailed.code == 0 && jailed.output == "True 1\n", "\(jailed)\(profile)")
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
