import Glibc
import HostSystem
import VMMemory
import VhostUser
import VirtioQueue
import VirtioSpec

/// What a run of checked I/O found.
package struct VerifyResult: Sendable {
  package var writes = 0
  package var reads = 0
  package var flushes = 0
  package var kills = 0
  package var stops = 0
  package var cuts = 0
  /// A completed write is not there any more.
  package var lost: [String] = []
  /// A block holds pieces of several writes, or something never written.
  package var torn: [String] = []
  /// A block holds another block's content.
  package var misplaced: [String] = []
  /// A request was completed twice, or one that was never made.
  package var repeated: [String] = []
  /// A request was never completed.
  package var missing: [String] = []
  /// A request ended with an error status.
  package var failed: [String] = []
  package var longestGap = Duration.zero
  package var usesInflight = false
  package var isInflightOffered = false
  package var wasInterrupted = false

  package var findingCount: Int { lost.count + torn.count + misplaced.count + repeated.count + missing.count + failed.count }
}

/// Checked I/O: the expected state of every block lives here, whatever happens to the back end. One request per block at a
/// time, so that there is always one right answer, or two after a request whose end is not known.
package final class Verifier {
  package struct Plan: Sendable {
    package var blockSize = 4096
    package var depth = 16
    package var byteCount: UInt64 = 16 << 20
    /// Whether a disk with less room is refused.
    package var isExact = false
    package var duration = Duration.seconds(10)
    package var interval = Duration.seconds(1)
    package var kills = true
    package var stops = true
    package var cuts = true
    package var mayUseInflight = true
    package var seed: UInt64 = 1

    package init() {}
  }

  private struct Slot {
    enum Kind { case idle, read, write, flush }
    var kind = Kind.idle
    var block = 0
    var generation: UInt64 = 0
    var header = GuestAddress(0)
    var data = GuestAddress(0)
    var status = GuestAddress(0)
  }

  private struct Block {
    /// Of the last completed write; 0 when none was.
    var acknowledged: UInt64 = 0
    /// Of a write whose end is not known.
    var uncertain: UInt64?
    var isBusy = false
  }

  private let target: Target
  private let plan: Plan
  private let arena: Arena
  private var link: Link?
  private var ring: ProbeRing?
  private var slots: [Slot] = []
  private var slotOfHead: [Int?]
  private var blocks: [Block]
  private var random: UInt64
  private var inflight: (area: InflightDescription, fd: SharedDescriptor)?
  private var features: FeatureSet = []
  private var result = VerifyResult()
  private var lastCompletion = MonotonicTime.now
  /// The back end ended by itself, or completes nothing any more: there is nothing left to do but to tell.
  private var isOver = false
  private var nextGeneration: UInt64 = 1
  private static let ringSize: UInt16 = 128

  package init(_ target: Target, _ plan: Plan) throws(ProbeError) {
    self.target = target
    self.plan = plan
    random = plan.seed &* 0x9E37_79B9_7F4A_7C15 | 1
    arena = try Arena(byteCount: UInt64(plan.depth) * UInt64(plan.blockSize + 4096) + (1 << 20))
    slotOfHead = Array(repeating: nil, count: Int(Self.ringSize))
    blocks = []
  }

  private func nextRandom(_ limit: Int) -> Int {
    random ^= random << 13
    random ^= random >> 7
    random ^= random << 17
    return Int(random % UInt64(limit))
  }

  // MARK: The session

  /// Connects and sets up; with an inflight area of an earlier session the ring goes on where it was.
  private func connect() throws(ProbeError) {
    var link = try Link(target)
    var wanted = Link.wanted
    if !plan.mayUseInflight { wanted.remove(.inflightShmFD) }
    try link.negotiate(wanted, configurationByteCount: 60)
    if blocks.isEmpty {
      try DeviceGuess.expect(.block, link.offer, target)
      guard let space = link.offer.configuration else { throw .unsuitable("verify needs a disk, and the back end gives no configuration") }
      if link.offer.features.contains(.blockReadOnly) { throw .unsuitable("The disk is read-only; verify writes") }
      let capacity = BlockConfiguration(decoding: space).capacity
      guard capacity < 1 << 54, !plan.isExact || plan.byteCount <= capacity * 512 else {
        throw .unsuitable("The disk has \(capacity &* 512) bytes, and --size \(plan.byteCount) wants more; give it at most so many")
      }
      let count = min(plan.byteCount, capacity * 512) / UInt64(plan.blockSize)
      guard count >= UInt64(plan.depth) * 2 else {
        throw .unsuitable("The disk has room for \(count) blocks; verify needs \(plan.depth * 2)")
      }
      blocks = Array(repeating: Block(), count: Int(count))
      result.isInflightOffered = link.offer.protocolFeatures.contains(.inflightShmFD)
    }
    features = link.offer.features.intersection([.version1, .eventIndex, .blockFlush])
    try link.accept(features)
    try link.share(arena)
    try link.send(.setVringNum(VringState(index: 0, number: UInt32(Self.ringSize))))
    let isResuming = try prepareInflight(&link)
    var ring = self.ring.take()
    if ring == nil || !isResuming {
      arena.reset()
      ring = try ProbeRing(0, size: Self.ringSize, features: features, arena: arena)
      try layOut()
    }
    guard let made = ring.take() else { throw .unsuitable("The probe lost its ring") }
    // With an inflight area the back end itself knows what was taken; the base is what was given back.
    let used = arena.memory.load(UInt16.self, at: GuestAddress(made.queue.configuration.device.rawValue + 2)) ?? 0
    try link.start(made, base: UInt32(used))
    try link.ready()
    made.kick.signal()
    self.ring = consume made
    self.link = consume link
    if !isResuming { try resubmit() }
  }

  /// Gives the back end its area of earlier, or asks for one; true when there is one of earlier.
  private func prepareInflight(_ link: inout Link) throws(ProbeError) -> Bool {
    guard link.agreed.contains(.inflightShmFD) else { return false }
    if let inflight {
      try link.send(.setInflightFD(inflight.area), descriptors: [inflight.fd.fd.rawValue])
      return ring != nil
    }
    var answered = try link.perform(.getInflightFD(InflightDescription(queueCount: 1, queueSize: Self.ringSize)))
    guard case .inflight(let area) = answered.reply, area.size > 0, let fd = answered.descriptors.takeFirst() else { return false }
    try link.send(.setInflightFD(area), descriptors: [fd.rawValue])
    inflight = (area, SharedDescriptor(fd))
    result.usesInflight = true
    return false
  }

  /// Places of the slots; they are the same each time, because the arena begins anew.
  private func layOut() throws(ProbeError) {
    let isFirst = slots.isEmpty
    for index in 0..<plan.depth {
      let header = try arena.allocate(64)
      let data = try arena.allocate(plan.blockSize, alignment: 4096)
      if isFirst { slots.append(Slot()) }
      slots[index].header = header
      slots[index].status = GuestAddress(header.rawValue + 32)
      slots[index].data = data
    }
  }

  /// Without an inflight area, requests whose end is not known are made again in a fresh ring.
  private func resubmit() throws(ProbeError) {
    slotOfHead = Array(repeating: nil, count: Int(Self.ringSize))
    for index in slots.indices where slots[index].kind != .idle {
      if slots[index].kind == .write { blocks[slots[index].block].uncertain = slots[index].generation }
      try submit(index)
    }
    kick()
  }

  // MARK: Requests

  private func submit(_ index: Int) throws(ProbeError) {
    let slot = slots[index]
    let type: BlockRequestType = slot.kind == .read ? .read : slot.kind == .write ? .write : .flush
    let sector = slot.kind == .flush ? 0 : UInt64(slot.block) * UInt64(plan.blockSize / 512)
    _ = arena.memory.copyIn(BlockWire.header(type, sector), at: slot.header)
    _ = arena.memory.copyIn([0xFF], at: slot.status)
    var buffers = [DriverBuffer(slot.header, 16, isDeviceWritable: false)]
    if slot.kind == .write {
      let bytes = VerifyPattern.bytes(block: UInt64(slot.block), generation: slot.generation, byteCount: plan.blockSize, seed: plan.seed)
      _ = arena.memory.copyIn(bytes, at: slot.data)
    }
    if slot.kind != .flush { buffers.append(DriverBuffer(slot.data, UInt32(plan.blockSize), isDeviceWritable: slot.kind == .read)) }
    buffers.append(DriverBuffer(slot.status, 1, isDeviceWritable: true))
    guard let head = ring?.queue.add(buffers.span) else { throw .unsuitable("The probe's ring is full") }
    slotOfHead[Int(head)] = index
  }

  private func kick() { if ring?.queue.publish() == true { ring?.kick.signal() } }

  private func refill() throws(ProbeError) {
    var count = 0
    for index in slots.indices where slots[index].kind == .idle {
      let block = nextRandom(blocks.count)
      if blocks[block].isBusy { continue }
      let choice = nextRandom(100)
      if choice < 2, features.contains(.blockFlush) {
        slots[index].kind = .flush
      } else {
        blocks[block].isBusy = true
        slots[index].block = block
        slots[index].kind = choice < 60 || blocks[block].acknowledged == 0 ? .write : .read
        slots[index].generation = nextGeneration
        nextGeneration += 1
      }
      try submit(index)
      count += 1
    }
    if count > 0 { kick() }
  }

  /// Takes what is done, waiting a little when nothing is; false when nothing came.
  private func takeUsed(within patience: Duration) -> Bool {
    let end = MonotonicTime.now.advanced(by: patience)
    var taken = 0
    while true {
      let outcome = ring?.queue.nextUsed() ?? .empty
      switch outcome {
      case .used(let head, _):
        taken += 1
        guard let index = slotOfHead[Int(head)] else {
          result.repeated.append("chain \(head) was completed and was not outstanding")
          continue
        }
        slotOfHead[Int(head)] = nil
        finish(index)
      case .broken:
        result.repeated.append("the used ring reports what is not outstanding")
        return false
      case .empty:
        if taken > 0 { return true }
        if MonotonicTime.now >= end { return false }
        if ring?.queue.enableCalls() != true {
          _ = try? ring?.call.fd.waitUntil(.readable, timeout: .milliseconds(5))
          ring?.call.drain()
        }
      }
    }
  }

  private func finish(_ index: Int) {
    let now = MonotonicTime.now
    result.longestGap = max(result.longestGap, now.since(lastCompletion))
    lastCompletion = now
    let slot = slots[index]
    slots[index].kind = .idle
    if slot.kind != .flush { blocks[slot.block].isBusy = false }
    let status = arena.memory.bytes(at: slot.status, count: 1)?.first ?? 0xFF
    guard status == 0 else {
      if slot.kind == .write { blocks[slot.block].uncertain = slot.generation }
      result.failed.append("block \(slot.block): a \(slot.kind) ended with status \(status)")
      return
    }
    switch slot.kind {
    case .write:
      result.writes += 1
      blocks[slot.block].acknowledged = slot.generation
      blocks[slot.block].uncertain = nil
    case .read:
      result.reads += 1
      examine(slot.block, arena.memory.bytes(at: slot.data, count: plan.blockSize) ?? [])
    case .flush: result.flushes += 1
    case .idle: break
    }
  }

  private func examine(_ block: Int, _ bytes: [UInt8]) {
    let expected = blocks[block]
    guard expected.acknowledged != 0 || expected.uncertain != nil else { return }
    switch VerifyPattern.examine(bytes, block: UInt64(block), seed: plan.seed) {
    case .whole(let generation) where generation == expected.acknowledged || generation == expected.uncertain:
      // From now on it is known.
      blocks[block].acknowledged = generation
      blocks[block].uncertain = nil
    case .whole(let generation):
      result.lost.append("block \(block) holds generation \(generation) instead of \(expected.acknowledged)")
    case .misplaced(let other): result.misplaced.append("block \(block) holds block \(other)")
    case .torn:
      // Before its first write had surely ended, a block may still hold what was there before.
      if expected.acknowledged == 0 { return }
      result.torn.append("block \(block), generation \(expected.acknowledged): \(bytes.prefix(16).hexText())")
    }
  }

  private var outstanding: Int { slots.count { $0.kind != .idle } }

  // MARK: The run

  package func run(_ interruption: (Duration) -> Bool) throws(ProbeError) -> VerifyResult {
    do throws(ProbeError) { try connect() } catch { throw target.explaining(error) }
    lastCompletion = .now
    let begin = MonotonicTime.now
    let end = begin.advanced(by: plan.duration)
    var nextTrouble = begin.advanced(by: plan.interval)
    var lastProgress = begin
    while MonotonicTime.now < end, result.findingCount < 100, !isOver {
      if interruption(.zero) {
        result.wasInterrupted = true
        break
      }
      try refill()
      if !takeUsed(within: .milliseconds(200)) { notice() }
      if isOver { break }
      let now = MonotonicTime.now
      if now >= nextTrouble {
        try makeTrouble()
        nextTrouble = MonotonicTime.now.advanced(by: plan.interval)
      }
      if now.since(lastProgress) > .milliseconds(500) {
        lastProgress = now
        let left = decimal(Double(end.since(now).nanoseconds) / 1e9, 0)
        Progress.show(
          "verify: \(result.writes) writes, \(result.reads) reads, \(result.kills) kills, \(result.findingCount) findings, \(left) s left")
      }
    }
    try drain()
    try readAll()
    Progress.clear()
    if let link = link.take() { Self.close(link) }
    return result
  }

  private static func close(_ link: consuming Link) { _ = try? link.stop(0) }

  /// Nothing came for a while: the back end is dead, or stuck.
  private func notice() {
    if let end = target.collect() {
      let words = target.lastWords
      result.failed.append("the back end \(end), and nobody had killed it" + (words.isEmpty ? "" : "; it said: \(words)"))
      isOver = true
    }
    guard !isOver, MonotonicTime.now.since(lastCompletion) > target.timeout, outstanding > 0 else { return }
    for slot in slots where slot.kind != .idle {
      let what = slot.kind == .flush ? "a flush" : "block \(slot.block): a \(slot.kind)"
      result.missing.append("\(what) was not completed within \(decimal(Double(target.timeout.nanoseconds) / 1e9, 1)) s")
    }
    isOver = true
  }

  private func makeTrouble() throws(ProbeError) {
    var kinds: [Int] = []
    if plan.kills, target.isOurs { kinds.append(0) }
    if plan.stops, target.isOurs { kinds.append(1) }
    if plan.cuts, target.canReconnect { kinds.append(2) }
    guard !kinds.isEmpty else { return }
    // Something is in flight when it happens.
    try refill()
    usleep(useconds_t(nextRandom(300)))
    switch kinds[nextRandom(kinds.count)] {
    case 0:
      target.stop()
      result.kills += 1
      link = nil
      try connect()
    case 1:
      target.signal(SIGSTOP)
      usleep(200_000)
      target.signal(SIGCONT)
      result.stops += 1
    default:
      link = nil
      result.cuts += 1
      try connect()
    }
  }

  private func drain() throws(ProbeError) {
    while outstanding > 0, result.findingCount < 200, !isOver {
      if !takeUsed(within: .milliseconds(200)) { notice() }
    }
  }

  /// Every block that was ever written is read at the end.
  private func readAll() throws(ProbeError) {
    var block = 0
    while block < blocks.count || outstanding > 0, result.findingCount < 200, !isOver {
      var count = 0
      for index in slots.indices where slots[index].kind == .idle {
        while block < blocks.count, blocks[block].acknowledged == 0, blocks[block].uncertain == nil { block += 1 }
        guard block < blocks.count else { break }
        slots[index].kind = .read
        slots[index].block = block
        blocks[block].isBusy = true
        try submit(index)
        block += 1
        count += 1
      }
      if count > 0 { kick() }
      if outstanding > 0, !takeUsed(within: .milliseconds(200)) { notice() }
    }
  }
}
