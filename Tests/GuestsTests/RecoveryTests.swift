// Device processes killed under a running guest that checks every byte.

import Foundation
import TestSupport
import Testing

@Suite(
  "Back ends that die under a running guest", .serialized, .enabled(if: WholeVM.canRun, "These tests need /dev/kvm and the built programs.")
)
struct RecoveryTests {
  /// Kills `victim` again and again while the guest works; returns how often.
  private func killWhileRunning(_ home: WholeVM, _ vm: RunningProgram, _ victim: String, rounds: Int) -> Int {
    var kills = 0
    for _ in 0..<rounds where vm.isRunning {
      if let pid = home.processes[victim], kill(pid, SIGKILL) == 0 { kills += 1 }
      // In service again first: what dies before that is waited for longer and longer, and this guest's patience is 5 s.
      while vm.isRunning, vm.errorText.components(separatedBy: "served again").count <= kills { usleep(2000) }
      usleep(UInt32.random(in: 1000...30000))
    }
    return kills
  }

  private func serial(_ home: WholeVM) -> String {
    (try? String(contentsOfFile: home.directory + "/serial.log", encoding: .utf8)) ?? ""
  }

  private func disks(_ home: WholeVM) throws -> String { try home.ctl("devices").output }

  @Test(
    "A disk's process is killed a hundred times under verified writes; the guest sees no error",
    arguments: [("", ""), (" plain=1", ""), ("", ",registered=on")])
  func disk(_ variant: String, _ keys: String) throws {
    let home = try WholeVM()
    let rounds = MicroGuest.killRounds(100)
    let vm = try home.start([
      "--cmdline", "test=blk op=write depth=16 n=\(4000 * rounds) span=2" + variant, "--disk",
      "path=disk.img,restart-limit=10000" + keys, "--control", "ctl", "--serial", "file=serial.log",
    ])
    try home.waitUntilRunning()
    let kills = killWhileRunning(home, vm, "blk0", rounds: rounds)
    // A machine busy with other things takes a minute and more for a million writes.
    #expect(vm.wait(seconds: 300 + 3 * Double(rounds)).code == 0, "\(vm.errorText.suffix(1000))")
    #expect(serial(home).contains("MICRO done ok"), "\(serial(home).suffix(1000))")
    #expect(!serial(home).contains("FAIL"))
    #expect(kills >= 10, "\(kills) kills")
    home.expectNothingLeft()
  }

  @Test("A console's process is killed again and again: no line is lost, only what is under way comes twice")
  func console() throws {
    let home = try WholeVM()
    let rounds = MicroGuest.killRounds(20)
    let count = 20_000 * rounds
    let vm = try home.start([
      "--cmdline", "test=console lines=\(count)", "--console", "file=console.log,restart-limit=10000", "--control", "ctl", "--serial",
      "file=serial.log",
    ])
    try home.waitUntilRunning()
    let kills = killWhileRunning(home, vm, "con0", rounds: rounds)
    #expect(vm.wait(seconds: 300 + 3 * Double(rounds)).code == 0, "\(vm.errorText.suffix(1000))")
    #expect(serial(home).contains("MICRO done ok") && !serial(home).contains("FAIL"), "\(serial(home).suffix(1000))")
    var next = 0
    var repeated = 0
    let text = String(decoding: try Data(contentsOf: URL(fileURLWithPath: home.directory + "/console.log")), as: UTF8.self)
    for line in text.split(whereSeparator: \.isNewline) where line.hasPrefix("LINE ") {
      let number = Int(line.dropFirst(5))
      if number == next { next += 1 } else if number == next - 1 { repeated += 1 } else { break }
    }
    #expect(next == count, "line \(next) is missing after \(kills) kills")
    #expect(repeated <= kills && kills >= min(3, rounds), "\(repeated) lines twice, \(kills) kills")
    home.expectNothingLeft()
  }

  @Test("The entropy device fills buffers, and goes on when its process is killed")
  func entropy() throws {
    let home = try WholeVM()
    let vm = try home.start(["--cmdline", "test=rng n=400000", "--rng", "on", "--control", "ctl", "--serial", "file=serial.log"])
    try home.waitUntilRunning()
    #expect(try home.ctl("devices").output.contains("martlet-template"))
    for round in 0..<2 {
      let pid = try #require(home.processes["rng0"])
      kill(pid, SIGKILL)
      waitWhile { vm.isRunning && vm.errorText.components(separatedBy: "served again").count <= round + 1 }
    }
    #expect(vm.wait(seconds: 60).code == 0, "\(vm.errorText.suffix(1000))")
    #expect(serial(home).contains("MICRO done ok"), "\(serial(home).suffix(1000))")
    #expect(serial(home).contains("rng.filled"))
    #expect(vm.errorText.components(separatedBy: "served again").count == 3, "\(vm.errorText)")
    home.expectNothingLeft()
  }

  @Test("A process that dies too often is given up, and the VM lives")
  func crashLoop() throws {
    let home = try WholeVM()
    let vm = try home.start([
      "--cmdline", "test=boot end=hang", "--disk", "path=disk.img,restart-limit=3", "--control", "ctl", "--serial", "file=serial.log",
    ])
    try home.waitUntilRunning()
    for _ in 0..<400 {
      if let pid = home.processes["blk0"] { kill(pid, SIGKILL) }
      if vm.errorText.contains("too often") { break }
      usleep(10_000)
    }
    #expect(vm.errorText.contains("too often"), "\(vm.errorText)")
    #expect(vm.isRunning)
    #expect(try home.ctl("info").output.contains("\"state\":\"running\""))
    #expect(try disks(home).contains("\"state\":\"lost\""))
    vm.signal(SIGTERM)
    #expect(vm.wait().code == 143)
    home.expectNothingLeft()
  }

  @Test("Policies: held, failed, and the end of the VM", arguments: ["hold", "fail", "stop-vm"])
  func policies(_ policy: String) throws {
    let home = try WholeVM()
    let vm = try home.start([
      "--cmdline", "test=boot end=hang", "--disk", "path=disk.img,on-death=" + policy, "--control", "ctl", "--serial", "file=serial.log",
    ])
    try home.waitUntilRunning()
    kill(try #require(home.processes["blk0"]), SIGKILL)
    if policy == "stop-vm" {
      #expect(vm.wait().code == 5)
    } else {
      usleep(300_000)
      #expect(vm.isRunning)
      #expect(home.processes["blk0"] == nil)
      #expect(try disks(home).contains(policy == "hold" ? "waiting-for-back-end" : "\"lost\""))
      vm.signal(SIGTERM)
      #expect(vm.wait().code == 143)
    }
    home.expectNothingLeft()
  }
}
