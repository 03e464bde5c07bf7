// Back ends that are replaced under a running guest that checks every byte.

import Foundation
import TestSupport
import Testing

@Suite(
  "Back ends that are replaced under a running guest", .serialized,
  .enabled(if: WholeVM.canRun, "These tests need /dev/kvm and the built programs.")
)
struct ReplacementTests {
  private static let profile =
    URL(fileURLWithPath: #filePath).deletingLastPathComponent().deletingLastPathComponent()
    .deletingLastPathComponent().path + "/protocol/jails/qemu-storage-daemon.jail"
  private static let hasStorageDaemon = access("/usr/bin/qemu-storage-daemon", X_OK) == 0
  private static let broken =
    URL(fileURLWithPath: "/proc/self/exe").resolvingSymlinksInPath().deletingLastPathComponent().appendingPathComponent("broken-backend")
    .path

  /// A guest that works on its disk until it has done `n` rounds, or idles.
  private func start(_ home: WholeVM, _ line: String, disk: String = "path=disk.img", _ more: [String] = []) throws -> RunningProgram {
    let vm = try home.start(["--cmdline", line, "--disk", disk, "--control", "ctl", "--serial", "file=serial.log"] + more)
    try home.waitUntilRunning()
    return vm
  }

  private func finish(_ home: WholeVM, _ vm: RunningProgram) {
    let result = vm.wait(seconds: 120)
    let serial = (try? String(contentsOfFile: home.directory + "/serial.log", encoding: .utf8)) ?? ""
    #expect(result.code == 0, "\(result.errors.suffix(2000))")
    #expect(serial.contains("MICRO done ok") && !serial.contains("FAIL"), "\(serial.suffix(1000)) \(result.errors.suffix(1000))")
    home.expectNothingLeft()
  }

  private func end(_ home: WholeVM, _ vm: RunningProgram) {
    vm.signal(SIGTERM)
    #expect(vm.wait().code == 143)
    home.expectNothingLeft()
  }

  private func replace(_ home: WholeVM, _ words: String, _ location: SourceLocation = #_sourceLocation) throws {
    let result = try home.ctl("replace " + words)
    #expect(result.code == 0, "\(result.output) \(result.errors)", sourceLocation: location)
  }

  /// Refused with that reason, and the same process serves.
  private func expectRefusal(_ home: WholeVM, _ words: String, _ reason: String, _ location: SourceLocation = #_sourceLocation) throws {
    let before = home.processes
    let result = try home.ctl("replace " + words)
    #expect(result.code == 1 && result.output.contains(reason), "\(words): \(result)", sourceLocation: location)
    #expect(home.processes == before, sourceLocation: location)
    #expect(try home.ctl("devices").output.contains("\"state\":\"waiting") == false, sourceLocation: location)
  }

  private func descriptorCounts(_ home: WholeVM) -> [String: Int] {
    home.processes.filter { ["core", "supervisor", "spawner"].contains($0.key) }.mapValues {
      (try? FileManager.default.contentsOfDirectory(atPath: "/proc/\($0)/fd").count) ?? 0
    }
  }

  @Test("A disk's process is replaced again and again under verified writes, and nothing leaks", arguments: ["", " plain=1"])
  func again(_ variant: String) throws {
    let home = try WholeVM()
    let vm = try start(home, "test=blk op=write depth=16 n=100000000 span=2 until=button" + variant)
    try replace(home, "blk0")
    // What belonged to the one before goes a moment after the answer.
    let counts = settled { descriptorCounts(home) }
    var pids: Set<Int32> = []
    for _ in 0..<12 where vm.isRunning {
      try replace(home, "blk0")
      if let pid = home.processes["blk0"] { pids.insert(pid) }
    }
    #expect(pids.count > 3, "\(vm.errorText)")
    // What belongs to the last one goes a moment after the answer.
    waitWhile { vm.isRunning && descriptorCounts(home) != counts }
    #expect(descriptorCounts(home) == counts)
    #expect(try home.ctl("power-button").code == 0)
    finish(home, vm)
  }

  @Test("Another build takes over, and comes again when it dies; the disk moves to a copy and back")
  func elsewhere() throws {
    let home = try WholeVM()
    let vm = try start(home, "test=boot end=hang")
    try home.shell("mkdir other; cp \(BuiltPrograms.path("martlet-block")) other/martlet-block; cp disk.img copy.img")
    let first = home.processes["blk0"]
    try replace(home, "blk0 --dry-run -- ./other/martlet-block --poll=off")
    #expect(home.processes["blk0"] == first)
    try replace(home, "blk0 -- ./other/martlet-block --poll=off")
    let second = try #require(home.processes["blk0"])
    #expect(second != first)
    #expect(try home.ctl("devices").output.contains("/other/martlet-block"))
    kill(second, SIGKILL)
    waitWhile { !vm.errorText.contains("served again") }
    let third = try #require(home.processes["blk0"])
    #expect(try FileManager.default.destinationOfSymbolicLink(atPath: "/proc/\(third)/exe").hasSuffix("/other/martlet-block"))

    // The VM's two images, one after the other.
    home.foreignSockets = ["other.sock"]
    func isFree(_ image: String) throws -> Bool {
      let other = try RunningProgram(
        "/usr/bin/timeout", ["0.3", BuiltPrograms.path("martlet-block"), "--socket-path=other.sock", "--blk-file=\(image)"],
        directory: home.directory
      ).wait()
      return !other.errors.contains("use")
    }
    #expect(try !isFree("disk.img") && isFree("copy.img"))
    try replace(home, "blk0 --path copy.img --dry-run")
    #expect(try !isFree("disk.img") && isFree("copy.img"))
    try replace(home, "blk0 --path copy.img")
    #expect(try isFree("disk.img") && !isFree("copy.img"))
    kill(try #require(home.processes["blk0"]), SIGKILL)
    waitWhile { vm.errorText.components(separatedBy: "served again").count < 3 }
    #expect(try isFree("disk.img") && !isFree("copy.img"))
    try replace(home, "blk0 --disk path=disk.img,direct=on")
    #expect(try !isFree("disk.img") && isFree("copy.img"))
    end(home, vm)
  }

  @Test("What the guest would notice is refused with its reason, and nothing has changed")
  func refusals() throws {
    let home = try WholeVM()
    let vm = try start(home, "test=boot end=hang", ["--rng", "on"])
    try home.shell("truncate -s 1M small.img; truncate -s 4M other.img")
    try expectRefusal(home, "blk0 --path small.img", "capacity")
    try expectRefusal(home, "blk0 --path missing.img", "missing.img")
    try expectRefusal(home, "blk0 -- ./missing", "missing")
    try expectRefusal(home, "blk0 -- /bin/true", "before it was ready")
    try expectRefusal(home, "blk0 -- \(BuiltPrograms.path("martlet-template"))", "before it was ready")
    try expectRefusal(home, "blk0 --socket missing.sock", "missing.sock")
    try expectRefusal(home, "blk0 --socket ctl", "belongs to the VM")
    try expectRefusal(home, "blk9 --socket missing.sock", "There is no device 'blk9'; did you mean 'blk0'?")
    try expectRefusal(home, "rng0 --path other.img", "rng0 is no disk")
    try expectRefusal(home, "blk0 --disk path=other.img,num_queues=3", "num_queues")
    // Nobody else may come between, either.
    let other = try WholeVM()
    let otherVM = try other.start([
      "--cmdline", "test=boot end=hang", "--disk", "path=disk.img", "--control", "ctl", "--serial", "null",
    ])
    try other.waitUntilRunning()
    try expectRefusal(home, "blk0 --path \(other.directory)/disk.img", "in use")
    try expectRefusal(home, "blk0 --socket \(other.directory)/ctl", "belongs to the VM")
    end(other, otherVM)
    for (words, reason) in [
      ("", "DEVICE"), ("blk0 --frobnicate", "frobnicate"), ("blk0 --socket a --jail b", "--socket"), ("blk0 --jail p", "PROGRAM"),
      ("blk0 --jail p -- x", "{listen}"), ("blk0 --drain 0", "--drain"), ("blk0 --socket a -- x", "--socket"), ("blk0 --", "PROGRAM"),
    ] {
      let result = try home.ctl(words.isEmpty ? "replace" : "replace " + words)
      #expect(result.code == 2 && result.errors.contains(reason), "\(words): \(result)")
    }
    end(home, vm)
  }

  @Test(
    "Broken back ends at a socket never take over",
    arguments: [
      ["net"], ["rng"], ["block", "read-only"], ["block"], ["block", "no-version1"], ["block", "protocol-abort"], ["block", "queues-zero"],
      ["block", "capacity-zero"],
    ])
  func brokenOnes(_ words: [String]) throws {
    let home = try WholeVM()
    try home.shell("truncate -s 16M disk.img")
    let vm = try start(home, "test=blk op=write depth=8 n=200000 span=2")
    home.foreignSockets = ["broken.sock"]
    let broken = try RunningProgram(Self.broken, [home.directory + "/broken.sock"] + words)
    waitWhile { access(home.directory + "/broken.sock", F_OK) != 0 }
    let before = home.processes["blk0"]
    let result = try home.ctl("replace blk0 --socket broken.sock")
    let after = home.processes["blk0"]
    if vm.isRunning {
      #expect(result.code == 1, "\(result)")
      #expect(after == before)
    }
    finish(home, vm)
    broken.signal(SIGKILL)
    _ = broken.wait()
  }

  @Test("Old and new ones that are killed in the middle: the guest sees nothing")
  func killedInTheMiddle() throws {
    let home = try WholeVM()
    let rounds = MicroGuest.killRounds(10)
    let vm = try start(home, "test=blk op=write depth=16 n=\(40_000 * rounds) span=2", disk: "path=disk.img,restart-limit=10000")
    for _ in 0..<rounds where vm.isRunning {
      let request = try RunningProgram(
        BuiltPrograms.path("martlet"), ["ctl", "--control", "ctl", "replace", "blk0"], directory: home.directory)
      usleep(UInt32.random(in: 1000...12000))
      // Both carry the same title; one of them it is.
      if let pid = home.processes["blk0"] { kill(pid, SIGKILL) }
      _ = request.wait(seconds: 30)
      for _ in 0..<12_000 where vm.isRunning {
        if try home.ctl("devices").output.contains("\"state\":\"active\"") { break }
        usleep(5000)
      }
    }
    finish(home, vm)
  }

  @Test(
    "From our block program to QEMU's storage daemon and back, in a jail and by its socket, under verified writes",
    .enabled(if: hasStorageDaemon, "qemu-storage-daemon is not installed"))
  func storageDaemon() throws {
    let home = try WholeVM()
    let vm = try start(
      home, "test=blk op=write depth=8 n=100000000 span=2 wait=halt until=button", disk: "path=disk.img,portable=on,num_queues=1")
    let daemon =
      "--blockdev driver=file,node-name=f,filename={path},locking=off --export type=vhost-user-blk,id=e,node-name=f,writable=on,"
      + "addr.type=fd,addr.str={listen}"
    // It locks by itself unless told not to, and meets the VM's own lock.
    try expectRefusal(
      home, "blk0 --jail \(Self.profile) -- qemu-storage-daemon " + daemon.replacingOccurrences(of: ",locking=off", with: ""),
      "first contact")
    // A slow one has requests in flight whenever it is stopped, and finishes them after it has said that it stopped.
    let slow =
      "--object throttle-group,id=t,limits.iops-total=100 "
      + daemon.replacing("--export", with: "--blockdev driver=throttle,node-name=s,throttle-group=t,file=f --export")
      .replacing("node-name=f,writable", with: "node-name=s,writable")
    for daemon in [daemon, slow, daemon] {
      try replace(home, "blk0 --jail \(Self.profile) -- qemu-storage-daemon " + daemon)
      #expect(try home.ctl("devices").output.contains("qemu-storage-daemon"))
      usleep(100_000)
      try replace(home, "blk0 -- \(BuiltPrograms.path("martlet-block"))")
      #expect(try !home.ctl("devices").output.contains("qemu-storage-daemon"))
      usleep(50_000)
    }
    home.foreignSockets = ["qsd.sock"]
    let byHand = try RunningProgram(
      "/usr/bin/qemu-storage-daemon",
      [
        "--blockdev", "driver=file,node-name=f,filename=disk.img,locking=off", "--export",
        "type=vhost-user-blk,id=e,node-name=f,writable=on,addr.type=unix,addr.path=qsd.sock",
      ], directory: home.directory)
    waitWhile { access(home.directory + "/qsd.sock", F_OK) != 0 }
    #expect(!vm.errorText.contains("lost"), "\(vm.errorText)")
    try expectRefusal(home, "blk0 --path copy.img", "copy.img")
    for _ in 0..<2 where vm.isRunning {
      try replace(home, "blk0 --socket qsd.sock")
      #expect(try home.ctl("devices").output.contains("external"))
      // What was started by hand has no program that could be started again.
      try expectRefusal(home, "blk0", "--path")
      usleep(100_000)
      // The image is the VM's own still.
      try replace(home, "blk0 --path disk.img")
      #expect(try !home.ctl("devices").output.contains("external"))
      usleep(50_000)
    }
    if vm.isRunning {
      let before = vm.errorText.components(separatedBy: "served again").count
      kill(try #require(home.processes["blk0"]), SIGKILL)
      waitWhile { vm.isRunning && vm.errorText.components(separatedBy: "served again").count == before }
    }
    #expect(try home.ctl("power-button").code == 0)
    finish(home, vm)
    byHand.signal(SIGTERM)
    _ = byHand.wait()
  }

  @Test("What a guest has heard of its storage's wear it goes on hearing")
  func wear() throws {
    let home = try WholeVM()
    let vm = try start(home, "test=boot end=hang")
    try home.shell("mkdir other; cp \(BuiltPrograms.path("martlet-block")) other/martlet-block; cp disk.img copy.img")
    func tells() throws -> Bool { try home.ctl("devices").output.contains("\"LIFETIME\"") }
    #expect(try !tells())
    try replace(home, "blk0 -- \(BuiltPrograms.path("martlet-block")) --lifetime=2,3,4")
    #expect(try tells())
    for words in ["blk0", "blk0 -- ./other/martlet-block", "blk0 --path copy.img"] {
      try replace(home, words)
      #expect(try tells(), "\(words)")
    }
    end(home, vm)
  }

  @Test("An upgrade replaces every process of a device and tells of each")
  func upgrade() throws {
    let home = try WholeVM()
    let vm = try start(home, "test=blk op=write depth=16 n=200000 span=2", ["--rng", "on"])
    let before = home.processes
    let result = try home.ctl("upgrade")
    if vm.isRunning {
      #expect(result.code == 0, "\(result)")
      let after = home.processes
      for id in ["blk0", "rng0", "con0"] { #expect(before[id] != nil && after[id] != nil && before[id] != after[id], "\(id)") }
      for id in ["core"] { #expect(before[id] == after[id]) }
    }
    finish(home, vm)
  }
}
