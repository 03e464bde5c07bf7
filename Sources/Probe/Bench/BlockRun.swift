import CLinux
import Glibc
import HostSystem
import VhostUser
import VirtioQueue
import VirtioSpec

/// One measured run against one back end.
struct BlockResult: Sendable {
  var job: BlockJob
  var name = ""
  var counts = LaneCounts()
  var reads = LatencySummary()
  var writes = LatencySummary()
  var seconds = 0.0
  /// Nanoseconds; nil when the process cannot be seen.
  var backEndCPU: UInt64?
  var toolCPU: UInt64 = 0
  /// Back end's calls per request, counted in a separate short run; nil when that was not possible.
  var backEndSystemCalls: Double?
  /// Requests per second in slices of `slice`.
  var rates: [Double] = []
  var slice = Duration.milliseconds(100)
  var wasInterrupted = false
  /// For the run under ptrace: requests and calls of the measured time.
  var completedWhenCounted: UInt64 = 0
  var systemCallsCounted = 0

  var requestsPerSecond: Double { seconds > 0 ? Double(counts.requests) / seconds : 0 }
  var bytesPerSecond: Double { seconds > 0 ? Double(counts.reads + counts.writes) * Double(job.blockSize) / seconds : 0 }
  /// The share of the tool's measured time in which it had nothing to do but to look at its rings; nil with one thread for
  /// several rings, where one waits while another does not.
  var waitingShare: Double?
  func perRequest(_ value: UInt64) -> Double { counts.requests == 0 ? 0 : Double(value) / Double(counts.requests) }
}

/// A lane in a place that a thread can hold on to.
final class LaneBox {
  var lane: BlockLane
  init(_ lane: consuming BlockLane) { self.lane = lane }
}

/// Lanes handed to one thread; the array is not touched by anyone else while that runs.
final class LaneGroup: @unchecked Sendable {
  // @unchecked: owned by its thread from start to join.
  let lanes: [LaneBox]
  let sleeps: Bool
  let processor: Int?

  init(_ lanes: [LaneBox], sleeps: Bool, processor: Int?) {
    self.lanes = lanes
    self.sleeps = sleeps
    self.processor = processor
  }

  /// Runs until all lanes are told to stop and have nothing in flight, or `patience` after the stop.
  func run() {
    if let processor { _ = clinux_pin(CInt(processor)) }
    if lanes.count == 1 { runOne() } else { runMany() }
  }

  private func isDone(_ box: LaneBox) -> Bool {
    box.lane.words.load(.phase) >= 2 && (box.lane.inFlight == 0 || box.lane.words.load(.phase) >= 3) || box.lane.isBroken
  }

  private func runOne() {
    let box = lanes[0]
    box.lane.ring.queue.disableCalls()
    while !isDone(box) {
      if box.lane.work(spinning: !sleeps) { continue }
      if sleeps { sleep([box]) }
    }
  }

  private func runMany() {
    for box in lanes { box.lane.ring.queue.disableCalls() }
    while !lanes.allSatisfy({ isDone($0) }) {
      var moved = false
      for box in lanes where !box.lane.isBroken { moved = box.lane.turn() || moved }
      if !moved && sleeps { sleep(lanes) }
    }
  }

  private func sleep(_ lanes: [LaneBox]) {
    var isReady = false
    for box in lanes { isReady = box.lane.prepareToSleep() || isReady }
    if !isReady {
      var entries = lanes.map { pollfd(fd: $0.lane.ring.call.fd.rawValue, events: Int16(POLLIN), revents: 0) }
      // Only the rate wakes us otherwise; the end is told by a call from the watching thread.
      let timeout: CInt = lanes.contains { $0.lane.waitsForRate } ? 1 : 100
      // SAFETY: the array is ours and has so many entries.
      _ = unsafe entries.withUnsafeMutableBufferPointer { unsafe poll($0.baseAddress, nfds_t($0.count), timeout) }
    }
    for box in lanes { box.lane.awake() }
  }
}

