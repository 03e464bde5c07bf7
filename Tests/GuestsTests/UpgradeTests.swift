// The supervisor becomes another program under a guest that checks every byte.

import Foundation
import TestSupport
import Testing

@Suite(
  "Upgrade of the supervisor under a running guest", .serialized,
  .enabled(if: WholeVM.canRun, "These tests need /dev/kvm and the built programs."))
struct UpgradeTests {
  @Test("Ten upgrades under verified writes, each followed by the death of the disk's process")
  func underLoad() throws {
    let home = try WholeVM()
    let vm = try home.start([
      "--cmdline", "test=blk op=write depth=16 n=100000000 span=2 until=button", "--disk", "path=disk.img,restart-limit=10000", "--control",
      "ctl",
      "--serial", "file=serial.log",
    ])
    try home.waitUntilRunning()
    let before = home.processes
    let supervisor = try #require(before["supervisor"])
    func descriptors() -> Int { (try? FileManager.default.contentsOfDirectory(atPath: "/proc/\(supervisor)/fd").count) ?? 0 }
    usleep(300_000)
    let count = descriptors()
    var upgrades = 0
    for _ in 0..<10 where vm.isRunning {
      let answer = try home.ctl("upgrade-supervisor")
      #expect(answer.code == 0, "\(answer.output) \(vm.errorText.suffix(500))")
      upgrades += 1
      if let pid = home.processes["blk0"] { kill(pid, SIGKILL) }
      while vm.isRunning, vm.errorText.components(separatedBy: "served again").count <= upgrades { usleep(2000) }
    }
    #expect(upgrades == 10, "the guest's work was over too soon")
    let after = home.processes
    #expect(after["supervisor"] == supervisor && after["core"] == before["core"])
    #expect(after.count == before.count, "\(after)")
    for _ in 0..<200 where descriptors() != count { usleep(10_000) }
    #expect(descriptors() == count)
    #expect(try home.ctl("power-button").code == 0)
    #expect(vm.wait(seconds: 120).code == 0, "\(vm.errorText.suffix(1000))")
    let serial = (try? String(contentsOfFile: home.directory + "/serial.log", encoding: .utf8)) ?? ""
    #expect(serial.contains("MICRO done ok") && !serial.contains("FAIL"), "\(serial.suffix(1000))")
    home.expectNothingLeft()
  }

  @Test("Device processes and supervisor in turn: whoever is replaced by the same program can be handed on")
  func inTurn() throws {
    let home = try WholeVM()
    let vm = try home.start([
      "--cmdline", "test=blk op=write depth=16 n=100000000 span=2 until=button", "--disk", "path=disk.img,restart-limit=10000", "--control",
      "ctl",
      "--serial", "file=serial.log", "--rng", "on",
    ])
    try home.waitUntilRunning()
    var deaths = 0
    for round in 0..<3 where vm.isRunning {
      let before = home.processes
      for verb in ["upgrade-supervisor", "upgrade"] {
        let answer = try home.ctl(verb)
        #expect(answer.code == 0, "\(round) \(verb): \(answer.output) \(vm.errorText.suffix(500))")
      }
      let after = home.processes
      for id in ["blk0", "rng0", "con0"] { #expect(before[id] != nil && after[id] != nil && before[id] != after[id], "\(id)") }
      #expect(before["core"] == after["core"] && before["supervisor"] == after["supervisor"])
      if let pid = home.processes["blk0"] { kill(pid, SIGKILL) }
      deaths += 1
      while vm.isRunning, vm.errorText.components(separatedBy: "served again").count <= deaths { usleep(2000) }
    }
    #expect(deaths == 3, "the guest's work was over too soon")
    #expect(try home.ctl("power-button").code == 0)
    #expect(vm.wait(seconds: 120).code == 0, "\(vm.errorText.suffix(1000))")
    let serial = (try? String(contentsOfFile: home.directory + "/serial.log", encoding: .utf8)) ?? ""
    #expect(serial.contains("MICRO done ok") && !serial.contains("FAIL"), "\(serial.suffix(1000))")
    home.expectNothingLeft()
  }

  @Test("A disk that was plugged in lives on, goes and comes again; recordings are counted on")
  func hotPlug() throws {
    let home = try HotPlugTests.Home("rounds=2", MicroVM.firstDisk + ["--flight-recorder", "."])
    func die(times: Int) throws {
      kill(try #require(home.vm.processes["blk1"]), SIGKILL)
      try home.vm.until { home.program.errorText.components(separatedBy: "Device blk1 is served again").count > times }
    }
    _ = try home.expect("add", "disk", "path=second.img,num_queues=1")
    try home.vm.wait(for: "MICRO hotplug.came ok", times: 2, of: home.program)
    try die(times: 1)
    for _ in 0..<2 { _ = try home.expect("upgrade-supervisor") }
    try die(times: 2)
    for number in 0..<2 { #expect(access(home.vm.path("\(home.vm.name)-blk1-\(number).rec"), F_OK) == 0, "recording \(number)") }
    #expect(try home.ctl("events").output.contains("\"added\""))
    _ = try home.expect("remove", "blk1")
    #expect(try home.expect("add", "rng", "id=luck").contains("luck is in slot"))
    try home.vm.wait(for: "MICRO hotplug.came ok", times: 3, of: home.program)
    #expect(try home.expect("upgrade").hasSuffix("the supervisor: upgraded\n"))
    _ = try home.expect("remove", "luck")
    try home.finish()
  }

  @Test("At a terminal: the size, the escape key and the terminal's settings are looked after as before")
  func atATerminal() throws {
    let vm = try MicroVM()
    for end in ["key", "kill"] {
      try vm.runAtATerminal(
        end, seconds: 30, steps: 200,
        meanwhile: """
          for _ in range(2): subprocess.run([sys.argv[2], "ctl", "--control", "ctl", "upgrade-supervisor"], check=True)
          """)
    }
  }
}
