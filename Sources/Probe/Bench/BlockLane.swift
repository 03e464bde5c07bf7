import CLinux
import Glibc
import HostSystem
import VMMemory
import VirtioQueue
import VirtioSpec

/// One queue under load: `depth` requests in flight, each with a slot of header, data and status of its own. Nothing
/// allocates and no pointer is looked up between a completion and the request that replaces it. In a split ring the slots
/// are standing chains of three descriptors, so that a request writes a sector number and one entry of the ring.
@safe
struct BlockLane: ~Copyable, BenchLane, @unchecked Sendable {
  // @unchecked: handed to one thread, which is the only one to touch it.

  var ring: ProbeRing
  let job: BlockJob
  let words: LaneWords
  private let rate: CycleRate

  private let isStanding: Bool

  /// Guest addresses of slot n are start + n * stride; statuses lie side by side, 64 to a cache line, since a batch of
  /// them is written by one side and then read by the other.
  private let headers: GuestAddress
  private let statuses: GuestAddress
  private let data: GuestAddress
  /// The same memory as pointers, checked once for its whole extent.
  private let headerPointer: UnsafeMutableRawPointer
  private let statusPointer: UnsafeMutableRawPointer

  private let slotOfHead: UnsafeMutablePointer<UInt16>
  private let freeSlots: UnsafeMutablePointer<UInt16>
  private var freeCount: Int
  private var freeHead = 0
  private var freeTail = 0
  /// Per slot: when it was made available, and what it is.
  private let startCycles: UnsafeMutablePointer<UInt64>
  private let kinds: UnsafeMutablePointer<UInt8>

  private var random: UInt64
  private var cursor: UInt64 = 0
  private let blockCount: UInt64
  private let firstSector: UInt64
  private let sectorsPerBlock: UInt64
  private var writesSinceFlush = 0
  private var completed: UInt64 = 0
  private(set) var isBroken = false

  // Reads and writes apart, as fio tells them.
  private(set) var counts = LaneCounts()
  var readLatency = LatencyHistogram()
  var writeLatency = LatencyHistogram()
  private var isMeasured = false
  /// When the ring was first found empty; 0 while there is something to do.
  private var idleSince: UInt64 = 0
  private var pacer: RatePacer
  private var pace: BatchPace

  /// Where a lane's slots lie, checked.
  @unsafe
  private struct Places {
    var headers: GuestAddress
    var statuses: GuestAddress
    var data: GuestAddress
    var headerPointer: UnsafeMutableRawPointer
    var statusPointer: UnsafeMutableRawPointer
    var blockCount: UInt64
  }

  static func make(_ ring: consuming ProbeRing, _ job: BlockJob, capacity: UInt64, rate: CycleRate) throws(ProbeError) -> BlockLane {
    let places = unsafe try Self.places(ring.arena, job, capacity)
    return unsafe BlockLane(ring, job, places, rate)
  }

  private static func places(_ arena: Arena, _ job: BlockJob, _ capacity: UInt64) throws(ProbeError) -> Places {
    let depth = job.depth
    let headers = try arena.allocate(16 * depth)
    let statuses = try arena.allocate(depth)
    let data = try arena.allocate(Int(job.blockSize) * depth, alignment: 4096)
    guard let headerPointer = unsafe arena.memory.translate(headers, byteCount: UInt64(16 * depth)),
      let statusPointer = unsafe arena.memory.translate(statuses, byteCount: UInt64(depth))
    else { throw .unsuitable("The probe's own memory is cut through a request; use one region") }
    let bytes = capacity * 512
    guard job.offset < bytes else { throw .unsuitable("The disk has \(bytes) bytes, and --offset lies beyond them") }
    let span = min(job.size ?? (bytes - job.offset), bytes - job.offset)
    let blockCount = span / UInt64(job.blockSize)
    guard blockCount > 0 else {
      throw .unsuitable("The working set of \(span) bytes is smaller than one block of \(job.blockSize)")
    }
    return unsafe Places(
      headers: headers, statuses: statuses, data: data, headerPointer: headerPointer, statusPointer: statusPointer,
      blockCount: blockCount)
  }

