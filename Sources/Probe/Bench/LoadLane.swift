import CLinux
import Glibc
import HostSystem

/// What a lane shares with the thread that watches it: single 64-bit words in memory of their own, so that reading them
/// costs the lane nothing.
@safe
final class LaneWords: @unchecked Sendable {
  // @unchecked: every access is a single relaxed load or store.
  enum Word: Int {
    /// Requests completed since the lane began.
    case completed = 0
    /// 0 warm up, 1 measure, 2 stop, 3 stop without what is outstanding.
    case phase
  }
  private let words: UnsafeMutableRawPointer

  init() {
    unsafe words = .allocate(byteCount: 128, alignment: 64)
    unsafe words.initializeMemory(as: UInt8.self, repeating: 0, count: 128)
  }

  deinit { unsafe words.deallocate() }

  // SAFETY (both): the index is below sixteen words.
  @inline(__always)
  func load(_ word: Word) -> UInt64 { unsafe clinux_load_relaxed_u64(words + 8 * word.rawValue) }
  @inline(__always)
  func store(_ word: Word, _ value: UInt64) { unsafe clinux_store_relaxed_u64(words + 8 * word.rawValue, value) }
}

/// What a lane counted while it was measured.
struct LaneCounts: Sendable {
  /// Of a network card: frames received.
  var reads: UInt64 = 0
  /// Of a network card: frames sent.
  var writes: UInt64 = 0
  var flushes: UInt64 = 0
  var errors: UInt64 = 0
  /// Frames that did not come back, or came back as something else.
  var lost: UInt64 = 0
  var kicks: UInt64 = 0
  var calls: UInt64 = 0
  /// System calls of the tool's own.
  var systemCalls: UInt64 = 0
  /// Cycles in which the ring had nothing used, spinning or asleep.
  var waitingCycles: UInt64 = 0

  static func + (a: LaneCounts, b: LaneCounts) -> LaneCounts {
    LaneCounts(
      reads: a.reads + b.reads, writes: a.writes + b.writes, flushes: a.flushes + b.flushes, errors: a.errors + b.errors,
      lost: a.lost + b.lost, kicks: a.kicks + b.kicks, calls: a.calls + b.calls, systemCalls: a.systemCalls + b.systemCalls,
      waitingCycles: a.waitingCycles + b.waitingCycles)
  }
}

/// One queue, or pair of queues, under load.
protocol BenchLane: ~Copyable, SendableMetatype {
  var words: LaneWords { get }
  /// What the back end owes.
  var inFlight: Int { get }
  /// The back end reported what was not outstanding.
  var isBroken: Bool { get }
  /// Whether requests wait only for their time.
  var waitsForRate: Bool { get }
  var counts: LaneCounts { get }
  var ringIndex: Int { get }
  /// Where calls arrive.
  var callDescriptors: [CInt] { get }
  /// Many turns: takes what is done, offers anew, kicks if asked to. True when the last of them moved something; spinning
  /// goes on without, sleeping does not.
  mutating func work(turns: Int, spinning: Bool) -> Bool
  /// Asks for no calls.
  mutating func quieten()
  /// Asks for a call; true when there is something to do already.
  mutating func prepareToSleep() -> Bool
  /// After a wait: takes the call's count, asks for no more.
  mutating func awake()
}

/// A lane in a place that a thread can hold on to.
final class LaneBox<Lane: BenchLane & ~Copyable> {
  var lane: Lane
  init(_ lane: consuming Lane) { self.lane = lane }
}

/// Lanes handed to one thread; the array is not touched by anyone else while that runs.
final class LaneGroup<Lane: BenchLane & ~Copyable>: @unchecked Sendable {
  // @unchecked: owned by its thread from start to join.
  let lanes: [LaneBox<Lane>]
  let sleeps: Bool
  let processor: Int?

  init(_ lanes: [LaneBox<Lane>], sleeps: Bool, processor: Int?) {
    self.lanes = lanes
    self.sleeps = sleeps
    self.processor = processor
  }

