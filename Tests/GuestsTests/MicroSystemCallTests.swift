// What the processes of a VM ask of the kernel while the guest works and while it idles.

import Foundation
import TestSupport
import Testing

@Suite("System calls of a VM's processes", .enabled(if: MicroVM.canRun, MicroVM.cannotRun), .serialized)
struct MicroSystemCallTests {
  private static let hasStrace = access("/usr/bin/strace", X_OK) == 0

  /// System calls of the core from exec to exit, `KVM_RUN` apart, of a run with so many timed requests.
  private func coreCalls(_ options: String, requests: Int) throws -> (runs: Int, others: Int, requests: Int) {
    let vm = try MicroVM()
    // At the end the guest idles, so that the core's threads can be told from the others.
    let program = try vm.start(
      "test=blk,idle ms=1500 span=1 n=\(requests) \(options)", vm.disk(), below: ["/usr/bin/strace", "-ff", "-qq", "-o", vm.path("calls")])
    try vm.wait(for: "MICRO blk.reset", of: program)
    let core = try #require(vm.processes["core"])
    let threads = try FileManager.default.contentsOfDirectory(atPath: "/proc/\(core)/task").filter { thread in
      // A worker of the kernel's own, which shows as a thread of the process that made the VM.
      try !String(contentsOfFile: "/proc/\(core)/task/\(thread)/comm", encoding: .utf8).hasPrefix("kvm-nx-lpage")
    }
    #expect(threads.count >= 2)
    let run = MicroRun(program.wait())
    #expect(run.passed && run.exitStatus == 0, run.summary)
    vm.expectNothingLeft()
    var runs = 0
    var others = 0
    for thread in threads {
      let text = try String(contentsOfFile: vm.path("calls.\(thread)"), encoding: .utf8)
      for line in text.split(separator: "\n") where !line.hasPrefix("+++") && !line.hasPrefix("---") {
        if line.contains("KVM_RUN") { runs += 1 } else { others += 1 }
      }
    }
    // The device's own calls show that the trace sees what is there to see.
    let words = run.report("blk.speed")?.detail.split(separator: " ").map(String.init) ?? []
    let kicks = words.firstIndex(of: "kicks").flatMap { Int(words[$0 - 1]) } ?? 0
    #expect(kicks >= requests, run.summary)
    return (runs, others, kicks)
  }

  @Test(
    "the core makes no system call per request, with and without interrupts", .enabled(if: hasStrace, "strace is not installed."),
    arguments: ["wait=poll", "wait=spin", "wait=halt"])
  func theCoreIsNotInTheDataPath(_ options: String) throws {
    let few = try coreCalls(options, requests: 100)
    let many = try coreCalls(options, requests: 5100)
    // Set-up, the serial port's lines (a KVM_RUN for each byte) and the end are in both; they differ by a few digits.
    #expect(many.others - few.others < 50, "\(few) and \(many)")
    #expect(many.runs - few.runs < 100, "\(few) and \(many)")
    #expect(few.others > 50 && few.runs > 100, "\(few): the trace is empty")
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
    for _ in 0..<2000 where !ready {
      usleep(5000)
      ready = (try? String(contentsOfFile: vm.path("serial"), encoding: .utf8).contains("boot.ecam")) ?? false
    }
    #expect(ready)
    usleep(700_000)
    let processes = vm.processes
    #expect(Set(processes.keys) == ["supervisor", "guardian", "core", "blk0", "con0", "serial"])
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
