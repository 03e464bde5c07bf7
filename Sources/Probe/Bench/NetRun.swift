import CLinux
import Glibc
import HostSystem
import VhostUser
import VirtioQueue
import VirtioSpec

/// Prepares a network card for load and drives it.
final class NetRun: BenchRun {
  private let target: Target
  private let job: NetJob
  private let frameSize: Int
  private let rate: CycleRate
  private var link: Link
  private var lanes: [LaneBox<NetLane>] = []
  private var ringCount = 0

  init(_ target: Target, _ job: NetJob, frameSize: Int, _ rate: CycleRate) throws(ProbeError) {
    var link = try Link(target)
    do throws(ProbeError) { try link.negotiate() } catch { throw target.explaining(error) }
    try DeviceGuess.expect(.net, link.offer, target)
    var features: FeatureSet = .version1
    if job.hasEventIndex { features.insert(.eventIndex) }
    if job.isPacked { features.insert(.packedRing) }
    if job.isMergeable { features.insert(.netMergeableReceiveBuffers) }
    if job.pairCount > 1 { features.insert(.netMultipleQueues) }
    guard !job.isPacked || link.offer.features.contains(.packedRing) else { throw .unsuitable("The back end does not offer packed rings") }
    guard !job.isMergeable || link.offer.features.contains(.netMergeableReceiveBuffers) else {
      throw .unsuitable("The back end does not offer MRG_RXBUF")
    }
    // Some tell pairs, some rings; less than the pairs is too little in both.
    let available = link.offer.queueCount ?? 1
    guard UInt64(job.pairCount) <= available || job.pairCount == 1 else {
      throw .unsuitable("The back end has \(available) queues, \(job.pairCount) pairs were asked for")
    }
    features = features.intersection(link.offer.features)
    try link.accept(features)
    let ringBytes = VirtqueueConfiguration.contiguousByteCount(size: job.ringSize, features: features) + 8192
    // The least that a buffer to receive into may have, without merging, is 1526 bytes.
    let receiveSize = max(frameSize, 2048 - FrameRing.headerByteCount)
    let slots = min(job.depth, Int(job.ringSize))
    let perPair = UInt64(2 * ringBytes + Int(job.ringSize) * (receiveSize + 128) + slots * (frameSize + 128) + (1 << 16))
    let arena = try Arena(byteCount: perPair * UInt64(job.pairCount) + (1 << 20))
    try link.share(arena)
    for pair in 0..<job.pairCount {
      let receive = try ProbeRing(2 * pair, size: job.ringSize, features: features, arena: arena)
      let transmit = try ProbeRing(2 * pair + 1, size: job.ringSize, features: features, arena: arena)
      try link.start(receive)
      try link.start(transmit)
      lanes.append(
        LaneBox(
          NetLane(
            try .make(receive, slotCount: Int(job.ringSize), frameByteCount: receiveSize, isReceiving: true),
            try .make(transmit, slotCount: slots, frameByteCount: frameSize, isReceiving: false), job, frameSize, rate)))
    }
    try link.ready()
    ringCount = 2 * job.pairCount
    self.target = target
    self.job = job
    self.frameSize = frameSize
    self.rate = rate
    self.link = link
    for box in lanes { box.lane.begin() }
  }

  func measure(_ interruption: Interruption, title: String, counter: SystemCallCounter?) throws(ProbeError) -> BenchResult {
    var result = BenchResult()
    result.kind = .network(job.mode)
    result.name = target.name
    result.byteCount = UInt64(frameSize)
    result.options = [
      ("mode", job.mode.rawValue), ("frame_size", "\(frameSize)"), ("iodepth", "\(job.depth)"), ("numjobs", "\(job.pairCount)"),
      ("ioengine", "vhost-user-net"),
    ]
    let far = try job.farEnd.map { name throws(ProbeError) in try FarEnd(name, job.mode, frameSize) }
    defer { far?.stop() }
    let groups = LaneGroup<NetLane>.spread(lanes, threads: job.threadCount, sleeps: job.sleeps, pin: job.pin)
    let run = LoadRun(target: target, lanes: lanes, groups: groups, rate: rate, ramp: job.ramp, runtime: job.runtime)
    try run.measure(into: &result, interruption, title: title, counter: counter)
    var trips = LatencyHistogram()
    for box in lanes { trips.add(box.lane.roundTrips) }
    result.reads = trips.summary
    return result
  }

  func finish() {
    for index in 0..<ringCount { _ = try? link.stop(index) }
  }
}
