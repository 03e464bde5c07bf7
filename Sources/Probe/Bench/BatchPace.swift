import CLinux

/// How long a spinning lane leaves the ring alone between two looks at it.
///
/// A lane that looks all the time takes requests one by one, and each takes the cache lines of the used ring from the back
/// end that is about to write into them, and back: on processors that are far from one another that is most of what a
/// request costs, on both sides. With half of the requests done before the next look, lines travel once for many
/// requests, and the back end still has the other half to work on: it never waits for the lane. What a request's latency is
/// then, is depth over rate, as in every loop that is closed.
///
/// Back ends slower than `slowest` a request (0.6 µs) are not what this is for: there a look costs nothing that could be
/// measured. Never longer than 4 µs.
package struct BatchPace {
  /// Requests a look is to find; 0 for a depth at which there is nothing to batch.
  private let batch: UInt64
  private let longest: UInt64
  private let slowest: UInt64
  private var cyclesPerRequest: UInt64
  private var last: UInt64 = 0
  private var next: UInt64 = 0

  package init(depth: Int, _ rate: CycleRate) {
    batch = depth < 8 ? 0 : UInt64(depth / 2)
    longest = UInt64(rate.cyclesPerSecond * 4e-6)
    slowest = UInt64(rate.cyclesPerSecond * 0.6e-6)
    cyclesPerRequest = 0
  }

  /// `count` requests, more than none, were taken at `now`.
  @inline(__always)
  package mutating func took(_ count: Int, _ now: UInt64) {
    guard batch > 0 else { return }
    let each = min((now &- last) / UInt64(count), 2 &* slowest)
    last = now
    cyclesPerRequest = (7 &* cyclesPerRequest &+ each) / 8
    next = cyclesPerRequest < slowest ? now &+ min(batch &* cyclesPerRequest, longest) : now
  }

  /// Whether it is too early to look again at `now`.
  @inline(__always)
  package func isEarly(_ now: UInt64) -> Bool { now < next }
}
