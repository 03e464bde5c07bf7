import CLinux
import Glibc
import HostSystem
import VMMemory
import VirtioQueue
import VirtioSpec

/// One ring of a network card with a buffer for each of its slots. In a split ring the slots are standing chains.
@safe
struct FrameRing: ~Copyable, @unchecked Sendable {
  // @unchecked: part of a lane, which one thread has.

  var ring: ProbeRing
  private let isStanding: Bool
  private let isReceiving: Bool
  let slotCount: Int
  /// Bytes from one buffer to the next; the buffer's own bytes, header included.
  private let stride: Int
  private let byteCount: Int
  private let start: GuestAddress
  private let pointer: UnsafeMutableRawPointer
  private let slotOfHead: UnsafeMutablePointer<UInt16>

  /// A virtio-net header as every device of version 1 has it.
  static let headerByteCount = 12

  /// - Parameter frameByteCount: without the header.
  static func make(
    _ ring: consuming ProbeRing, slotCount: Int, frameByteCount: Int, isReceiving: Bool
  ) throws(ProbeError) -> FrameRing {
    let stride = (frameByteCount + Self.headerByteCount + 63) & ~63
    let arena = ring.arena
    let start = try arena.allocate(stride * slotCount, alignment: 4096)
    guard let pointer = unsafe arena.memory.translate(start, byteCount: UInt64(stride * slotCount)) else {
      throw .unsuitable("The probe's own memory is cut through a frame")
    }
    return unsafe FrameRing(ring, slotCount, stride, frameByteCount + Self.headerByteCount, start, pointer, isReceiving)
  }

  private init(
    _ ring: consuming ProbeRing, _ slotCount: Int, _ stride: Int, _ byteCount: Int, _ start: GuestAddress,
    _ pointer: UnsafeMutableRawPointer, _ isReceiving: Bool
  ) {
    self.slotCount = slotCount
    self.stride = stride
    self.byteCount = byteCount
    self.start = start
    unsafe self.pointer = pointer
    self.isReceiving = isReceiving
    isStanding = ring.queue.allowsStandingChains
    unsafe slotOfHead = .allocate(capacity: 32768)
    unsafe slotOfHead.initialize(repeating: 0, count: 32768)
    self.ring = ring
    // SAFETY: `make` checked the buffers of all slots.
    unsafe pointer.initializeMemory(as: UInt8.self, repeating: 0, count: stride * slotCount)
    guard isStanding else { return }
    self.ring.queue.beginStanding()
    for slot in 0..<slotCount {
      let buffers: InlineArray<1, DriverBuffer> = [buffer(slot)]
      self.ring.queue.writeStanding(buffers.span, at: UInt16(slot))
    }
  }

  deinit { unsafe slotOfHead.deallocate() }

  @inline(__always)
  private func buffer(_ slot: Int) -> DriverBuffer {
    DriverBuffer(GuestAddress(start.rawValue &+ UInt64(stride &* slot)), UInt32(byteCount), isDeviceWritable: isReceiving)
  }

  /// A slot's frame, for single loads and stores within its bytes.
  @unsafe @inline(__always)
  func frame(_ slot: Int) -> UnsafeMutableRawPointer { unsafe pointer + stride &* slot + Self.headerByteCount }

  /// A copy of a frame's first bytes.
  func frameBytes(_ slot: Int, _ count: Int) -> [UInt8] {
    precondition(slot < slotCount && count <= byteCount - Self.headerByteCount, "A frame lies within its buffer")
    // SAFETY: checked just now; the device may write meanwhile, to these bytes only.
    return unsafe [UInt8](UnsafeRawBufferPointer(start: frame(slot), count: count))
  }

  /// The header that the device wrote before a frame.
  func headerBytes(_ slot: Int) -> [UInt8] {
    precondition(slot < slotCount, "A frame lies within its buffer")
    // SAFETY: every buffer begins with a header.
    return unsafe [UInt8](UnsafeRawBufferPointer(start: frame(slot) - Self.headerByteCount, count: Self.headerByteCount))
  }