  private init(_ ring: consuming ProbeRing, _ job: BlockJob, _ places: Places, _ rate: CycleRate) {
    let depth = job.depth
    blockCount = unsafe places.blockCount
    self.job = job
    self.rate = rate
    words = LaneWords()
    headers = unsafe places.headers
    statuses = unsafe places.statuses
    data = unsafe places.data
    unsafe headerPointer = places.headerPointer
    unsafe statusPointer = places.statusPointer
    unsafe slotOfHead = .allocate(capacity: 32768)
    unsafe slotOfHead.initialize(repeating: 0, count: 32768)
    unsafe freeSlots = .allocate(capacity: depth)
    for slot in 0..<depth { unsafe (freeSlots + slot).initialize(to: UInt16(slot)) }
    freeCount = depth
    unsafe startCycles = .allocate(capacity: depth)
    unsafe startCycles.initialize(repeating: 0, count: depth)
    unsafe kinds = .allocate(capacity: depth)
    unsafe kinds.initialize(repeating: 0, count: depth)
    firstSector = job.offset / 512
    sectorsPerBlock = UInt64(job.blockSize) / 512
    random = (job.seed &+ UInt64(ring.index) &+ 1) &* 0x9E37_79B9_7F4A_7C15
    cursor = blockCount / UInt64(max(1, job.queueCount)) * UInt64(ring.index % max(1, job.queueCount)) % blockCount
    pacer = RatePacer(rate: job.rate, laneCount: job.queueCount, rate)
    pace = BatchPace(depth: depth, rate)
    isStanding = ring.queue.allowsStandingChains && 3 * depth <= Int(ring.queue.configuration.size)
    self.ring = ring
    // SAFETY: `places` was checked for so many bytes.
    unsafe statusPointer.initializeMemory(as: UInt8.self, repeating: 0xFF, count: depth)
    guard isStanding else { return }
    self.ring.queue.beginStanding()
    for slot in 0..<depth { stand(slot, Self.kindRead) }
  }

  deinit {
    unsafe slotOfHead.deallocate()
    unsafe freeSlots.deallocate()
    unsafe startCycles.deallocate()
    unsafe kinds.deallocate()
  }

  var inFlight: Int { job.depth - freeCount }

  private static let kindRead: UInt8 = 0
  private static let kindWrite: UInt8 = 1
  private static let kindFlush: UInt8 = 2

  /// Takes what is done, offers new requests, kicks if asked to. True when anything moved.
  @inline(__always)
  mutating func turn() -> Bool {
    let phase = words.load(.phase)
    if phase == 1, !isMeasured {
      isMeasured = true
      counts = LaneCounts()
      if idleSince != 0 { idleSince = clinux_cycles() }
    }
    let moved = isStanding ? takeUsed(standing: true) : takeUsed(standing: false)
    guard phase < 2 else {
      isMeasured = false
      return moved
    }
    return refill() || moved
  }

  mutating func work(turns: Int, spinning: Bool) -> Bool {
    for _ in 0..<turns {
      if turn() {
        if spinning { leaveAlone() }
        continue
      }
      if !spinning || isBroken || words.load(.phase) >= 2 { return false }
      clinux_pause()
    }
    return true
  }

  /// Waits until enough may be done that a look is worth its while.
  @inline(__always)
  private mutating func leaveAlone() {
    var now = clinux_cycles()
    guard pace.isEarly(now), pacer.isLimiting == false else { return }
    if idleSince == 0 { idleSince = now }
    while pace.isEarly(now) {
      clinux_pause()
      now = clinux_cycles()
    }
  }

