import ControlProtocol
import Foundation
import Glibc
import TestSupport
import Testing

/// A VM of fake processes from start to every kind of end.
@Suite(.enabled(if: Installation.canRun, "These tests open /dev/kvm and need the built programs."))
struct LifeTests {
  @Test(arguments: [("guest-off", 0), ("guest-reset", 0)])
  func endOfTheGuestEndsTheVM(_ name: String, _ code: Int32) throws {
    let home = try Installation()
    let result = try home.run("--disk", "path=disk.img", "--name", name, "--control", "ctl", "--serial", "file=boot.log")
    #expect(result.code == code)
    #expect(result.errors == "")
    home.expectNothingLeft()
  }

  @Test(arguments: [(SIGTERM, 143), (SIGINT, 130), (SIGHUP, 129)] as [(Int32, Int32)])
  func signalsEndTheVMCleanly(_ number: Int32, _ code: Int32) throws {
    let home = try Installation()
    let vm = try home.start(["--disk", "path=disk.img", "--control", "ctl", "--console", "socket=con"])
    try home.waitUntilRunning()
    vm.signal(number)
    let result = vm.wait()
    #expect(result.code == code)
    #expect(result.errors == "")
    home.expectNothingLeft()
  }

  @Test func signalDuringTheStartEndsItToo() throws {
    let home = try Installation()
    let vm = try home.start(["--control", "ctl", "--name", "core-hang"])
    home.waitUntil("a control socket") { access(home.directory + "/ctl", F_OK) == 0 }
    vm.signal(SIGTERM)
    #expect(vm.wait(seconds: 3).code == 143)
    home.expectNothingLeft()
  }

  @Test func killedSupervisorLeavesNothing() throws {
    let home = try Installation()
    let vm = try home.start([
      "--disk", "path=disk.img", "--control", "ctl", "--console", "socket=con", "--serial", "file=log",
    ])
    try home.waitUntilRunning()
    #expect(home.processes.count == 7)  // supervisor, guardian, spawner, core, blk0, con0, serial
    vm.signal(SIGKILL)
    #expect(vm.wait().signal == SIGKILL)
    home.expectNothingLeft()
  }

  @Test(arguments: ["core", "blk0", "con0", "guardian"])
  func killedProcessIsNoticedAndTheEndIsClean(_ victim: String) throws {
    let home = try Installation()
    let vm = try home.start(["--disk", "path=disk.img", "--control", "ctl"])
    try home.waitUntilRunning()
    let pid = try #require(home.processes.first { $0.title == "vm/vm/\(victim)" }?.pid)
    kill(pid, SIGKILL)
    if victim == "core" {
      let result = vm.wait()
      #expect(result.code == 6)
      #expect(result.errorLines == ["martlet: error: The core process was killed by signal 9; the VM has ended"])
    } else {
      if victim != "guardian" {
        home.waitUntil("a warning") { vm.errorText.contains("of \(victim) (pid \(pid)) was killed by signal 9; it is started again") }
        home.waitUntil("a new process") { vm.errorText.contains("Device \(victim) is served again") }
        #expect(try home.ctl("devices", "--json").output.contains("\"restarts\":1"))
      }
      #expect(vm.isRunning)
      vm.signal(SIGTERM)
      #expect(vm.wait().code == 143)
    }
    home.expectNothingLeft()
  }

  @Test func deviceThatIgnoresItsOrdersIsKilled() throws {
    let home = try Installation()
    let vm = try home.start(["--disk", "path=disk.img", "--control", "ctl", "--name", "dev-stay"])
    try home.waitUntilRunning()
    vm.signal(SIGTERM)
    let result = vm.wait()
    #expect(result.code == 143)
    #expect(result.errorLines == ["martlet: warning: martlet-block of blk0 does not end and is killed"])
    home.expectNothingLeft()
  }

  @Test func coreThatIgnoresItsOrdersIsKilledByTheSecondSignal() throws {
    let home = try Installation()
    let vm = try home.start(["--control", "ctl", "--name", "core-stay"])
    try home.waitUntilRunning()
    vm.signal(SIGTERM)
    usleep(100_000)
    #expect(vm.isRunning)
    vm.signal(SIGTERM)
    #expect(vm.wait(seconds: 3).code == 143)
    home.expectNothingLeft()
  }

