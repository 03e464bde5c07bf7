import BackendKit
import CLinux
import DiskImage
import Glibc
import HostSystem
import VirtioQueue
import VirtioSpec

/// What a worker watches besides its storage.
private enum WatchToken {
  static let order = 0
  static let kick = 1
}

/// Serves one virtqueue in one thread. Sleeps in `engine.turn` for completions, kicks and orders alike; awake, it takes all
/// there is before it sleeps again.
@safe
struct BlockQueueWorker<Engine: StorageEngine & ~Copyable>: ~Copyable {
  let desk: WorkerDesk
  let space: BlockConfigurationSpace
  var engine: Engine
  /// Indexed by the head of the chain.
  let slots: UnsafeMutablePointer<RequestSlot>
  let depth: Int
  /// `greatestRangeCount` ranges for every slot; pages are only touched by requests that have ranges.
  let ranges: MemoryMapping
  var pool: VectorPool
  var chain: DescriptorChain
  var limits: BlockLimits
  var inFlight = 0
  var poll: PollBudget
  /// The time as it was when the present turn began to take or to answer, in nanoseconds.
  var now: UInt64 = 0
  /// A rate limit was reached; the engine will say when it is over.
  var isThrottled = false
  /// Answers not shown to the driver yet.
  var answered = 0
  /// Reads whose data is cached and which are copied and answered together.
  let foreseen: UnsafeMutablePointer<ForeseenRead>
  var foreseenCount = 0
  /// Handing over without sleeping, in the hope that storage answers within the call.
  var handOverTrial = Trial()
  /// A short look for what the driver makes available in place of what was just answered.
  var glanceTrial = Trial()
  var hasAnswered = false
  /// The last answer was to a small write through the page cache. On most file systems the kernel's own threads do those, and do many in
  /// a row while we sleep; replacing them one by one would wake a thread for each.
  var wasLeftToWorkers = false
  static var smallWrite: UInt32 { 64 << 10 }

  /// Answers shown to the driver together: few while it is awake, so that it goes on beside us; many when each time wakes it.
  var batch = Self.wakefulBatch

  static var wakefulBatch: Int { 16 }

  /// As far as its ring has told with the last answers.
  private var isDriverAwake: Bool { batch == Self.wakefulBatch }

  /// Requests that a disk is given, and answers of its that are shown, together. Given all at once it answers all at once, and
  /// has nothing to do until all of them are replaced.
  static var diskGroup: Int { 4 }

  /// The image is, or seems to be, on storage that takes its time, and gets its requests from this thread.
  private var isDisk: Bool { space.image.isDirect || handOverTrial.isFailing && !wasLeftToWorkers }
  static var greatestBatch: Int { 32 }

  init(_ desk: WorkerDesk, _ space: BlockConfigurationSpace, _ engine: consuming Engine) throws(SystemError) {
    let depth = Int(space.greatestQueueSize)
    let ranges = try MemoryMapping.anonymous(
      byteCount: depth * BlockLimits.greatestRangeCount * MemoryLayout<BlockRangeSegment>.stride)
    let pool = try VectorPool(blockCount: depth)
    self.init(desk, space, engine, depth, ranges, pool)
  }

  private init(
    _ desk: WorkerDesk, _ space: BlockConfigurationSpace, _ engine: consuming Engine, _ depth: Int, _ ranges: MemoryMapping,
    _ pool: consuming VectorPool
  ) {
    self.desk = desk
    self.space = space
    self.engine = engine
    self.depth = depth
    self.ranges = ranges
    self.pool = pool
    poll = PollBudget(space.pollPolicy)
    chain = DescriptorChain(capacity: max(depth, 1024) + 16)
    unsafe foreseen = .allocate(capacity: Self.greatestBatch)
    unsafe foreseen.initialize(repeating: ForeseenRead(), count: Self.greatestBatch)
    limits = space.limits
    unsafe slots = .allocate(capacity: depth)
    unsafe slots.initialize(repeating: RequestSlot(), count: depth)
  }

