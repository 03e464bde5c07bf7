import CLinux
import Glibc
import HostSystem
import VhostUser
import VirtioQueue
import VirtioSpec

/// Prepares a back end for load and drives it.
final class BlockRun: BenchRun {
  let target: Target
  let job: BlockJob
  private var link: Link
  private var lanes: [LaneBox<BlockLane>] = []
  let capacity: UInt64
  private let rate: CycleRate

  init(_ target: Target, _ job: BlockJob, _ rate: CycleRate) throws(ProbeError) {
    var link = try Link(target)
    do throws(ProbeError) { try link.negotiate(configurationByteCount: 60) } catch {
      throw target.explaining(error)
    }
    try DeviceGuess.expect(.block, link.offer, target)
    guard let space = link.offer.configuration else {
      throw .unsuitable("The back end gives no configuration space; bench needs a block device's")
    }
    let capacity = BlockConfiguration(decoding: space).capacity
    guard capacity > 0, capacity < 1 << 54 else { throw .unsuitable("The disk has no room: its capacity is \(capacity) sectors") }
    if let size = job.size, job.offset + size > capacity * 512 {
      throw .unsuitable(
        "The disk has \(capacity * 512) bytes; --size \(size)" + (job.offset > 0 ? " from --offset \(job.offset) on" : "") + " wants more")
    }
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
    if job.recordsInflight { try link.shareInflightArea(queueCount: job.queueCount, queueSize: Int(job.wantedRingSize)) }
    for index in 0..<job.queueCount {
      let ring = try ProbeRing(index, size: job.wantedRingSize, features: features, arena: arena)
      try link.start(ring)
      lanes.append(LaneBox(try BlockLane.make(ring, job, capacity: capacity, rate: rate)))
    }
    try link.ready()
    self.target = target
    self.job = job
    self.rate = rate
    self.link = link
  }

  /// Warms up, measures, drains, and ends the session.
  func measure(_ interruption: Interruption, title: String, counter: SystemCallCounter?) throws(ProbeError) -> BenchResult {
    var result = BenchResult()
    result.name = target.name
    result.byteCount = UInt64(job.blockSize)
    result.options = [
      ("rw", job.pattern.rawValue), ("bs", "\(job.blockSize)"), ("iodepth", "\(job.depth)"), ("numjobs", "\(job.queueCount)"),
      ("ioengine", "vhost-user-blk"),
    ]
    let groups = LaneGroup<BlockLane>.spread(lanes, threads: job.threadCount, sleeps: job.sleeps, pin: job.pin)
    let run = LoadRun(target: target, lanes: lanes, groups: groups, rate: rate, ramp: job.ramp, runtime: job.runtime)
    try run.measure(into: &result, interruption, title: title, counter: counter)
    var read = LatencyHistogram()
    var write = LatencyHistogram()
    for box in lanes {
      read.add(box.lane.readLatency)
      write.add(box.lane.writeLatency)
    }
    result.reads = read.summary
    result.writes = write.summary
    return result
  }

  /// Stops the rings, so that the back end is at rest.
  func finish() {
    for box in lanes { _ = try? link.stop(box.lane.ring.index) }
  }
}
