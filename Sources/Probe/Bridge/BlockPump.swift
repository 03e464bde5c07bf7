import CLinux
import Glibc
import HostSystem
import VMMemory
import VhostUser
import VirtioQueue
import VirtioSpec

/// What a disk can be asked to do.
package enum BlockOperation: Equatable, Sendable {
  case read, write, flush, discard
  case writeZeroes(mayUnmap: Bool)
}

/// Requests of any length to a disk over one queue: each is cut into pieces that fit a slot, and is done when all of them are.
final class BlockPump {
  /// One request. `data` is what is written, or what was read when it is done.
  final class Job {
    let operation: BlockOperation
    let offset: UInt64
    let byteCount: UInt64
    var data: [UInt8]
    /// A flush follows a write that succeeded.
    let flushesAfter: Bool
    /// Whose it is, to the one who submitted it.
    let owner: Int
    let cookie: UInt64
    /// The first status that was not 0.
    fileprivate(set) var status: UInt8 = 0
    fileprivate var submitted: UInt64 = 0
    fileprivate var pending = 0
    fileprivate var isFlushing = false

    init(
      _ operation: BlockOperation, offset: UInt64, byteCount: UInt64, data: [UInt8] = [], flushesAfter: Bool = false, owner: Int,
      cookie: UInt64
    ) {
      self.operation = operation
      self.offset = offset
      self.byteCount = byteCount
      self.data = operation == .read ? [UInt8](repeating: 0, count: Int(byteCount)) : data
      self.flushesAfter = flushesAfter
      self.owner = owner
      self.cookie = cookie
    }

    fileprivate var isCutUp: Bool { operation == .flush ? submitted > 0 : submitted == byteCount }
  }

  private struct Piece {
    var job: Job
    var offset: UInt64
    var byteCount: UInt64
  }

  private static let slotCount = 32
  private static let slotByteCount: UInt64 = 1 << 20
  // The most that every back end known takes; a request that finds no room waits.
  private static let ringSize: UInt16 = 256

  let byteCount: UInt64
  /// What every offset and length is a multiple of.
  let blockSize: UInt64
  let features: FeatureSet
  private let space: BlockConfiguration
  private var link: Link
  private var ring: ProbeRing
  private let headers: GuestAddress
  private let statuses: GuestAddress
  private let data: GuestAddress
  private var freeSlots = Array(0..<slotCount)
  private var pieces: [Piece?] = Array(repeating: nil, count: slotCount)
  private var slotOfHead = [Int](repeating: 0, count: Int(ringSize))
  private var waiting: [Job] = []
  private(set) var requestCount = 0

  init(_ target: Target) throws(ProbeError) {
    var link = try Link(target)
    do throws(ProbeError) { try link.negotiate(configurationByteCount: BlockConfiguration.commonByteCount) } catch {
      throw target.explaining(error)
    }
    try DeviceGuess.expect(.block, link.offer, target)
    guard let bytes = link.offer.configuration else { throw .unsuitable("The back end gives no configuration space; is it a disk?") }
    let space = BlockConfiguration(decoding: bytes)
    guard space.capacity > 0, space.capacity < 1 << 54 else {
      throw .unsuitable("The disk has no room: its capacity is \(space.capacity) sectors")
    }
    features = link.offer.features.intersection([
      .version1, .eventIndex, .blockFlush, .blockReadOnly, .blockBlockSize, .blockDiscard, .blockWriteZeroes, .blockSizeMax,
      .blockSegMax,
    ])
    blockSize =
      features.contains(.blockBlockSize) && space.blockSize >= 512 && space.blockSize <= 65536
        && space.blockSize & (space.blockSize - 1) == 0 ? UInt64(space.blockSize) : 512
    byteCount = space.capacity * 512
    self.space = space
    try link.accept(features)
    let ringBytes = UInt64(VirtqueueConfiguration.contiguousByteCount(size: Self.ringSize, features: features))
    let arena = try Arena(byteCount: UInt64(Self.slotCount) * (Self.slotByteCount + 256) + ringBytes + (1 << 20))
    ring = try ProbeRing(0, size: Self.ringSize, features: features, arena: arena)
    headers = try arena.allocate(64 * Self.slotCount)
    statuses = try arena.allocate(64 * Self.slotCount)
    data = try arena.allocate(Int(Self.slotByteCount) * Self.slotCount, alignment: 4096)
    try link.share(arena)
    try link.start(ring)
    try link.ready()
    self.link = link
  }

  var socket: CInt { link.frontEnd.socketNumber }
  var call: CInt { ring.call.fd.rawValue }
  var isReadOnly: Bool { features.contains(.blockReadOnly) }
  var hasFlush: Bool { features.contains(.blockFlush) }
  var hasDiscard: Bool { features.contains(.blockDiscard) && space.maxDiscardSectors > 0 }
  var hasWriteZeroes: Bool { features.contains(.blockWriteZeroes) && space.maxWriteZeroesSectors > 0 }

  /// Data segments of a request: how long each may be, and how many.
  private var segmentLimit: (byteCount: UInt64, count: Int) {
    // A limit of zero, as some give, is none.
    let each = features.contains(.blockSizeMax) && space.sizeMax > 0 ? UInt64(space.sizeMax) : Self.slotByteCount
    let count = features.contains(.blockSegMax) && space.segmentMax > 0 ? Int(min(space.segmentMax, 12)) : 1
    return (min(each, Self.slotByteCount), count)
  }

