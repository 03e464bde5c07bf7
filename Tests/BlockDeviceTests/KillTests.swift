import Foundation
import HostSystem
import TestSupport
import Testing
import VMMemory
import VhostUser
import VirtioQueue
import VirtioSpec

/// `martlet-block` killed with -9 under load of every kind, again and again: its driver sees every request answered once, without
/// error, and the image has what was written, discarded and zeroed.
@Suite("A block process that is killed", .serialized)
struct KillTests {
  private static let blockByteCount = 4096
  private static let blockCount = 64
  private static let depth = 16
  /// `MARTLET_KILL_ROUNDS` asks for more than the piece that every run of the tests does.
  private static let rounds = ProcessInfo.processInfo.environment["MARTLET_KILL_ROUNDS"].flatMap { Int($0) } ?? 100

  private enum Order: UInt32, CaseIterable { case read = 0, write = 1, flush = 4, discard = 11, writeZeroes = 13 }

  private struct Request {
    /// Nil for a flush.
    var block: Int?
    /// How many processes died with it.
    var deaths = 0
    var order: Order
    var place: GuestAddress
    var status: GuestAddress
  }

  @Test("Every request is answered once and rightly over hundreds of kills", arguments: [false, true])
  func load(isPacked: Bool) throws {
    let image = "/tmp/martlet-disk-" + UUID().uuidString
    guard FileManager.default.createFile(atPath: image, contents: nil) else { throw TestFailure("no image") }
    defer { unlink(image) }
    truncate(image, Self.blockByteCount * Self.blockCount)
    let arguments = ["--blk-file=" + image, "--num-queues=1"]
    var program = try DeviceProcess("martlet-block", arguments)
    let front = try TestFrontEnd(
      try program.connect(), wanting: { isPacked ? $0.union(.packedRing) : $0.subtracting(.packedRing) })
    #expect(front.protocolFeatures.contains(.inflightShmFD))
    #expect(front.features.contains(.packedRing) == isPacked)
    try front.recordInflight(queues: 1, queueSize: 128)
    let queue = try front.startQueue(size: 128)

    var random = SeededRandom(isPacked ? 2 : 1)
    // What each block holds, by the seed of its pattern; a block has one request at a time, so order means nothing.
    var content = [UInt64](repeating: 0, count: Self.blockCount)
    var isBusy = [Bool](repeating: false, count: Self.blockCount)
    var free: [(header: GuestAddress, data: GuestAddress, status: GuestAddress)] = (0..<Self.depth).map { _ in
      (front.allocate(16), front.allocate(Self.blockByteCount, alignment: 4096), front.allocate(1, alignment: 1))
    }
    var outstanding: [UInt16: (Request, (header: GuestAddress, data: GuestAddress, status: GuestAddress), UInt64)] = [:]
    var answered = 0
    /// How often a kind of request was under way when the process was killed.
    var underWay: [Order: Int] = [:]
    let zeros = [UInt8](repeating: 0, count: Self.blockByteCount)

    func bytes(_ seed: UInt64) -> [UInt8] { seed == 0 ? zeros : pattern(Self.blockByteCount, seed) }
    func submit() throws {
      while let room = free.last {
        // Mostly reads and writes, and now and then another kind.
        let order = Order.allCases[max(0, Int(random.next() % 15) - 10)]
        let kind = order == .read && random.next() % 2 == 0 ? Order.write : order
        let block = Int(random.next() % UInt64(Self.blockCount))
        guard kind == .flush || !isBusy[block] else { return }
        let seed = kind == .write ? random.next() | 1 : 0
        _ = front.memory.store(kind.rawValue, at: room.header)
        _ = front.memory.store(UInt32(0), at: GuestAddress(room.header.rawValue + 4))
        _ = front.memory.store(kind == .read || kind == .write ? UInt64(block * 8) : 0, at: GuestAddress(room.header.rawValue + 8))
        _ = front.memory.store(UInt8(0xAA), at: room.status)
        var buffers = [DriverBuffer(room.header, 16, isDeviceWritable: false)]
        switch kind {
        case .read, .write:
          if kind == .write { _ = front.memory.copyIn(bytes(seed), at: room.data) }
          buffers.append(DriverBuffer(room.data, UInt32(Self.blockByteCount), isDeviceWritable: kind == .read))
        case .discard, .writeZeroes:
          // One range: sector, count, and whether the storage may go (of write-zeroes, half of the time).
          _ = front.memory.store(UInt64(block * 8), at: room.data)
          _ = front.memory.store(UInt32(8), at: GuestAddress(room.data.rawValue + 8))
          _ = front.memory.store(kind == .writeZeroes ? UInt32(random.next() % 2) : 0, at: GuestAddress(room.data.rawValue + 12))
          buffers.append(DriverBuffer(room.data, 16, isDeviceWritable: false))
        case .flush: break
        }
        buffers.append(DriverBuffer(room.status, 1, isDeviceWritable: true))
        guard let head = queue.offer(buffers) else { return }
        free.removeLast()
        if kind != .flush { isBusy[block] = true }
        outstanding[head] = (Request(block: kind == .flush ? nil : block, order: kind, place: room.data, status: room.status), room, seed)
      }
    }
    func collect() throws {
      while true {
        switch queue.driver.nextUsed() {
        case .empty: return
        case .broken: throw TestFailure("answered what was not outstanding")
        case .used(let head, _):
          guard let (request, room, seed) = outstanding.removeValue(forKey: head) else { throw TestFailure("answered twice") }
          let status = front.memory.load(UInt8.self, at: request.status)
          guard status == 0 else { throw TestFailure("request failed with \(String(describing: status))") }
          if let block = request.block {
            if request.order != .read {
              content[block] = seed
            } else if front.memory.bytes(at: request.place, count: Self.blockByteCount) != bytes(content[block]) {
              throw TestFailure("block \(block) reads as it should not")
            }
            isBusy[block] = false
          }
          free.append(room)
          answered += 1
        }
      }
    }

    for round in 1...Self.rounds {
      // Killed while it works: after a number of answers that differs from round to round.
      let goal = answered + Int(random.next() % 200) + 1
      let end = MonotonicTime.now.advanced(by: .seconds(60))
      // One that has been begun so often that it would be refused the next time is waited for.
      while answered < goal || outstanding.values.contains(where: { $0.0.deaths >= Virtqueue.replayLimit }) {
        try submit()
        try collect()
        guard MonotonicTime.now < end else { throw TestFailure("round \(round): no answers; \(program.log)") }
      }
      try submit()
      for head in outstanding.keys {
        outstanding[head]?.0.deaths += 1
        if let order = outstanding[head]?.0.order { underWay[order, default: 0] += 1 }
      }
      program.kill9()
      try front.reconnect(try restart(&program, arguments))
    }
    let end = MonotonicTime.now.advanced(by: .seconds(10))
    while !outstanding.isEmpty {
      try collect()
      guard MonotonicTime.now < end else { throw TestFailure("lost: \(outstanding.count) requests; \(program.log)") }
    }
    let file = try unwrap(FileManager.default.contents(atPath: image))
    for block in 0..<Self.blockCount {
      let start = block * Self.blockByteCount
      #expect(Array(file[start..<start + Self.blockByteCount]) == bytes(content[block]), "block \(block)")
    }
    #expect(answered > 50 * Self.rounds)
    for order in Order.allCases where Self.rounds >= 100 {
      #expect(underWay[order, default: 0] > Self.rounds / 10, "\(order): \(underWay)")
    }
  }

