// Spare processes: they wait without harm, take over, and are followed by the next.

import ControlProtocol
import Foundation
import TestSupport
import Testing

@Suite(
  "Spare processes", .serialized, .enabled(if: WholeVM.canRun, "These tests need /dev/kvm and the built programs."))
struct SpareTests {
  private func device(_ home: WholeVM) throws -> JSONValue? {
    // Nothing is answered before the VM runs.
    (try? JSONValue(parsing: try home.ctl("devices").output))?["devices"]?.array?.first
  }

  /// The device's process and its spare, once both are there.
  private func pair(_ home: WholeVM, _ vm: RunningProgram) throws -> (served: Int32, spare: Int32) {
    for _ in 0..<12_000 where vm.isRunning {
      if let device = try device(home), device["state"]?.string == "active", let spare = device["spare"], spare["ready"]?.bool == true,
        let first = device["pid"]?.unsigned, let second = spare["pid"]?.unsigned
      {
        return (Int32(first), Int32(second))
      }
      usleep(5000)
    }
    throw TestFailure("There is no spare: \(try home.ctl("devices").output) \(vm.errorText)")
  }

  private func start(_ home: WholeVM, _ keys: String, _ options: [String] = []) throws -> RunningProgram {
    try home.start(
      [
        "--cmdline", "test=blk op=write depth=16 n=100000000 span=2", "--disk", "path=disk.img,spare=on" + keys, "--control", "ctl",
        "--serial", "file=serial.log",
      ] + options)
  }

  @Test("Spares take over one after another while the guest writes, with walls and without", arguments: ["on", "off"])
  func takeOver(_ walls: String) throws {
    let home = try WholeVM()
    let vm = try start(home, ",restart-limit=1000", ["--sandbox", walls])
    for round in 1...5 {
      let (served, spare) = try pair(home, vm)
      kill(served, SIGKILL)
      waitWhile { vm.isRunning && vm.errorText.components(separatedBy: "served again").count <= round }
      let device = try #require(try device(home))
      #expect(device["pid"]?.unsigned == UInt64(spare))
      #expect(home.processes["blk0"] == spare, "its title says that it serves: \(home.processes)")
      #expect(device["restarts"]?.unsigned == UInt64(round))
    }
    // One lock, on one open file, however many processes have had the image.
    _ = try pair(home, vm)
    let attempt = try RunningProgram(
      "/usr/bin/python3",
      [
        "-c",
        """
        import fcntl, struct, sys
        f = open(sys.argv[1], "r+b")
        try:
            fcntl.fcntl(f, 37, struct.pack("hhqqi4x", fcntl.F_WRLCK, 0, 0, 0, 0))
        except BlockingIOError:
            sys.exit(7)
        """, home.directory + "/disk.img",
      ]
    ).wait()
    #expect(attempt.code == 7, "the image is locked against others: \(attempt.errors)")
    vm.signal(SIGTERM)
    #expect(vm.wait().code == 143)
    let serial = (try? String(contentsOfFile: home.directory + "/serial.log", encoding: .utf8)) ?? ""
    #expect(!serial.contains("FAIL"), "\(serial.suffix(500))")
    home.expectNothingLeft()
  }

  @Test("A spare that dies harms nobody and is replaced; descriptors and processes stay as many as they were")
  func deadSpare() throws {
    let home = try WholeVM()
    let vm = try start(home, ",restart-limit=1000")
    var (served, spare) = try pair(home, vm)
    let supervisor = try #require(home.processes["supervisor"])
    func descriptors() -> Int { (try? FileManager.default.contentsOfDirectory(atPath: "/proc/\(supervisor)/fd").count) ?? -1 }
    let before = descriptors()
    let processCount = home.processes.count
    kill(spare, SIGKILL)
    let next = try pairAfter(spare, home, vm)
    #expect(next.served == served, "the device's process is the same")
    for _ in 0..<3 {
      (served, spare) = try pair(home, vm)
      kill(served, SIGKILL)
      _ = try pairAfter(spare, home, vm)
    }
    #expect(descriptors() == before)
    #expect(home.processes.count == processCount)
    vm.signal(SIGTERM)
    #expect(vm.wait().code == 143)
    home.expectNothingLeft()
  }

  private func pairAfter(_ spare: Int32, _ home: WholeVM, _ vm: RunningProgram) throws -> (served: Int32, spare: Int32) {
    for _ in 0..<2000 {
      let now = try pair(home, vm)
      if now.spare != spare { return now }
      usleep(5000)
    }
    throw TestFailure("No other spare came: \(vm.errorText)")
  }

  @Test("Keys that make no sense are refused", arguments: ["on-death=hold", "vhost_user=on,socket=s"])
  func badKeys(_ keys: String) throws {
    let home = try WholeVM()
    let image = keys.contains("socket") ? "" : "path=disk.img,"
    let result = try home.start(["--disk", image + "spare=on," + keys]).wait()
    #expect(result.code == 2)
    #expect(result.errors.contains("spare"))
    #expect(result.errors.split(separator: "\n").count == 1)
  }
}
