// The processes of a whole VM: what they are given, what is left of them, and what the core says of bad input. The real
// programs with a micro guest.

import Foundation
import TestSupport
import Testing

/// A VM that runs until it is ended, in a directory of its own.
final class WholeVM {
  /// Of back ends that the test itself has started, and may have killed.
  var foreignSockets: Set<String> = []
  let directory: String
  let micro: URL

  static let canRun = MicroGuest.hasKVM && BuiltPrograms.exists("martlet-core")

  init() throws {
    micro = try MicroGuest.directory.get()
    directory = "/tmp/martlet-guest-\(getpid())-\(UInt32.random(in: 0 ... .max))"
    try FileManager.default.createDirectory(atPath: directory, withIntermediateDirectories: true)
    try FileManager.default.copyItem(atPath: micro.appendingPathComponent("micro.elf").path, toPath: directory + "/kernel")
    try Data(count: 4 << 20).write(to: URL(fileURLWithPath: directory + "/disk.img"))
  }

  deinit { try? FileManager.default.removeItem(atPath: directory) }

  func start(_ arguments: [String]) throws -> RunningProgram {
    let console = arguments.contains("--console") ? [] : ["--console", "null"]
    let kernel = arguments.contains("--kernel") ? [] : ["--kernel", "kernel"]
    let common = ["--memory", "size=64M", "--name", "t\(getpid())-\(directory.suffix(5))"]
    return try RunningProgram(
      BuiltPrograms.path("martlet"), ["run"] + kernel + console + common + arguments, directory: directory)
  }

  func ctl(_ verb: String) throws -> ProgramResult {
    try RunningProgram(
      BuiltPrograms.path("martlet"), ["ctl", "--control", "ctl", "--json"] + verb.split(separator: " ").map(String.init),
      directory: directory
    )
    .wait()
  }

  func shell(_ script: String) throws {
    let result = try RunningProgram("/bin/sh", ["-c", script], directory: directory).wait()
    try #require(result.code == 0, "\(result.errors)")
  }

  func waitUntilRunning() throws {
    let end = Date().addingTimeInterval(60)
    while Date() < end {
      if try ctl("info").output.contains("\"state\":\"running\"") { return }
      usleep(5000)
    }
    Issue.record("The VM does not run")
  }

  /// Processes of this VM by the last part of their titles.
  var processes: [String: Int32] {
    MicroGuest.processes(ofVM: "t\(getpid())-\(directory.suffix(5))")
  }

  func expectNothingLeft(_ location: SourceLocation = #_sourceLocation) {
    waitWhile { !processes.isEmpty }
    #expect(processes.isEmpty, sourceLocation: location)
    for pid in processes.values { kill(pid, SIGKILL) }
    for file in (try? FileManager.default.contentsOfDirectory(atPath: directory)) ?? [] where !foreignSockets.contains(file) {
      var status = stat()
      let isSocket = lstat(directory + "/" + file, &status) == 0 && status.st_mode & S_IFMT == S_IFSOCK
      #expect(!isSocket, "\(file) is left", sourceLocation: location)
    }
  }
}

@Suite(.enabled(if: WholeVM.canRun, "These tests need /dev/kvm and the built programs."))
struct ProcessTests {
  private static let running = [
    "--cmdline", "test=boot end=hang", "--disk", "path=disk.img", "--control", "ctl", "--console", "socket=con",
    "--serial", "file=serial.log",
  ]