  deinit {
    unsafe slots.deallocate()
    unsafe foreseen.deallocate()
  }

  /// Serves one queue after another until told to leave.
  mutating func run() {
    engine.watch(desk.orderFD, token: WatchToken.order)
    // Each round sleeps until there is an order.
    while true {
      switch desk.takeOrder() {
      case .serve(let queue):
        var queue = consume queue
        let leaves = serve(&queue)
        desk.deliver(queue)
        if leaves { return }
      case .leave: return
      case .stop: break
      case .none:
        engine.turn(waiting: true)
        // A queue that is taken away while its limit holds it back leaves its time running.
        while let event = engine.nextEvent() { if case .time = event { isThrottled = false } }
      }
    }
  }

  /// Serves a queue until told to stop, and then until nothing of it is in flight; true when told to leave altogether.
  private mutating func serve(_ queue: inout DeviceQueue) -> Bool {
    var leaves = false
    var isTaking = true
    engine.watch(queue.kickFD, token: WatchToken.kick)
    // Buffers may have been made available before anybody listened.
    _ = take(&queue)
    while isTaking || inFlight > 0 {
      handOver(&queue, isTaking)
      var hasOrder = false
      var wasKicked = false
      var reaped = false
      while let event = engine.nextEvent() {
        switch event {
        case .completed(let slot, let outcome):
          if !reaped { now = MonotonicTime.now.nanoseconds }
          reaped = true
          finish(slot, outcome, &queue)
          if answered >= Self.diskGroup, isDisk, isDriverAwake { publish(&queue) }
        case .readable(let token): if token == WatchToken.order { hasOrder = true } else { wasKicked = true }
        case .time: isThrottled = false
        }
      }
      if hasOrder {
        switch desk.takeOrder() {
        case .none: break
        case .serve: preconditionFailure("A worker serves one queue at a time.")
        case .stop: isTaking = false
        case .leave:
          isTaking = false
          leaves = true
        }
      }
      if reaped {
        if isTaking, glanceTrial.isNext, mayGlance { queue.ring.withdrawKicks() }
        publish(&queue)
      }
      let tookAny = isTaking && take(&queue)
      if wasKicked {
        queue.counters.kicks.add(1)
        if !tookAny { queue.counters[.mergedKicks].add(1) }
      }
    }
    engine.unwatch(queue.kickFD, token: WatchToken.kick)
    return leaves
  }

  /// Gives the storage what was begun, and returns when there may be something to do: at once, after looking for it, or
  /// after sleeping.
  @inline(__always)
  private mutating func handOver(_ queue: inout DeviceQueue, _ isTaking: Bool) {
    let takes = isTaking && !isThrottled
    // Storage that answered within the call the last time is expected to do so again. Then nobody has to be asked for kicks.
    if engine.hasPrepared {
      if handOverTrial.isDue() {
        engine.turn(waiting: false)
        handOverTrial.ended(well: engine.hasWork)
        if engine.hasWork { return }
      }
    } else if engine.hasWork {
      return engine.turn(waiting: false)
    }
    // Storage that did not answer at once takes longer than it pays to look; the driver's next request may not.
    if takes, inFlight == 0, poll.nanoseconds > 0, engine.canBePolled, look(&queue, takes) {
      queue.counters[.polls].add(1)
      return
    }
    // A driver that looks at its ring all the time replaces at once what was answered: not worth a sleep in between.
    if takes, hasAnswered, inFlight > 0, mayGlance, glanceTrial.isDue() {
      hasAnswered = false
      let found = glance(&queue)
      glanceTrial.ended(well: found)
      if found { return }
    }
    // Asking for kicks comes last before sleeping; what came meanwhile is taken first, and handed over together with what is prepared. An
    // engine that does not show all of its work has to be asked for it now and then.
    if takes && queue.ring.enableKicks() {
      if !engine.canBePolled { engine.turn(waiting: false) }
      return
    }
    queue.counters[.sleeps].add(1)
    guard poll.isLearning, inFlight == 0 else { return engine.turn(waiting: true) }
    let begin = MonotonicTime.now.nanoseconds
    engine.turn(waiting: true)
    poll.slept(from: begin, to: MonotonicTime.now.nanoseconds)
  }

