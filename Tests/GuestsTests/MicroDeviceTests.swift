// Traffic between micro guests and the device processes: disks, a network card, consoles.

import Foundation
import HostSystem
import TestSupport
import Testing

@Suite("Micro guests under martlet run: disks", .enabled(if: MicroVM.canRun, MicroVM.cannotRun))
struct MicroDiskTests {
  @Test(
    "data is written, flushed and verified, in every way of waiting",
    arguments: [
      "wait=poll", "wait=spin", "wait=halt", "wait=poll depth=32", "wait=halt depth=16 op=write", "plain=1 wait=halt depth=4",
      "size=65536 depth=8 n=200", "size=512 depth=64", "wait=halt move=0xdf000000", "move=0x8000000000 depth=4",
    ])
  func traffic(_ options: String) throws {
    let vm = try MicroVM()
    let run = try vm.run("test=blk span=2 n=500 \(options)", vm.disk("disk.img", ",serial=martlet"))
    #expect(run.isClean, run.summary)
    #expect(run.report("blk.id")?.detail.hasSuffix(" id martlet") == true, run.summary)
    #expect(run.report("blk.verify") != nil && run.report("blk.speed") != nil, run.summary)
    #expect((run.report("blk.moved") != nil) == options.contains("move="), run.summary)
    let words = run.report("blk.speed")?.detail.split(separator: " ").map(String.init) ?? []
    let interrupts = words.firstIndex(of: "interrupts").flatMap { Int(words[$0 - 1]) } ?? -1
    // A spinning driver may find every completion in the ring before its interrupt comes; a halted one cannot.
    if options.contains("halt") { #expect(interrupts > 0, run.summary) }
    if !options.contains("halt"), !options.contains("spin") { #expect(interrupts <= 0, run.summary) }
  }

  @Test func whatTheGuestWroteIsInTheImage() throws {
    let vm = try MicroVM()
    let run = try vm.run("test=blk span=4 n=1 seed=77", vm.disk(mebibytes: 4))
    #expect(run.isClean, run.summary)
    let data = try Data(contentsOf: URL(fileURLWithPath: vm.path("disk.img")))
    var sum: UInt64 = 0
    data.withUnsafeBytes { for word in $0.bindMemory(to: UInt64.self) { sum &+= word } }
    #expect(data.count == 4 << 20)
    #expect(run.report("blk.verify")?.detail.hasSuffix("sum " + String(sum, radix: 16)) == true, run.summary)
  }

  @Test func aReadOnlyDiskRefusesWritesAndStaysAsItWas() throws {
    let vm = try MicroVM()
    let filled = try vm.run("test=blk span=1 n=1", vm.disk(mebibytes: 1))
    #expect(filled.isClean, filled.summary)
    let before = try Data(contentsOf: URL(fileURLWithPath: vm.path("disk.img")))
    let run = try vm.run("test=blk readonly=1 span=1 n=100", ["--disk", "path=disk.img,readonly=on"])
    #expect(run.isClean, run.summary)
    #expect(run.report("blk.read-only") != nil && run.report("blk.write") == nil, run.summary)
    #expect(try Data(contentsOf: URL(fileURLWithPath: vm.path("disk.img"))) == before)
  }

  @Test func eachOfEightDisksIsItsOwn() throws {
    let vm = try MicroVM()
    var disks: [String] = []
    for number in 0..<8 { disks += try vm.disk("\(number).img", mebibytes: number + 1, ",serial=s\(number)") }
    for number in [0, 3, 7] {
      let run = try vm.run("test=blk nth=\(number) span=1 n=50", disks)
      #expect(run.isClean, run.summary)
      #expect(run.report("blk.id")?.detail.hasSuffix(" id s\(number)") == true, run.summary)
      #expect(run.report("blk.config")?.detail.hasPrefix("\((number + 1) << 11) sectors") == true, run.summary)
    }
  }

  @Test func maskedInterruptsWaitAndComeOnce() throws {
    let vm = try MicroVM()
    let run = try vm.run("test=msix,kick n=500", vm.disk())
    #expect(run.isClean, run.summary)
    #expect(run.reports.count { $0.name.hasPrefix("msix.") } == 10, run.summary)
  }

  @Test func nonsenseInTheRingEndsNoDevice() throws {
    let vm = try MicroVM()
    let run = try vm.run("test=ring,blk span=1 n=50", vm.disk())
    #expect(run.passed && run.exitStatus == 0, run.summary)
    #expect(run.reports.count { $0.name.hasPrefix("ring.") } == 22, run.summary)
    #expect(!run.errors.contains("killed by signal") && !run.errors.contains("exited"), run.summary)
  }
}

@Suite("Micro guests under martlet run: network", .enabled(if: MicroVM.canMakeTaps, MicroVM.cannotMakeTaps))
struct MicroNetTests {
  /// Runs the command behind it in a network namespace with a tap whose other end sends frames back.
  static func below() throws -> [String] {
    let script = """
      ip link set lo up && ip tuntap add tap0 mode tap && ip link set tap0 up || exit 99
      : >echo; "$0" tap0 >>echo & echo=$!
      until grep -q READY echo; do sleep 0.01; done
      "$@"; code=$?
      kill $echo
      ip link show tap0 >/dev/null || exit 98
      exit $code
      """
    return ["/usr/bin/unshare", "--net", "/bin/sh", "-c", script, try MicroGuest.tool("frame-echo")]
  }

  @Test("frames go out and come back whole", arguments: ["size=64 window=1", "size=1514 window=32", "size=512 window=64", "size=65"])
  func echo(_ options: String) throws {
    let vm = try MicroVM()
    let run = try vm.run("test=net n=1000 \(options)", ["--net", "tap=tap0,mac=52:54:00:12:34:56"], below: Self.below())
    #expect(run.isClean, run.summary)
    #expect(run.report("net.mac")?.detail == "52:54:0:12:34:56", run.summary)
    #expect(run.report("net.echo") != nil, run.summary)
  }

  @Test func aCardAndADiskLiveSideBySide() throws {
    let vm = try MicroVM()
    let run = try vm.run(
      "test=net,blk,net,msix n=300 span=1", vm.disk() + ["--net", "tap=tap0", "--cpus", "boot=2"], below: Self.below())
    #expect(run.isClean, run.summary)
    #expect(run.reports.count { $0.name == "net.echo" } == 2, run.summary)
  }
}

@Suite("Micro guests under martlet run: consoles", .enabled(if: MicroVM.canRun, MicroVM.cannotRun))
struct MicroConsoleTests {
  /// Talks to a guest that sends back what it gets: nothing is lost, added or changed.
  private func talk(_ vm: MicroVM, _ program: RunningProgram, _ line: borrowing OwnedFD, count: Int) throws {
    let sent = (0..<count).map { UInt8(truncatingIfNeeded: $0 &* 31 &+ $0 >> 8) }
    var waiting = sent[...]
    var received: [UInt8] = []
    let hello = Array("MICRO-CONSOLE READY\r\n".utf8)
    let end = Date().addingTimeInterval(60)
    while received.count < hello.count + count, Date() < end {
      var poll = pollfd(fd: line.rawValue, events: Int16(POLLIN), revents: 0)
      let isGreeted = received.count >= hello.count
      if isGreeted, !waiting.isEmpty { poll.events |= Int16(POLLOUT) }
      _ = Glibc.poll(&poll, 1, 1000)
      if poll.revents & Int16(POLLIN) != 0 {
        var buffer = [UInt8](repeating: 0, count: 4096)
        let got = read(line.rawValue, &buffer, buffer.count)
        if got <= 0 { break }
        received += buffer[..<got]
      }
      if poll.revents & Int16(POLLOUT) != 0 {
        let piece = Array(waiting.prefix(1000))
        let put = write(line.rawValue, piece, piece.count)
        if put > 0 { waiting = waiting.dropFirst(put) }
      }
    }
    #expect(received.count == hello.count + count)
    #expect(received == hello + sent)
    let run = MicroRun(program.wait())
    #expect(run.passed && run.exitStatus == 0, run.summary)
    #expect(run.report("console.echo")?.detail.hasSuffix("sum \(sent.reduce(0) { $0 + Int($1) })") == true, run.summary)
    vm.expectNothingLeft()
  }

  @Test func aSocketCarriesEveryByteBothWays() throws {
    let vm = try MicroVM()
    let program = try vm.start("test=console bytes=20000", ["--console", "socket=con"])
    var line: OwnedFD?
    // The guest waits ten seconds for its input.
    for _ in 0..<12_000 where line == nil {
      usleep(5000)
      line = try? UnixSocket.connect(to: vm.path("con"))
    }
    try talk(vm, program, unwrap(line), count: 20000)
  }

  @Test func aPseudoTerminalCarriesEveryByteBothWays() throws {
    let vm = try MicroVM()
    let program = try vm.start("test=console bytes=20000", ["--console", "pty"])
    var path: Substring?
    for _ in 0..<12_000 where path == nil {
      usleep(5000)
      path = program.errorText.split(whereSeparator: \.isWhitespace).first { $0.hasPrefix("/dev/pts/") }
    }
    let line = try OwnedFD.open(String(try #require(path)), O_RDWR | O_NOCTTY)
    // Left as it is a terminal echoes and changes line ends.
    var settings = termios()
    tcgetattr(line.rawValue, &settings)
    cfmakeraw(&settings)
    tcsetattr(line.rawValue, TCSANOW, &settings)
    try talk(vm, program, line, count: 20000)
  }

  @Test func theEscapeKeyEndsTheVMAndIsNotForTheGuest() throws {
    let vm = try MicroVM()
    let script = """
      import os, pty, subprocess, sys, termios
      master, slave = pty.openpty()
      before = termios.tcgetattr(slave)
      vm = subprocess.Popen(sys.argv[1:], stdin=slave, stdout=slave)
      seen = b""
      while b"MICRO-CONSOLE READY" not in seen: seen += os.read(master, 4096)
      assert termios.tcgetattr(slave) != before
      os.write(master, b"a\\x01\\x01b\\x01c")
      while not seen.endswith(b"a\\x01b\\x01c"): seen += os.read(master, 4096)
      os.write(master, b"\\x01x")
      code = vm.wait(20)
      assert termios.tcgetattr(slave) == before
      sys.exit(code)
      """
    let words = try vm.command("test=console bytes=100", ["--console", "tty", "--serial", "file=serial"])
    let result = try RunningProgram("/usr/bin/env", ["python3", "-c", script] + words, directory: vm.directory).wait(seconds: 60)
    #expect(result.code == 0 && result.errors.isEmpty, "\(result.errors)")
    vm.expectNothingLeft()
  }

  @Test func aFileGetsTheOutput() throws {
    let vm = try MicroVM()
    let run = try vm.run("test=console bytes=0", ["--console", "file=out"])
    #expect(run.isClean, run.summary)
    #expect(try String(contentsOfFile: vm.path("out"), encoding: .utf8) == "MICRO-CONSOLE READY\r\n")
  }

  @Test("the serial port's bytes arrive in a file and at a client's socket too", arguments: ["file", "socket"])
  func serial(_ kind: String) throws {
    let vm = try MicroVM()
    let program = try vm.start("test=exits,idle n=10 ms=1000", ["--serial", "\(kind)=serial"])
    var text = ""
    if kind == "socket" {
      var line: OwnedFD?
      for _ in 0..<12_000 where line == nil {
        usleep(2000)
        line = try? UnixSocket.connect(to: vm.path("serial"))
      }
      let socket = try unwrap(line)
      var buffer = [UInt8](repeating: 0, count: 4096)
      while case let got = read(socket.rawValue, &buffer, buffer.count), got > 0 { text += String(decoding: buffer[..<got], as: UTF8.self) }
    }
    let result = program.wait()
    #expect(result.code == 0 && result.errors.isEmpty, "\(result.errors)")
    if kind == "file" { text = try String(contentsOfFile: vm.path("serial"), encoding: .utf8) }
    #expect(text.hasPrefix("MICRO start ok") && text.contains("MICRO done ok"), "\(text)")
    vm.expectNothingLeft()
  }
}
