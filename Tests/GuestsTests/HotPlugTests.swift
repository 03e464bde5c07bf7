// Devices that come and go under a running guest, which drives the registers of PCI hot plug by itself.

import Foundation
import TestSupport
import Testing

@Suite("Devices added and removed while the guest runs", .serialized, .enabled(if: MicroVM.canRun, MicroVM.cannotRun))
struct HotPlugTests {
  /// A VM whose guest waits for devices.
  final class Home {
    let vm: MicroVM
    let program: RunningProgram

    init(_ guest: String = "rounds=1", _ options: [String] = []) throws {
      vm = try MicroVM()
      for name in ["first.img", "second.img", "third.img"] {
        guard FileManager.default.createFile(atPath: vm.path(name), contents: nil), truncate(vm.path(name), 1 << 20) == 0 else {
          throw TestFailure("\(name) cannot be made")
        }
      }
      program = try vm.start("test=hotplug end=hang busy=1 " + guest, options + ["--console", "off"])
      try vm.wait(for: "hotplug.waits", of: program)
      // The guest may run before the supervisor has its walls up.
      let hasSpawner = !options.contains("off")
      try vm.until { try self.ctl("info").output.contains("\"state\":\"running\"") && (!hasSpawner || self.vm.processes["spawner"] != nil) }
    }

    func ctl(_ words: String...) throws -> ProgramResult {
      try RunningProgram(BuiltPrograms.path("martlet"), ["ctl", "--control", "ctl", "--json"] + words, directory: vm.directory)
        .wait(seconds: 60)
    }

    func expect(_ words: String..., location: SourceLocation = #_sourceLocation) throws -> String {
      let result = try RunningProgram(BuiltPrograms.path("martlet"), ["ctl", "--control", "ctl"] + words, directory: vm.directory)
        .wait(seconds: 60)
      #expect(result.code == 0, "\(words): \(result.errors) \(program.errorText.suffix(1000))", sourceLocation: location)
      return result.output
    }

    /// Descriptors of a process of the VM.
    func descriptors(_ name: String) -> Int {
      guard let pid = vm.processes[name] else { return -1 }
      return (try? FileManager.default.contentsOfDirectory(atPath: "/proc/\(pid)/fd").count) ?? -1
    }

    /// Descriptors of the long-lived processes, once clients that have gone are noticed to have.
    func counts(like expected: [Int]? = nil) -> [Int] {
      var counts: [Int] = []
      for _ in 0..<400 {
        counts = ["core", "supervisor", "spawner"].map(descriptors)
        if let expected, counts == expected { break }
        usleep(5000)
        if expected == nil, ["core", "supervisor", "spawner"].map(descriptors) == counts { break }
      }
      return counts
    }

    /// The guest has done its rounds.
    func finish(_ location: SourceLocation = #_sourceLocation) throws {
      try vm.wait(for: "MICRO done", of: program)
      #expect(!program.outputText.contains("FAIL"), "\(program.outputText.suffix(2000))", sourceLocation: location)
      stop(location)
    }

    func stop(_ location: SourceLocation = #_sourceLocation) {
      program.signal(SIGTERM)
      #expect(program.wait(seconds: 30).code == 143, sourceLocation: location)
      vm.expectNothingLeft(location)
    }
  }

  @Test("A disk and an entropy device come, work by interrupts, are let go of and leave nothing", arguments: ["on", "off"])
  func comeAndGo(_ sandbox: String) throws {
    let home = try Home("rounds=2", MicroVM.firstDisk + (sandbox == "off" ? ["--sandbox", "off"] : []))
    #expect(try home.expect("add", "disk", "path=second.img,num_queues=1") == "blk1 is in slot 2\n")
    #expect(try home.expect("add", "rng", "id=luck") == "luck is in slot 3\n")
    try home.vm.wait(for: "MICRO hotplug.came ok", times: 3, of: home.program)
    let devices = try home.ctl("devices").output
    #expect(devices.contains("\"blk1\"") && devices.contains("\"luck\"") && devices.contains("\"slot\":3"), "\(devices)")
    #expect(home.vm.processes["blk1"] != nil && home.vm.processes["luck"] != nil)
    #expect(try home.expect("remove", "blk1") == "blk1 is removed\n")
    #expect(home.vm.processes["blk1"] == nil)
    #expect(try !home.ctl("devices").output.contains("\"blk1\""))
    // Its image can be locked at once.
    let image = try FileHandle(forUpdating: URL(fileURLWithPath: home.vm.path("second.img")))
    #expect(lockf(image.fileDescriptor, F_TLOCK, 0) == 0)
    try image.close()
    #expect(try home.ctl("events").output.contains("\"added\""))
    #expect(try home.expect("remove", "luck") == "luck is removed\n")
    try home.finish()
  }