  /// The fence of whoever starts processes: what the dead one left under way holds the image's lock.
  private func restart(_ program: inout DeviceProcess, _ arguments: [String]) throws -> OwnedFD {
    let end = MonotonicTime.now.advanced(by: .seconds(10))
    while true {
      program = try DeviceProcess("martlet-block", arguments)
      do { return try program.connect() } catch {
        guard program.log.contains("in use"), MonotonicTime.now < end else { throw error }
      }
    }
  }

  @Test("An area that is too small, open to shrinking, or not made for the queue is refused")
  func hostileAreas() throws {
    let rig = try BlockRig(wanting: { $0.subtracting(.packedRing) })
    _ = try rig.front.stop(rig.front.queues[0])
    try rig.front.recordInflight(queues: 1, queueSize: 128)
    let good = try unwrap(rig.front.inflight)
    func isRefused(_ description: InflightDescription, _ fd: CInt) -> Bool {
      do {
        _ = try rig.front.frontEnd.request(.setInflightFD(description), descriptors: [fd])
        return false
      } catch { return true }
    }
    let fd = good.descriptor.fd.rawValue
    #expect(!isRefused(good.description, fd))
    #expect(isRefused(InflightDescription(size: 64, queueCount: 1, queueSize: 128), fd))
    #expect(isRefused(InflightDescription(size: good.description.size, mapOffset: 1 << 20, queueCount: 1, queueSize: 128), fd))
    #expect(isRefused(InflightDescription(size: good.description.size, mapOffset: 64, queueCount: 1, queueSize: 128), fd))
    #expect(isRefused(InflightDescription(size: good.description.size, queueCount: 1, queueSize: 1024), fd))
    #expect(isRefused(InflightDescription(size: good.description.size, queueCount: 9, queueSize: 128), fd))
    // Made for shorter queues than the one that is started with it.
    #expect(!isRefused(InflightDescription(size: good.description.size, queueCount: 1, queueSize: 64), fd))
    let start = Result { try rig.front.start(rig.front.queues[0], base: 0) }
    #expect(throws: (any Error).self) { try start.get() }
    // The process is there for the next one.
    #expect(rig.program.isRunning)
  }
}
