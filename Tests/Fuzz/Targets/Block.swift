import DiskImage
import Glibc
import HostSystem
import VMMemory
import VirtioQueue
import VirtioSpec

@testable import BackendKit
@testable import BlockDevice

// A whole worker of the block device on storage that does as the script says: it answers at once or later, in any order, well or
// with errors, while the driver goes on.

let blockRequests = Target(
  name: "block", about: "requests of the block device, from ring to answer, on storage of the script's", seeds: blockSeeds,
  run: serveRequests)

private let bench = DeviceBench()
private let image = sure { try DiskImage(nullOf: 1 << 20) }

private func blockSeeds() -> [[UInt8]] {
  // Shape; then turns: reads, writes, flush, id, ranges, answered at once or later.
  var seeds: [[UInt8]] = []
  for type in [0, 1, 4, 8, 11, 13] as [UInt8] {
    seeds.append([0x20] + [0, type, 0, 1, 1, 0, 0, 0, 5, 3, 0, 0, type, 8, 2, 1, 1, 0, 4, 3, 0])
    seeds.append([0x21] + [0, type, 0, 1, 3, 0, 2, 0, type, 0, 1, 3, 0, 2, 3, 0, 3, 1, 3, 0])
  }
  return seeds
}

/// Storage of the script's.
private final class Stage {
  var script: Script
  var driver: RingDriver
  let desk: WorkerDesk
  /// What each busy slot wants done.
  var busy: [Int: StorageRequest] = [:]
  var events: [StorageEvent] = []
  var stops = false
  var turns = 0
  var requestCount = 0

  init(_ script: Script, _ driver: consuming RingDriver, _ desk: WorkerDesk) {
    self.script = script
    self.driver = driver
    self.desk = desk
  }

  func check(_ slot: Int, _ request: StorageRequest) {
    demand(slot >= 0 && slot < 64, "a request in slot \(slot)")
    demand(busy[slot] == nil, "slot \(slot) has two requests")
    let (end, overflow) = request.offset.addingReportingOverflow(request.byteCount)
    demand(!overflow && end <= image.byteCount, "a request beyond the disk: \(request.offset) and \(request.byteCount) bytes")
    demand(request.vectorCount <= 1024, "\(request.vectorCount) pieces")
    guard request.operation == .read || request.operation == .write else { return }
    var total: UInt64 = 0
    for index in 0..<request.vectorCount {
      guard let piece = request.vectors?[index] else { return demand(false, "pieces are missing") }
      demand(bench.room.contains(piece.iov_base, piece.iov_len), "data of a request is not guest memory")
      total += UInt64(piece.iov_len)
      if request.operation == .read { memset(piece.iov_base, 0x5A, piece.iov_len) }
    }
    demand(total == request.byteCount && total % 512 == 0, "a request of \(request.byteCount) bytes has pieces of \(total)")
  }

  func outcome() -> StorageOutcome {
    switch script.byte() & 7 {
    case 0: .failed(.inputOutput)
    case 1: .failed(.notSupported)
    default: .done
    }
  }

  /// One thing happens outside.
  func act() {
    turns += 1
    if script.isOver || turns > 4000 {
      // Everything is answered, then the worker is sent home.
      for slot in busy.keys.sorted() { events.append(.completed(slot: slot, .done)) }
      busy = [:]
      if !stops {
        stops = true
        desk.give(.leave)
      }
      events.append(.readable(token: 0))
      return
    }
    switch script.byte() % 7 {
    case 0, 1: request()
    case 2: driver.offerAny(&script)
    case 3:
      guard !busy.isEmpty else { break }
      let slots = busy.keys.sorted()
      let slot = slots[script.below(slots.count)]
      busy[slot] = nil
      events.append(.completed(slot: slot, outcome()))
    case 4: driver.collect()
    case 5: events.append(.readable(token: 1))
    default: driver.misbehave(&script)
    }
    events.append(.readable(token: 1))
  }