  @Test("Many rounds: descriptors and processes are what they were after the first")
  func leaks() throws {
    let rounds = MicroGuest.isFull ? 200 : 40
    let home = try Home("rounds=\(rounds)")
    var counts: [[Int]] = []
    for round in 0..<rounds {
      #expect(try home.expect("add", round % 2 == 0 ? "disk" : "rng", round % 2 == 0 ? "path=second.img" : "on").hasSuffix("slot 1\n"))
      try home.vm.wait(for: "MICRO hotplug.came ok", times: round + 1, of: home.program)
      _ = try home.expect("remove", round % 2 == 0 ? "blk0" : "rng0")
      if round == 3 || round == rounds - 1 { counts.append(home.counts(like: counts.first)) }
    }
    #expect(counts.count == 2 && counts[0] == counts[1], "\(counts)")
    try home.finish()
  }

  @Test("A guest that never answers keeps its device, and is told; by force the device goes")
  func never() throws {
    let home = try Home("seconds=600 answer=never")
    _ = try home.expect("add", "disk", "path=second.img")
    try home.vm.wait(for: "MICRO hotplug.came ok", of: home.program)
    let refusal = try home.ctl("remove", "blk0", "--timeout", "300")
    #expect(refusal.code == 1 && refusal.output.contains("has not let go of 'blk0' within 300 ms; it stays"), "\(refusal.output)")
    try home.vm.wait(for: "hotplug.asked ok", of: home.program)
    #expect(home.vm.processes["blk0"] != nil)
    #expect(try home.ctl("devices").output.contains("\"active\""))
    // A second device meanwhile; then the first goes by force, and its slot stays empty until the guest has let go.
    _ = try home.expect("add", "rng", "on")
    #expect(try home.expect("remove", "blk0", "--force") == "blk0 is removed\n")
    #expect(home.vm.processes["blk0"] == nil)
    try home.vm.wait(for: "was gone", of: home.program)
    #expect(!home.program.outputText.contains("hotplug.reset FAIL"), "\(home.program.outputText.suffix(500))")
    #expect(try home.expect("add", "disk", "path=second.img").contains("blk0 is in slot 1"))
    home.stop()
  }

