// The supervisor is killed under a guest that checks every byte, and another takes the VM over.

import Foundation
import TestSupport
import Testing

@Suite(
  "The supervisor is killed, and the VM goes on", .serialized,
  .enabled(if: WholeVM.canRun, "These tests need /dev/kvm and the built programs."))
struct TakeoverTests {
  private static let options = [
    "--disk", "path=disk.img,restart-limit=10000", "--control", "ctl", "--serial", "file=serial.log", "--on-supervisor-death", "continue",
  ]

  /// A VM that writes until it has written enough, or is ended, and what the tests do with it.
  private final class Home {
    let whole: WholeVM
    let vm: RunningProgram
    private(set) var kills = 0

    init(_ guest: String = "test=blk op=write depth=16 n=100000000 span=2", _ options: [String] = TakeoverTests.options) throws {
      whole = try WholeVM()
      vm = try whole.start(["--cmdline", guest] + options)
      try whole.waitUntilRunning()
      // The guest runs before the supervisor has its walls up; a state is kept from then on.
      waitWhile { vm.isRunning && whole.processes["spawner"] == nil }
      _ = try whole.ctl("devices")
    }

    func number(_ key: String) throws -> Int {
      let answer = try JSONSerialization.jsonObject(with: Data(try whole.ctl("info").output.utf8)) as? [String: Any]
      return answer?[key] as? Int ?? -1
    }

    /// Kills the supervisor; returns when another one has taken over.
    /// - Parameter mayEnd: it may be ending for an upgrade just then, which is no death; that is asked the next one.
    func killSupervisor(mayEnd: Bool = false) throws {
      var old: Int32?
      repeat {
        waitWhile {
          old = whole.processes["supervisor"]
          return vm.isRunning && old == nil
        }
        kill(try #require(old, "\(vm.errorText.suffix(1000))"), SIGKILL)
        guard mayEnd else { break }
        waitWhile { vm.isRunning && [old, nil].contains(whole.processes["supervisor"]) }
      } while try vm.isRunning && number("takeovers") == kills
      kills += 1
      waitWhile { vm.isRunning && vm.errorText.components(separatedBy: "has taken over").count <= kills }
    }

    /// A supervisor that has lived so long does not count as one that dies at once.
    func rest() { usleep(600_000) }

    /// All devices are served, by processes that are known.
    func isServed() throws -> Bool {
      guard let answer = try JSONSerialization.jsonObject(with: Data(try whole.ctl("devices").output.utf8)) as? [String: Any],
        let devices = answer["devices"] as? [[String: Any]]
      else { return false }
      return devices.allSatisfy { device in
        ["active", "connected"].contains(device["state"] as? String) && device["process"] as? String == "running"
          && whole.processes[device["id"] as? String ?? ""] == (device["pid"] as? Int).map(Int32.init)
      }
    }

    func descriptors(_ name: String) -> Int {
      whole.processes[name].flatMap { try? FileManager.default.contentsOfDirectory(atPath: "/proc/\($0)/fd").count } ?? -1
    }

    func memory() -> Int {
      guard let pid = whole.processes["supervisor"], let status = FileManager.default.contents(atPath: "/proc/\(pid)/status") else {
        return -1
      }
      let line = String(decoding: status, as: UTF8.self).split(separator: "\n").first { $0.hasPrefix("VmRSS:") }
      return line.flatMap { Int($0.split(separator: " ")[1]) } ?? -1
    }

    func shutDown(_ location: SourceLocation = #_sourceLocation) throws {
      #expect(try whole.ctl("shutdown").code == 0, sourceLocation: location)
      let end = vm.wait(seconds: 120)
      #expect(end.code == 0, "\(end.errors.suffix(2000))", sourceLocation: location)
      whole.expectNothingLeft(location)
    }
  }

