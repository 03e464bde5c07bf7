import ControlProtocol
import Foundation
import TestSupport
import Testing

/// What the tests of both kinds of upgrade ask and say.
extension Installation {
  /// The VM's processes by the last word of their titles.
  var members: [String: Int32] {
    Dictionary(processes.map { ($0.title.split(separator: "/").last.map(String.init) ?? "", $0.pid) }) { $1 }
  }

  static func descriptorCount(_ pid: Int32?) -> Int {
    pid.flatMap { try? FileManager.default.contentsOfDirectory(atPath: "/proc/\($0)/fd").count } ?? 0
  }

  /// A number of `ctl info`.
  func number(_ name: String) throws -> UInt64? {
    try JSONValue(parsing: try ctl("info", "--json").output)[name]?.unsigned
  }

  /// Another program takes the supervisor's place, as a package manager would do it.
  func installSupervisor(_ program: String) throws {
    let copy = try shell("cp '\(program)' new && chmod 755 new && mv new martlet-supervisor")
    try #require(copy.code == 0, "\(copy.errors)")
  }

  /// Nobody else can lock the byte by which a VM owns its image (F_OFD_SETLK).
  func expectImageIsOwned(_ location: SourceLocation = #_sourceLocation) throws {
    let lock = "import fcntl, struct; fcntl.fcntl(open('disk.img', 'r+'), 37, struct.pack('hhqqi', fcntl.F_WRLCK, 0, 1 << 62, 0, 0))"
    let other = try shell("python3 -c \"\(lock)\"")
    #expect(other.code != 0 && other.errors.contains("Resource temporarily unavailable"), "\(other.errors)", sourceLocation: location)
  }

  /// The first upgrade of a VM keeps its clients, whatever they are at; then the VM is ended.
  func expectClientsStay(_ vm: RunningProgram, _ location: SourceLocation = #_sourceLocation) throws {
    let script = """
      import json, socket
      def connect():
          s = socket.socket(socket.AF_UNIX); s.connect("ctl"); s.settimeout(20); return s
      idle, asker, half = connect(), connect(), connect()
      half.sendall(b"inf")
      follower = connect().makefile("rw")
      follower.write("events --follow\\n"); follower.flush(); json.loads(follower.readline())
      asker.sendall(b"upgrade-supervisor\\ninfo\\n")
      lines = asker.makefile()
      first = json.loads(lines.readline())
      assert first["ok"] and first["changed"] and first["upgrades"] == 1, first
      assert json.loads(lines.readline())["state"] == "running"
      idle.sendall(b"info\\n"); assert json.loads(idle.makefile().readline())["upgrades"] == 1
      half.sendall(b"o\\n"); assert json.loads(half.makefile().readline())["ok"]
      assert json.loads(follower.readline())["event"] == "upgraded"
      """
    let result = try RunningProgram("/usr/bin/env", ["python3", "-c", script], directory: directory).wait(seconds: 60)
    #expect(result.code == 0, "\(result.errors)", sourceLocation: location)
    vm.signal(SIGTERM)
    #expect(vm.wait().code == 143, sourceLocation: location)
    expectNothingLeft(location)
  }
}
