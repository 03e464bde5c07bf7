import Foundation
import HostSystem
import TestSupport
import Testing
import VMMemory
import VhostUser
import VirtioQueue
import VirtioSpec

// The kit through a program that is built with it: martlet-block.

private final class Image {
  let path = "/tmp/martlet-kit-" + UUID().uuidString
  init() {
    _ = FileManager.default.createFile(atPath: path, contents: nil)
    truncate(path, 1 << 20)
  }
  deinit { unlink(path) }
}

private func block(_ image: Image, _ arguments: [String] = []) throws -> DeviceProcess {
  try DeviceProcess("martlet-block", ["--blk-file=" + image.path, "--num-queues=1"] + arguments)
}

/// Reads sector 0 through queue 0.
private func readsASector(_ front: TestFrontEnd) throws -> Bool {
  let queue = front.queues[0]
  let header = front.allocate(16)
  _ = front.memory.copyIn([UInt8](repeating: 0, count: 16), at: header)
  let data = front.allocate(513)
  queue.offer([buffer(header, 16, isWritable: false), buffer(data, 513, isWritable: true)])
  return try queue.nextUsed().written == 513
}

private func buffer(_ address: GuestAddress, _ count: UInt32, isWritable: Bool) -> DriverBuffer {
  DriverBuffer(address, count, isDeviceWritable: isWritable)
}

@Suite struct ProgramTests {
  @Test func terminationIsCleanAndLeavesNoSocket() throws {
    let image = Image()
    let program = try block(image)
    let front = try TestFrontEnd(program.connect())
    try front.startQueue()
    check(try readsASector(front))
    program.signal(SIGTERM)
    #expect(program.exitCode() == 0)
    check(!FileManager.default.fileExists(atPath: program.socketPath))
    #expect(program.log.isEmpty)
  }

  @Test func frontEndsAreServedOneAfterAnother() throws {
    let image = Image()
    let program = try block(image)
    for _ in 0..<5 {
      let front = try TestFrontEnd(program.connect())
      try front.startQueue()
      check(try readsASector(front))
    }
    // One that breaks the protocol ends its own connection only.
    do {
      var bad = BlockingFrontEnd(try program.connect())
      bad.sendRaw([UInt8](repeating: 0xFF, count: 64))
      #expect(throws: VhostUserError.self) { while try bad.receiveRaw() != nil {} }
    }
    let front = try TestFrontEnd(program.connect())
    try front.startQueue()
    check(try readsASector(front))
    check(program.isRunning)
    #expect(program.log.contains("Connection closed"))
  }

  @Test func configurationIsPaddedWithZerosTo256() throws {
    let image = Image()
    let program = try block(image)
    let front = try TestFrontEnd(program.connect())
    let bytes = try front.configuration(256)
    #expect(bytes.count == 256)
    #expect(BlockConfiguration(decoding: bytes).capacity == 2048)
    #expect(bytes[96...].allSatisfy { $0 == 0 })
    #expect(try front.configuration(8, at: 0) == Array(bytes[..<8]))
    #expect(try front.configuration(1, at: 255) == [0])
  }

  @Test func unsealedMemoryIsTakenWithAWarningOnlyWithoutASupervisor() throws {
    let image = Image()
    let program = try block(image)
    let front = try TestFrontEnd(program.connect(), sealed: false)
    try front.startQueue()
    check(try readsASector(front))
    #expect(program.log.contains("not sealed"))
    let other = Image()
    let supervised = try DeviceProcess("martlet-block", ["--blk-file=" + other.path, "--ready-fd=2"])
    #expect(throws: (any Error).self) { try TestFrontEnd(supervised.connect(), sealed: false) }
  }

  @Test func readyIsSaidOnceItCanServe() throws {
    let image = Image()
    let program = try block(image, ["--ready-fd=2"])
    let front = try TestFrontEnd(program.connect())
    try front.startQueue()
    check(try readsASector(front))
    #expect(program.log.contains("READY\n"))
  }

  @Test func whatCannotStartSaysWhyInOneLine() throws {
    let image = Image()
    for (arguments, code, words) in [
      (["--blk-file=/no/such/file"], Int32(1), "Cannot open disk image /no/such/file"),
      (["--blk-file=/dev/null"], 1, "neither a regular file nor a block device"),
      ([], 1, "Exactly one of --blk-file"),
      (["--blk-file=" + image.path, "--blk-format=qcow2"], 2, "--blk-format is raw, not qcow2"),
      (["--blk-fil=/x"], 2, "did you mean --blk-file?"),
      (["--blk-file=" + image.path, "--queue-size=3"], 2, "power of two"),
      (["--blk-file=/x", "--fd=3"], 2, "Exactly one of --socket-path"),
    ] {
      let program = try DeviceProcess("martlet-block", arguments)
      #expect(program.exitCode() == code)
      let log = program.log
      #expect(log.contains(words))
      #expect(log.split(separator: "\n").count == 1)
      check(!FileManager.default.fileExists(atPath: program.socketPath))
    }
  }

  @Test func aSecondUserOfAnImageIsRefused() throws {
    let image = Image()
    let first = try block(image)
    _ = try first.connect()
    let second = try block(image)
    #expect(second.exitCode() == 1)
    #expect(second.log.contains("is in use by process") && second.log.contains("(martlet-block)"))
  }

  @Test func anIdleProgramMakesNoSystemCalls() throws {
    let image = Image()
    let program = try block(image)
    let front = try TestFrontEnd(program.connect())
    try front.startQueue()
    check(try readsASector(front))
    func switches() throws -> Int {
      let tasks = "/proc/\(program.processID)/task"
      return try FileManager.default.contentsOfDirectory(atPath: tasks).reduce(0) { sum, task in
        let status = (try? String(contentsOfFile: "\(tasks)/\(task)/status", encoding: .utf8)) ?? ""
        let line = status.split(separator: "\n").first { $0.hasPrefix("voluntary_ctxt_switches") }
        return sum + (line.flatMap { Int($0.split(separator: "\t").last ?? "") } ?? 0)
      }
    }
    usleep(100_000)
    let before = try switches()
    usleep(500_000)
    #expect(try switches() == before)
  }

  @Test func memoryCanBeAddedAndTakenAway() throws {
    let image = Image()
    let program = try block(image)
    let front = try TestFrontEnd(program.connect())
    try front.startQueue()
    check(try readsASector(front))
    let more = try SharedMemory.sealed(name: "more", byteCount: 1 << 20)
    let region = RegionDescription(guestAddress: 1 << 32, size: 1 << 20, userAddress: 0x6000_0000_0000, mapOffset: 0)
    _ = try front.frontEnd.request(.addMemReg(SingleRegion(region)), descriptors: [more.rawValue])
    // A read into the new region arrives there.
    let header = front.allocate(16)
    _ = front.memory.copyIn([UInt8](repeating: 0, count: 16), at: header)
    front.queues[0].offer([buffer(header, 16, isWritable: false), buffer(GuestAddress(1 << 32), 513, isWritable: true)])
    #expect(try front.queues[0].nextUsed().written == 513)
    _ = try front.frontEnd.request(.remMemReg(SingleRegion(region)))
    check(try readsASector(front))
    // Gone: a chain that points there breaks the ring.
    front.queues[0].offer([buffer(header, 16, isWritable: false), buffer(GuestAddress(1 << 32), 513, isWritable: true)])
    check(try front.queues[0].error.fd.waitUntil(.readable, timeout: .seconds(10)))
  }
}
