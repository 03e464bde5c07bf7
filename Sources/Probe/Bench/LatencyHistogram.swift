/// Counts of latencies in nanoseconds: exact below 32 ns, then 32 steps per power of two (at most 3 % off), like fio's.
@safe
package struct LatencyHistogram: ~Copyable, @unchecked Sendable {
  // @unchecked: one owner; the memory is private to it.

  /// 32 exact ones, then 32 for each of the powers 5 to 41 (an hour and more).
  package static let bucketCount = 32 + 37 * 32

  private let buckets: UnsafeMutablePointer<UInt64>
  private(set) var count: UInt64 = 0
  private(set) var sum: UInt64 = 0
  private(set) var least: UInt64 = .max
  private(set) var greatest: UInt64 = 0
  /// Of squares, for the standard deviation.
  private var squares = 0.0

  package init() {
    unsafe buckets = .allocate(capacity: Self.bucketCount)
    unsafe buckets.initialize(repeating: 0, count: Self.bucketCount)
  }

  deinit { unsafe buckets.deallocate() }

  @inline(__always)
  package static func bucket(_ value: UInt64) -> Int {
    if value < 32 { return Int(value) }
    let power = 63 - value.leadingZeroBitCount
    let step = Int(truncatingIfNeeded: value >> UInt64(power - 5)) & 31
    return min((power - 4) * 32 + step, bucketCount - 1)
  }

  /// The least value of a bucket.
  package static func start(_ bucket: Int) -> UInt64 {
    bucket < 32 ? UInt64(bucket) : UInt64(32 + bucket % 32) << UInt64(bucket / 32 - 1)
  }

  @inline(__always)
  package mutating func record(_ value: UInt64) {
    // SAFETY: `bucket` is below `bucketCount`.
    unsafe buckets[Self.bucket(value)] &+= 1
    count &+= 1
    sum &+= value
    if value < least { least = value }
    if value > greatest { greatest = value }
    let number = Double(value)
    squares += number * number
  }

  mutating func add(_ other: borrowing LatencyHistogram) {
    for index in 0..<Self.bucketCount { unsafe buckets[index] &+= other.buckets[index] }
    count += other.count
    sum += other.sum
    least = min(least, other.least)
    greatest = max(greatest, other.greatest)
    squares += other.squares
  }

  package var summary: LatencySummary {
    var filled: [LatencySummary.Bucket] = []
    for index in 0..<Self.bucketCount {
      let count = unsafe buckets[index]
      if count > 0 { filled.append(LatencySummary.Bucket(start: Self.start(index), end: Self.start(index + 1), count: count)) }
    }
    let mean = count == 0 ? 0 : Double(sum) / Double(count)
    let variance = count == 0 ? 0 : max(0, squares / Double(count) - mean * mean)
    return LatencySummary(
      buckets: filled, count: count, least: count == 0 ? 0 : least, greatest: greatest, mean: mean, deviation: variance.squareRoot())
  }
}

/// A histogram as a value, for reports. Nanoseconds.
package struct LatencySummary: Sendable {
  package struct Bucket: Sendable {
    var start: UInt64
    var end: UInt64
    var count: UInt64
  }
  package var buckets: [Bucket] = []
  package var count: UInt64 = 0
  package var least: UInt64 = 0
  package var greatest: UInt64 = 0
  package var mean = 0.0
  package var deviation = 0.0

  /// fio's list.
  static let percentages = [1.0, 5, 10, 20, 30, 40, 50, 60, 70, 80, 90, 95, 99, 99.5, 99.9, 99.95, 99.99]

  /// The value that so many percent do not exceed.
  package func percentile(_ percent: Double) -> UInt64 {
    guard count > 0 else { return 0 }
    let wanted = UInt64((Double(count) * percent / 100).rounded(.up))
    var seen: UInt64 = 0
    for bucket in buckets {
      seen += bucket.count
      if seen >= wanted { return min(max(bucket.end - 1, least), greatest) }
    }
    return greatest
  }
}
