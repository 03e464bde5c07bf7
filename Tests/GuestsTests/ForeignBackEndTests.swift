// Back ends that are not ours, or not in Swift, under our core with a micro guest.

import Foundation
import TestSupport
import Testing

@Suite("Back ends of other makers under martlet run", .serialized, .enabled(if: MicroVM.canRun, MicroVM.cannotRun))
struct ForeignBackEndTests {
  /// A program that listens at a socket of its own, once it does.
  private func backEnd(_ words: [String], socket: String) throws -> RunningProgram {
    let program = try RunningProgram(words[0], Array(words.dropFirst()))
    let end = Date().addingTimeInterval(20)
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
    ).wait(seconds: 60)
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
    let device = try backEnd(words, socket: socket)
    let run = try vm.run("test=net n=1000 size=512 window=8", ["--net", "vhost_user=on,socket=\(socket),mac=52:54:00:12:34:56"])
    #expect(run.isClean, run.summary)
    #expect(run.report("net.echo") != nil, run.summary)
    device.signal(SIGKILL)
    _ = device.wait()
  }
}