  @inline(__always)
  private mutating func takeUsed(standing: Bool) -> Bool {
    var taken = 0
    var now: UInt64 = 0
    // Bounded: no more than `depth` requests are outstanding.
    while taken <= job.depth {
      switch standing ? ring.queue.nextUsedStanding() : ring.queue.nextUsed() {
      case .used(let head, _):
        if taken == 0 { now = busy() }
        taken += 1
        // SAFETY: heads are below 32768.
        finish(standing ? Int(head) / 3 : unsafe Int(slotOfHead[Int(head)]), now)
      case .empty:
        return report(taken, now)
      case .broken:
        isBroken = true
        return false
      }
    }
    return report(taken, now)
  }

  /// The time, once for all that is taken together; waiting is over.
  @inline(__always)
  private mutating func busy() -> UInt64 {
    let now = clinux_cycles()
    if idleSince != 0 {
      counts.waitingCycles &+= now &- idleSince
      idleSince = 0
    }
    return now
  }

  @inline(__always)
  private mutating func report(_ taken: Int, _ now: UInt64) -> Bool {
    guard taken > 0 else {
      if idleSince == 0 { idleSince = clinux_cycles() }
      return false
    }
    pace.took(taken, now)
    completed &+= UInt64(taken)
    words.store(.completed, completed)
    return true
  }

  @inline(__always)
  private mutating func finish(_ slot: Int, _ now: UInt64) {
    // SAFETY (all): slot < depth.
    unsafe freeSlots[freeTail] = UInt16(truncatingIfNeeded: slot)
    freeTail = freeTail + 1 == job.depth ? 0 : freeTail + 1
    freeCount += 1
    // A status that says well is left as it is: storing 0xFF over it would cost a cache line's way for each request. That
    // statuses are written at all is for `check` to say.
    let status = unsafe clinux_load_relaxed_u8(statusPointer + slot)
    if status != 0 {
      unsafe clinux_store_relaxed_u8(statusPointer + slot, 0xFF)
      if isMeasured { counts.errors &+= 1 }
    }
    guard isMeasured else { return }
    let nanoseconds = unsafe rate.nanoseconds(now &- startCycles[slot])
    switch unsafe kinds[slot] {
    case Self.kindRead:
      counts.reads &+= 1
      readLatency.record(nanoseconds)
    case Self.kindWrite:
      counts.writes &+= 1
      writeLatency.record(nanoseconds)
    default:
      counts.flushes &+= 1
      writeLatency.record(nanoseconds)
    }
  }

  @inline(__always)
  private mutating func refill() -> Bool {
    guard freeCount > 0 else { return false }
    let now = clinux_cycles()
    let limit = pacer.take(freeCount, now)
    if limit == 0 { return false }
    for _ in 0..<limit {
      freeCount -= 1
      // SAFETY: freeCount was above zero; slots are below depth.
      let slot = unsafe Int(freeSlots[freeHead])
      freeHead = freeHead + 1 == job.depth ? 0 : freeHead + 1
      unsafe startCycles[slot] = now
      guard offer(slot) else {
        freeCount += 1
        freeHead = freeHead == 0 ? job.depth - 1 : freeHead - 1
        break
      }
    }
    if ring.queue.publish() {
      ring.kick.signal()
      if isMeasured {
        counts.kicks &+= 1
        counts.systemCalls &+= 1
      }
    }
    return true
  }

  @inline(__always)
  private mutating func offer(_ slot: Int) -> Bool {
    let kind = nextKind()
    let sector = kind == Self.kindFlush ? 0 : firstSector &+ nextBlock() &* sectorsPerBlock
    // SAFETY (all): slot < depth, for which headers and statuses were checked.
    unsafe clinux_store_relaxed_u64(headerPointer + 16 * slot + 8, sector)
    if isStanding {
      if unsafe kinds[slot] != kind { stand(slot, kind) }
      ring.queue.makeAvailable(UInt16(truncatingIfNeeded: 3 * slot))
      return true
    }
    unsafe kinds[slot] = kind
    unsafe clinux_store_relaxed_u64(headerPointer + 16 * slot, Self.wireType(kind))
    let buffers = self.buffers(slot, kind)
    guard let head = kind == Self.kindFlush ? ring.queue.add(buffers.span.extracting(first: 2)) : ring.queue.add(buffers.span) else {
      return false
    }
    unsafe slotOfHead[Int(head)] = UInt16(truncatingIfNeeded: slot)
    return true
  }