  /// Spreads lanes over threads.
  static func spread(_ lanes: [LaneBox<Lane>], threads: Int, sleeps: Bool, pin: [Int]) -> [LaneGroup<Lane>] {
    (0..<threads).map { thread in
      let mine = lanes.enumerated().filter { $0.offset % threads == thread }.map(\.element)
      return LaneGroup(mine, sleeps: sleeps, processor: pin.isEmpty ? nil : pin[thread % pin.count])
    }
  }

  /// Runs until all lanes are told to stop and have nothing in flight, or are told not to wait for that.
  func run() {
    if let processor { _ = clinux_pin(CInt(processor)) }
    for box in lanes { box.lane.quieten() }
    if lanes.count == 1 { runOne(lanes[0]) } else { runMany() }
  }

  private func isDone(_ box: LaneBox<Lane>) -> Bool {
    let phase = box.lane.words.load(.phase)
    return phase >= 2 && (box.lane.inFlight == 0 || phase >= 3) || box.lane.isBroken
  }

  private func runOne(_ box: LaneBox<Lane>) {
    while !isDone(box) {
      if box.lane.work(turns: 256, spinning: !sleeps) { continue }
      if sleeps { sleep() }
    }
  }

  private func runMany() {
    while !lanes.allSatisfy({ isDone($0) }) {
      var moved = false
      for box in lanes where !box.lane.isBroken { moved = box.lane.work(turns: 1, spinning: false) || moved }
      if !moved && sleeps { sleep() }
    }
  }

  private func sleep() {
    var isReady = false
    for box in lanes { isReady = box.lane.prepareToSleep() || isReady }
    if !isReady {
      var entries = lanes.flatMap { $0.lane.callDescriptors }.map { pollfd(fd: $0, events: Int16(POLLIN), revents: 0) }
      // Only the rate wakes us otherwise; the end is told by a call from the watching thread.
      let timeout: CInt = lanes.contains { $0.lane.waitsForRate } ? 1 : 100
      // SAFETY: the array is ours and has so many entries.
      _ = unsafe entries.withUnsafeMutableBufferPointer { unsafe poll($0.baseAddress, nfds_t($0.count), timeout) }
    }
    for box in lanes { box.lane.awake() }
  }
}

/// How many requests may be made by now.
struct RatePacer {
  /// 0: as many as possible.
  private let cyclesPerRequest: Double
  private var issued: UInt64 = 0
  private var firstCycle: UInt64 = 0

  /// - Parameter rate: requests a second over `laneCount` lanes; nil for no limit.
  init(rate: UInt64?, laneCount: Int, _ clock: CycleRate) {
    cyclesPerRequest = rate.map { clock.cyclesPerSecond * Double(laneCount) / Double($0) } ?? 0
  }

  var isLimiting: Bool { cyclesPerRequest > 0 }

  /// At most `limit` of them, which count as made.
  @inline(__always)
  mutating func take(_ limit: Int, _ now: UInt64) -> Int {
    guard cyclesPerRequest > 0 else { return limit }
    if firstCycle == 0 { firstCycle = now }
    let due = UInt64(Double(now &- firstCycle) / cyclesPerRequest) &+ 1
    let allowed = Int(min(UInt64(limit), due &- min(due, issued)))
    issued &+= UInt64(allowed)
    return allowed
  }
}

/// How fast the time stamp counter runs, measured against the clock.
package struct CycleRate: Sendable {
  package let cyclesPerSecond: Double
  /// Nanoseconds per cycle in 2^-32.
  private let scale: UInt64

  package init(cyclesPerSecond: Double) {
    self.cyclesPerSecond = cyclesPerSecond
    scale = UInt64(1e9 / cyclesPerSecond * 4_294_967_296)
  }

  /// Takes 20 ms.
  static func measured() -> CycleRate {
    let begin = MonotonicTime.now
    let first = clinux_cycles()
    usleep(20_000)
    let last = clinux_cycles()
    let elapsed = MonotonicTime.now.since(begin)
    return CycleRate(cyclesPerSecond: Double(last &- first) / (Double(elapsed.nanoseconds) / 1e9))
  }

  @inline(__always)
  func nanoseconds(_ cycles: UInt64) -> UInt64 {
    let product = cycles.multipliedFullWidth(by: scale)
    return product.high << 32 | product.low >> 32
  }
}
