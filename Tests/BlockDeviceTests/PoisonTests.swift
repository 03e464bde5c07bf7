import Foundation
import HostSystem
import TestSupport
import Testing
import VMMemory
import VirtioQueue
import VirtioSpec

/// A request that kills whoever begins it.
@Suite("A request that kills its process")
struct PoisonTests {
  private static let hasStrace = FileManager.default.isExecutableFile(atPath: "/usr/bin/strace")

  @Test(
    "It is begun four times in all and then fails by itself; what came with it does not",
    .enabled(if: hasStrace, "strace kills at the call"), arguments: [false, true])
  func poison(isPacked: Bool) throws {
    let image = "/tmp/martlet-poison-" + UUID().uuidString
    guard FileManager.default.createFile(atPath: image, contents: nil) else { throw TestFailure("no image") }
    defer { unlink(image) }
    truncate(image, 1 << 20)
    let arguments = ["--blk-file=" + image, "--num-queues=1", "--aio=threads"]
    // Reads are deadly, writes are not.
    let deadly = ["/usr/bin/strace", "-f", "-qq", "-e", "trace=preadv", "-e", "inject=preadv:signal=SIGKILL", "-o", "/dev/null"]
    var program = try DeviceProcess("martlet-block", arguments, wrapper: deadly)
    let front = try TestFrontEnd(
      try program.connect(), wanting: { isPacked ? $0.union(.packedRing) : $0.subtracting(.packedRing) })
    try front.recordInflight(queues: 1, queueSize: 64)
    let queue = try front.startQueue(size: 64)
    func offer(_ type: UInt32, _ sector: UInt64) -> (head: UInt16?, status: GuestAddress) {
      let header = front.allocate(16)
      let status = front.allocate(1)
      _ = front.memory.store(type, at: header)
      _ = front.memory.store(sector, at: GuestAddress(header.rawValue + 8))
      _ = front.memory.store(UInt8(0xAA), at: status)
      let head = queue.offer([
        DriverBuffer(header, 16, isDeviceWritable: false), DriverBuffer(front.allocate(512), 512, isDeviceWritable: type == 0),
        DriverBuffer(status, 1, isDeviceWritable: true),
      ])
      return (head, status)
    }
    let poison = offer(0, 8)
    var deaths = 0
    while deaths < 10 {
      let end = MonotonicTime.now.advanced(by: .seconds(10))
      while program.isRunning, front.memory.load(UInt8.self, at: poison.status) == 0xAA, MonotonicTime.now < end { usleep(2000) }
      if front.memory.load(UInt8.self, at: poison.status) != 0xAA { break }
      guard !program.isRunning else { throw TestFailure("neither dead nor done: \(program.log)") }
      deaths += 1
      program.kill9()
      program = try DeviceProcess("martlet-block", arguments, wrapper: deadly)
      // It may die of the request before the last message has been answered.
      _ = try? front.reconnect(try program.connect())
    }
    #expect(deaths == 1 + Virtqueue.replayLimit)
    #expect(try queue.nextUsed().head == poison.head)
    #expect(front.memory.load(UInt8.self, at: poison.status) == 1)
    let write = offer(1, 16)
    #expect(try queue.nextUsed().head == write.head)
    #expect(front.memory.load(UInt8.self, at: write.status) == 0)
    #expect(program.isRunning)
  }
}