  /// Puts a frame, by default with a header that says nothing, into a slot that is not available.
  func fill(_ slot: Int, _ bytes: [UInt8], header: [UInt8] = [UInt8](repeating: 0, count: Self.headerByteCount)) {
    precondition(
      slot < slotCount && bytes.count <= byteCount - Self.headerByteCount && header.count == Self.headerByteCount,
      "A frame lies within its buffer")
    // SAFETY: checked just now.
    unsafe UnsafeMutableRawBufferPointer(start: frame(slot) - Self.headerByteCount, count: Self.headerByteCount).copyBytes(from: header)
    unsafe UnsafeMutableRawBufferPointer(start: frame(slot), count: bytes.count).copyBytes(from: bytes)
  }

  /// `give` for a frame that is shorter than the buffer.
  mutating func give(_ slot: Int, frameByteCount: Int) -> Bool {
    let length = UInt32(frameByteCount + Self.headerByteCount)
    let buffers: InlineArray<1, DriverBuffer> = [DriverBuffer(buffer(slot).address, length, isDeviceWritable: isReceiving)]
    if isStanding {
      ring.queue.writeStanding(buffers.span, at: UInt16(truncatingIfNeeded: slot))
      ring.queue.makeAvailable(UInt16(truncatingIfNeeded: slot))
      return true
    }
    guard let head = ring.queue.add(buffers.span) else { return false }
    // SAFETY: heads are below 32768.
    unsafe slotOfHead[Int(head)] = UInt16(truncatingIfNeeded: slot)
    return true
  }

  enum Taken { case slot(Int, byteCount: Int), empty, broken }

  /// The next slot the device is done with; the bytes written to it, without the header.
  @inline(__always)
  mutating func take() -> Taken {
    switch isStanding ? ring.queue.nextUsedStanding() : ring.queue.nextUsed() {
    case .used(let head, let written):
      // SAFETY: heads are below 32768.
      let slot = unsafe isStanding ? Int(head) : Int(slotOfHead[Int(head)])
      return .slot(slot, byteCount: Int(written ?? 0) - Self.headerByteCount)
    case .empty: return .empty
    case .broken: return .broken
    }
  }

  /// Makes a slot available with the next `publish`; not while it is.
  @inline(__always)
  mutating func give(_ slot: Int) -> Bool {
    if isStanding {
      ring.queue.makeAvailable(UInt16(truncatingIfNeeded: slot))
      return true
    }
    let buffers: InlineArray<1, DriverBuffer> = [buffer(slot)]
    guard let head = ring.queue.add(buffers.span) else { return false }
    // SAFETY: heads are below 32768.
    unsafe slotOfHead[Int(head)] = UInt16(truncatingIfNeeded: slot)
    return true
  }

  /// Shows the device what was given; true when it was kicked for that.
  @inline(__always)
  mutating func publish() -> Bool {
    guard ring.queue.publish() else { return false }
    ring.kick.signal()
    return true
  }
}

/// A queue pair under load.
@safe
struct NetLane: ~Copyable, BenchLane, @unchecked Sendable {
  // @unchecked: handed to one thread, which is the only one to touch it.

  private var receive: FrameRing
  private var transmit: FrameRing
  private let job: NetJob
  private let frameSize: Int
  let words = LaneWords()
  private let rate: CycleRate
  private var pacer: RatePacer

  private let freeSlots: UnsafeMutablePointer<UInt16>
  private var freeCount: Int
  /// Frames that are on their way in loop mode.
  private var away = 0
  private var lastReturn: UInt64 = 0
  private let patience: UInt64
  private var completed: UInt64 = 0
  private(set) var isBroken = false
  private(set) var counts = LaneCounts()
  var roundTrips = LatencyHistogram()
  private var isMeasured = false
  private var idleSince: UInt64 = 0