  @Test("A device whose back end has died is removed, and the same one added again", arguments: ["hold", "fail", "restart"])
  func dead(_ policy: String) throws {
    let home = try Home("rounds=2 answer=rude")
    for round in 1...2 {
      _ = try home.expect("add", "disk", "path=second.img,id=d,on-death=\(policy),restart-limit=0")
      try home.vm.wait(for: "MICRO hotplug.came ok", times: round, of: home.program)
      kill(try #require(home.vm.processes["d"]), SIGKILL)
      try home.vm.until { try !home.ctl("devices").output.contains("\"active\"") }
      _ = try home.expect("remove", "d")
    }
    try home.finish()
  }

  @Test("A device that is held is served once more when it is to go, so that its guest can let go of it")
  func held() throws {
    let home = try Home("seconds=600 answer=never")
    _ = try home.expect("add", "disk", "path=second.img,id=d,on-death=hold")
    try home.vm.wait(for: "MICRO hotplug.came ok", of: home.program)
    kill(try #require(home.vm.processes["d"]), SIGKILL)
    try home.vm.until { try home.ctl("devices").output.contains("waiting-for-back-end") }
    #expect(home.vm.processes["d"] == nil)
    _ = try home.ctl("remove", "d", "--timeout", "300")
    try home.vm.until { try home.ctl("devices").output.contains("\"active\"") }
    #expect(home.vm.processes["d"] != nil)
    _ = try home.expect("remove", "d", "--force")
    #expect(home.vm.processes["d"] == nil)
    home.stop()
  }

  @Test("A guest that lets go by itself loses the device; one that lets go of a running one, too", arguments: ["alone=1", "answer=rude"])
  func unasked(_ guest: String) throws {
    let home = try Home("rounds=1 \(guest)")
    _ = try home.expect("add", "disk", "path=second.img")
    if guest != "alone=1" { _ = try home.expect("remove", "blk0") }
    try home.vm.wait(for: "hotplug.went ok", of: home.program)
    try home.vm.until { home.vm.processes["blk0"] == nil }
    try home.vm.until { try !home.ctl("devices").output.contains("blk0") }
    #expect(try !home.ctl("devices").output.contains("blk0"))
    home.stop()
  }

  @Test("A reset keeps what was added, and is an answer to a removal that is still asked for")
  func resets() throws {
    let home = try Home("seconds=600 answer=never")
    _ = try home.expect("add", "disk", "path=second.img")
    _ = try home.expect("add", "rng", "on")
    try home.vm.wait(for: "MICRO hotplug.came ok", times: 2, of: home.program)
    _ = try home.ctl("remove", "blk0", "--timeout", "100")
    _ = try home.expect("reboot")
    // The guest finds the one that stays by itself.
    try home.vm.wait(for: "hotplug.waits", times: 2, of: home.program)
    try home.vm.wait(for: "MICRO hotplug.came ok", times: 3, of: home.program)
    try home.vm.until { home.vm.processes["blk0"] == nil }
    let devices = try home.ctl("devices").output
    #expect(!devices.contains("\"blk0\"") && devices.contains("\"rng0\""), "\(devices)")
    home.stop()
  }

  @Test("While the VM is paused a device can come, and goes only by force")
  func paused() throws {
    let home = try Home("seconds=600")
    _ = try home.expect("pause")
    _ = try home.expect("add", "disk", "path=second.img")
    let refusal = try home.ctl("remove", "blk0")
    #expect(refusal.code == 1 && refusal.output.contains("paused"), "\(refusal.output)")
    _ = try home.expect("remove", "blk0", "--force")
    _ = try home.expect("add", "rng", "on")
    _ = try home.expect("resume")
    try home.vm.wait(for: "MICRO hotplug.came ok", of: home.program)
    home.stop()
  }

  @Test("The bus is full with 31 devices: the next is refused, and there is room again after a removal")
  func full() throws {
    let home = try Home("rounds=1 seconds=600")
    for number in 1...31 {
      #expect(
        try home.expect("add", "disk", "path=second.img,readonly=on,num_queues=1").contains("in slot \(number)\n"), "device \(number)")
    }
    let refusal = try home.ctl("add", "rng", "on")
    #expect(refusal.code == 1 && refusal.output.contains("more than the 31"), "\(refusal.output)")
    _ = try home.expect("remove", "blk7")
    #expect(try home.expect("add", "rng", "on").contains("in slot 8"))
    home.stop()
  }

  @Test("What cannot be added or removed is refused with the reason, and nothing of it is left")
  func badInput() throws {
    let home = try Home("seconds=600", MicroVM.firstDisk)
    let before = (try home.ctl("devices").output, home.vm.processes, home.counts())
    let directory = home.vm.directory
    try "text".write(toFile: directory + "/file", atomically: true, encoding: .utf8)
    let cases: [([String], String)] = [
      (["add", "dsik", "path=second.img"], "did you mean 'disk'"), (["add", "memory", "size=1G"], "Unknown kind of device 'memory'"),
      (["add", "disk", "path=missing.img"], "does not exist"),
      (["add", "disk", "path=second.img,id=blk0"], "Two devices have the id 'blk0'"),
      (["add", "disk", "path=second.img,id=core"], "the core process"), (["add", "disk", "path=\(directory)/first.img"], "in use"),
      (["add", "disk", "path=."], "not a"), (["add", "disk", "pth=x"], "did you mean 'path'"), (["add", "disk", "path=a,path=b"], "twice"),
      (["add", "disk", "path=second.img,num_queues=0"], "num_queues"), (["add", "disk", "path=second.img,queue_size=3"], "power of two"),
      (["add", "disk", "vhost_user=on,socket=none.sock"], "none.sock': it does not exist"),
      (["add", "fs", "tag=t,socket=file"], "file'"), (["add", "fs", "socket=x"], "lacks 'tag='"),
      (["add", "net", "tap=nosuchtap0"], "nosuchtap0"), (["add", "net", "tap=lo"], "lo"), (["add", "net", "mac=1"], "lacks 'tap='"),
      (["add", "rng", "src=file"], "character device"), (["add", "console", "tty"], "does not understand 'tty'"),
      (["add", "console", "null,pty"], "one of pty"), (["add", "console", "socket=/nowhere/s"], "/nowhere/s"),
      (["add", "generic", "socket=none.sock,device_type=rngg,queue_sizes=[64]"], "did you mean"),
      (["add", "generic", "program=\"true {fd}\",jail=none.jail,device_type=rng,queue_sizes=[64]"], "none.jail"),
      (["add", "disk", "path=second.img,cpu-limit=10%"], "cannot be kept"), (["add", "disk", "path=second.img,cpu-limit=0%"], "from 1%"),
      (["add", "fs", "tag=t,socket=none.sock,pids-limit=9"], "not ours to limit"), (["add", "fs", "tag=t"], "lacks 'socket='"),
      (["add", "fs", "tag=t,program=\"true {fd}\",jail=none.jail"], "none.jail"),
      (["remove", "blk9"], "There is no device 'blk9'"), (["remove", "serial"], "There is no device 'serial'"),
      (["remove", "core"], "There is no device 'core'"),
    ]
    for (words, reason) in cases {
      let result = try RunningProgram(BuiltPrograms.path("martlet"), ["ctl", "--control", "ctl"] + words, directory: directory).wait()
      #expect(result.code != 0 && result.errorLines.count == 1, "\(words): \(result.output)\(result.errors)")
      #expect(result.errors.contains(reason), "\(words): \(result.errors)")
    }
    // The back end is of another type.
    let socket = home.vm.path("rng.sock")
    home.vm.foreignSockets = ["rng.sock"]
    let device = try RunningProgram(BuiltPrograms.path("martlet-template"), ["--socket-path=\(socket)"])
    try home.vm.until { access(socket, F_OK) == 0 }
    let wrong = try home.ctl("add", "disk", "vhost_user=on,socket=rng.sock,num_queues=4")
    #expect(wrong.code == 1 && wrong.output.contains("blk1"), "\(wrong.output)")
    device.signal(SIGTERM)
    _ = device.wait()
    let after = (try home.ctl("devices").output, home.vm.processes, home.counts(like: before.2))
    #expect(before.1 == after.1 && before.2 == after.2, "\(before) \(after)")
    #expect(after.0.components(separatedBy: "\"id\"").count == before.0.components(separatedBy: "\"id\"").count, "\(after.0)")
    #expect(try home.expect("add", "disk", "path=second.img") == "blk1 is in slot 2\n")
    home.stop()
  }

  @Test("An external back end is added, dies, is removed, and added again; and one that comes back is served again")
  func external() throws {
    let home = try Home("seconds=600 rounds=3 answer=rude")
    let socket = home.vm.path("rng.sock")
    home.vm.foreignSockets = ["rng.sock"]
    func start() throws -> RunningProgram {
      unlink(socket)
      let device = try RunningProgram(BuiltPrograms.path("martlet-template"), ["--socket-path=\(socket)"])
      try home.vm.until { access(socket, F_OK) == 0 }
      return device
    }
    for round in 1...3 {
      var device = try start()
      _ = try home.expect("add", "generic", "socket=rng.sock,device_type=rng,queue_sizes=[64],id=r")
      try home.vm.wait(for: "MICRO hotplug.came ok", times: round, of: home.program)
      device.signal(SIGKILL)
      _ = device.wait()
      try home.vm.until { try home.ctl("devices").output.contains("waiting-for-back-end") }
      if round == 2 {
        device = try start()
        try home.vm.until { try !home.ctl("devices").output.contains("waiting-for-back-end") }
        #expect(try home.ctl("devices").output.contains("\"active\""))
      }
      _ = try home.expect("remove", "r")
      device.signal(SIGKILL)
      _ = device.wait()
    }
    unlink(socket)
    try home.finish()
  }

  @Test("Consoles come with a file, a socket and a pseudo-terminal; the socket goes with its console, or with the VM")
  func consoles() throws {
    let home = try Home("seconds=600 rounds=9")
    #expect(try home.expect("add", "console", "file=out.txt").contains("con1 is in slot"))
    #expect(try home.expect("add", "console", "pty,id=pt").contains("/dev/pts/"))
    _ = try home.expect("add", "console", "socket=c.sock,id=s1")
    _ = try home.expect("add", "console", "socket=d.sock,id=s2")
    #expect(access(home.vm.path("c.sock"), F_OK) == 0)
    _ = try home.expect("remove", "s1", "--force")
    #expect(access(home.vm.path("c.sock"), F_OK) != 0 && access(home.vm.path("d.sock"), F_OK) == 0)
    home.stop()
  }

  @Test("Deaths, resets and pauses at any moment of coming and going leave a VM that is in order")
  func storm() throws {
    let home = try Home("seconds=600 rounds=1000000 answer=rude")
    var state = UInt64.random(in: 0 ... .max)
    func random(_ bound: UInt64) -> UInt64 {
      state = state &* 6_364_136_223_846_793_005 &+ 1_442_695_040_888_963_407
      return (state >> 33) % bound
    }
    let seed = state
    let rounds = MicroGuest.killRounds(MicroGuest.isFull ? 200 : 25)
    for round in 0..<rounds where home.program.isRunning {
      let id = "x\(random(2))"
      let words =
        random(2) == 0
        ? ["add", "disk", "path=\(id == "x0" ? "second" : "third").img,num_queues=1,id=\(id),restart-limit=100000"]
        : ["remove", id, "--timeout", "500"] + (random(3) == 0 ? ["--force"] : [])
      let request = try RunningProgram(
        BuiltPrograms.path("martlet"), ["ctl", "--control", "ctl"] + words, directory: home.vm.directory)
      usleep(UInt32(random(30_000)))
      switch random(4) {
      case 0: if let pid = home.vm.processes[id] { kill(pid, SIGKILL) }
      case 1: _ = try home.ctl("reboot")
      case 2:
        _ = try home.ctl("pause")
        usleep(UInt32(random(10_000)))
        _ = try home.ctl("resume")
      default: break
      }
      let result = request.wait(seconds: 60)
      #expect(result.code == 0 || result.code == 1, "round \(round) of seed \(seed): \(words) \(result.errors)")
    }
    _ = try home.ctl("resume")
    for id in ["x0", "x1"] { _ = try home.ctl("remove", id, "--force") }
    #expect(home.program.isRunning, "seed \(seed): \(home.program.errorText.suffix(3000))")
    try home.vm.until { home.vm.processes["x0"] == nil && home.vm.processes["x1"] == nil }
    let devices = try home.ctl("devices").output
    #expect(!devices.contains("\"x0\"") && !devices.contains("\"x1\""), "seed \(seed): \(devices)")
    for id in ["x0", "x1"] {
      #expect(try home.expect("add", "disk", "path=\(id == "x0" ? "second" : "third").img,id=\(id)").contains(id), "seed \(seed)")
    }
    home.stop()
  }
}

extension MicroVM {
  /// Asks until it is so.
  func until(seconds: Double = 30, _ location: SourceLocation = #_sourceLocation, _ condition: () throws -> Bool) throws {
    let end = Date().addingTimeInterval(seconds)
    while try !condition() {
      guard Date() < end else { throw TestFailure("It does not come to that, line \(location.line)") }
      usleep(10_000)
    }
  }

  /// The option of a disk that is there from the start; its file is made where it is used.
  static let firstDisk = ["--disk", "path=first.img,num_queues=1"]
}