  private var mayGlance: Bool { isDriverAwake && !wasLeftToWorkers }

  /// Looks at the ring for a microsecond or three; whether there is something.
  private func glance(_ queue: inout DeviceQueue) -> Bool {
    for _ in 0..<64 {
      if queue.ring.hasAvailable() { return true }
      clinux_pause()
    }
    return false
  }

  /// Looks for work until there is some or the budget is used up; whether there is.
  private mutating func look(_ queue: inout DeviceQueue, _ takes: Bool) -> Bool {
    let begin = MonotonicTime.now.nanoseconds
    var last = begin
    var yielded = begin
    // Bounded by the budget.
    while true {
      for _ in 0..<8 {
        if engine.hasWork || takes && queue.ring.hasAvailable() {
          poll.succeeded()
          return true
        }
        clinux_pause()
      }
      var time = MonotonicTime.now.nanoseconds
      var isLost = time &- last > PollBudget.lostTime
      if !isLost, poll.isLearning, time &- yielded >= poll.patience {
        // Whoever we wait for may be waiting for this processor.
        sched_yield()
        yielded = MonotonicTime.now.nanoseconds
        isLost = yielded &- time > PollBudget.yieldTime
        if !isLost { poll.yieldedInVain() }
        time = yielded
      }
      if isLost {
        poll.lostProcessor(now: time)
        return engine.hasWork || takes && queue.ring.hasAvailable()
      }
      last = time
      if time &- begin >= poll.nanoseconds { return false }
    }
  }

  /// Takes everything available and begins it; publishes what could be answered at once. Whether there was anything.
  private mutating func take(_ queue: inout DeviceQueue) -> Bool {
    if isThrottled { return false }
    queue.ring.disableKicks()
    limits = space.limits
    now = MonotonicTime.now.nanoseconds
    let isDisk = isDisk
    if let limiter = space.limiter, throttle(limiter, &queue) { return false }
    var count = 0
    // At most a ring full: an honest driver has no more outstanding, another one shall not keep us here.
    rounds: while count < depth {
      switch queue.ring.next(&chain) {
      case .chain:
        count &+= 1
        begin(&queue)
        if isDisk, count % Self.diskGroup == 0, engine.hasPrepared {
          engine.turn(waiting: false)
          if engine.hasWork { handOverTrial.ended(well: true) }
        }
        // The driver can go on with these while we do the next ones.
        if foreseenCount >= batch { copyForeseen(&queue) }
        if answered >= batch { publish(&queue) }
        if let limiter = space.limiter, !limiter.isOpen { break rounds }
      case .empty: break rounds
      case .broken(let why):
        // In-flight requests are waited for; the ring takes no more answers.
        queue.markBroken(why)
        break rounds
      }
    }
    if foreseenCount > 0 { copyForeseen(&queue) }
    if count > 0 { queue.counters[.batches].add(1) }
    publish(&queue)
    return count > 0
  }

  @inline(__always)
  private mutating func publish(_ queue: inout DeviceQueue) {
    guard answered > 0 else { return }
    answered = 0
    hasAnswered = true
    let isAsleep = queue.ring.publish()
    if isAsleep { queue.call() }
    batch = isAsleep ? Self.greatestBatch : Self.wakefulBatch
  }

  /// Whether a rate limit holds requests back now; then the engine wakes us when it does not.
  private mutating func throttle(_ limiter: RateLimiter, _ queue: inout DeviceQueue) -> Bool {
    let wait = limiter.wait(at: now)
    guard wait > 0, queue.ring.hasAvailable() else { return false }
    isThrottled = true
    queue.counters[.throttles].add(1)
    engine.wake(at: MonotonicTime(nanoseconds: now &+ wait))
    return true
  }
}
