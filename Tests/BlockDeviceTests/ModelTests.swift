import Foundation
import HostSystem
import TestSupport
import Testing
import VMMemory
import VirtioQueue
import VirtioSpec

/// How a run of random requests is set up.
struct ModelCase: CustomTestStringConvertible, Sendable {
  var name: String
  var arguments: [String] = []
  var queues = 1
  var queueSize: UInt16 = 64
  var without: FeatureSet = [.packedRing]
  var usesIndirect = false
  /// Sectors of a block: ranges are whole blocks.
  var unit = 1
  /// The image lies on a file system whose device has sectors as large as a block.
  var isOnLargeSectors = false
  var seed: UInt64
  var testDescription: String { name }

  static let all: [ModelCase] = [
    ModelCase(name: "event index, direct chains", seed: 1),
    ModelCase(name: "no event index", without: [.packedRing, .eventIndex], seed: 2),
    ModelCase(name: "indirect tables", usesIndirect: true, seed: 3),
    ModelCase(name: "two queues of 256", queues: 2, queueSize: 256, usesIndirect: true, seed: 4),
    ModelCase(name: "packed ring", queues: 2, without: [], usesIndirect: true, seed: 5),
    ModelCase(name: "packed ring without event index", without: [.eventIndex], seed: 6),
    ModelCase(name: "ordinary calls", arguments: ["--aio=threads"], seed: 7),
    ModelCase(name: "write-through, no flush", without: [.packedRing, .blockFlush], usesIndirect: true, seed: 8),
    ModelCase(name: "direct access", arguments: ["--direct"], usesIndirect: true, seed: 9),
    ModelCase(name: "smallest ring", queueSize: 8, seed: 10),
    ModelCase(name: "blocks of 4096", arguments: ["--block-size=4096"], usesIndirect: true, unit: 8, seed: 13),
    ModelCase(
      name: "direct access to sectors of 4096", arguments: ["--direct"], usesIndirect: true, unit: 8, isOnLargeSectors: true, seed: 14),
    ModelCase(
      name: "the same with ordinary calls", arguments: ["--direct", "--aio=threads"], unit: 8, isOnLargeSectors: true, seed: 15),
  ]
}

/// A driver with many requests outstanding, which never overlap, and a copy of the disk as it has to be.
private final class ModelDriver {
  struct Pending {
    var type: UInt32
    var first: Int
    var count: Int
    var status: GuestAddress
    var pieces: [(address: GuestAddress, byteCount: Int)]
    var bytes: [UInt8]
  }

  static let sectors = 16384
  let rig: BlockRig
  let test: ModelCase
  var model = [UInt8](repeating: 0, count: sectors * 512)
  var random: SeededRandom
  /// By queue and head.
  var pending: [[UInt16: Pending]]
  var busy = [Bool](repeating: false, count: sectors)
  /// Guest memory by queue and slot: requests reuse it.
  var free: [[(header: GuestAddress, data: GuestAddress)]]
  static let dataByteCount = 96 << 10

  private let mounted: MountedDisk?

  init(_ test: ModelCase) throws {
    self.test = test
    random = SeededRandom(test.seed)
    mounted = test.isOnLargeSectors ? try MountedDisk(sectorSize: 4096) : nil
    let image = mounted.map { $0.place + "/image" }
    if let image {
      guard FileManager.default.createFile(atPath: image, contents: nil) else { throw TestFailure("no image") }
      truncate(image, Self.sectors * 512)
    }
    rig = try BlockRig(
      sectors: Self.sectors, image: image, queues: test.queues, queueSize: test.queueSize, arguments: test.arguments,
      wanting: { $0.subtracting(test.without) })
    pending = Array(repeating: [:], count: test.queues)
    free = []
    for _ in 0..<test.queues {
      let slots = min(48, Int(test.queueSize))
      free.append(
        (0..<slots).map { _ in (rig.front.allocate(1024, alignment: 512), rig.front.allocate(Self.dataByteCount, alignment: 512)) })
    }
  }

  /// A range nobody works on.
  func range(upTo limit: Int) -> (first: Int, count: Int)? {
    for _ in 0..<20 {
      let count = Int.random(in: 1...limit / test.unit, using: &random) * test.unit
      let first = Int.random(in: 0...(Self.sectors - count) / test.unit, using: &random) * test.unit
      if !busy[first..<(first + count)].contains(true) { return (first, count) }
    }
    return nil
  }

