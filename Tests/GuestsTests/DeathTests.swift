// Death at bad moments and of a bad kind: during resets, silent, with a spoilt record, at sockets of others.

import ControlProtocol
import Foundation
import TestSupport
import Testing

@Suite(
  "Back ends that die at bad moments", .serialized, .enabled(if: WholeVM.canRun, "These tests need /dev/kvm and the built programs."))
struct DeathTests {
  private func answer(_ home: WholeVM, _ request: String) -> JSONValue? { try? JSONValue(parsing: try home.ctl(request).output) }

  private func device(_ home: WholeVM) -> JSONValue? { answer(home, "devices")?["devices"]?.array?.first }

  private func count(_ home: WholeVM, _ event: String) -> UInt64 { device(home)?["events"]?[event]?.unsigned ?? 0 }

  private func serial(_ home: WholeVM) -> String {
    (try? String(contentsOfFile: home.directory + "/serial.log", encoding: .utf8)) ?? ""
  }

  private func wait(_ vm: RunningProgram, _ what: String, seconds: Double = 60, _ condition: () throws -> Bool) throws {
    let end = Date().addingTimeInterval(seconds)
    while Date() < end, vm.isRunning {
      if try condition() { return }
      usleep(5000)
    }
    throw TestFailure("\(what): not seen; \(vm.errorText.suffix(1500))")
  }

  private func start(_ home: WholeVM, _ work: String, _ disk: String, _ options: [String] = []) throws -> RunningProgram {
    let vm = try home.start(
      ["--cmdline", work, "--disk", disk, "--control", "ctl", "--serial", "file=serial.log"] + options)
    try wait(vm, "a disk at work") { device(home)?["state"]?.string == "active" }
    return vm
  }

  private func finish(_ home: WholeVM, _ vm: RunningProgram) {
    vm.signal(SIGTERM)
    #expect(vm.wait().code == 143, "\(vm.errorText.suffix(1500))")
    #expect(!serial(home).contains("FAIL"), "\(serial(home).suffix(500))")
    home.expectNothingLeft()
  }

  @Test("Kills at any moment of a guest that writes, verifies and resets itself over and over", arguments: ["off", "on"])
  func resets(_ spare: String) throws {
    let home = try WholeVM()
    let vm = try start(
      home, "test=blk,reset by=cf9 n=300 span=1 op=write depth=8", "path=disk.img,restart-limit=100000,spare=" + spare)
    func resetCount() -> UInt64 { answer(home, "info")?["resets"]?.unsigned ?? 0 }
    for round in 1...UInt64(max(1, MicroGuest.killRounds(15))) {
      try wait(vm, "the device's process") {
        guard let pid = device(home)?["pid"]?.unsigned, home.processes["blk0"] == Int32(pid) else { return false }
        return kill(Int32(pid), SIGKILL) == 0
      }
      try wait(vm, "service after kill \(round)") { count(home, "restarted") >= round }
      usleep(UInt32.random(in: 0...20_000))
    }
    let before = resetCount()
    try wait(vm, "more resets after the last kill") { resetCount() > before + 1 }
    #expect(count(home, "given-up") == 0)
    finish(home, vm)
  }

  @Test("What waits in a queue is seen while its back end is silent, and everything else answers")
  func silent() throws {
    let home = try WholeVM()
    let vm = try start(home, "test=blk op=write depth=4 n=100000000 span=2", "path=disk.img", ["--rng", "on"])
    let pid = try #require(device(home)?["pid"]?.unsigned)
    func queue() -> JSONValue? { device(home)?["queues"]?.array?.first }
    kill(Int32(pid), SIGSTOP)
    try wait(vm, "a request that waits") { (queue()?["waiting_ns"]?.unsigned ?? 0) > 1_500_000_000 }
    // Fewer than four where it was stopped between an answer and its call.
    let waiting = queue()?["waiting"]
    #expect(waiting?.unsigned.map { (1...4).contains($0) } == true || waiting == .null, "\(String(describing: queue()))")
    #expect(try home.ctl("devices").output.contains("\"waiting_ns\""))
    #expect(answer(home, "info")?["state"]?.string == "running")
    #expect(try home.ctl("pause").code == 0)
    #expect(try home.ctl("resume").code == 0)
    kill(Int32(pid), SIGCONT)
    try wait(vm, "progress") { (queue()?["waiting_ns"]?.unsigned ?? 0) < 1_000_000_000 }
    finish(home, vm)
  }

