import CLinux
import Glibc
import HostSystem

/// One measured run against one back end.
struct BenchResult: Sendable {
  enum Kind: Sendable {
    case disk
    case network(NetJob.Mode)
  }

  var kind = Kind.disk
  /// The command line or path of the back end.
  var name = ""
  /// The load in fio's words, for reports.
  var options: [(name: String, value: String)] = []
  /// Bytes of a block or a frame.
  var byteCount: UInt64 = 0
  var counts = LaneCounts()
  /// Of a network card: round trips.
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
  /// The share of the tool's measured time in which it had nothing to do but to look at its rings; nil with one thread for
  /// several rings, where one waits while another does not.
  var waitingShare: Double?

  /// Frames of a network card: those received, or those sent where nothing comes back.
  var requests: UInt64 {
    switch kind {
    case .disk: counts.reads + counts.writes + counts.flushes
    case .network(.send): counts.writes
    case .network: counts.reads
    }
  }

  var isNetwork: Bool { if case .network = kind { true } else { false } }

  private var dataRequests: UInt64 { isNetwork ? requests : counts.reads + counts.writes }
  var requestsPerSecond: Double { seconds > 0 ? Double(requests) / seconds : 0 }
  var bytesPerSecond: Double { seconds > 0 ? Double(dataRequests) * Double(byteCount) / seconds : 0 }
  func perRequest(_ value: UInt64) -> Double { requests == 0 ? 0 : Double(value) / Double(requests) }
}

/// Something that a back end was prepared for and can be measured doing.
protocol BenchRun: AnyObject {
  func measure(_ interruption: Interruption, title: String, counter: SystemCallCounter?) throws(ProbeError) -> BenchResult
  /// Stops the rings, so that the back end is at rest.
  func finish()
}

/// Drives lanes in threads of their own, and watches them.
struct LoadRun<Lane: BenchLane & ~Copyable> {
  let target: Target
  let lanes: [LaneBox<Lane>]
  let groups: [LaneGroup<Lane>]
  let rate: CycleRate
  let ramp: Duration
  let runtime: Duration

  /// Warms up, measures, and ends the threads. What the lanes themselves counted is added up; their latencies are not.
  ///
  /// - Parameter counter: asked at begin and end of the measured time; the difference goes into the result.
  func measure(
    into result: inout BenchResult, _ interruption: Interruption, title: String, counter: SystemCallCounter?
  ) throws(ProbeError) {
    // Shared words are all that this thread may touch of a lane that runs.
    let words = lanes.map { $0.lane.words }
    let calls = lanes.flatMap { $0.lane.callDescriptors }
    var threads: [HostThread] = []
    for (index, group) in groups.enumerated() {
      threads.append(try wrapping { () throws(SystemError) in try HostThread.start(name: "lane\(index)") { group.run() } })
    }
    func tell(_ phase: UInt64) {
      for word in words { word.store(.phase, phase) }
    }
    func completed() -> UInt64 { words.reduce(0) { $0 + $1.load(.completed) } }
    _ = interruption.wait(ramp)
    let firstCPU = Self.cpuTime(target.processID)
    let firstOwn = Self.cpuTime(getpid()) ?? 0
    tell(1)
    let begin = MonotonicTime.now
    let end = begin.advanced(by: runtime)
    var last = completed()
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
      let total = completed()
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
      // Not while it is traced: waiting for a child also takes the stops that are another thread's to see.
      if counter == nil, let ended = target.collect() {
        failure = .ended("\(ended) under load", lastWords: target.lastWords)
        break
      }
    }
    Progress.clear()
    result.systemCallsCounted = (counter?.count ?? 0) - firstCalls
    result.completedWhenCounted = completed() - firstCompleted
    tell(2)
    result.seconds = Double(MonotonicTime.now.since(begin).nanoseconds) / 1e9
    if let first = firstCPU, let now = Self.cpuTime(target.processID) { result.backEndCPU = now - first }
    result.toolCPU = (Self.cpuTime(getpid()) ?? 0) - firstOwn
    try join(threads, words, calls, failure == nil ? .seconds(2) : .milliseconds(50))
    if let failure { throw failure }
    if result.completedWhenCounted == 0, !result.wasInterrupted {
      throw .unsuitable("The back end completed nothing in the \(decimal(result.seconds, 2)) s that were measured")
    }
    for box in lanes {
      if box.lane.isBroken { throw .unsuitable("The back end broke ring \(box.lane.ringIndex): it reported what was not outstanding") }
      result.counts = result.counts + box.lane.counts
    }
    if groups.count == lanes.count, result.seconds > 0 {
      result.waitingShare = min(1, Double(result.counts.waitingCycles) / rate.cyclesPerSecond / result.seconds / Double(groups.count))
    }
  }

  /// What is in flight comes back, or not: the data is not needed any more.
  private func join(_ threads: [HostThread], _ words: [LaneWords], _ calls: [CInt], _ time: Duration) throws(ProbeError) {
    func wake() {
      for number in calls { Self.signal(number) }
    }
    wake()
    let patience = MonotonicTime.now.advanced(by: time)
    let joiner = try wrapping { () throws(SystemError) in try EventFD() }
    let joined = joiner.fd.rawValue
    let waiting = try wrapping { () throws(SystemError) in
      try HostThread.start(name: "joiner") {
        for thread in threads { thread.join() }
        Self.signal(joined)
      }
    }
    while !joiner.isSignalledNow() {
      if MonotonicTime.now >= patience { for word in words { word.store(.phase, 3) } }
      wake()
      usleep(500)
    }
    waiting.join()
  }

  private static func signal(_ number: CInt) {
    var one: UInt64 = 1
    // SAFETY: eight bytes of ours.
    _ = unsafe write(number, &one, 8)
  }

  /// CPU time of a process in nanoseconds.
  private static func cpuTime(_ process: Int32?) -> UInt64? {
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