  func begin(_ queueIndex: Int) -> Bool {
    let queue = rig.front.queues[queueIndex]
    let memory = rig.front.memory
    guard let place = free[queueIndex].popLast() else { return false }
    var type = [0, 0, 0, 0, 1, 1, 1, 1, 4, 11, 13].randomElement(using: &random) ?? UInt32(0)
    if type == 4, test.without.contains(.blockFlush) { type = 0 }
    guard let (first, count) = range(upTo: 120) else {
      free[queueIndex].append(place)
      return false
    }
    let status = GuestAddress(place.header.rawValue + 16)
    var request = Pending(type: type, first: first, count: count, status: status, pieces: [], bytes: [])
    var sector = UInt64(first)
    var buffers: [DriverBuffer] = []
    switch type {
    case 0, 1:
      request.bytes = type == 1 ? pattern(count * 512, random.next()) : []
      // Odd starts and lengths: direct access has to bounce some of them.
      var at = place.data.rawValue + (Bool.random(using: &random) ? 0 : UInt64.random(in: 0..<2048, using: &random))
      var left = count * 512
      let pieces = Int.random(in: 1...(test.usesIndirect ? 20 : 3), using: &random)
      for piece in 0..<pieces where left > 0 {
        let length = piece == pieces - 1 ? left : Int.random(in: 1...left, using: &random)
        request.pieces.append((GuestAddress(at), length))
        at += UInt64(length)
        left -= length
      }
      var done = 0
      for piece in request.pieces {
        if type == 1 { _ = memory.copyIn(Array(request.bytes[done..<(done + piece.byteCount)]), at: piece.address) }
        done += piece.byteCount
        buffers.append(DriverBuffer(piece.address, UInt32(piece.byteCount), isDeviceWritable: type == 0))
      }
    case 4: sector = 0
    default:
      _ = memory.store(UInt64(first), at: place.data)
      _ = memory.store(UInt32(count), at: GuestAddress(place.data.rawValue + 8))
      _ = memory.store(UInt32(type == 13 && Bool.random(using: &random) ? 1 : 0), at: GuestAddress(place.data.rawValue + 12))
      buffers.append(DriverBuffer(place.data, 16, isDeviceWritable: false))
    }
    _ = memory.store(type, at: place.header)
    _ = memory.store(sector, at: GuestAddress(place.header.rawValue + 8))
    _ = memory.store(UInt8(0xAA), at: status)
    buffers.insert(DriverBuffer(place.header, 16, isDeviceWritable: false), at: 0)
    buffers.append(DriverBuffer(status, 1, isDeviceWritable: true))
    let head =
      test.usesIndirect
      ? queue.driver.addIndirect(buffers.span, table: GuestAddress(place.header.rawValue + 32)) : queue.driver.add(buffers.span)
    guard let head else {
      free[queueIndex].append(place)
      return false
    }
    if type != 4 { for index in first..<(first + count) { busy[index] = true } }
    pending[queueIndex][head] = request
    places[queueIndex][head] = place
    return true
  }

  lazy var places: [[UInt16: (header: GuestAddress, data: GuestAddress)]] = Array(repeating: [:], count: test.queues)

  func finish(_ queueIndex: Int) throws {
    let used = try rig.front.queues[queueIndex].nextUsed()
    guard let request = pending[queueIndex].removeValue(forKey: used.head), let place = places[queueIndex].removeValue(forKey: used.head)
    else { throw TestFailure("a chain came back that was not outstanding") }
    free[queueIndex].append(place)
    let memory = rig.front.memory
    guard memory.load(UInt8.self, at: request.status) == 0 else {
      throw TestFailure("request \(request.type) at \(request.first) of \(request.count) failed: \(rig.program.log)")
    }
    let range = (request.first * 512)..<((request.first + request.count) * 512)
    switch request.type {
    case 0:
      var found: [UInt8] = []
      for piece in request.pieces { found += memory.bytes(at: piece.address, count: piece.byteCount) ?? [] }
      guard found == Array(model[range]) else { throw TestFailure("wrong bytes from sector \(request.first) on") }
      guard used.written == UInt32(range.count) + 1 else { throw TestFailure("wrong length of a read") }
    case 1: model.replaceSubrange(range, with: request.bytes)
    // A hole reads as zeros on every storage these tests use.
    case 11, 13: model.replaceSubrange(range, with: repeatElement(0, count: range.count))
    default: break
    }
    if request.type != 4 { for index in request.first..<(request.first + request.count) { busy[index] = false } }
  }

  func run(_ count: Int) throws {
    var begun = 0
    var finished = 0
    while finished < count {
      for queue in 0..<test.queues {
        let batch = Int.random(in: 1...24, using: &random)
        for _ in 0..<batch where begun < count { if begin(queue) { begun += 1 } else { break } }
        rig.front.queues[queue].show()
      }
      for queue in 0..<test.queues where !pending[queue].isEmpty {
        for _ in 0..<Int.random(in: 1...pending[queue].count, using: &random) {
          try finish(queue)
          finished += 1
        }
      }
    }
  }
}

@Suite struct ModelTests {
  @Test(arguments: ModelCase.all)
  func randomRequestsAgreeWithAModelOfTheDisk(_ test: ModelCase) throws {
    guard !test.isOnLargeSectors || MountedDisk.canRun else { return }
    let driver: ModelDriver
    do { driver = try ModelDriver(test) } catch let failure as TestFailure {
      // A file system without direct access cannot be tested for it.
      if test.name == "direct access", failure.description.contains("without the page cache") { return }
      throw failure
    }
    #expect(BlockConfiguration(decoding: try driver.rig.front.configuration(96)).blockSize == UInt32(test.unit * 512))
    try driver.run(3000)
    check(driver.rig.content == driver.model, "the image is the model in the end")
  }

  @Test func aStoppedQueueGoesOnWhereItStopped() throws {
    let driver = try ModelDriver(ModelCase(name: "stop", queues: 2, seed: 11))
    for _ in 0..<20 {
      try driver.run(50)
      // Some requests are outstanding: the stop waits for them.
      for _ in 0..<10 { _ = driver.begin(0) }
      driver.rig.front.queues[0].show()
      let base = try driver.rig.front.stop(driver.rig.front.queues[0])
      try driver.rig.front.start(driver.rig.front.queues[0], base: base)
      while !driver.pending[0].isEmpty { try driver.finish(0) }
    }
    check(driver.rig.content == driver.model, "the image is the model in the end")
  }

  @Test func memoryAndDescriptorsMayBeReplacedWhileQueuesRun() throws {
    let driver = try ModelDriver(ModelCase(name: "replace", queues: 2, seed: 12))
    for round in 0..<20 {
      for _ in 0..<10 { _ = driver.begin(0) }
      driver.rig.front.queues[0].show()
      if round % 2 == 0 { try driver.rig.front.passMemory() } else { try driver.rig.front.replaceDescriptors(driver.rig.front.queues[0]) }
      while !driver.pending[0].isEmpty { try driver.finish(0) }
      try driver.run(50)
    }
    check(driver.rig.content == driver.model, "the image is the model in the end")
  }
}
