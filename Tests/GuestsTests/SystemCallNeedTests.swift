// Every entry of the system-call lists is needed: whole VMs at work, from the start over death and reset to the end, are
// traced, and each entry must have been asked for by a thread that has its filter. Taking such an entry away would have
// ended that process, because what is not in the list is killed (FilterTests, in IsolationTests, tries that for every
// call and altered arguments).

import Foundation
import Glibc
import HostSystem
import Sandbox
import TestSupport
import Testing

@Suite(
  "System-call lists: every entry is needed", .serialized,
  .enabled(
    if: MicroVM.canMakeTaps && access("/usr/bin/strace", X_OK) == 0 && BuiltPrograms.exists("martlet-hostile"),
    "Needs /dev/kvm, root, taps, strace and the built programs."))
struct SystemCallNeedTests {
  /// What no VM brings about at will, and the test that does it on purpose and without the entry fails.
  private static let elsewhere: [(test: String, entries: [String])] = [
    (
      "libcsOwnCallsAreNeeded",
      [
        "base brk", "base mprotect", "base restart_syscall", "processor mmap", "processor munmap", "processor madvise 0x4", "processor brk",
        "processor exit", "supervisor mmap", "supervisor munmap", "supervisor brk", "supervisor rt_sigprocmask", "supervisor gettid",
        "supervisor tgkill", "supervisor restart_syscall",
      ]
    ),
    ("programsStartedByHandCloseThemselvesIn", ["by-hand accept4", "by-hand shutdown 0x2"]),
    (
      "everyCallOfTheGuardianIsNeeded",
      [
        "guardian-groups write", "guardian-groups getdents64", "guardian-groups lseek", "guardian-groups unlinkat 0x200",
        "guardian-groups poll",
      ]
    ),
  ]

  /// What is shown nowhere, and why it stands in the list.
  private static let rare: [String: String] = [
    "base clock_gettime": "only on hosts whose clock cannot be read in user space",
    "core ioctl 0x4020ae76": "KVM_IRQFD: a driver that changes vectors while the main thread resets its device",
    "core ioctl 0x4020aea5": "KVM_SIGNAL_MSI: an interrupt of the serial port that waited for the main thread",
    "core ioctl 0x8090ae81": "KVM_GET_REGS: a payload that is loaded again over a processor that was stopped in an access",
    "core ioctl 0xae80": "KVM_RUN: such an access is completed",
    "core rt_sigreturn": "a kick that arrives late",
    "processor close": "descriptors of a vector that goes",
    "processor clock_gettime": "as in base",
    "block-control ioctl 0x1277": "BLKDISCARD: a device that cannot zero what it forgets; DeviceImageTests",
    "block-control ioctl 0x127d": "BLKSECDISCARD: DeviceImageTests",
    "block-control fdatasync": "the same with a write cache that is switched off",
    "block sched_yield": "a look before sleeping, when looks have paid",
    "supervisor clock_gettime": "as in base",
  ]

  /// Lists by the name of the thread that has them; the first prefix that fits.
  private static let roles: [(prefix: String, lists: [SystemCallList])] = [
    ("martlet-block", [.base, .device, .block]), ("core", [.base, .core]), ("vcpu", [.processor]), ("blk", [.base, .device, .block]),
    ("queue", [.base, .device, .block]),
    ("calls", [.base, .device, .block]),
    ("net", [.base, .device, .net]), ("con", [.base, .device, .console]), ("serial", [.base, .device, .console]),
    ("supervisor", [.supervisor]), ("guardian", [.guardian]),
  ]

  /// One line of a list with one of the values it names.
  private struct Entry {
    let name: String
    let call: String
    var tests: [(argument: Int, mask: UInt64, value: UInt64)] = []

    func allows(_ arguments: [UInt64]) -> Bool {
      tests.allSatisfy { $0.argument < arguments.count && arguments[$0.argument] & $0.mask == $0.value }
    }
  }

  private static func entries(_ list: SystemCallList) -> [Entry] {
    list.rules.flatMap { rule -> [Entry] in
      let call = SystemCall.name(rule.number)
      var all = [Entry(name: "\(list.rawValue) \(call)", call: call)]
      for condition in rule.conditions {
        all = all.flatMap { entry -> [Entry] in
          var entry = entry
          switch condition.test {
          case .ownProcess: return [entry]
          case .masked(let mask, let value) where mask != .max:
            entry.tests.append((condition.argument, mask, value))
            return [entry]
          case .masked(_, let value): return [with(entry, condition.argument, value)]
          case .anyOf(let values): return values.map { with(entry, condition.argument, $0) }
          }
        }
      }
      return all
    }
  }

