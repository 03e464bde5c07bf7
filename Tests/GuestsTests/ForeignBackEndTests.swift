// Back ends that are not ours, or not in Swift, under our core with a micro guest.

import Foundation
import TestSupport
import Testing

@Suite("Back ends of other makers under martlet run", .serialized, .enabled(if: MicroVM.canRun, MicroVM.cannotRun))
struct ForeignBackEndTests {
  /// A program that listens at a socket of its own, once it does.
  private func backEnd(_ words: [String], socket: String) throws -> RunningProgram {
    unlink(socket)
    let program = try RunningProgram(words[0], Array(words.dropFirst()))
    let end = Date().addingTimeInterval(60)
    while access(socket, F_OK) != 0 {
      guard program.isRunning, Date() < end else {
        throw TestFailure("\(words[0]) does not listen: \(program.wait(seconds: 0).errors)")
      }
      usleep(5000)
    }
    return program
  }

  static let example = URL(fileURLWithPath: #filePath).deletingLastPathComponent().deletingLastPathComponent()
    .deletingLastPathComponent().appendingPathComponent("docs/examples/entropy.py").path

  @Test func theExampleInPythonFillsTheBuffersOfAGuest() throws {
    let vm = try MicroVM()
    let socket = vm.directory + "-rng.sock"
    let device = try backEnd(["/usr/bin/env", "python3", Self.example, "--socket-path", socket], socket: socket)
    let options = ["--generic-vhost-user", "socket=\(socket),device_type=rng,queue_sizes=[32]"]
    for size in [64, 4096, 65536] {
      let run = try vm.run("test=rng n=500 size=\(size)", options)
      #expect(run.isClean, run.summary)
      #expect(run.report("rng.filled")?.detail == "500 buffers \(500 * min(size, 4096)) bytes", run.summary)
    }
    device.signal(SIGTERM)
    #expect(device.wait().code == 0)
    #expect(access(socket, F_OK) != 0)
  }

  @Test func theProbeFindsNothingWrongWithTheExampleInPython() throws {
    let result = try RunningProgram(
      BuiltPrograms.path("martlet-probe"), ["check", "--type", "rng", "--", Self.example, "--socket-path", "{socket}"]
    ).wait(seconds: 240)
    #expect(result.code == 0, "\(result.output) \(result.errors)")
  }

  static let testpmd = "/usr/bin/dpdk-testpmd"

  @Test(
    "DPDK's net_vhost sends a guest's frames back whole",
    .enabled(if: access(testpmd, X_OK) == 0 && geteuid() == 0, "Needs root and dpdk-testpmd (Debian's dpdk-dev)."))
  func vhost() throws {
    let vm = try MicroVM()
    let socket = vm.directory + "-net.sock"
    defer { unlink(socket) }
    let words = [
      Self.testpmd, "--no-huge", "-m", "256", "--no-pci", "--no-telemetry", "--file-prefix", vm.name, "--lcores", "0@0,1@1", "--vdev",
      "net_vhost0,iface=\(socket),queues=1", "--", "--forward-mode=macswap", "--port-topology=loop", "--stats-period", "3600",
      "--total-num-mbufs=8192",
    ]
    var device = try backEnd(words, socket: socket)
    let options = ["--net", "vhost_user=on,socket=\(socket),mac=52:54:00:12:34:56"]
    // It looks at its rings without a pause, with a lock that its other thread must win for every message about memory and rings. Where
    // that thread shares its processor with others who never sleep, it may be late for the core, which then connects anew; the
    // guest has to wait for all that, and no frame may be missing after it.
    let work = "test=net size=512 window=8 patience=100000"
    // One VM after another; the last is killed.
    let run = try vm.run("\(work) n=1000", options, seconds: 240)
    #expect(run.passed && run.exitStatus == 0, run.summary)
    let complaints = run.errors.split(separator: "\n").filter { !$0.contains("did not answer") && !$0.contains("is served again") }
    #expect(complaints.isEmpty, "\(complaints)")
    #expect(run.report("net.echo") != nil, run.summary)
    let killed = try vm.start("\(work) n=1000000", options)
    try vm.wait(for: "MICRO start", of: killed)
    killed.signal(SIGKILL)
    _ = killed.wait()
    vm.expectNothingLeft()
    // Under the third one it is killed itself, and comes back.
    let third = try vm.start("\(work) n=1000 end=hang", options)
    for round in 1...3 {
      try vm.wait(for: "MICRO done", times: round, of: third, seconds: 240)
      device.signal(SIGKILL)
      _ = device.wait()
      try vm.until(seconds: 120) { try vm.ctl("devices").output.contains("waiting-for-back-end") }
      unlink(socket)
      device = try backEnd(words, socket: socket)
      try vm.until(seconds: 120) { try !vm.ctl("devices").output.contains("waiting-for-back-end") }
      #expect(try vm.ctl("reboot").code == 0)
    }
    try vm.wait(for: "MICRO done", times: 4, of: third, seconds: 240)
    #expect(!third.outputText.contains("FAIL"), "\(third.outputText.suffix(2000))")
    third.signal(SIGTERM)
    #expect(third.wait().code == 143)
    vm.expectNothingLeft()
    device.signal(SIGKILL)
    _ = device.wait()
  }

  static let storageDaemon = "/usr/bin/qemu-storage-daemon"

  @Test(
    "QEMU's storage daemon is killed under verified writes and comes back, as often as one likes; so does our side",
    .enabled(if: access(storageDaemon, X_OK) == 0, "Needs qemu-storage-daemon (Debian's qemu-utils or qemu-system-common)."))
  func storageDaemonComesBack() throws {
    let vm = try MicroVM()
    _ = try vm.disk()
    let socket = vm.directory + "-blk.sock"
    defer { unlink(socket) }
    let words = [
      Self.storageDaemon, "--blockdev", "driver=file,node-name=f,filename=\(vm.path("disk.img"))", "--export",
      "type=vhost-user-blk,id=e,node-name=f,writable=on,addr.type=unix,addr.path=\(socket)",
    ]
    var daemon = try backEnd(words, socket: socket)
    let options = ["--disk", "vhost_user=on,socket=\(socket)"]
    // It keeps no record of requests in flight, so one at a time: a split ring alone says then where to go on. With interrupts: it drops
    // a connection whose ring has none as soon as it has something to tell.
    let killed = try vm.start("test=blk op=write wait=spin n=1000000 span=2", options)
    try vm.wait(for: "MICRO start", of: killed)
    killed.signal(SIGKILL)
    _ = killed.wait()
    vm.expectNothingLeft()
    let run = try vm.start("test=blk op=write wait=spin n=60000 span=2", options)
    try vm.wait(for: "MICRO blk.id", of: run)
    var kills = 0
    for round in 1...10 where run.isRunning {
      usleep(UInt32.random(in: 1000...50_000))
      daemon.signal(SIGKILL)
      _ = daemon.wait()
      kills += 1
      daemon = try backEnd(words, socket: socket)
      try vm.until { !run.isRunning || run.errorText.components(separatedBy: "served again").count > round }
    }
    let result = run.wait(seconds: 120)
    #expect(result.code == 0 && kills > 1, "\(kills) kills: \(result.errors.suffix(2000))")
    #expect(result.output.contains("MICRO done ok") && !result.output.contains("FAIL"), "\(result.output.suffix(2000))")
    vm.expectNothingLeft()
    daemon.signal(SIGTERM)
    _ = daemon.wait()
  }
}