  let ringIndex: Int

  /// What our frames say of themselves: the experimental ethertype, and behind it a mark and the time of sending.
  private static let etherType: UInt16 = 0xB588
  private static let markOffset = 16
  private static let mark: UInt32 = 0x7465_6C6D
  private static let stampOffset = 24

  init(_ receive: consuming FrameRing, _ transmit: consuming FrameRing, _ job: NetJob, _ frameSize: Int, _ rate: CycleRate) {
    self.job = job
    self.frameSize = frameSize
    self.rate = rate
    pacer = RatePacer(rate: job.rate, laneCount: job.pairCount, rate)
    ringIndex = transmit.ring.index
    let slots = transmit.slotCount
    unsafe freeSlots = .allocate(capacity: slots)
    for slot in 0..<slots { unsafe (freeSlots + slot).initialize(to: UInt16(slots - 1 - slot)) }
    freeCount = slots
    patience = UInt64(rate.cyclesPerSecond / 20)
    self.receive = receive
    self.transmit = transmit
    for slot in 0..<slots {
      // SAFETY: a frame has at least 60 bytes.
      let frame = unsafe self.transmit.frame(slot)
      for index in 0..<6 {
        let octet = UInt8(truncatingIfNeeded: job.destination.rawValue >> UInt64(40 - 8 * index))
        unsafe frame.storeBytes(of: octet, toByteOffset: index, as: UInt8.self)
      }
      for (index, byte) in ([2, 0, 0, 0, 0, 1] as [UInt8]).enumerated() {
        unsafe frame.storeBytes(of: byte, toByteOffset: 6 + index, as: UInt8.self)
      }
      unsafe frame.storeBytes(of: Self.etherType, toByteOffset: 12, as: UInt16.self)
      unsafe frame.storeBytes(of: Self.mark, toByteOffset: Self.markOffset, as: UInt32.self)
    }
    // A card wants buffers to receive into in every mode.
    for slot in 0..<self.receive.slotCount { _ = self.receive.give(slot) }
  }

  deinit { unsafe freeSlots.deallocate() }

  /// Shows the buffers to receive into, once the rings are started.
  mutating func begin() { if receive.ring.queue.publish() { receive.ring.kick.signal() } }

  var inFlight: Int { transmit.slotCount - freeCount }
  var waitsForRate: Bool { pacer.isLimiting && freeCount > 0 }
  var callDescriptors: [CInt] { [receive.ring.call.fd.rawValue, transmit.ring.call.fd.rawValue] }

  mutating func work(turns: Int, spinning: Bool) -> Bool {
    for _ in 0..<turns {
      if turn() { continue }
      if !spinning || isBroken || words.load(.phase) >= 2 { return false }
      clinux_pause()
    }
    return true
  }

  @inline(__always)
  private mutating func turn() -> Bool {
    let phase = words.load(.phase)
    if phase == 1, !isMeasured {
      isMeasured = true
      counts = LaneCounts()
      if idleSince != 0 { idleSince = clinux_cycles() }
    }
    let received = takeReceived()
    let sent = takeSent()
    if received + sent > 0 {
      if idleSince != 0 {
        counts.waitingCycles &+= clinux_cycles() &- idleSince
        idleSince = 0
      }
    } else if idleSince == 0 {
      idleSince = clinux_cycles()
    }
    let done = job.mode == .send ? sent : received
    if done > 0 {
      completed &+= UInt64(done)
      words.store(.completed, completed)
    }
    guard phase < 2 else {
      isMeasured = false
      return received + sent > 0
    }
    return (job.mode.sends && send()) || received + sent > 0
  }