  @Test("The last conversation with a lost back end is written down and can be read; no more files than sixteen")
  func recordings() throws {
    let home = try WholeVM()
    try FileManager.default.createDirectory(atPath: home.directory + "/flights", withIntermediateDirectories: true)
    let vm = try start(
      home, "test=blk op=write depth=4 n=100000000 span=2", "path=disk.img,restart-limit=1000", ["--flight-recorder", "flights"])
    func files() -> [String] { ((try? FileManager.default.contentsOfDirectory(atPath: home.directory + "/flights")) ?? []).sorted() }
    for round in 1...18 as ClosedRange<UInt64> {
      kill(Int32(try #require(device(home)?["pid"]?.unsigned)), SIGKILL)
      try wait(vm, "service") { count(home, "restarted") >= round }
    }
    #expect(files().count == 16, "\(files())")
    #expect(count(home, "replayed") > 0, "not one of 18 kills met a request in flight")
    let file = home.directory + "/flights/" + (files().first ?? "")
    let decoded = try RunningProgram(BuiltPrograms.path("martlet-probe"), ["decode", "--type", "blk", "--input", file]).wait()
    #expect(decoded.code == 0, "\(decoded.errors)")
    for word in ["SET_VRING_KICK", "GET_FEATURES answered", "SET_INFLIGHT_FD", "SET_MEM_TABLE"] {
      #expect(decoded.output.contains(word), "\(word): \(decoded.output)")
    }
    var status = stat()
    #expect(stat(file, &status) == 0 && status.st_mode & 0o777 == 0o600 && status.st_size < 16_384)
    let living = try #require(answer(home, "conversation blk0")?["conversation"]?.string)
    #expect(living.hasPrefix("martlet-recording 2\nconnection\n"))
    finish(home, vm)
  }

  @Test("A directory for recordings that is none is refused")
  func noDirectory() throws {
    let home = try WholeVM()
    for (path, words) in [("nowhere", "nowhere"), ("disk.img", "a directory")] {
      let result = try home.start(["--disk", "path=disk.img", "--flight-recorder", path]).wait()
      #expect(result.code == 3 && result.errors.split(separator: "\n").count == 1 && result.errors.contains(words), "\(result)")
    }
  }

  @Test(
    "A spoilt record of requests in flight is refused by every successor: the device is given up, the VM lives",
    .enabled(if: geteuid() == 0, "Needs root, to write into the core's memory object."))
  func spoiltRecord() throws {
    let home = try WholeVM()
    let vm = try start(home, "test=blk op=write depth=8 n=100000000 span=2", "path=disk.img,restart-limit=2")
    let pid = Int32(try #require(device(home)?["pid"]?.unsigned))
    let core = try #require(home.processes["core"])
    kill(pid, SIGSTOP)
    let fds = try FileManager.default.contentsOfDirectory(atPath: "/proc/\(core)/fd")
    let area = try #require(
      fds.first { (try? FileManager.default.destinationOfSymbolicLink(atPath: "/proc/\(core)/fd/\($0)").contains("inflight")) == true })
    let file = open("/proc/\(core)/fd/\(area)", O_RDWR)
    #expect(file >= 0)
    var status = stat()
    fstat(file, &status)
    let garbage = [UInt8](repeating: 0xA5, count: Int(status.st_size))
    #expect(pwrite(file, garbage, garbage.count, 0) == garbage.count)
    close(file)
    kill(pid, SIGKILL)
    try wait(vm, "giving up") { count(home, "given-up") == 1 }
    #expect(count(home, "start-failed") >= 1)
    #expect(answer(home, "info")?["state"]?.string == "running")
    vm.signal(SIGTERM)
    #expect(vm.wait().code == 143)
    home.expectNothingLeft()
  }

  // MARK: Sockets of others

  private func external(_ home: WholeVM, queues: Int) throws -> RunningProgram {
    home.foreignSockets = ["disk.sock"]
    return try RunningProgram(
      BuiltPrograms.path("martlet-block"),
      ["--socket-path=\(home.directory)/disk.sock", "--blk-file=\(home.directory)/disk.img", "--num-queues=\(queues)"])
  }

  @Test("A back end at a socket may be started late, come back with less, and come back right; it is never given up")
  func comesBack() throws {
    let home = try WholeVM()
    let vm = try home.start([
      "--cmdline", "test=blk op=write depth=4 n=100000000 span=2", "--disk",
      "vhost_user=on,socket=disk.sock,num_queues=2,wait=60", "--control", "ctl", "--serial", "file=serial.log",
    ])
    usleep(100_000)
    var backEnd = try external(home, queues: 2)
    try wait(vm, "a disk at work") { device(home)?["state"]?.string == "active" }
    for _ in 0..<2 {
      let before = count(home, "start-failed")
      let restarted = count(home, "restarted")
      backEnd.signal(SIGKILL)
      _ = backEnd.wait()
      backEnd = try external(home, queues: 1)
      try wait(vm, "two refusals of a back end that offers less") { count(home, "start-failed") >= before + 2 }
      #expect(device(home)?["state"]?.string == "waiting-for-back-end")
      backEnd.signal(SIGKILL)
      _ = backEnd.wait()
      backEnd = try external(home, queues: 2)
      try wait(vm, "service") { count(home, "restarted") == restarted + 1 }
    }
    finish(home, vm)
    backEnd.signal(SIGTERM)
    _ = backEnd.wait()
  }

  @Test("A back end at a socket is waited for as long as was said, at the start and later")
  func patience() throws {
    let home = try WholeVM()
    let disk = "vhost_user=on,socket=disk.sock,wait=1"
    let late = try home.start(["--cmdline", "test=boot", "--disk", disk]).wait()
    #expect(late.code == 3 && late.errors.contains("disk.sock"), "\(late.errors)")
    let backEnd = try external(home, queues: 1)
    let vm = try start(home, "test=blk op=write depth=4 n=100000000 span=2", disk)
    backEnd.signal(SIGKILL)
    try wait(vm, "giving up") { count(home, "given-up") == 1 }
    #expect(device(home)?["state"]?.string == "lost")
    #expect(answer(home, "info")?["state"]?.string == "running")
    vm.signal(SIGTERM)
    #expect(vm.wait().code == 143)
    home.expectNothingLeft()
  }

  @Test("Killing the supervisor ends everything, spares too")
  func noSupervisor() throws {
    let home = try WholeVM()
    let vm = try start(home, "test=blk op=write depth=4 n=100000000 span=2", "path=disk.img,spare=on", ["--rng", "on,spare=on"])
    try wait(vm, "the spares") { home.processes["blk0 (spare)"] != nil && home.processes["rng0 (spare)"] != nil }
    kill(try #require(home.processes["supervisor"]), SIGKILL)
    #expect(vm.wait().signal == SIGKILL)
    home.expectNothingLeft()
  }
}
