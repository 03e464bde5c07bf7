import ControlProtocol
import Foundation
import Glibc
import TestSupport
import Testing

/// `martlet ctl upgrade-supervisor` of a VM that outlives its supervisor, with a core and devices of straw.
@Suite(.enabled(if: Installation.canRun, "These tests open /dev/kvm and need the built programs."))
struct KeptUpgradeTests {
  private func start(_ home: Installation, _ arguments: [String] = []) throws -> RunningProgram {
    let vm = try home.start(
      ["--disk", "path=disk.img,restart-limit=1000", "--control", "ctl", "--console", "socket=con", "--on-supervisor-death", "continue"]
        + arguments)
    try home.waitUntilRunning()
    // A state is kept from then on.
    home.waitUntil("a spawner") { processes(home)["spawner"] != nil }
    return vm
  }

  private func processes(_ home: Installation) -> [String: Int32] {
    Dictionary(home.processes.map { ($0.title.split(separator: "/").last.map(String.init) ?? "", $0.pid) }) { $1 }
  }

  private func descriptors(_ pid: Int32?) -> Int {
    pid.flatMap { try? FileManager.default.contentsOfDirectory(atPath: "/proc/\($0)/fd").count } ?? 0
  }

  private func member(_ home: Installation, _ name: String) throws -> UInt64? {
    try JSONValue(parsing: try home.ctl("info", "--json").output)[name]?.unsigned
  }

  private func install(_ program: String, _ home: Installation) throws {
    let copy = try home.shell("cp '\(program)' new && chmod 755 new && mv new martlet-supervisor")
    try #require(copy.code == 0, "\(copy.errors)")
  }

  /// Which file a process runs.
  private func program(_ pid: Int32?) throws -> UInt64 {
    var status = stat()
    try #require(stat("/proc/\(try #require(pid))/exe", &status) == 0)
    return UInt64(status.st_ino)
  }