  /// A request as a driver would make it, more or less.
  private func request() {
    let type = script.byte()
    let how = script.byte()
    let header = driver.allocate(16)
    let memory = bench.room.memory
    _ = memory.store(UInt32(type), at: GuestAddress(header))
    let sector = how & 1 == 0 ? UInt64(how >> 1 & 15) : how & 2 == 0 ? (1 << 11) &- UInt64(script.byte()) : script.number()
    _ = memory.store(sector, at: GuestAddress(header + 8))
    var buffers = [DriverBuffer(GuestAddress(header), how & 0x40 != 0 ? UInt32(script.byte() & 31) : 16, isDeviceWritable: false)]
    let pieces = script.byte() & 7
    for _ in 0..<pieces {
      let size = script.byte() & 3 == 0 ? UInt32(script.byte()) : 512
      let place = driver.allocate(Int(size))
      if type == 11 || type == 13 {
        let segment = GuestAddress(place)
        _ = memory.store(UInt64(script.byte()), at: segment)
        _ = memory.store(script.bool() ? 8 : UInt32(truncatingIfNeeded: script.number()), at: GuestAddress(place + 8))
        _ = memory.store(UInt32(script.byte() & 3), at: GuestAddress(place + 12))
        buffers.append(DriverBuffer(segment, 16, isDeviceWritable: false))
      } else if size > 0 {
        buffers.append(DriverBuffer(GuestAddress(place), size, isDeviceWritable: type & 1 == 0))
      }
    }
    if how & 0x80 == 0 { buffers.append(DriverBuffer(GuestAddress(driver.allocate(1)), 1, isDeviceWritable: true)) }
    driver.offer(buffers, indirect: how & 0x20 != 0 && driver.configuration.features.contains(.indirectDescriptors))
  }
}

private struct ScriptedEngine: StorageEngine, ~Copyable {
  let stage: Stage

  mutating func begin(_ slot: Int, _ request: StorageRequest) -> StorageOutcome? {
    stage.check(slot, request)
    stage.requestCount += 1
    if stage.script.bool() { return stage.outcome() }
    stage.busy[slot] = request
    return nil
  }
  func foresee(_ request: StorageRequest) -> Bool { stage.script.byte() & 3 == 0 }
  mutating func copy(_ request: StorageRequest) -> CopyOutcome {
    stage.check(63, request)
    return switch stage.script.byte() & 3 {
    case 0: .no
    case 1: .ifLongEnough
    default: .whole
    }
  }
  var wholeByteCount: UInt64 { stage.script.byte() & 3 == 0 ? 512 : image.byteCount }
  mutating func wake(at time: MonotonicTime) { stage.events.append(.time) }
  mutating func watch(_ fd: CInt, token: Int) {}
  mutating func unwatch(_ fd: CInt, token: Int) {}
  mutating func turn(waiting: Bool) { stage.act() }
  mutating func nextEvent() -> StorageEvent? { stage.events.isEmpty ? nil : stage.events.removeFirst() }
  var hasPrepared: Bool { stage.script.bool() }
  var hasWork: Bool { !stage.events.isEmpty }
  var canBePolled: Bool { true }
}

private func serveRequests(_ script: inout Script) {
  let packed = script.byte() & 1 == 1
  var (size, features) = RingDriver.shape(&script, packed: packed)
  features.remove(.inOrder)
  size = min(size, 32)
  let limited = script.byte()
  let driver = RingDriver(bench.room, size: size, features)
  let queue = bench.queue(0, for: driver)
  var options = BlockOptions()
  options.greatestQueueSize = 64
  options.poll = limited & 1 == 0 ? .off : .fixed(1)
  if limited & 2 != 0 { options.operationRate = RateBucket(size: 4, refillTime: .milliseconds(1)) }
  let space = BlockConfigurationSpace(image: image, blockSize: 512, options)
  space.negotiated(limited & 4 == 0 ? space.features : .version1)
  if limited & 8 != 0 { demand(!space.write([2], at: 32), "a configuration byte that means nothing is taken") }
  let desk = sure { try WorkerDesk() }
  let stage = Stage(script, driver, desk)
  var worker = sure { try BlockQueueWorker(desk, space, ScriptedEngine(stage: stage)) }
  desk.give(.serve(queue))
  worker.run()
  demand(worker.inFlight == 0, "\(worker.inFlight) requests are in flight at the end")
  demand(stage.busy.isEmpty, "storage is busy at the end")
  let ports = sure { try QueuePorts(QueueCounters(), isServedByLoop: true) }
  guard let back = try? desk.collect(ports) else { return demand(false, "the queue does not come back") }
  checkFlight(back.ring, 0)
  stage.driver.collect()
  if stage.driver.isHonest, stage.script.isOver, stage.turns <= 4000, back.ring.brokenReason == nil {
    demand(stage.driver.collected <= stage.driver.offered, "more was answered than asked")
  }
}
