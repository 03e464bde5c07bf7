import HostSystem
import Synchronization

/// What a device may do in a time, in Cloud Hypervisor's terms: a bucket of `size` tokens that fills within `refillTime`, and
/// `oneTimeBurst` tokens more at the start that never come back.
package struct RateBucket: Equatable, Sendable {
  package var size: UInt64
  package var oneTimeBurst: UInt64
  package var refillTime: Duration

  package init(size: UInt64, oneTimeBurst: UInt64 = 0, refillTime: Duration) {
    self.size = size
    self.oneTimeBurst = oneTimeBurst
    self.refillTime = refillTime
  }
}

/// Limits of one device over all its queues. A request is begun while there is any token left, and takes what it costs
/// even if that is more, so that the next one waits longer: in the long run the rate is exact whatever the requests' size.
package final class RateLimiter: Sendable {
  private struct Tokens {
    let perNanosecond: Double
    let size: Double
    var burst: Double
    var now: Double
    var time: UInt64

    init(_ bucket: RateBucket, _ time: UInt64) {
      size = Double(bucket.size)
      perNanosecond = size / Double(max(1, bucket.refillTime.nanoseconds))
      burst = Double(bucket.oneTimeBurst)
      now = size
      self.time = time
    }

    mutating func fill(_ time: UInt64) {
      guard time > self.time else { return }
      now = min(size, now + Double(time - self.time) * perNanosecond)
      self.time = time
    }

    mutating func take(_ cost: Double) {
      let fromBurst = min(burst, cost)
      burst -= fromBurst
      now -= cost - fromBurst
    }

    /// Nanoseconds until there is something to take again: what a millisecond brings, so that there is one wake-up
    /// for many requests.
    var wait: UInt64 {
      if burst >= 1 || now >= 1 { return 0 }
      let nanoseconds = (max(1, min(size, perNanosecond * 1_000_000)) - now) / perNanosecond
      // A day at most; what is left then is waited for anew. A slow rate and a great request make more than a number holds.
      return UInt64(max(1, min(nanoseconds, 86_400e9)))
    }
  }

  private struct State {
    var bytes: Tokens?
    var operations: Tokens?
  }

  private let state: Mutex<State>

  /// Nil without any limit.
  package init?(bytes: RateBucket?, operations: RateBucket?, now: MonotonicTime = .now) {
    guard bytes != nil || operations != nil else { return nil }
    state = Mutex(
      State(bytes: bytes.map { Tokens($0, now.nanoseconds) }, operations: operations.map { Tokens($0, now.nanoseconds) }))
  }

  /// Nanoseconds before the next request may be begun; 0 for now.
  package func wait(at now: UInt64) -> UInt64 {
    state.withLock { state in
      state.bytes?.fill(now)
      state.operations?.fill(now)
      return max(state.bytes?.wait ?? 0, state.operations?.wait ?? 0)
    }
  }

  /// Whether the next request may be begun, by what is there since the last `wait`.
  package var isOpen: Bool { state.withLock { ($0.bytes?.wait ?? 0) == 0 && ($0.operations?.wait ?? 0) == 0 } }

  /// A request of so many bytes has begun.
  package func took(byteCount: UInt64) {
    state.withLock { state in
      state.bytes?.take(Double(byteCount))
      state.operations?.take(1)
    }
  }
}