/// Prepares a back end for load and drives it.
final class BlockRun {
  let target: Target
  let job: BlockJob
  private var link: Link
  private var groups: [LaneGroup] = []
  private var lanes: [LaneBox] = []
  let capacity: UInt64
  private let rate: CycleRate

  init(_ target: Target, _ job: BlockJob, _ rate: CycleRate) throws(ProbeError) {
    var link = try Link(target)
    do throws(ProbeError) { try link.negotiate(configurationByteCount: 60) } catch {
      throw target.explaining(error)
    }
    guard let space = link.offer.configuration else {
      throw .unsuitable("The back end gives no configuration space; bench needs a block device's")
    }
    let capacity = BlockConfiguration(decoding: space).capacity
    guard capacity > 0, capacity < 1 << 54 else { throw .unsuitable("The disk has no room: its capacity is \(capacity) sectors") }
    self.capacity = capacity
    var features: FeatureSet = [.version1, .blockFlush, .blockMultipleQueues, .blockBlockSize, .blockSegMax]
    if job.hasEventIndex { features.insert(.eventIndex) }
    if job.isPacked { features.insert(.packedRing) }
    guard !job.isPacked || link.offer.features.contains(.packedRing) else { throw .unsuitable("The back end does not offer packed rings") }
    guard !job.pattern.writes || !link.offer.features.contains(.blockReadOnly) else {
      throw .unsuitable("The disk is read-only; choose --rw read or randread")
    }
    let available = link.offer.queueCount ?? UInt64(max(1, BlockConfiguration(decoding: space).queueCount))
    guard UInt64(job.queueCount) <= available else {
      throw .unsuitable("The back end has \(available) queues, \(job.queueCount) were asked for")
    }
    features = features.intersection(link.offer.features)
    try link.accept(features)
    let ringBytes = VirtqueueConfiguration.contiguousByteCount(size: job.wantedRingSize, features: features) + 8192
    let perQueue = UInt64(job.depth) * (UInt64(job.blockSize) + 128) + UInt64(ringBytes) + 65536
    let arena = try Arena(byteCount: perQueue * UInt64(job.queueCount) + (1 << 20))
    try link.share(arena)
    for index in 0..<job.queueCount {
      let ring = try ProbeRing(index, size: job.wantedRingSize, features: features, arena: arena)
      try link.start(ring)
      lanes.append(LaneBox(try BlockLane.make(ring, job, capacity: capacity, rate: rate)))
    }
    self.target = target
    self.job = job
    self.rate = rate
    self.link = link
    for thread in 0..<job.threadCount {
      let mine = lanes.enumerated().filter { $0.offset % job.threadCount == thread }.map(\.element)
      groups.append(LaneGroup(mine, sleeps: job.sleeps, processor: job.pin.isEmpty ? nil : job.pin[thread % job.pin.count]))
    }
  }