  @Test("A dozen kills under verified writes, some at once after the other, disks dying in between")
  func underLoad() throws {
    let home = try Home("test=blk op=write depth=16 n=100000000 span=2 until=button")
    let before = home.whole.processes
    #expect(before["keeper"] == home.vm.pid)
    usleep(300_000)
    let count = home.descriptors("supervisor")
    let rounds = MicroGuest.killRounds(4)
    for round in 0..<rounds where home.vm.isRunning {
      for _ in 0..<3 where home.vm.isRunning { try home.killSupervisor() }
      home.rest()
      guard let disk = home.whole.processes["blk0"] else { break }
      kill(disk, SIGKILL)
      waitWhile { home.vm.isRunning && home.vm.errorText.components(separatedBy: "served again").count <= round + 1 }
    }
    #expect(home.kills == 3 * rounds, "the guest's work was over too soon")
    // "Served again" is said by the core; the successor's title may show a moment later.
    waitWhile { home.vm.isRunning && home.whole.processes.count != before.count }
    let after = home.whole.processes
    for name in ["keeper", "core", "guardian", "spawner", "con0", "serial"] {
      #expect(before[name] != nil && before[name] == after[name], "\(name)")
    }
    #expect(after.count == before.count, "\(after)")
    waitWhile { home.vm.isRunning && home.descriptors("supervisor") != count }
    #expect(home.descriptors("supervisor") == count)
    #expect(try home.whole.ctl("power-button").code == 0)
    #expect(home.vm.wait(seconds: 120).code == 0, "\(home.vm.errorText.suffix(1000))")
    let serial = (try? String(contentsOfFile: home.whole.directory + "/serial.log", encoding: .utf8)) ?? ""
    #expect(serial.contains("MICRO done ok") && !serial.contains("FAIL"), "\(serial.suffix(1000))")
    home.whole.expectNothingLeft()
  }