  @Test(arguments: ["supervisor", "core", "blk0", "con0", "serial", "guardian", "spawner"])
  func whateverIsKilledNothingIsLeft(_ victim: String) throws {
    let home = try WholeVM()
    let vm = try home.start(Self.running)
    try home.waitUntilRunning()
    let processes = home.processes
    #expect(Set(processes.keys) == ["supervisor", "core", "blk0", "con0", "serial", "guardian", "spawner"])
    kill(try #require(processes[victim]), SIGKILL)
    switch victim {
    case "supervisor": #expect(vm.wait().signal == SIGKILL)
    case "core": #expect(vm.wait().code == 6)
    default:
      usleep(700_000)
      #expect(vm.isRunning, "\(vm.errorText)")
      vm.signal(SIGTERM)
      #expect(vm.wait().code == 143)
    }
    home.expectNothingLeft()
  }

  @Test(.enabled(if: geteuid() == 0, "Uids of their own need root."))
  func everyProcessHasAUidOfItsOwnAndNoCapability() throws {
    let home = try WholeVM()
    let vm = try home.start(Self.running)
    try home.waitUntilRunning()
    var uids: Set<String> = []
    for name in ["core", "blk0", "con0", "serial"] {
      let pid = try #require(home.processes[name])
      let status = String(decoding: FileManager.default.contents(atPath: "/proc/\(pid)/status") ?? Data(), as: UTF8.self)
      #expect(status.contains("CapEff:\t0000000000000000\nCapBnd:\t0000000000000000"), "\(name)")
      #expect(status.contains("NoNewPrivs:\t1"))
      let line = try #require(status.split(separator: "\n").first { $0.hasPrefix("Uid:") })
      uids.insert(String(line))
      // Not dumpable: its files in /proc belong to root.
      var owner = stat()
      #expect(stat("/proc/\(pid)/mem", &owner) == 0 && owner.st_uid == 0)
    }
    #expect(uids.count == 4)
    #expect(!uids.contains { $0.contains("\t0") })
    vm.signal(SIGTERM)
    #expect(vm.wait().code == 143)
    home.expectNothingLeft()
  }

  @Test func badPayloadsAreToldInOneLine() throws {
    let home = try WholeVM()
    try home.shell("head -c 5000 kernel > cut; head -c 100000 /dev/urandom > noise; truncate -s 63M initrd")
    for (arguments, start) in [
      (["--kernel", "cut"], "martlet: error: 'cut': Kernel file is cut short"),
      (["--kernel", "noise"], "martlet: error: 'noise': Kernel file is neither a bzImage nor an ELF vmlinux"),
      (["--initramfs", "initrd"], "martlet: error: 'initrd': Initramfs of 66060288 bytes does not fit"),
    ] {
      let result = try home.start(arguments + ["--disk", "path=disk.img", "--control", "ctl"]).wait()
      #expect(result.code == 3)
      #expect(result.errorLines.count == 1 && result.errors.hasPrefix(start), "\(result.errors)")
      home.expectNothingLeft()
    }
  }

  @Test(arguments: [
    ("close", "closed the connection"), ("noise", "protocol version"), ("never", "did not answer GET_FEATURES within 300 ms"),
  ])
  func badBackEndsAreToldInOneLine(_ kind: String, _ part: String) throws {
    let home = try WholeVM()
    let script = """
      import socket, sys, time
      s = socket.socket(socket.AF_UNIX); s.bind("be"); s.listen(1); print("up", flush=True)
      c, _ = s.accept()
      if sys.argv[1] == "close": c.close()
      if sys.argv[1] == "noise": c.sendall(b"x" * 4096)
      time.sleep(30)
      """
    let backEnd = try RunningProgram("/usr/bin/env", ["python3", "-c", script, kind], directory: home.directory)
    waitWhile { !backEnd.outputText.contains("up") }
    // A guest that lives: one that ends before its devices are missed has had a good end.
    let result = try home.start(["--cmdline", "test=boot end=hang", "--disk", "vhost_user=on,socket=be", "--deadline", "reply=300"]).wait()
    backEnd.signal(SIGKILL)
    _ = backEnd.wait()
    unlink(home.directory + "/be")
    #expect(result.code == 5)
    #expect(result.errorLines.count == 1)
    #expect(result.errors.hasPrefix("martlet: error: Back end of blk0 at 'be': ") && result.errors.contains(part), "\(result.errors)")
    home.expectNothingLeft()
  }

  @Test func guestsEndIsASuccess() throws {
    let home = try WholeVM()
    for _ in 0..<3 {
      let result = try home.start(["--cmdline", "test=blk n=50 span=1", "--disk", "path=disk.img"]).wait()
      #expect(result.code == 0)
      #expect(result.errors == "")
    }
    home.expectNothingLeft()
  }
}
