import ControlProtocol
import Foundation
import Glibc
import TestSupport
import Testing

/// `martlet ctl events` against a VM of fake processes.
@Suite(.enabled(if: Installation.canRun, "These tests open /dev/kvm and need the built programs."))
struct EventsTests {
  private func events(_ text: String) throws -> [JSONValue] { try text.split(separator: "\n").map { try JSONValue(parsing: String($0)) } }

  @Test func everyDeathOfADeviceIsToldInOrderAndCounted() throws {
    let home = try Installation()
    let vm = try home.start(["--disk", "path=disk.img,restart-limit=0", "--control", "ctl", "--name", "web1"])
    try home.waitUntilRunning()
    kill(try #require(home.processes.first { $0.title == "vm/web1/blk0" }?.pid), SIGKILL)
    var lines: [JSONValue] = []
    try home.waitUntil("the device is given up") {
      lines = try events(try home.ctl("events", "--json").output)
      return lines.contains { $0["event"]?.string == "given-up" }
    }
    let own = lines.filter { $0["device"]?.string == "blk0" }
    #expect(own.compactMap { $0["event"]?.string } == ["connected", "lost", "given-up"])
    #expect(lines.compactMap { $0["number"]?.unsigned } == Array(1...UInt64(lines.count)))
    let times = lines.compactMap { $0["time_ns"]?.unsigned }
    #expect(times.count == lines.count && times == times.sorted())
    #expect(own.last?["time"]?.string == times.last.map(WallTime.text))
    let devices = try JSONValue(parsing: try home.ctl("devices", "--json").output)["devices"]?.array
    #expect(devices?.first?["events"] == .record(["connected": .unsigned(1), "lost": .unsigned(1), "given-up": .unsigned(1)]))
    #expect(try home.ctl("events").output.split(separator: "\n").count == lines.count)
    vm.signal(SIGTERM)
    _ = vm.wait()
    home.expectNothingLeft()
  }

  /// Of more events than are kept the oldest give way. One who follows gets each, and one who does not read holds nobody up
  /// and is told how many it has missed.
  @Test func slowReadersLoseEventsAndAreToldHowMany() throws {
    let home = try Installation()
    let vm = try home.start(["--control", "ctl", "--name", "web1"])
    try home.waitUntilRunning()
    let script = """
      import socket, json
      count = 4000
      def connect():
          s = socket.socket(socket.AF_UNIX); s.connect("ctl"); s.settimeout(20); return s, s.makefile("r")
      slow, slow_lines = connect()
      slow.sendall(b"events --follow\\n")
      quick, quick_lines = connect()
      quick.sendall(b"events --follow\\n")
      first = json.loads(quick_lines.readline())
      assert first["ok"] and first["forgotten"] == 0, first
      start = first["events"][-1]["number"]
      other, other_lines = connect()
      for i in range(count):
          other.sendall(b"reboot\\n")
          assert json.loads(other_lines.readline())["ok"]
          event = json.loads(quick_lines.readline())
          assert event["event"] == "guest-reset" and event["number"] == start + 1 + i, event
      assert json.loads(slow_lines.readline())["ok"]
      got, missed, last = 0, 0, start
      while got + missed < count:
          event = json.loads(slow_lines.readline())
          if event["event"] == "missed":
              missed += event["count"]
              last += event["count"]
          else:
              got += 1
              assert event["number"] == last + 1, (event, last)
              last += 1
      assert missed > 0 and got > 100, (got, missed)
      other.sendall(b"reboot\\n")
      assert json.loads(slow_lines.readline())["number"] == last + 1
      other.sendall(b"events\\n")
      other_lines.readline()
      kept = json.loads(other_lines.readline())
      assert len(kept["events"]) == 256 and kept["forgotten"] == start + count + 1 - 256, kept["forgotten"]
      """
    try script.write(toFile: home.directory + "/follow.py", atomically: true, encoding: .utf8)
    let result = try home.shell("python3 follow.py", seconds: 60)
    #expect(result.code == 0, "\(result.errors)")
    // Followers hear of the end by the end of the connection.
    let follower = try RunningProgram(
      home.directory + "/martlet", ["ctl", "--control", "ctl", "events", "--follow"], directory: home.directory)
    home.waitUntil("the follower follows") { follower.outputText.contains("guest-reset") }
    vm.signal(SIGTERM)
    _ = vm.wait()
    #expect(follower.wait().code == 0)
    home.expectNothingLeft()
  }

  @Test(arguments: [["events", "now"], ["info", "--follow"], ["events", "--follow", "--follow"]])
  func wrongWordsAreRefused(_ words: [String]) throws {
    let result = try RunningProgram(BuiltPrograms.path("martlet"), ["ctl", "--control", "none"] + words).wait()
    #expect(result.code == 2)
    #expect(result.errorLines.count == 1)
  }
}