  /// The most that one piece may cover.
  private func pieceLimit(_ operation: BlockOperation) -> UInt64 {
    let limit: UInt64
    switch operation {
    case .read, .write: limit = min(Self.slotByteCount, segmentLimit.byteCount * UInt64(segmentLimit.count))
    case .discard: limit = UInt64(space.maxDiscardSectors) * 512
    case .writeZeroes: limit = UInt64(space.maxWriteZeroesSectors) * 512
    case .flush: limit = 0
    }
    return max(blockSize, limit / blockSize * blockSize)
  }

  func submit(_ job: Job) {
    requestCount += 1
    waiting.append(job)
  }

  /// Gives the back end what waits, as far as there is room.
  func start() {
    var isKicked = false
    // Bounded: every turn of the inner loop takes a slot, every turn of the outer one a job.
    while let job = waiting.first {
      while !job.isCutUp, let slot = freeSlots.popLast() {
        guard place(job, slot) else {
          freeSlots.append(slot)
          break
        }
      }
      guard job.isCutUp else { break }
      waiting.removeFirst()
    }
    isKicked = ring.queue.publish()
    if isKicked { ring.kick.signal() }
  }

  /// One piece into a slot and the ring; false when the ring is full.
  private func place(_ job: Job, _ slot: Int) -> Bool {
    let memory = ring.arena.memory
    let header = GuestAddress(headers.rawValue + UInt64(64 * slot))
    let status = GuestAddress(statuses.rawValue + UInt64(64 * slot))
    let body = GuestAddress(data.rawValue + Self.slotByteCount * UInt64(slot))
    let operation = job.isFlushing ? .flush : job.operation
    let offset = job.offset + job.submitted
    let count = operation == .flush ? 0 : min(job.byteCount - job.submitted, pieceLimit(operation))
    var buffers = [DriverBuffer(header, 16, isDeviceWritable: false)]
    let type: BlockRequestType
    var sector = offset / 512
    switch operation {
    case .read, .write:
      type = operation == .read ? .read : .write
      if operation == .write {
        let first = Int(job.submitted)
        guard memory.copyIn(Array(job.data[first..<first + Int(count)]), at: body) else { return false }
      }
      var done: UInt64 = 0
      // Bounded by the piece's limit: at most twelve segments.
      while done < count {
        let length = min(count - done, segmentLimit.byteCount)
        buffers.append(
          DriverBuffer(GuestAddress(body.rawValue + done), UInt32(length), isDeviceWritable: operation == .read))
        done += length
      }
    case .flush:
      type = .flush
      sector = 0
    case .discard, .writeZeroes:
      type = operation == .discard ? .discard : .writeZeroes
      sector = 0
      guard memory.copyIn(BlockWire.segment(offset / 512, UInt32(count / 512), operation == .writeZeroes(mayUnmap: true) ? 1 : 0), at: body)
      else { return false }
      buffers.append(DriverBuffer(body, 16, isDeviceWritable: false))
    }
    buffers.append(DriverBuffer(status, 1, isDeviceWritable: true))
    guard memory.copyIn(BlockWire.header(type, sector), at: header), memory.copyIn([0xFF], at: status),
      let head = ring.queue.add(buffers.span)
    else { return false }
    slotOfHead[Int(head)] = slot
    pieces[slot] = Piece(job: job, offset: job.submitted, byteCount: count)
    job.submitted += operation == .flush && !job.isFlushing ? 1 : count
    job.pending += 1
    return true
  }

  /// What is done now.
  func collect() throws(ProbeError) -> [Job] {
    var done: [Job] = []
    repeat {
      // Bounded: no more than all slots are outstanding.
      loop: while true {
        switch ring.queue.nextUsed() {
        case .used(let head, _): if let job = finish(slotOfHead[Int(head)]) { done.append(job) }
        case .empty: break loop
        case .broken: throw .notVhostUser("the used ring reports a chain that is not outstanding, or too many")
        }
      }
    } while ring.queue.enableCalls()
    return done
  }

  /// After a call.
  func drainCalls() { ring.call.drain() }

  private func finish(_ slot: Int) -> Job? {
    guard let piece = pieces[slot] else { return nil }
    pieces[slot] = nil
    freeSlots.append(slot)
    let job = piece.job
    let memory = ring.arena.memory
    let status = memory.load(UInt8.self, at: GuestAddress(statuses.rawValue + UInt64(64 * slot))) ?? 0xFF
    if status != 0, job.status == 0 { job.status = status }
    if job.operation == .read, status == 0,
      let bytes = memory.bytes(at: GuestAddress(data.rawValue + Self.slotByteCount * UInt64(slot)), count: Int(piece.byteCount))
    {
      job.data.replaceSubrange(Int(piece.offset)..<Int(piece.offset + piece.byteCount), with: bytes)
    }
    job.pending -= 1
    guard job.pending == 0, job.isCutUp else { return nil }
    if job.flushesAfter, !job.isFlushing, job.status == 0, hasFlush {
      // The slot and the descriptors of this piece have just become free.
      job.isFlushing = true
      if let flush = freeSlots.popLast(), place(job, flush) {
        if ring.queue.publish() { ring.kick.signal() }
        return nil
      }
      job.status = 1
    }
    return job
  }

  func finish() { _ = try? link.stop(0) }
}