  private static func with(_ entry: Entry, _ argument: Int, _ value: UInt64) -> Entry {
    Entry(name: entry.name + " 0x" + String(value, radix: 16), call: entry.call, tests: entry.tests + [(argument, .max, value)])
  }

  private static let trace = ["/usr/bin/strace", "-f", "-qq", "-X", "raw", "-e", "raw=!clone3", "--decode-pids=comm,pidns", "-o", "trace"]

  private struct Call {
    let thread: Int
    let name: Substring
    let call: Substring
    let arguments: [UInt64]
    /// Whether it came back, or its thread went on to another. Of a thread that is killed while it is stopped for strace, the last lines mean
    /// nothing: there are no registers any more, and what is printed may be another thread's call, of another process.
    var isSure: Bool
  }

  /// `4711<blk0> io_uring_enter(0xb, 0x1, ...`: who, what, with what.
  private static func calls(_ path: String) throws -> [Call] {
    let line = #/^(\d+)<([^>]*)> +(\w+)\((.*)$/#
    let other = #/^(\d+)<[^>]*> +(.*)$/#
    var calls: [Call] = []
    var last: [Int: Int] = [:]
    for text in try String(contentsOfFile: path, encoding: .utf8).split(separator: "\n") {
      if let match = text.wholeMatch(of: line), let thread = Int(match.1) {
        if let index = last[thread] { calls[index].isSure = true }
        let arguments = match.4.prefix { $0 != ")" && $0 != "<" }.split(separator: ",").compactMap { word -> UInt64? in
          let word = word.split(separator: " ").first ?? ""
          return word.hasPrefix("0x") ? UInt64(word.dropFirst(2), radix: 16) : UInt64(word)
        }
        last[thread] = calls.count
        calls.append(Call(thread: thread, name: match.2, call: match.3, arguments: arguments, isSure: isResult(match.4)))
      } else if let match = text.wholeMatch(of: other), let thread = Int(match.1), let index = last[thread] {
        if match.2.hasPrefix("+++") { last[thread] = nil } else if isResult(match.2) { calls[index].isSure = true }
      }
    }
    return calls
  }

  /// `...) = 0x1`, and neither `= ?` nor `= -1 (errno 18446744073709551384)`.
  private static func isResult(_ text: Substring) -> Bool {
    guard let result = text.split(separator: " = ").last, result.endIndex == text.endIndex, result.startIndex != text.startIndex else {
      return false
    }
    return !result.hasPrefix("?") && !result.contains("(errno ")
  }

  /// Who made each thread: `4711<blk0> clone3({...}, 88) = 3<blk0> /* 4715 in strace's PID NS */`.
  private static func makers(_ path: String) throws -> [Int: Int] {
    let line = #/^(\d+)<[^>]*> +(?:<... )?clone3.* = (\d+)<[^>]*>(?: /\* (\d+) in .*)?$/#
    var makers: [Int: Int] = [:]
    for text in try String(contentsOfFile: path, encoding: .utf8).split(separator: "\n") {
      guard let match = text.wholeMatch(of: line), let maker = Int(match.1), let thread = Int(match.3 ?? match.2) else { continue }
      makers[thread] = maker
    }
    return makers
  }

