import HostSystem

/// A token bucket: so many messages at once, and so many a second after that.
struct MessageBudget: Sendable {
  /// Tokens in billionths, so that a nanosecond earns a whole number of them.
  private var level: UInt64
  private let capacity: UInt64
  private let perSecond: UInt64
  private var last: MonotonicTime?

  init(burst: Int, perSecond: Int) {
    capacity = UInt64(burst) * 1_000_000_000
    level = capacity
    self.perSecond = UInt64(perSecond)
  }

  /// Takes one token; false when there is none.
  mutating func allows(_ now: MonotonicTime) -> Bool {
    let elapsed = UInt64(clamping: now.since(last ?? now).nanoseconds)
    last = now
    let (earned, overflow) = elapsed.multipliedReportingOverflow(by: perSecond)
    level = overflow || earned >= capacity - level ? capacity : level + earned
    guard level >= 1_000_000_000 else { return false }
    level -= 1_000_000_000
    return true
  }
}