  @Test("Killed at any moment of an order, a restart or a replacement: nothing half is left, and everything goes on working")
  func inTheMiddle() throws {
    let home = try Home()
    let follower = try RunningProgram(
      BuiltPrograms.path("martlet"), ["ctl", "--control", "ctl", "--json", "events", "--follow"], directory: home.whole.directory)
    defer { follower.signal(SIGKILL) }
    waitWhile { home.vm.isRunning && !follower.outputText.contains("connected") }
    let orders = [
      "replace blk0", "add rng id=luck", "replace blk0 --path disk.img", "kill", "remove luck --force", "devices", "upgrade-supervisor",
    ]
    let rounds = MicroGuest.killRounds(14)
    for round in 0..<rounds where home.vm.isRunning {
      let order = orders[round % orders.count]
      var client: RunningProgram?
      if order == "kill" {
        if let pid = home.whole.processes["blk0"] { kill(pid, SIGKILL) }
      } else {
        client = try RunningProgram(
          BuiltPrograms.path("martlet"), ["ctl", "--control", "ctl"] + order.split(separator: " ").map(String.init),
          directory: home.whole.directory)
      }
      usleep(UInt32.random(in: 0..<15_000))
      try home.killSupervisor(mayEnd: order == "upgrade-supervisor")
      // Whether it was done or not: it is told something.
      if let client { #expect(client.wait(seconds: 100).signal == nil, "\(order): no answer") }
      waitWhile { home.vm.isRunning && (try? home.isServed()) != true }
      #expect(try home.isServed(), "\(order): \(home.vm.errorText.suffix(1500))")
      home.rest()
    }
    #expect(home.kills == rounds, "\(home.vm.errorText.suffix(1500))")
    let count = home.descriptors("supervisor")
    let memory = home.memory()
    _ = try home.whole.ctl("remove luck --force")
    for order in ["add rng id=luck", "replace blk0", "remove luck --force", "pause", "resume"] {
      let answer = try home.whole.ctl(order)
      #expect(answer.code == 0, "\(order): \(answer.output) \(answer.errors)")
    }
    try home.killSupervisor()
    home.rest()
    #expect(home.descriptors("supervisor") <= count + 2 && home.memory() < memory + 1024)
    #expect(try home.number("takeovers") == home.kills)
    waitWhile { home.vm.isRunning && follower.outputText.components(separatedBy: "\"taken-over\"").count <= home.kills }
    #expect(follower.isRunning, "who follows events goes on following")
    try home.shutDown()
  }

  @Test("Upgraded under verified writes, killed, upgraded again, the disk's process dying in between")
  func upgraded() throws {
    let home = try Home("test=blk op=write depth=16 n=100000000 span=2 until=button")
    let before = home.whole.processes
    usleep(300_000)
    let count = home.descriptors("supervisor")
    for round in 0..<4 where home.vm.isRunning {
      let old = home.whole.processes
      let answer = try home.whole.ctl(round == 2 ? "upgrade" : "upgrade-supervisor")
      #expect(answer.code == 0, "\(answer.output) \(answer.errors) \(home.vm.errorText.suffix(500))")
      #expect(try home.number("upgrades") == round + 1)
      let new = home.whole.processes
      for name in ["supervisor", "spawner"] { #expect(old[name] != nil && new[name] != nil && old[name] != new[name], "\(name)") }
      for name in ["keeper", "core"] { #expect(before[name] != nil && before[name] == new[name], "\(name)") }
      home.rest()
      if round != 1 { try home.killSupervisor() }
      guard let disk = home.whole.processes["blk0"] else { break }
      kill(disk, SIGKILL)
      waitWhile { home.vm.isRunning && home.vm.errorText.components(separatedBy: "served again").count <= round + 1 }
      home.rest()
    }
    #expect(try home.number("upgrades") == 4 && home.number("takeovers") == 3, "\(home.vm.errorText.suffix(1000))")
    // The place of the process that was replaced last is free and keeps its pidfd until another one comes.
    waitWhile { home.vm.isRunning && (home.whole.processes.count != before.count || home.descriptors("supervisor") > count + 1) }
    #expect(home.whole.processes.count == before.count, "\(home.whole.processes)")
    #expect(home.descriptors("supervisor") <= count + 1)
    #expect(try home.whole.ctl("power-button").code == 0)
    #expect(home.vm.wait(seconds: 120).code == 0, "\(home.vm.errorText.suffix(1000))")
    let serial = (try? String(contentsOfFile: home.whole.directory + "/serial.log", encoding: .utf8)) ?? ""
    #expect(serial.contains("MICRO done ok") && !serial.contains("FAIL"), "\(serial.suffix(1000))")
    home.whole.expectNothingLeft()
  }

  @Test(
    "A disk of a jailed program: it is known, watched and started again by every supervisor",
    .enabled(if: access("/usr/bin/qemu-storage-daemon", X_OK) == 0, "Needs qemu-storage-daemon."))
  func jailed() throws {
    let home = try Home(
      "test=blk op=write depth=1 wait=halt n=100000000 span=2 until=button",
      [
        "--disk",
        "vhost_user=on,path=disk.img,restart-limit=10000,jail=\(MicroJailTests.profile),program=\"qemu-storage-daemon --blockdev "
          + "driver=file,node-name=f,filename={path} --export type=vhost-user-blk,id=e,node-name=f,writable=on,addr.type=fd,addr.str={listen}\"",
        "--control", "ctl", "--serial", "file=serial.log", "--on-supervisor-death", "continue",
      ])
    func daemon() throws -> Int32? {
      let answer = try JSONSerialization.jsonObject(with: Data(try home.whole.ctl("devices").output.utf8)) as? [String: Any]
      let disk = (answer?["devices"] as? [[String: Any]])?.first { $0["id"] as? String == "blk0" }
      guard disk?["process"] as? String == "running", disk?["state"] as? String == "active" else { return nil }
      return (disk?["pid"] as? Int).map(Int32.init)
    }
    // Its checks over: what the daemon does again after a kill, it does with whatever the guest has put into those descriptors meanwhile.
    // One request at a time: it keeps no record of those in flight, so of several that ended out of order the wrong ones would be done again.
    waitWhile {
      home.vm.isRunning
        && (try? String(contentsOfFile: home.whole.directory + "/serial.log", encoding: .utf8))?.contains("MICRO blk.verify") != true
    }
    let before = home.whole.processes.count
    for round in 0..<3 where home.vm.isRunning {
      try home.killSupervisor()
      waitWhile { home.vm.isRunning && (try? daemon()) ?? nil == nil }
      let old = try #require(try daemon(), "\(home.vm.errorText.suffix(1000))")
      kill(old, SIGKILL)
      waitWhile { home.vm.isRunning && [old, nil].contains((try? daemon()) ?? nil) }
      #expect(try daemon() != nil, "\(home.vm.errorText.suffix(1000))")
      home.rest()
      if round == 1 { #expect(try home.whole.ctl("upgrade").code == 0, "\(home.vm.errorText.suffix(1000))") }
      home.rest()
    }
    #expect(try home.number("takeovers") == 3 && home.number("upgrades") == 1)
    waitWhile { home.vm.isRunning && home.whole.processes.count != before }
    #expect(home.whole.processes.count == before, "\(home.whole.processes)")
    #expect(try home.whole.ctl("power-button").code == 0)
    #expect(home.vm.wait(seconds: 120).code == 0, "\(home.vm.errorText.suffix(1000))")
    let serial = (try? String(contentsOfFile: home.whole.directory + "/serial.log", encoding: .utf8)) ?? ""
    #expect(serial.contains("MICRO done ok") && !serial.contains("FAIL"), "\(serial.suffix(1000))")
    home.whole.expectNothingLeft()
  }

  @Test("One that is killed again and again is given up, and everything ends")
  func crashLoop() throws {
    let home = try Home()
    waitWhile {
      if let pid = home.whole.processes["supervisor"] { kill(pid, SIGKILL) }
      return home.vm.isRunning
    }
    let end = home.vm.wait()
    #expect(end.code == 128 + SIGKILL && end.errors.contains("too often; the VM has ended"), "\(end.code) \(end.errors.suffix(500))")
    home.whole.expectNothingLeft()
  }

  @Test("The keeper is killed, alone or with the supervisor, and a crash is like a kill")
  func keeper() throws {
    for victims in [["keeper"], ["keeper", "supervisor"], ["supervisor", "keeper"]] {
      let home = try Home()
      // SIGSEGV, as a crash is seen from outside.
      kill(try #require(home.whole.processes["supervisor"]), SIGSEGV)
      waitWhile { home.vm.isRunning && !home.vm.errorText.contains("has taken over") }
      #expect(home.vm.isRunning, "\(home.vm.errorText)")
      let pids = try victims.map { try #require(home.whole.processes[$0]) }
      for pid in pids { kill(pid, SIGKILL) }
      #expect(home.vm.wait().signal == SIGKILL)
      home.whole.expectNothingLeft()
    }
  }

  @Test("A signal to the process that was started ends the VM as ever, also after a takeover", arguments: [SIGTERM, SIGINT, SIGHUP])
  func signals(_ number: Int32) throws {
    let home = try Home()
    try home.killSupervisor()
    home.vm.signal(number)
    let end = home.vm.wait()
    #expect(end.code == 128 + number, "\(end.errors.suffix(500))")
    home.whole.expectNothingLeft()
  }

  @Test("At a terminal: the size, the escape key and the terminal's settings are looked after as before", arguments: ["key", "kill"])
  func atATerminal(_ end: String) throws {
    try MicroVM().runAtATerminal(
      end, ["--on-supervisor-death", "continue"], seconds: 60, steps: 2000,
      meanwhile: """
        def supervisor():
            while True:
                told = subprocess.run([sys.argv[2], "ctl", "--control", "ctl", "--json", "info"], capture_output=True, text=True).stdout
                found = re.search('"supervisor":([0-9]+)', told)
                if found and '"state":"running"' in told: return int(found[1])
                time.sleep(0.01)
        known = supervisor()
        for _ in range(2):
            os.kill(known, signal.SIGKILL)
            while supervisor() == known: time.sleep(0.01)
            known = supervisor()
        """)
  }

  @Test("Without walls there is nobody to take over")
  func bounds() throws {
    let whole = try WholeVM()
    for (words, said) in [
      (["--on-supervisor-death", "perhaps"], "end or continue"),
      (["--on-supervisor-death", "continue", "--sandbox", "off"], "--sandbox off"),
    ] {
      let result = try whole.start(words).wait()
      #expect(result.code == 2 && result.errors.contains(said), "\(result.errors)")
    }
  }
}