  /// The entries that threads behind their filters have used.
  private static func used(_ path: String, blockList: SystemCallList) throws -> Set<String> {
    var found: Set<String> = []
    var walled: Set<Int> = []
    // Threads of a disk's process have their filter when its first thread says so; they come after it.
    var disks: Set<Int> = []
    let makers = try makers(path)
    func disk(of thread: Int) -> Int {
      var owner = thread
      for _ in 0..<64 where !disks.contains(owner) {
        guard let maker = makers[owner] else { return thread }
        owner = maker
      }
      return owner
    }
    // One that is upgraded bears the program's name for a moment.
    var supervisors: Set<Int> = []
    var table: [String: [Entry]] = [:]
    for (prefix, lists) in roles {
      table[prefix] = lists.map { $0 == .block ? blockList : $0 }.flatMap(entries)
    }
    for line in try calls(path) {
      let (thread, name, call, arguments) = (line.thread, line.name, line.call, line.arguments)
      let shown = supervisors.contains(thread) ? "supervisor" : name
      guard let role = roles.first(where: { shown.hasPrefix($0.prefix) }) else { continue }
      // A process gives up its files before it makes threads, which bear its name at first.
      if role.lists.contains(.block), call.hasPrefix("landlock") { disks.insert(thread) }
      if call == "seccomp" {
        // SECCOMP_SET_MODE_FILTER
        if arguments.first == 1 {
          walled.insert(thread)
          if role.prefix == "supervisor" { supervisors.insert(thread) }
        }
        continue
      }
      // The one exec, whose number the list does not know.
      if role.prefix == "supervisor", call == "execveat", arguments.count > 4, arguments[4] == 0x1000 { continue }
      let owner = role.prefix == "queue" || role.prefix == "calls" ? disk(of: thread) : thread
      guard walled.contains(owner) else { continue }
      if let entry = table[role.prefix]?.first(where: { $0.call == call && $0.allows(arguments) }) {
        found.insert(entry.name)
      } else if line.isSure {
        Issue.record("\(name) made \(call)\(arguments.map { String($0, radix: 16) }) behind its filter, and lives")
      }
    }
    return found
  }

