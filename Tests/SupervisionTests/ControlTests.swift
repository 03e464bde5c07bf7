import ControlProtocol
import Foundation
import Glibc
import TestSupport
import Testing

/// `martlet ctl` against a VM of fake processes.
@Suite(.enabled(if: Installation.canRun, "These tests open /dev/kvm and need the built programs."))
struct ControlTests {
  private func withVM(_ arguments: [String] = [], _ body: (Installation, RunningProgram) throws -> Void) throws {
    let home = try Installation()
    let vm = try home.start(["--disk", "path=disk.img", "--control", "ctl", "--name", "web1"] + arguments)
    try home.waitUntilRunning()
    try body(home, vm)
    vm.signal(SIGTERM)
    _ = vm.wait()
    home.expectNothingLeft()
  }

  @Test func devicesNamesProgramPidUidStateQueuesAndFeatures() throws {
    try withVM { (home: Installation, _: RunningProgram) throws -> Void in
      let answer = try JSONValue(parsing: try home.ctl("devices", "--json").output)
      let devices = try #require(answer["devices"]?.array)
      #expect(devices.map { $0["id"]?.string } == ["blk0", "con0"])
      #expect(devices[0]["program"]?.string == "martlet-block")
      #expect(devices[0]["pid"]?.unsigned.map(Int32.init) == home.processes.first { $0.title == "vm/web1/blk0" }?.pid)
      #expect(devices[0]["state"]?.string == "active")
      #expect(devices[0]["queues"] == .array([.record(["size": .unsigned(256), "enabled": .bool(true)])]))
      #expect(devices[0]["features"] == .array([.string("EVENT_IDX"), .string("VERSION_1")]))
      #expect(devices[0]["protocol_features"] == .array([.string("REPLY_ACK")]))
      // What the kernel says of the process, though supervisor and device are behind walls.
      let usage = try #require(devices[0]["usage"])
      for key in ["cpu_ns", "memory_rss", "memory_anonymous", "memory_pss", "threads"] {
        #expect((usage[key]?.unsigned ?? 0) > 0, "\(key)")
      }
      #expect((usage["memory_rss"]?.unsigned ?? 0) < 64 << 20)
      let text = try home.ctl("devices").output.split(separator: "\n")
      #expect(text[0].contains("CPU") && text[0].contains("MEMORY  THREADS  READ"))
      #expect(text.count == 3)
      #expect(text[0].hasPrefix("DEVICE  TYPE     SLOT  PROGRAM"))
      #expect(text[1].hasPrefix("blk0    block    1     martlet-block"))
      #expect(text[1].hasSuffix("EVENT_IDX VERSION_1"))
    }
  }

  @Test func pauseAndResumeReachTheCore() throws {
    try withVM { (home: Installation, _: RunningProgram) throws -> Void in
      #expect(try home.ctl("pause").output == "paused\n")
      #expect(try home.ctl("info").output.contains("state        paused"))
      let again = try home.ctl("pause")
      #expect(again.code == 1)
      #expect(again.errors == "martlet: error: The VM is paused already\n")
      #expect(try home.ctl("resume").output == "running\n")
      #expect(try home.ctl("reboot").code == 0)
    }
  }

  @Test(arguments: ["shutdown", "power-button"]) func ordersToEnd(_ order: String) throws {
    try withVM { (home: Installation, vm: RunningProgram) throws -> Void in
      #expect(try home.ctl(order).code == 0)
      #expect(vm.wait().code == 0)
    }
  }

  @Test func nonsenseOnTheSocketHarmsNobody() throws {
    try withVM { (home: Installation, vm: RunningProgram) throws -> Void in
      let script = """
        import socket, json, time
        def talk(data):
            s = socket.socket(socket.AF_UNIX); s.connect("ctl"); s.settimeout(3)
            try:
                s.sendall(data); return s.recv(65536)
            except (ConnectionResetError, BrokenPipeError): return b""
        assert json.loads(talk(b"inof\\n")) == {"ok": False, "error": "Unknown request 'inof'; did you mean 'info'?"}
        assert json.loads(talk(b"\\xff\\xfe\\x00\\n"))["ok"] is False
        assert json.loads(talk(b"info now\\n"))["ok"] is False
        assert json.loads(talk(b"\\n"))["ok"] is False
        assert talk(b"x" * 100000) == b""
        idle = [socket.socket(socket.AF_UNIX) for _ in range(16)]
        for s in idle: s.connect("ctl")
        assert talk(b"info\\n") == b""
        for s in idle: s.close()
        answer = b""
        for _ in range(100):
            answer = talk(b"info\\n")
            if answer: break
            time.sleep(0.02)
        assert json.loads(answer)["ok"]
        two = talk(b"pause\\nresume\\n")
        assert two.count(b"\\n") >= 1
        """
      try script.write(toFile: home.directory + "/talk.py", atomically: true, encoding: .utf8)
      let result = try home.shell("python3 talk.py")
      #expect(result.code == 0, "\(result.errors)")
      #expect(vm.isRunning)
      #expect(try home.ctl("info").code == 0)
    }
  }

  @Test func coreThatDoesNotAnswerIsReported() throws {
    let home = try Installation()
    let vm = try home.start(["--control", "ctl", "--name", "core-mute"])
    try home.waitUntil("a running VM") { try home.ctl("pause").code == 0 }
    let result = try home.ctl("info")
    #expect(result.code == 1)
    #expect(result.errors == "martlet: error: The core process did not answer 'info' in time\n")
    vm.signal(SIGTERM)
    let end = vm.wait()
    #expect(end.code == 143, "\(end.errors)")
    home.expectNothingLeft()
  }

  @Test func ctlExplainsItsOwnErrors() throws {
    let home = try Installation(programs: [])
    let missing = try home.ctl("info")
    #expect(missing.code == 3)
    #expect(missing.errors == "martlet: error: No VM has the control socket 'ctl'; it is made by martlet run --control\n")
    let wrong = try home.ctl("pwer-button")
    #expect(wrong.code == 2)
    #expect(wrong.errorLines.count == 1)
    #expect(wrong.errors.contains("did you mean 'power-button'?"))
  }

  @Test func everyVerbHasHelp() throws {
    for words in [["--help"], ["run", "--help"], ["ctl", "--help"], ["doctor", "--help"], ["--version"]] {
      let result = try RunningProgram(BuiltPrograms.path("martlet"), words).wait()
      #expect(result.code == 0)
      #expect(!result.output.isEmpty)
      #expect(result.errors == "")
    }
    let wrong = try RunningProgram(BuiltPrograms.path("martlet"), ["rnu"]).wait()
    #expect(wrong.code == 2)
    #expect(wrong.errors == "martlet: error: Unknown command 'rnu'; did you mean martlet run?\n")
  }
}
