import HostSystem
import VirtioSpec
import VirtioTransport

/// How long requests of one queue have been waiting, seen from guest memory alone and so for any back end: since when the
/// device's side of the ring has stood still while the driver had something in it. A look costs two or three loads. What it says of
/// time is a lower bound: it begins with the first look that saw the ring so.
struct QueueWatch {
  private enum Ring {
    /// Addresses of `avail.idx` and `used.idx`.
    case split(available: UInt64, used: UInt64)
    /// Descriptor ring and driver event suppression. Where the device stands is nowhere in memory; with event indices a driver
    /// that waits writes there what it waits for, which is the same when everything stands still.
    case packed(descriptors: UInt64, size: UInt16, event: UInt64)
  }

  let index: Int
  private let ring: Ring
  private var mark: UInt16?
  /// Nil: nothing waits, as far as is known.
  private(set) var since: MonotonicTime?
  /// Chains made available and not answered; nil when the ring does not tell how many.
  private(set) var count: UInt16?

  /// Nil for queues whose buffers wait for the world outside: that they wait says nothing.
  init?(_ queue: QueueGeometry, _ features: FeatureSet, of device: DeviceID) {
    guard !Self.receives(queue.index, of: device) else { return nil }
    index = queue.index
    if !features.contains(.packedRing) {
      ring = .split(available: queue.driver &+ 2, used: queue.device &+ UInt64(SplitRing.usedIndexOffset))
    } else if features.contains(.eventIndex) {
      ring = .packed(descriptors: queue.descriptors, size: queue.size, event: queue.driver)
    } else {
      return nil
    }
  }

  private static func receives(_ queue: Int, of device: DeviceID) -> Bool {
    switch device {
    case .net, .console: queue % 2 == 0
    case .vsock: queue != 1
    case .input: queue == 0
    case .block, .fileSystem, .entropy: false
    // Not known: better no number than one that frightens.
    default: true
    }
  }

  /// True while something waits.
  mutating func look(_ host: any DeviceHost, _ now: MonotonicTime) -> Bool {
    let state: (mark: UInt16, count: UInt16?, waits: Bool)?
    switch ring {
    case .split(let available, let used):
      state = host.word(at: used).flatMap { used in host.word(at: available).map { (used, $0 &- used, $0 != used) } }
    case .packed(let descriptors, let size, let event):
      state = Self.packedState(host, descriptors, size, event)
    }
    guard let state, state.waits else {
      since = nil
      count = nil
      mark = nil
      return false
    }
    if since == nil || mark != state.mark { since = now }
    mark = state.mark
    count = state.count
    return true
  }

  private static func packedState(
    _ host: any DeviceHost, _ descriptors: UInt64, _ size: UInt16, _ event: UInt64
  ) -> (mark: UInt16, count: UInt16?, waits: Bool)? {
    // struct pvirtq_event_suppress: offset and wrap counter, then flags, of which 2 says that the offset counts.
    guard let position = host.word(at: event), host.word(at: event &+ 2) == 2, position & 0x7FFF < size,
      let flags = host.word(at: descriptors &+ UInt64(position & 0x7FFF) * 16 &+ 14)
    else { return nil }
    let wrap = position >> 15
    return (position, nil, flags >> 7 & 1 == wrap && flags >> 15 & 1 != wrap)
  }
}

/// How a queue waits, for reports.
package struct QueueWait: Equatable, Sendable {
  package let since: MonotonicTime
  /// Nil when the ring does not tell.
  package let count: UInt16?

  package init(since: MonotonicTime, count: UInt16?) {
    self.since = since
    self.count = count
  }
}

extension DeviceFrontEnd {
  /// Looks at all rings; true while something waits in one of them.
  package func look(now: MonotonicTime) -> Bool {
    guard let host else { return false }
    var waits = false
    for position in watches.indices where watches[position].look(host, now) { waits = true }
    return waits
  }

  /// Chains made available and not answered, in the rings that tell.
  func countWaiting(_ now: MonotonicTime) -> Int {
    guard look(now: now) else { return 0 }
    return watches.reduce(0) { $0 + Int($1.count ?? 0) }
  }

  /// What the last look has seen.
  package func wait(ofQueue index: Int) -> QueueWait? {
    guard let watch = watches.first(where: { $0.index == index }), let since = watch.since else { return nil }
    return QueueWait(since: since, count: watch.count)
  }
}
