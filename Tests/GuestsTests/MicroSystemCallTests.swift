// What the processes of a VM ask of the kernel while the guest works and while it idles.

import Foundation
import TestSupport
import Testing

@Suite("System calls of a VM's processes", .enabled(if: MicroVM.canRun, MicroVM.cannotRun), .serialized)
struct MicroSystemCallTests {
  private static let hasStrace = access("/usr/bin/strace", X_OK) == 0

  /// When each system call of a thread began, and which.
  private func calls(_ path: String) throws -> [(time: Double, call: Substring)] {
    try String(contentsOfFile: path, encoding: .utf8).split(separator: "\n").compactMap { line in
      let words = line.split(separator: " ", maxSplits: 1)
      guard words.count == 2, let time = Double(words[0]), !words[1].hasPrefix("+++"), !words[1].hasPrefix("---") else { return nil }
      return (time, words[1])
    }
  }

  /// The threads of a process that run its program. The kernel's own workers look like threads of the process for which
  /// they work (of its rings, from the first request that must wait; of KVM), and nobody can trace them.
  private func programThreads(_ process: Int32) throws -> [String] {
    try FileManager.default.contentsOfDirectory(atPath: "/proc/\(process)/task").filter { thread in
      // One that has ended meanwhile was such a worker: ours live as long as the guest.
      guard let text = try? String(contentsOfFile: "/proc/\(process)/task/\(thread)/stat", encoding: .utf8) else { return false }
      let fields = text[(text.lastIndex(of: ")") ?? text.startIndex)...].split(separator: " ")
      let flags = try #require(fields.count > 7 ? UInt64(fields[7]) : nil)
      // PF_IO_WORKER and PF_USER_WORKER (linux/sched.h).
      return flags & 0x4010 == 0
    }
  }

  @Test(
    "the core makes no system call per request, with and without interrupts", .enabled(if: hasStrace, "strace is not installed."),
    arguments: ["wait=poll", "wait=spin", "wait=halt"])
  func theCoreIsNotInTheDataPath(_ options: String) throws {
    let vm = try MicroVM()
    let requests = 3000
    let program = try vm.start(
      "test=blk span=1 n=\(requests) \(options)", vm.disk() + ["--console", "off"],
      below: ["/usr/bin/strace", "-ff", "-ttt", "-qq", "-o", vm.path("calls")])
    defer { program.signal(SIGKILL) }
    try vm.wait(for: "MICRO blk.config", of: program)
    let core = try #require(vm.processes["core"])
    let threads = try programThreads(core)
    let disk = try #require(vm.processes["blk0"])
    let diskThreads = try programThreads(disk)
    let run = MicroRun(program.wait(seconds: 120))
    #expect(run.isClean, run.summary)
    vm.expectNothingLeft()

    // The processor's thread leaves the guest for each byte on the serial port, and stays in it while the guest is busy with
    // its disk: its longest stay is the timed requests, whatever else they are.
    let traces = try threads.map { try calls(vm.path("calls.\($0)")) }
    let processor = try #require(traces.first { trace in trace.count { $0.call.contains("KVM_RUN") } > 100 })
    let stays = zip(processor, processor.dropFirst()).map { ($0.time, $1.time) }
    let stay = try #require(stays.max { $0.1 - $0.0 < $1.1 - $1.0 })
    let words = run.report("blk.speed")?.detail.split(separator: " ").map(String.init) ?? []
    let each = words.firstIndex(of: "ns").flatMap { Double(words[$0 - 1]) } ?? 0
    #expect(stay.1 - stay.0 >= each * Double(requests) / 1e9, run.summary)
    // The line before may still be on its way through the core when the requests begin.
    let window = (stay.0 + (stay.1 - stay.0) / 4)..<stay.1
    let coreCalls = traces.joined().filter { window.contains($0.time) }
    #expect(coreCalls.count <= 5, "\(coreCalls.prefix(20))")
    // The trace sees what is there to see: a guest that halts is called, so the disk's process makes far more calls than the core.
    // For one that looks at its ring, nobody need make any.
    let diskCalls = try diskThreads.map { try calls(vm.path("calls.\($0)")) }.joined().count { window.contains($0.time) }
    #expect(diskCalls > 50 || options != "wait=halt", "\(diskCalls) of the disk's process")
  }

  /// What of a thread changes whenever it runs: a thread that never ran made no system call.
  private func turns(_ process: Int32) throws -> [String: String] {
    var found: [String: String] = [:]
    for thread in try FileManager.default.contentsOfDirectory(atPath: "/proc/\(process)/task") {
      let text = try String(contentsOfFile: "/proc/\(process)/task/\(thread)/status", encoding: .utf8)
      let lines = text.split(separator: "\n").filter { $0.contains("ctxt_switches") || $0.hasPrefix("State:") }
      #expect(lines.count == 3)
      found["\(process)/\(thread)"] = lines.joined(separator: " ")
    }
    return found
  }

  @Test func whileTheGuestIdlesNoProcessRuns() throws {
    let vm = try MicroVM()
    let options = try vm.disk() + ["--cpus", "boot=1", "--serial", "file=serial", "--console", "socket=con"]
    let program = try vm.start("test=boot,idle ms=4000", options)
    defer { program.signal(SIGKILL) }
    var ready = false
    for _ in 0..<12_000 where !ready {
      usleep(5000)
      ready = (try? String(contentsOfFile: vm.path("serial"), encoding: .utf8).contains("boot.ecam")) ?? false
    }
    #expect(ready)
    usleep(700_000)
    let processes = vm.processes
    #expect(Set(processes.keys) == ["supervisor", "guardian", "spawner", "core", "blk0", "con0", "serial"])
    var before: [String: String] = [:]
    for pid in processes.values { before.merge(try turns(pid)) { old, _ in old } }
    usleep(1_100_000)
    var after: [String: String] = [:]
    for pid in processes.values { after.merge(try turns(pid)) { old, _ in old } }
    #expect(before == after)
    #expect(before.count >= 8, "six processes, the core with its processor's thread and the disk with its queue's: \(before)")
    let result = program.wait()
    #expect(result.code == 0, "\(result.errors)")
    #expect(try String(contentsOfFile: vm.path("serial"), encoding: .utf8).contains("MICRO done ok"))
    vm.expectNothingLeft()
  }
}