  @Test func everyEntryIsUsedByAVMAtWork() throws {
    defer { Self.releaseLoopDevice() }
    var found = try work()
    found.formUnion(try withoutRings())
    found.formUnion(try atATerminal())
    found.formUnion(try withoutACache())
    found.formUnion(try dyingAtWork())
    found.formUnion(try crashing())
    let all = SystemCallList.allCases.flatMap(Self.entries).map(\.name)
    var rare = Self.rare
    if Self.loopDevice == nil {
      rare["block ioctl 0x80081272"] = "BLKGETSIZE64: this host has no loop devices to be a disk that is resized"
      rare["block-calls ioctl 0x80081272"] = "as in block"
    }
    let others = Self.elsewhere.flatMap(\.entries)
    let unused = all.filter { !found.contains($0) && rare[$0] == nil && !others.contains($0) }
    #expect(unused.isEmpty, "\(unused)")
    let unknown = (Self.rare.keys + others).filter { !all.contains($0) }
    #expect(unknown.isEmpty, "these are excused and stand in no list: \(unknown)")
    // An excuse more must replace one.
    #expect(Self.rare.count <= 13)
    let isolation = URL(fileURLWithPath: #filePath).deletingLastPathComponent().deletingLastPathComponent().path + "/IsolationTests"
    let tests = try FileManager.default.contentsOfDirectory(atPath: isolation).map {
      try String(contentsOfFile: isolation + "/" + $0, encoding: .utf8)
    }
    for (test, _) in Self.elsewhere { #expect(tests.contains { $0.contains("func \(test)(") }, "there is no \(test)") }
  }

  /// A VM with every device, whose guest works, whose devices die, which is paused, reset and ended.
  private func work() throws -> Set<String> {
    let vm = try MicroVM()
    let program = try vm.start(
      "test=boot,pci,registers,msix,blk,net,kick,console,idle n=60 span=1 bytes=2000 ms=300000",
      vm.disk("disk.img", mebibytes: 16, ",poll=200") + Self.loopDisk() + [
        "--net", "tap=tap0", "--cpus", "boot=2", "--console", "socket=con", "--serial", "file=serial",
      ],
      below: MicroNetTests.below() + Self.trace)
    defer { program.signal(SIGKILL) }
    var line: OwnedFD?
    for _ in 0..<12_000 where line == nil {
      usleep(5000)
      line = try? UnixSocket.connect(to: vm.path("con"))
    }
    let console = try unwrap(line)
    var heard: [UInt8] = []
    let end = Date().addingTimeInterval(120)
    func listen() {
      var buffer = [UInt8](repeating: 0, count: 4096)
      if (try? console.waitUntil(.readable, timeout: .milliseconds(100))) == true {
        let got = read(console.rawValue, &buffer, buffer.count)
        if got > 0 { heard += buffer[..<got] }
      }
    }
    while Date() < end, !String(decoding: heard, as: UTF8.self).contains("READY") { listen() }
    for _ in 0..<20 {
      try console.writeAll([UInt8](repeating: 65, count: 100))
      listen()
    }
    for verb in ["info", "devices", "pause", "resume"] { _ = try vm.ctl(verb) }
    resizeLoopDisk(vm)
    let upgrade = try vm.ctl("upgrade-supervisor")
    #expect(upgrade.code == 0, "\(upgrade.output)")
    let victims = vm.processes
    for name in ["blk0", "net0", "con0"] { kill(try #require(victims[name]), SIGKILL) }
    waitWhile { program.errorText.components(separatedBy: "served again").count < 4 }
    #expect(program.errorText.components(separatedBy: "served again").count == 4, "\(program.errorText)")
    _ = try vm.ctl("power-button")
    _ = try vm.ctl("reboot")
    usleep(1_500_000)
    _ = try vm.ctl("shutdown")
    #expect(program.wait(seconds: 60).code == 0, "\(program.errorText)")
    vm.expectNothingLeft()
    return try Self.used(vm.path("trace"), blockList: .block)
  }

  /// A block device that can be a disk; it is one of ours as long as the program runs.
  private static let loopDevice: String? = {
    let file = "/tmp/martlet-need-\(getpid()).img"
    guard FileManager.default.createFile(atPath: file, contents: nil), truncate(file, 16 << 20) == 0,
      let result = try? RunningProgram("/usr/sbin/losetup", ["--find", "--show", file]).wait(), result.code == 0
    else {
      unlink(file)
      return nil
    }
    unlink(file)
    return result.output.trimmingCharacters(in: .whitespacesAndNewlines)
  }()

  private static func releaseLoopDevice() {
    if let loopDevice { _ = try? RunningProgram("/usr/sbin/losetup", ["--detach", loopDevice]).wait() }
  }

  private func resizeLoopDisk(_ vm: MicroVM) {
    guard Self.loopDevice != nil else { return }
    let answer = try? RunningProgram(BuiltPrograms.path("martlet"), ["ctl", "--control", vm.path("ctl"), "resize-disk", "blkloop"]).wait()
    #expect(answer?.code == 0, "\(answer?.errors ?? "")")
    // It is told by a signal.
    usleep(100_000)
  }

  private static func loopDisk() -> [String] { loopDevice.map { ["path=\($0),id=blkloop,num_queues=1"] } ?? [] }

  /// A disk served by ordinary calls, and a reset by a triple fault.
  private func withoutRings() throws -> Set<String> {
    let vm = try MicroVM()
    let program = try vm.start(
      "test=blk,reset by=triple n=50 span=1", vm.disk() + Self.loopDisk() + ["--cpus", "boot=1", "--serial", "file=serial"],
      below: Self.trace + [BuiltPrograms.path("martlet-hostile"), "--what=without", "--calls=io_uring_setup", "--"])
    defer { program.signal(SIGKILL) }
    let end = Date().addingTimeInterval(120)
    while Date() < end {
      usleep(20_000)
      let serial = (try? String(contentsOfFile: vm.path("serial"), encoding: .utf8)) ?? ""
      if serial.components(separatedBy: "MICRO start ok").count > 2 { break }
    }
    resizeLoopDisk(vm)
    _ = try vm.ctl("shutdown")
    #expect(program.wait(seconds: 60).code == 0, "\(program.errorText)")
    return try Self.used(vm.path("trace"), blockList: .blockCalls)
  }

  /// A disk by itself, served by ordinary calls, whose drivers ask for all that a driver can: the cases of `martlet probe check`.
  private func withoutACache() throws -> Set<String> {
    let vm = try MicroVM()
    _ = try vm.disk()
    var found: Set<String> = []
    // One on a file system without zeroing of its own, where /dev/shm is tmpfs.
    let other = "/dev/shm/martlet-need-\(getpid()).img"
    defer { unlink(other) }
    try #require(FileManager.default.createFile(atPath: other, contents: nil) && truncate(other, 16 << 20) == 0)
    for image in ["disk.img", other] + (Self.loopDevice.map { [$0] } ?? []) {
      let words =
        // Of many processes, some at the same time: each has a trace of its own. strace writes it itself, line by line: whoever stood
        // between would be killed with it, and what it still held be lost.
        ["probe", "check", "--writes", "--only", "blk.", "--", "/bin/sh", "-c"]
        + ["exec \(Self.trace.dropLast().joined(separator: " ")) checked.$$ \"$@\"", "sh"]
        + [BuiltPrograms.path("martlet-block"), "--fd={fd}", "--sandbox=on", "--aio=threads", "--blk-file=\(image)"]
      let result = try RunningProgram(BuiltPrograms.path("martlet"), words, directory: vm.directory).wait(seconds: 120)
      #expect(result.code == 0, "\(result.output)\(result.errors)")
    }
    let traces = try FileManager.default.contentsOfDirectory(atPath: vm.directory).filter { $0.hasPrefix("checked.") }
    #expect(traces.count > 10)
    for trace in traces { found.formUnion(try Self.used(vm.path(trace), blockList: .blockCalls)) }
    return found
  }

  /// A disk whose process dies while its driver is at work: the next one takes the lock behind its filter, and the core makes good
  /// what may have been missed.
  private func dyingAtWork() throws -> Set<String> {
    var found: Set<String> = []
    for (way, list) in [("io_uring", SystemCallList.block), ("threads", .blockCalls)] {
      let vm = try MicroVM()
      let program = try vm.start(
        "test=blk op=write depth=8 n=100000000 span=2",
        vm.disk("disk.img", mebibytes: 16, ",aio=\(way),poll=auto,spare=on,ops_size=200,ops_refill_time=1000") + ["--cpus", "boot=1"],
        below: Self.trace)
      defer { program.signal(SIGKILL) }
      func wait(for condition: () throws -> Bool) rethrows {
        for _ in 0..<6000 where program.isRunning {
          if try condition() { return }
          usleep(10_000)
        }
        Issue.record("In vain: \(program.errorText)")
      }
      // The spare is started when everything else has been: one that dies before that ends the VM.
      try wait {
        let devices = try vm.ctl("devices").output
        return devices.contains("\"state\":\"active\"") && devices.contains("\"ready\":true")
      }
      for round in 1...2 {
        if let pid = vm.processes["blk0"] { kill(pid, SIGKILL) }
        wait { program.errorText.components(separatedBy: "served again").count > round }
      }
      for verb in ["events", "devices", "stats"] { _ = try vm.ctl(verb) }
      _ = try vm.ctl("shutdown")
      #expect(program.wait(seconds: 60).code == 0, "\(program.errorText)")
      found.formUnion(try Self.used(vm.path("trace"), blockList: list))
    }
    return found
  }

  /// A guest that goes where nothing is: its processor's place is told.
  private func crashing() throws -> Set<String> {
    let vm = try MicroVM()
    let program = try vm.start("test=reset by=nowhere", ["--cpus", "boot=1", "--serial", "file=serial"], below: Self.trace)
    defer { program.signal(SIGKILL) }
    let result = program.wait(seconds: 60)
    #expect(result.code != 0 && result.errors.contains("at rip 0x"), "\(result)")
    return try Self.used(vm.path("trace"), blockList: .block)
  }

  /// A console on a terminal whose size changes, ended by the escape key: the terminal is put right by two processes.
  private func atATerminal() throws -> Set<String> {
    let vm = try MicroVM()
    let script = """
      import fcntl, os, pty, signal, struct, subprocess, sys, termios
      master, slave = pty.openpty()
      fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
      vm = subprocess.Popen(sys.argv[1:], stdin=slave, stdout=slave)
      seen = b""
      while b"MICRO-CONSOLE READY" not in seen: seen += os.read(master, 4096)
      fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 30, 90, 0, 0))
      supervisor = [p for p in os.listdir("/proc") if p.isdigit() and os.path.exists(f"/proc/{p}/cmdline")
                    and open(f"/proc/{p}/cmdline").read().startswith("vm/%NAME%/supervisor")]
      os.kill(int(supervisor[0]), signal.SIGWINCH)
      os.write(master, b"abc")
      while b"abc" not in seen: seen += os.read(master, 4096)
      os.write(master, b"\\x01x")
      sys.exit(vm.wait(90))
      """.replacing("%NAME%", with: vm.name)
    let words = Self.trace + (try vm.command("test=console bytes=100", ["--console", "tty", "--serial", "file=serial"]))
    let result = try RunningProgram("/usr/bin/env", ["python3", "-c", script] + words, directory: vm.directory).wait(seconds: 180)
    #expect(result.code == 0, "\(result.errors)")
    vm.expectNothingLeft()
    return try Self.used(vm.path("trace"), blockList: .block)
  }
}
