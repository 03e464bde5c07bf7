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
    home.waitUntil("a spawner") { home.members["spawner"] != nil }
    return vm
  }

  /// Which file a process runs.
  private func program(_ pid: Int32?) throws -> UInt64 {
    var status = stat()
    try #require(stat("/proc/\(try #require(pid))/exe", &status) == 0)
    return UInt64(status.st_ino)
  }

  private func killSupervisor(_ home: Installation, _ vm: RunningProgram) throws {
    let count = vm.errorText.components(separatedBy: "has taken over").count
    kill(try #require(home.members["supervisor"]), SIGKILL)
    home.waitUntil("another supervisor: \(vm.errorText)", seconds: 30) {
      vm.errorText.components(separatedBy: "has taken over").count > count
    }
  }

  @Test func upgradedKilledAndUpgradedAgain() throws {
    let home = try Installation()
    let vm = try start(home)
    let before = home.members
    #expect(before["keeper"] == vm.pid)
    var count = 0
    for round in 1...4 {
      let old = home.members
      try home.installSupervisor(BuiltPrograms.path("martlet-supervisor"))
      var installed = stat()
      #expect(stat(home.directory + "/martlet-supervisor", &installed) == 0)
      let answer = try home.ctl("upgrade-supervisor", "--json")
      #expect(answer.code == 0 && answer.output.contains("\"changed\":true"), "\(answer.output) \(answer.errors) \(vm.errorText)")
      #expect(try home.number("upgrades") == UInt64(round))
      #expect(try home.number("takeovers") == UInt64(round - 1))
      home.waitUntil("as many processes as before: \(home.members)") { home.members.count == before.count }
      let now = home.members
      #expect(now["keeper"] == vm.pid && now["core"] == before["core"])
      for name in ["keeper", "supervisor", "spawner", "guardian"] {
        #expect(try program(now[name]) == UInt64(installed.st_ino), "\(name) is not the installed program")
        if name != "keeper" { #expect(now[name] != old[name], "\(name)") }
      }
      // Whoever has been upgraded is taken over from as before, and serves.
      usleep(600_000)
      try killSupervisor(home, vm)
      kill(try #require(home.members["blk0"]), SIGKILL)
      home.waitUntil("the disk's next process: \(vm.errorText)") {
        vm.errorText.components(separatedBy: "Device blk0 is served again").count > round
      }
      for verb in ["pause", "resume", "devices"] { #expect(try home.ctl(verb).code == 0, "\(verb)") }
      usleep(600_000)
      if round == 1 { count = settled { Installation.descriptorCount(home.members["supervisor"]) } }
      home.waitUntil("as many descriptors as before: \(Installation.descriptorCount(home.members["supervisor"])), not \(count)") {
        Installation.descriptorCount(home.members["supervisor"]) == count
      }
    }
    try home.expectImageIsOwned()
    #expect(try home.ctl("shutdown").code == 0)
    #expect(vm.wait().code == 0, "\(vm.errorText)")
    home.expectNothingLeft()
  }

  @Test func whoeverIsConnectedStaysConnected() throws {
    let home = try Installation()
    try home.expectClientsStay(try start(home))
  }

  /// The program that was examined cannot be executed any more: the path to it is another one by then.
  @Test func anExecutionThatFailsChangesNothing() throws {
    let home = try Installation()
    let vm = try start(home)
    let before = home.members
    let elsewhere = home.directory + "-moved"
    try FileManager.default.moveItem(atPath: home.directory, toPath: elsewhere)
    let answer = try RunningProgram(
      elsewhere + "/martlet", ["ctl", "--control", "ctl", "upgrade-supervisor"], directory: elsewhere
    ).wait()
    try FileManager.default.moveItem(atPath: elsewhere, toPath: home.directory)
    #expect(answer.code == 1, "\(answer.output)")
    #expect(answer.errors.contains("Not upgraded, and nothing has changed: The new program cannot be executed: "), "\(answer.errors)")
    #expect(try home.number("upgrades") == 0)
    #expect(try home.number("takeovers") == 0)
    home.waitUntil("the processes of before: \(home.members)") {
      home.members.filter { $0.key != "supervisor" } == before.filter { $0.key != "supervisor" }
    }
    kill(try #require(before["blk0"]), SIGKILL)
    home.waitUntil("the disk's next process") { vm.errorText.contains("Device blk0 is served again") }
    #expect(try home.ctl("upgrade-supervisor").code == 0)
    #expect(try home.number("upgrades") == 1)
    vm.signal(SIGTERM)
    #expect(vm.wait().code == 143)
    home.expectNothingLeft()
  }

  @Test(arguments: ["up-crash", "up-refuse", "up-half"])
  func aProgramThatCannotTakeOverChangesNothing(_ name: String) throws {
    let home = try Installation()
    let vm = try start(home, ["--name", name])
    let before = home.members
    try home.installSupervisor(BuiltPrograms.path("martlet-fake"))
    let answer = try home.ctl("upgrade-supervisor")
    #expect(answer.code == 1 && answer.errors.contains("Not upgraded, and nothing has changed"), "\(answer.errors)")
    home.waitUntil("the processes of before: \(home.members)") { home.members == before }
    // The program that would take over now is the one from before.
    try killSupervisor(home, vm)
    try home.installSupervisor(BuiltPrograms.path("martlet-supervisor"))
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
      let now = home.members
      if victim != "keeper", victim != "end", let pid = now["supervisor"] { kill(pid, SIGKILL) }
      if victim == "end" { vm.signal(SIGTERM) } else if victim != "supervisor" { vm.signal(SIGKILL) }
      #expect(asker.wait(seconds: 60).signal == nil)
      guard victim == "supervisor" else { break }
      #expect(vm.isRunning, "\(vm.errorText)")
      // A supervisor that has lived so long does not count as one that dies at once.
      usleep(600_000)
      home.waitUntil("the processes of before: \(home.members)") {
        Set(home.members.keys).isSuperset(of: ["keeper", "supervisor", "spawner", "guardian", "core", "blk0"])
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
    home.waitUntil("a spawner") { home.members["spawner"] != nil }
    for round in 1...2 {
      try killSupervisor(home, vm)
      #expect(home.status(try #require(home.members["supervisor"]), "Uid")?.hasPrefix("65534 ") == true)
      #expect(try home.ctl("upgrade-supervisor").code == 0, "\(vm.errorText)")
      let supervisor = try #require(home.members["supervisor"])
      #expect(home.status(supervisor, "Uid")?.hasPrefix("65534 ") == true)
      #expect(home.status(supervisor, "CapPrm") == "0000000000000000" && home.status(supervisor, "Seccomp_filters") == "1")
      kill(try #require(home.members["blk0"]), SIGKILL)
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
    #expect(try home.number("upgrades") == 2)
    vm.signal(SIGKILL)
    #expect(vm.wait().signal == SIGKILL)
    home.waitUntil("the socket's end") { access(home.directory + "/late", F_OK) != 0 }
    home.expectNothingLeft()
  }
}