  private func killSupervisor(_ home: Installation, _ vm: RunningProgram) throws {
    let count = vm.errorText.components(separatedBy: "has taken over").count
    kill(try #require(processes(home)["supervisor"]), SIGKILL)
    home.waitUntil("another supervisor: \(vm.errorText)", seconds: 30) {
      vm.errorText.components(separatedBy: "has taken over").count > count
    }
  }

  @Test func upgradedKilledAndUpgradedAgain() throws {
    let home = try Installation()
    let vm = try start(home)
    let before = processes(home)
    #expect(before["keeper"] == vm.pid)
    var count = 0
    for round in 1...4 {
      let old = processes(home)
      try install(BuiltPrograms.path("martlet-supervisor"), home)
      var installed = stat()
      #expect(stat(home.directory + "/martlet-supervisor", &installed) == 0)
      let answer = try home.ctl("upgrade-supervisor", "--json")
      #expect(answer.code == 0 && answer.output.contains("\"changed\":true"), "\(answer.output) \(answer.errors) \(vm.errorText)")
      #expect(try member(home, "upgrades") == UInt64(round))
      #expect(try member(home, "takeovers") == UInt64(round - 1))
      home.waitUntil("as many processes as before: \(processes(home))") { processes(home).count == before.count }
      let now = processes(home)
      #expect(now["keeper"] == vm.pid && now["core"] == before["core"])
      for name in ["keeper", "supervisor", "spawner", "guardian"] {
        #expect(try program(now[name]) == UInt64(installed.st_ino), "\(name) is not the installed program")
        if name != "keeper" { #expect(now[name] != old[name], "\(name)") }
      }
      // Whoever has been upgraded is taken over from as before, and serves.
      usleep(600_000)
      try killSupervisor(home, vm)
      kill(try #require(processes(home)["blk0"]), SIGKILL)
      home.waitUntil("the disk's next process: \(vm.errorText)") {
        vm.errorText.components(separatedBy: "Device blk0 is served again").count > round
      }
      for verb in ["pause", "resume", "devices"] { #expect(try home.ctl(verb).code == 0, "\(verb)") }
      usleep(600_000)
      if round == 1 { count = settled { descriptors(processes(home)["supervisor"]) } }
      home.waitUntil("as many descriptors as before: \(descriptors(processes(home)["supervisor"])), not \(count)") {
        descriptors(processes(home)["supervisor"]) == count
      }
    }
    let lock = "import fcntl, struct; fcntl.fcntl(open('disk.img', 'r+'), 37, struct.pack('hhqqi', fcntl.F_WRLCK, 0, 1 << 62, 0, 0))"
    let other = try home.shell("python3 -c \"\(lock)\"")
    #expect(other.code != 0 && other.errors.contains("Resource temporarily unavailable"), "\(other.errors)")
    #expect(try home.ctl("shutdown").code == 0)
    #expect(vm.wait().code == 0, "\(vm.errorText)")
    home.expectNothingLeft()
  }

  @Test func whoeverIsConnectedStaysConnected() throws {
    let home = try Installation()
    let vm = try start(home)
    let script = """
      import json, socket
      def connect():
          s = socket.socket(socket.AF_UNIX); s.connect("ctl"); s.settimeout(20); return s
      idle, asker, half = connect(), connect(), connect()
      half.sendall(b"inf")
      follower = connect().makefile("rw")
      follower.write("events --follow\\n"); follower.flush(); json.loads(follower.readline())
      asker.sendall(b"upgrade-supervisor\\ninfo\\n")
      lines = asker.makefile()
      first = json.loads(lines.readline())
      assert first["ok"] and first["changed"] and first["upgrades"] == 1, first
      assert json.loads(lines.readline())["state"] == "running"
      idle.sendall(b"info\\n"); assert json.loads(idle.makefile().readline())["upgrades"] == 1
      half.sendall(b"o\\n"); assert json.loads(half.makefile().readline())["ok"]
      assert json.loads(follower.readline())["event"] == "upgraded"
      """
    let result = try RunningProgram("/usr/bin/env", ["python3", "-c", script], directory: home.directory).wait(seconds: 60)
    #expect(result.code == 0, "\(result.errors)")
    vm.signal(SIGTERM)
    #expect(vm.wait().code == 143)
    home.expectNothingLeft()
  }

  /// The program that was examined cannot be executed any more: the path to it is another one by then.
  @Test func anExecutionThatFailsChangesNothing() throws {
    let home = try Installation()
    let vm = try start(home)
    let before = processes(home)
    let elsewhere = home.directory + "-moved"
    try FileManager.default.moveItem(atPath: home.directory, toPath: elsewhere)
    let answer = try RunningProgram(
      elsewhere + "/martlet", ["ctl", "--control", "ctl", "upgrade-supervisor"], directory: elsewhere
    ).wait()
    try FileManager.default.moveItem(atPath: elsewhere, toPath: home.directory)
    #expect(answer.code == 1, "\(answer.output)")
    #expect(answer.errors.contains("Not upgraded, and nothing has changed: The new program cannot be executed: "), "\(answer.errors)")
    #expect(try member(home, "upgrades") == 0)
    #expect(try member(home, "takeovers") == 0)
    home.waitUntil("the processes of before: \(processes(home))") {
      processes(home).filter { $0.key != "supervisor" } == before.filter { $0.key != "supervisor" }
    }
    kill(try #require(before["blk0"]), SIGKILL)
    home.waitUntil("the disk's next process") { vm.errorText.contains("Device blk0 is served again") }
    #expect(try home.ctl("upgrade-supervisor").code == 0)
    #expect(try member(home, "upgrades") == 1)
    vm.signal(SIGTERM)
    #expect(vm.wait().code == 143)
    home.expectNothingLeft()
  }

  @Test(arguments: ["up-crash", "up-refuse", "up-half"])
  func aProgramThatCannotTakeOverChangesNothing(_ name: String) throws {
    let home = try Installation()
    let vm = try start(home, ["--name", name])
    let before = processes(home)
    try install(BuiltPrograms.path("martlet-fake"), home)
    let answer = try home.ctl("upgrade-supervisor")
    #expect(answer.code == 1 && answer.errors.contains("Not upgraded, and nothing has changed"), "\(answer.errors)")
    home.waitUntil("the processes of before: \(processes(home))") { processes(home) == before }
    // The program that would take over now is the one from before.
    try killSupervisor(home, vm)
    try install(BuiltPrograms.path("martlet-supervisor"), home)
    let second = try home.ctl("upgrade-supervisor")
    #expect(second.code == 0, "\(second.errors)")
    vm.signal(SIGTERM)
    #expect(vm.wait().code == 143)
    home.expectNothingLeft()
  }

  /// Killed at some moment of an upgrade, alone or with the keeper; a signal that orders the end comes at one.
  @Test(arguments: ["supervisor", "keeper", "both", "end"]) func killedDuringAnUpgrade(_ victim: String) throws {
    let home = try Installation()
    let vm = try start(home)
    for _ in 0..<(victim == "supervisor" ? 8 : 1) {
      let asker = try RunningProgram(
        home.directory + "/martlet", ["ctl", "--control", "ctl", "upgrade-supervisor"], directory: home.directory)
      usleep(.random(in: 0...60_000))
      let now = processes(home)
      if victim != "keeper", victim != "end", let pid = now["supervisor"] { kill(pid, SIGKILL) }
      if victim == "end" { vm.signal(SIGTERM) } else if victim != "supervisor" { vm.signal(SIGKILL) }
      #expect(asker.wait(seconds: 60).signal == nil)
      guard victim == "supervisor" else { break }
      #expect(vm.isRunning, "\(vm.errorText)")
      // A supervisor that has lived so long does not count as one that dies at once.
      usleep(600_000)
      home.waitUntil("the processes of before: \(processes(home))") {
        Set(processes(home).keys).isSuperset(of: ["keeper", "supervisor", "spawner", "guardian", "core", "blk0"])
      }
      home.waitUntil("an answer") { (try? home.ctl("devices").code) == 0 }
    }
    if victim == "supervisor" {
      #expect(try home.ctl("upgrade-supervisor").code == 0, "\(vm.errorText)")
      vm.signal(SIGTERM)
    }
    let end = vm.wait()
    if victim == "keeper" || victim == "both" { #expect(end.signal == SIGKILL) } else { #expect(end.code == 143, "\(vm.errorText)") }
    home.expectNothingLeft()
  }

  /// In user namespaces, which each supervisor makes for itself.
  @Test(.enabled(if: geteuid() == 0, "Becoming an ordinary user needs root.")) func anOrdinaryUsersIsTakenOverAndUpgraded() throws {
    let home = try Installation()
    chmod(home.directory, 0o777)
    chmod(home.directory + "/disk.img", 0o666)
    let script = """
      exec unshare -m sh -c 'cp -a /dev/kvm kvm && chown 0:65500 kvm && chmod 660 kvm && mount --bind kvm /dev/kvm && \
      exec setpriv --reuid 65534 --regid 65534 --groups 65500 ./martlet run --kernel kernel --console null --control ctl \
      --disk path=disk.img,restart-limit=1000 --on-supervisor-death continue'
      """
    let vm = try RunningProgram("/bin/sh", ["-c", script], directory: home.directory)
    defer { unlink(home.directory + "/kvm") }
    try home.waitUntilRunning()
    home.waitUntil("a spawner") { processes(home)["spawner"] != nil }
    for round in 1...2 {
      try killSupervisor(home, vm)
      #expect(home.status(try #require(processes(home)["supervisor"]), "Uid")?.hasPrefix("65534 ") == true)
      #expect(try home.ctl("upgrade-supervisor").code == 0, "\(vm.errorText)")
      let supervisor = try #require(processes(home)["supervisor"])
      #expect(home.status(supervisor, "Uid")?.hasPrefix("65534 ") == true)
      #expect(home.status(supervisor, "CapPrm") == "0000000000000000" && home.status(supervisor, "Seccomp_filters") == "1")
      kill(try #require(processes(home)["blk0"]), SIGKILL)
      home.waitUntil("the disk's next process: \(vm.errorText)") {
        vm.errorText.components(separatedBy: "Device blk0 is served again").count > round
      }
      usleep(600_000)
    }
    vm.signal(SIGTERM)
    #expect(vm.wait().code == 143, "\(vm.errorText)")
    home.expectNothingLeft()
  }

  /// What has been done to the devices is handed on, and orders go on being served by the new spawner.
  @Test func whatHasChangedIsHandedOn() throws {
    let home = try Installation()
    let vm = try start(home, ["--rng", "on"])
    #expect(try home.shell("truncate -s 1M more.img other.img").code == 0)
    func succeed(_ words: String) throws {
      let result = try home.shell("./martlet ctl --control ctl \(words)")
      #expect(result.code == 0, "\(words): \(result.errors) \(vm.errorText)")
    }
    for words in ["add disk path=more.img,id=more", "add console socket=late,id=late", "remove rng0", "replace blk0 --path other.img"] {
      try succeed(words)
    }
    try succeed("upgrade-supervisor")
    try killSupervisor(home, vm)
    for words in ["remove more", "add disk path=more.img", "replace blk0 --path disk.img", "upgrade"] { try succeed(words) }
    #expect(access(home.directory + "/late", F_OK) == 0)
    #expect(try member(home, "upgrades") == 2)
    vm.signal(SIGKILL)
    #expect(vm.wait().signal == SIGKILL)
    home.waitUntil("the socket's end") { access(home.directory + "/late", F_OK) != 0 }
    home.expectNothingLeft()
  }
}
