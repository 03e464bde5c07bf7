import BackendTesting
import Foundation
import HostSystem
import TestSupport
import Testing
import VhostUser
import VirtioSpec

/// Rings for which the front end gives no kick descriptor (bit 8 of `SET_VRING_KICK`): the back end looks by itself.
@Suite struct PolledRingTests {
  private static func setup(_ features: FeatureSet) -> FakeFrontEnd.Setup {
    var setup = FakeFrontEnd.Setup(queueSize: 8, features: features)
    setup.isPolled = true
    return setup
  }

  /// Reads the first sector; its bytes and the status behind them.
  private static func read(_ front: FakeFrontEnd) throws -> [UInt8] {
    try front.request([UInt8](repeating: 0, count: 16), room: 513).bytes
  }

  @Test("A device that the kit calls is asked to look, and a kick may come and go", arguments: [[], .packedRing] as [FeatureSet])
  func byTheLoop(_ features: FeatureSet) throws {
    let program = try DeviceProcess("martlet-template", [])
    let front = try FakeFrontEnd(socket: program.socketPath, Self.setup(features))
    for _ in 0..<20 { #expect(try front.request(room: 16).bytes.count == 16) }
    try front.kick(queue: 0, polled: false)
    for _ in 0..<20 { #expect(try front.request(room: 16).bytes.count == 16) }
    try front.kick(queue: 0, polled: true)
    // The first look came with the change; this one is not waited for by anybody else.
    usleep(20_000)
    #expect(try front.request(room: 16).bytes.count == 16)
    let base = try front.stop(queue: 0)
    try front.offer(room: 16)
    #expect(try front.nextAnswer(queue: 0, within: .milliseconds(30)) == nil)
    try front.start(queue: 0, base: base)
    #expect(try front.nextAnswer().bytes.count == 16)
  }

  @Test("A device with threads of its own is woken to look", arguments: ["io_uring", "threads"])
  func byAThread(_ engine: String) throws {
    let image = FileManager.default.temporaryDirectory.appendingPathComponent("polled-\(UUID().uuidString)")
    defer { try? FileManager.default.removeItem(at: image) }
    try Data(repeating: 7, count: 4096).write(to: image)
    let program = try DeviceProcess("martlet-block", ["--blk-file=" + image.path, "--aio=" + engine])
    let front = try FakeFrontEnd(socket: program.socketPath, Self.setup([]))
    let whole = [UInt8](repeating: 7, count: 512) + [0]
    for _ in 0..<20 { #expect(try Self.read(front) == whole) }
    try front.kick(queue: 0, polled: false)
    #expect(try Self.read(front) == whole)
    try front.kick(queue: 0, polled: true)
    usleep(20_000)
    #expect(try Self.read(front) == whole)
  }

  @Test("An idle ring is looked at now and then, not all the time", arguments: ["martlet-template", "martlet-block"])
  func idle(_ name: String) throws {
    let image = FileManager.default.temporaryDirectory.appendingPathComponent("idle-\(UUID().uuidString)")
    defer { try? FileManager.default.removeItem(at: image) }
    try Data(repeating: 7, count: 4096).write(to: image)
    let program = try DeviceProcess(name, name == "martlet-block" ? ["--blk-file=" + image.path] : [])
    let front = try FakeFrontEnd(socket: program.socketPath, Self.setup([]))
    if name == "martlet-block" { _ = try Self.read(front) } else { _ = try front.request(room: 1) }
    let before = try Self.ticks(program.processID)
    usleep(1_000_000)
    // Of a hundred. Spinning would take nearly all, even on a busy machine half of them.
    #expect(try Self.ticks(program.processID) - before < 20)
  }

  /// Processor time of a process, in hundredths of a second.
  private static func ticks(_ process: pid_t) throws -> Int {
    let text = try String(contentsOfFile: "/proc/\(process)/stat", encoding: .utf8)
    let fields = try #require(text.split(separator: ")").last).split(separator: " ")
    return try #require(Int(fields[11])) + (try #require(Int(fields[12])))
  }
}