  @Test func processesHaveWhatTheyNeedAndNothingElse() throws {
    let home = try Installation()
    let vm = try home.start([
      "--disk", "path=disk.img", "--control", "ctl", "--serial", "file=log", "--name", "web1",
    ])
    try home.waitUntilRunning()
    defer {
      vm.signal(SIGTERM)
      _ = vm.wait()
    }
    let processes = Dictionary(uniqueKeysWithValues: home.processes.map { ($0.title, $0.pid) })
    #expect(
      Set(processes.keys) == Set(["supervisor", "guardian", "spawner", "core", "blk0", "con0", "serial"].map { "vm/web1/" + $0 }))
    func files(_ name: String) throws -> [String] {
      let pid = try #require(processes["vm/web1/" + name])
      let folder = "/proc/\(pid)/fd"
      let numbers = try FileManager.default.contentsOfDirectory(atPath: folder).compactMap(Int.init).sorted()
      return try numbers.map { number in
        let target = try FileManager.default.destinationOfSymbolicLink(atPath: "\(folder)/\(number)")
        return target.replacing(#/\[.*\]/#, with: "")
      }
    }
    // A true device process closes it once it is mapped.
    let statistics = "/memfd:statistics (deleted)"
    #expect(try files("blk0") == ["/dev/null", "/dev/null", "pipe:", "socket:", home.directory + "/disk.img", statistics])
    #expect(try files("con0") == ["/dev/null", "/dev/null", "pipe:", "socket:", statistics])
    #expect(try files("serial") == ["/dev/null", "/dev/null", "pipe:", "socket:", home.directory + "/log"])
    // kvm, kernel, two vhost-user sockets, the serial stream
    #expect(
      try files("core")
        == [
          "/dev/null", "/dev/null", "pipe:", "socket:", "/dev/kvm", home.directory + "/kernel", "socket:", "socket:",
          "socket:",
        ].sorted { _, _ in false })
    #expect(try files("guardian") == ["pipe:"])
    // The supervisor keeps nothing of theirs but the lock on the image: the part that is the VM's, the process's, and the next one's file.
    #expect(try !files("supervisor").contains { $0 == "/dev/kvm" || $0.hasSuffix("kernel") })
    #expect(try files("supervisor").count { $0.hasSuffix("disk.img") } == 3)
    var uids: Set<String> = []
    for name in ["core", "blk0", "con0", "serial"] {
      let pid = try #require(processes["vm/web1/" + name])
      #expect(home.status(pid, "CapEff") == "0000000000000000")
      #expect(home.status(pid, "CapPrm") == "0000000000000000")
      #expect(home.status(pid, "NoNewPrivs") == "1")
      let environment = FileManager.default.contents(atPath: "/proc/\(pid)/environ").map { String(decoding: $0, as: UTF8.self) }
      #expect(environment == "SWIFT_BACKTRACE=enable=no,swift-backtrace=/\0")
      uids.insert(home.status(pid, "Uid") ?? "")
    }
    if geteuid() == 0 {
      #expect(uids.count == 4)
      #expect(!uids.contains { $0.hasPrefix("0 ") || $0.contains(" 0") })
    }
  }

  @Test(.enabled(if: geteuid() == 0, "Choosing uids needs root."), arguments: [0, 5, 999, 65_475, 65_534])
  func idsOfTheHostAreRefused(base: Int) throws {
    let home = try Installation()
    let result = try home.run("--uid-base", String(base))
    #expect(result.code == (base < 1000 ? 2 : 4) && result.errorLines.count == 1, "\(result.errors)")
    #expect(result.errors.contains(base < 1000 ? "those below are the host's own" : "stands for users without an id"), "\(result.errors)")
  }

  @Test(.enabled(if: geteuid() == 0, "Choosing uids needs root."))
  func uidBaseIsUsed() throws {
    let home = try Installation()
    let vm = try home.start(["--control", "ctl", "--uid-base", "1900000000"])
    try home.waitUntilRunning()
    let answer = try JSONValue(parsing: try home.ctl("info", "--json").output)
    #expect(answer["processes"]?.array?.map { $0["uid"]?.unsigned } == [1_900_000_000, 1_900_000_001])
    vm.signal(SIGTERM)
    #expect(vm.wait().code == 143)
  }

  @Test(.enabled(if: geteuid() == 0, "Becoming an ordinary user needs root."))
  func ordinaryUserWithAccessToKVMRunsAVM() throws {
    let home = try Installation()
    chmod(home.directory, 0o777)
    chmod(home.directory + "/disk.img", 0o666)
    let script = """
      unshare -m sh -c 'cp -a /dev/kvm kvm && chown 0:65500 kvm && chmod 660 kvm && mount --bind kvm /dev/kvm && \
      exec setpriv --reuid 65534 --regid 65534 --groups 65500 ./martlet run --kernel kernel --console null \
      --disk path=disk.img --control ctl --name guest-off'; code=$?; rm -f kvm; exit $code
      """
    let result = try home.shell(script)
    #expect(result.errors == "")
    #expect(result.code == 0)
    home.expectNothingLeft()
  }

  @Test func theGuardiansDeathIsTold() throws {
    let home = try Installation()
    let vm = try home.start(["--control", "ctl"])
    try home.waitUntilRunning()
    let guardian = try #require(home.processes.first { $0.title.hasSuffix("/guardian") })
    kill(guardian.pid, SIGKILL)
    home.waitUntil("a line about it") { vm.errorText.contains("The guardian has ended") }
    #expect(try home.ctl("info", "--json").output.contains("\"state\":\"running\""))
    vm.signal(SIGTERM)
    let result = vm.wait()
    #expect(result.code == 143)
    #expect(result.errorLines.filter { $0.contains("The guardian has ended") }.count == 1, "\(result.errors)")
    home.expectNothingLeft()
  }

  @Test func staleSocketsAreReplaced() throws {
    let home = try Installation()
    let made = try home.shell("python3 -c 'import socket; socket.socket(socket.AF_UNIX).bind(\"ctl\")'")
    try #require(made.code == 0)
    #expect(try home.run("--control", "ctl", "--name", "guest-off").code == 0)
    home.expectNothingLeft()
  }

  @Test func pseudoTerminalIsAnnounced() throws {
    let home = try Installation()
    let result = try home.run("--console", "pty", "--name", "guest-off")
    #expect(result.code == 0)
    #expect(result.errorLines.count == 1)
    #expect(result.errors.hasPrefix("martlet: console: /dev/pts/"))
  }

  @Test func terminalIsPutRightWhateverDies() throws {
    let home = try Installation()
    // A terminal of our own, in whose settings the console process would meddle; here we do it ourselves.
    let script = """
      import os, pty, subprocess, sys, termios, time
      master, slave = pty.openpty()
      before = termios.tcgetattr(slave)
      vm = subprocess.Popen(["./martlet", "run", "--kernel", "kernel", "--console", "tty", "--control", "ctl"], stdin=slave, stdout=slave)
      while subprocess.run(["./martlet", "ctl", "--control", "ctl", "info"], capture_output=True).returncode: time.sleep(0.02)
      raw = termios.tcgetattr(slave); raw[3] &= ~(termios.ECHO | termios.ICANON); termios.tcsetattr(slave, termios.TCSANOW, raw)
      assert termios.tcgetattr(slave) != before
      vm.send_signal(int(sys.argv[1])); vm.wait()
      for _ in range(300):
        if termios.tcgetattr(slave) == before: break
        time.sleep(0.01)
      sys.exit(0 if termios.tcgetattr(slave) == before else 1)
      """
    try script.write(toFile: home.directory + "/terminal.py", atomically: true, encoding: .utf8)
    for number in [SIGTERM, SIGKILL] {
      let result = try home.shell("python3 terminal.py \(number)")
      #expect(result.code == 0, "signal \(number): \(result.errors)")
      home.expectNothingLeft()
    }
  }

  @Test(.enabled(if: access("/dev/kmsg", R_OK) == 0, "The kernel's log cannot be read here."))
  func forbiddenCallBecomesOneAuditLineWithItsName() throws {
    // The kernel drops records of a burst, and other tests make bursts; and on a busy machine a record comes late. So each try is
    // held against what the kernel's log really has of that process.
    let log = open("/dev/kmsg", O_RDONLY | O_NONBLOCK)
    defer { close(log) }
    lseek(log, 0, SEEK_END)
    var records = ""
    func readRecords() {
      var buffer = [UInt8](repeating: 0, count: 8192)
      while true {
        let count = read(log, &buffer, buffer.count)
        if count > 0 { records += String(decoding: buffer[..<count], as: UTF8.self) } else if count == 0 || errno != EPIPE { return }
      }
    }
    var told = ""
    var unread = 0
    for _ in 0..<5 where !told.contains("was killed for calling") {
      usleep(told.isEmpty ? 0 : 2_000_000)
      let home = try Installation()
      let vm = try home.start(["--name", "dev-violate", "--disk", "path=disk.img,on-death=fail", "--sandbox", "on", "--control", "ctl"])
      home.waitUntil("the audit line") { vm.errorText.contains("goes on without it") }
      vm.signal(SIGTERM)
      let lines = vm.wait().errorLines.filter { $0.contains("audit:") }
      #expect(lines.count == 1)
      told = lines.first ?? ""
      let process = try #require(told.firstMatch(of: #/martlet-block of blk0 \(pid (\d+)\)/#)?.1, "\(told)")
      readRecords()
      let record = records.split(separator: "\n").first { $0.contains("type=1326") && $0.contains(" pid=\(process) ") }
      if told.contains("was killed for calling") {
        #expect(told.contains("calling openat (257)") || told.contains("calling open (2)"), "\(told)")
        #expect(record?.contains("syscall=257 ") == true || record?.contains("syscall=2 ") == true, "\(told) without a record")
      } else {
        #expect(told.contains("cannot be read"), "\(told)")
        if record != nil { unread += 1 }
      }
    }
    // What the kernel has not written down cannot be told.
    #expect(told.contains("was killed for calling") || unread < 5, "there were records each time: \(told)")
  }
}