  /// Warms up, measures, drains, and ends the session.
  ///
  /// - Parameter counter: asked at begin and end of the measured time; the difference goes into the result.
  func measure(_ interruption: Interruption, title: String, counter: SystemCallCounter? = nil) throws(ProbeError) -> BlockResult {
    // Shared words are all that this thread may touch of a lane that runs.
    let words = lanes.map { $0.lane.words }
    let calls = lanes.map { $0.lane.ring.call.fd.rawValue }
    var threads: [(HostThread, CInt)] = []
    for (index, group) in groups.enumerated() {
      let thread = try wrapping { () throws(SystemError) in try HostThread.start(name: "lane\(index)") { group.run() } }
      threads.append((thread, 0))
    }
    func tell(_ phase: UInt64) {
      for word in words { word.store(.phase, phase) }
    }
    func wake() {
      for number in calls { Self.signal(number) }
    }
    var result = BlockResult(job: job, name: target.name)
    _ = interruption.wait(job.ramp)
    let firstCPU = Self.cpuTime(target.processID)
    let firstOwn = Self.cpuTime(getpid()) ?? 0
    tell(1)
    let begin = MonotonicTime.now
    let end = begin.advanced(by: job.runtime)
    var last = words.reduce(0) { $0 + $1.load(.completed) }
    let firstCompleted = last
    let firstCalls = counter?.count ?? 0
    var lastTime = begin
    var silence = begin
    var failure: ProbeError?
    while true {
      let now = MonotonicTime.now
      if now >= end { break }
      if interruption.wait(min(result.slice, end.since(now))) {
        result.wasInterrupted = true
        break
      }
      let total = words.reduce(0) { $0 + $1.load(.completed) }
      let time = MonotonicTime.now
      let rate = Double(total - last) / (Double(time.since(lastTime).nanoseconds) / 1e9)
      result.rates.append(rate)
      if total != last { silence = time }
      last = total
      lastTime = time
      Progress.show("\(title): \(decimal(rate / 1000, 1)) k/s, \(decimal(Double(end.since(time).nanoseconds) / 1e9, 0)) s left")
      if time.since(silence) > target.timeout {
        failure = .unsuitable("The back end has completed nothing for \(decimal(Double(target.timeout.nanoseconds) / 1e9, 1)) s")
        break
      }
      if let ended = target.collect() {
        failure = .ended("\(ended) under load", lastWords: target.lastWords)
        break
      }
    }
    Progress.clear()
    result.systemCallsCounted = (counter?.count ?? 0) - firstCalls
    result.completedWhenCounted = words.reduce(0) { $0 + $1.load(.completed) } - firstCompleted
    tell(2)
    result.seconds = Double(MonotonicTime.now.since(begin).nanoseconds) / 1e9
    if let first = firstCPU, let now = Self.cpuTime(target.processID) { result.backEndCPU = now - first }
    result.toolCPU = (Self.cpuTime(getpid()) ?? 0) - firstOwn
    wake()
    // What is in flight comes back, or not: the data is not needed any more.
    let patience = MonotonicTime.now.advanced(by: failure == nil ? .seconds(2) : .milliseconds(50))
    let joiner = try wrapping { () throws(SystemError) in try EventFD() }
    let joined = joiner.fd.rawValue
    let threadList = threads.map(\.0)
    let waiting = try wrapping { () throws(SystemError) in
      try HostThread.start(name: "joiner") {
        for thread in threadList { thread.join() }
        Self.signal(joined)
      }
    }
    while !joiner.isSignalledNow() {
      if MonotonicTime.now >= patience { tell(3) }
      wake()
      usleep(500)
    }
    waiting.join()
    if let failure { throw failure }
    var read = LatencyHistogram()
    var write = LatencyHistogram()
    for box in lanes {
      if box.lane.isBroken { throw .unsuitable("The back end broke ring \(box.lane.ring.index): it reported what was not outstanding") }
      result.counts = result.counts + box.lane.counts
      read.add(box.lane.readLatency)
      write.add(box.lane.writeLatency)
    }
    if groups.count == lanes.count, result.seconds > 0 {
      result.waitingShare = min(1, Double(result.counts.waitingCycles) / rate.cyclesPerSecond / result.seconds / Double(groups.count))
    }
    result.reads = read.summary
    result.writes = write.summary
    return result
  }

  /// Stops the rings, so that the back end is at rest.
  func finish() {
    for box in lanes { _ = try? link.stop(box.lane.ring.index) }
  }

  private static func signal(_ number: CInt) {
    var one: UInt64 = 1
    // SAFETY: eight bytes of ours.
    _ = unsafe write(number, &one, 8)
  }

  /// CPU time of a process in nanoseconds.
  static func cpuTime(_ process: Int32?) -> UInt64? {
    guard let process, process > 0 else { return nil }
    var time: UInt64 = 0
    // SAFETY: `time` is ours.
    return unsafe clinux_cpu_time(process, &time) == 0 ? time : nil
  }
}

extension Target {
  /// An error with the back end's end in it, when that is why.
  func explaining(_ error: ProbeError) -> ProbeError {
    usleep(20_000)
    if let end = collect() { return .ended("\(end)", lastWords: lastWords) }
    return error
  }
}