  @inline(__always)
  private static func wireType(_ kind: UInt8) -> UInt64 { kind == kindRead ? 0 : kind == kindWrite ? 1 : 4 }

  /// Header, data and status of a slot; header and status, and one of no meaning, for a flush.
  @inline(__always)
  private func buffers(_ slot: Int, _ kind: UInt8) -> InlineArray<3, DriverBuffer> {
    let offset = UInt64(slot)
    let header = DriverBuffer(GuestAddress(headers.rawValue &+ 16 &* offset), 16, isDeviceWritable: false)
    let status = DriverBuffer(GuestAddress(statuses.rawValue &+ offset), 1, isDeviceWritable: true)
    if kind == Self.kindFlush { return [header, status, status] }
    let body = DriverBuffer(
      GuestAddress(data.rawValue &+ UInt64(job.blockSize) &* offset), job.blockSize, isDeviceWritable: kind == Self.kindRead)
    return [header, body, status]
  }

  /// Writes the chain of a slot into its three descriptors; not while it is outstanding.
  private mutating func stand(_ slot: Int, _ kind: UInt8) {
    // SAFETY: slot < depth.
    unsafe kinds[slot] = kind
    unsafe clinux_store_relaxed_u64(headerPointer + 16 * slot, Self.wireType(kind))
    let buffers = self.buffers(slot, kind)
    let first = UInt16(truncatingIfNeeded: 3 * slot)
    if kind == Self.kindFlush {
      ring.queue.writeStanding(buffers.span.extracting(first: 2), at: first)
    } else {
      ring.queue.writeStanding(buffers.span, at: first)
    }
  }

  @inline(__always)
  private mutating func nextRandom() -> UInt64 {
    random ^= random << 13
    random ^= random >> 7
    random ^= random << 17
    return random
  }

  @inline(__always)
  private mutating func nextKind() -> UInt8 {
    switch job.pattern {
    case .read, .randread: return Self.kindRead
    case .flush: return Self.kindFlush
    default: break
    }
    if job.flushEvery > 0, writesSinceFlush >= job.flushEvery {
      writesSinceFlush = 0
      return Self.kindFlush
    }
    if job.pattern == .write || job.pattern == .randwrite || Int(nextRandom() >> 33) % 100 >= job.readShare {
      writesSinceFlush += 1
      return Self.kindWrite
    }
    return Self.kindRead
  }

  @inline(__always)
  private mutating func nextBlock() -> UInt64 {
    if job.pattern.isRandom { return nextRandom().multipliedFullWidth(by: blockCount).high }
    let block = cursor
    cursor = cursor &+ 1 == blockCount ? 0 : cursor &+ 1
    return block
  }

  // MARK: Sleeping

  /// Asks for a call; true when there is something to do already.
  mutating func prepareToSleep() -> Bool { ring.queue.enableCalls() }

  /// After a wait: takes the call's count.
  mutating func awake() {
    let count = ring.call.drain()
    ring.queue.disableCalls()
    if isMeasured {
      counts.calls &+= count
      counts.systemCalls &+= 2
    }
  }

  /// Whether requests wait only for their time.
  var waitsForRate: Bool { pacer.isLimiting && freeCount > 0 }

  var callDescriptors: [CInt] { [ring.call.fd.rawValue] }
  var ringIndex: Int { ring.index }

  mutating func quieten() { ring.queue.disableCalls() }
}