  @inline(__always)
  private mutating func takeReceived() -> Int {
    var taken = 0
    var now: UInt64 = 0
    // Bounded: no more than all buffers.
    while taken < receive.slotCount {
      switch receive.take() {
      case .slot(let slot, let byteCount):
        if taken == 0 { now = clinux_cycles() }
        taken += 1
        if job.mode == .loop { judge(slot, byteCount, now) } else if isMeasured { counts.reads &+= 1 }
        _ = receive.give(slot)
        continue
      case .empty: break
      case .broken: isBroken = true
      }
      break
    }
    if taken > 0, receive.publish() { countKick() }
    if taken == 0, job.mode == .loop, away > 0 { giveUp() }
    return taken
  }

  /// A frame of ours came back, or another came.
  @inline(__always)
  private mutating func judge(_ slot: Int, _ byteCount: Int, _ now: UInt64) {
    // SAFETY: a buffer has room for these bytes; what is in them is not believed.
    let frame = unsafe receive.frame(slot)
    let mark = unsafe frame.loadUnaligned(fromByteOffset: Self.markOffset, as: UInt32.self)
    guard byteCount == frameSize, mark == Self.mark else {
      if isMeasured, mark == Self.mark { counts.errors &+= 1 }
      return
    }
    lastReturn = now
    if away > 0 { away -= 1 }
    guard isMeasured else { return }
    counts.reads &+= 1
    let sent = unsafe frame.loadUnaligned(fromByteOffset: Self.stampOffset, as: UInt64.self)
    // Processors' counters may differ by a few cycles.
    roundTrips.record(rate.nanoseconds(now > sent ? now &- sent : 0))
  }

  /// Frames that have not come back in 50 ms will not.
  private mutating func giveUp() {
    let now = clinux_cycles()
    if now &- lastReturn < patience { return }
    if isMeasured { counts.lost &+= UInt64(away) }
    away = 0
    lastReturn = now
  }

  @inline(__always)
  private mutating func takeSent() -> Int {
    var taken = 0
    // Bounded: no more than all slots.
    while taken < transmit.slotCount {
      switch transmit.take() {
      case .slot(let slot, _):
        // SAFETY: a slot is outstanding once, so fewer than all are free.
        unsafe freeSlots[freeCount] = UInt16(truncatingIfNeeded: slot)
        freeCount += 1
        taken += 1
        continue
      case .empty: break
      case .broken: isBroken = true
      }
      break
    }
    return taken
  }

  @inline(__always)
  private mutating func send() -> Bool {
    var limit = freeCount
    if job.mode == .loop { limit = min(limit, job.depth - away) }
    guard limit > 0 else { return false }
    let isLoop = job.mode == .loop
    let now = isLoop || pacer.isLimiting ? clinux_cycles() : 0
    limit = pacer.take(limit, now)
    guard limit > 0 else { return false }
    if isLoop, away == 0 { lastReturn = now }
    var given = 0
    while given < limit {
      // SAFETY: limit is at most freeCount.
      let slot = unsafe Int(freeSlots[freeCount - 1])
      // SAFETY: a frame has at least 60 bytes.
      if isLoop { unsafe transmit.frame(slot).storeBytes(of: now, toByteOffset: Self.stampOffset, as: UInt64.self) }
      guard transmit.give(slot) else { break }
      freeCount -= 1
      given += 1
    }
    if isLoop { away += given }
    if isMeasured { counts.writes &+= UInt64(given) }
    if transmit.publish() { countKick() }
    return given > 0
  }

  @inline(__always)
  private mutating func countKick() {
    guard isMeasured else { return }
    counts.kicks &+= 1
    counts.systemCalls &+= 1
  }

  // MARK: Sleeping

  mutating func quieten() {
    receive.ring.queue.disableCalls()
    transmit.ring.queue.disableCalls()
  }

  mutating func prepareToSleep() -> Bool {
    let isReady = receive.ring.queue.enableCalls()
    return transmit.ring.queue.enableCalls() || isReady
  }

  mutating func awake() {
    let count = receive.ring.call.drain() + transmit.ring.call.drain()
    quieten()
    guard isMeasured else { return }
    counts.calls &+= count
    counts.systemCalls &+= 3
  }
}
