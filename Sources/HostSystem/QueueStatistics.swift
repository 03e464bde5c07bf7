import CLinux

/// The statistics of one queue as they lie in memory: one page of 64-bit words, each written by a single thread with plain
/// stores, and read by anybody at any time. The page may be shared with another process, which copies it and believes nothing
/// (`protocol/statistics.md`).
public enum QueueStatistics {
  public static let pageByteCount = 4096
  /// The first word of a page in use.
  public static let mark: UInt64 = 0x3154_4154_534C_544D  // "MTLSTAT1"

  /// Words of a page that count. All but `mark` only grow.
  public enum Word: Int, CaseIterable, Sendable {
    case mark = 0
    /// Requests (chains, packets) completed.
    case requests
    /// Bytes the device read from guest memory: a disk's writes, a card's transmitted frames.
    case bytesRead
    /// Bytes the device wrote into guest memory.
    case bytesWritten
    /// Requests answered with an error, or dropped.
    case errors
    /// Wake-ups by the driver.
    case kicks
    /// Wake-ups that found their requests taken already.
    case mergedKicks
    /// Notifications to the driver.
    case calls
    /// Times that requests were taken, one or many.
    case batches
    /// Times that the thread went to sleep.
    case sleeps
    /// Looks before sleeping that made the sleep needless.
    case polls
    /// Times that requests had to wait for a rate limit.
    case throttles
    case flushes
    /// Requests that a process before had in flight when it ended, and that were begun again.
    case replays
  }

  /// Where it says of what file a flush has failed: its device and its inode, both zero where none has.
  @usableFromInline static let failedFileWord = 14

  /// Latencies from taking a request to its answer, by kind.
  public enum Histogram: Int, CaseIterable, Sendable {
    case reads = 0
    case writes
    case others

    var firstWord: Int { 32 + rawValue * bucketCount }
  }

  /// Below 512 ns, then four steps for every power of two, up to several minutes.
  public static let bucketCount = 120

  @inlinable @inline(__always)
  public static func bucket(_ nanoseconds: UInt64) -> Int {
    guard nanoseconds >= 512 else { return 0 }
    let power = 63 - nanoseconds.leadingZeroBitCount
    let step = Int(truncatingIfNeeded: nanoseconds >> UInt64(power - 2)) & 3
    return min(1 + (power - 9) * 4 + step, bucketCount - 1)
  }

  /// The least value that does not fall into a bucket or one before it.
  public static func end(ofBucket index: Int) -> UInt64 {
    index == 0 ? 512 : UInt64(4 + (index - 1) % 4 + 1) << UInt64((index - 1) / 4 + 7)
  }
}

/// One queue's statistics, written by the thread that serves it and read by any.
@safe
public final class QueueCounters: @unchecked Sendable {
  // @unchecked: every access is a single relaxed load or store; the mapping lives as long as this.

  private let mapping: MemoryMapping
  @usableFromInline let words: UnsafeMutableRawPointer

  /// One number with a single writer: a plain addition, never a locked one.
  @safe
  public struct Counter: Sendable {
    @usableFromInline nonisolated(unsafe) let word: UnsafeMutableRawPointer

    @inlinable @inline(__always)
    init(_ word: UnsafeMutableRawPointer) { unsafe self.word = word }

    @inlinable @inline(__always)
    public func add(_ count: UInt64) {
      // SAFETY: the word lies in the page that the counters keep mapped.
      unsafe clinux_store_relaxed_u64(word, clinux_load_relaxed_u64(word) &+ count)
    }

    @inlinable public var value: UInt64 { unsafe clinux_load_relaxed_u64(word) }
  }

  /// - Parameters:
  ///   - mapping: memory of at least `index + 1` pages, zero where nobody has counted yet.
  ///   - index: the page.
  public init(_ mapping: MemoryMapping, page index: Int) {
    precondition(index >= 0 && (index + 1) * QueueStatistics.pageByteCount <= mapping.byteCount, "Every queue has a page.")
    self.mapping = mapping
    // SAFETY: within the mapping, as just checked.
    unsafe words = mapping.baseAddress + index * QueueStatistics.pageByteCount
    unsafe clinux_store_relaxed_u64(words, QueueStatistics.mark)
  }

  /// In memory of their own.
  public convenience init() throws(SystemError) {
    self.init(try .anonymous(byteCount: QueueStatistics.pageByteCount), page: 0)
  }

  // SAFETY: every word lies in the page.
  @inlinable @inline(__always)
  public subscript(_ word: QueueStatistics.Word) -> Counter { unsafe Counter(words + word.rawValue &* 8) }

  @inlinable public var requests: Counter { self[.requests] }
  @inlinable public var bytesRead: Counter { self[.bytesRead] }
  @inlinable public var bytesWritten: Counter { self[.bytesWritten] }
  @inlinable public var errors: Counter { self[.errors] }
  @inlinable public var kicks: Counter { self[.kicks] }
  @inlinable public var calls: Counter { self[.calls] }

  /// A request of that kind took so long.
  @inlinable @inline(__always)
  public func record(_ nanoseconds: UInt64, in histogram: QueueStatistics.Histogram) {
    let word = 32 &+ histogram.rawValue &* QueueStatistics.bucketCount &+ QueueStatistics.bucket(nanoseconds)
    // SAFETY: bucket < bucketCount, so the word lies in the page.
    unsafe Counter(words + word &* 8).add(1)
  }

  /// Whether a flush of that file has failed, in this process or in one before it.
  package func saysFailed(_ file: FileStatus) -> Bool {
    let word = QueueStatistics.failedFileWord &* 8
    // SAFETY: both words lie in the page.
    return unsafe clinux_load_relaxed_u64(words + word) == file.device && clinux_load_relaxed_u64(words + word + 8) == file.inode
  }

  /// A flush of that file has failed; known until another file's fails, and whoever counts in this page after us will know it.
  package func noteFailed(_ file: FileStatus) {
    let word = QueueStatistics.failedFileWord &* 8
    // SAFETY: both words lie in the page. The inode first: half of it is no file's but for one that has failed before.
    unsafe clinux_store_relaxed_u64(words + word + 8, file.inode)
    unsafe clinux_store_relaxed_u64(words + word, file.device)
  }

  /// One log line.
  public var summary: String {
    "\(requests.value) requests, \(bytesRead.value) bytes read, \(bytesWritten.value) written, \(errors.value) errors, "
      + "\(kicks.value) kicks, \(calls.value) calls"
  }
}

/// A copy of one page, whoever wrote it: numbers without any promise.
public struct QueueStatisticsCopy: Sendable {
  public let queue: Int
  private let words: [UInt64]

  /// Nil when the page is not in use.
  public init?(_ mapping: MemoryMapping, page index: Int) {
    let count = QueueStatistics.pageByteCount / 8
    guard index >= 0, (index + 1) * QueueStatistics.pageByteCount <= mapping.byteCount else { return nil }
    // SAFETY: within the mapping; every word is loaded once.
    let base = unsafe UnsafeMutableRawPointer(mapping.baseAddress) + index * QueueStatistics.pageByteCount
    guard unsafe clinux_load_relaxed_u64(base) == QueueStatistics.mark else { return nil }
    words = (0..<count).map { unsafe clinux_load_relaxed_u64(base + $0 * 8) }
    queue = index
  }

  public subscript(_ word: QueueStatistics.Word) -> UInt64 { words[word.rawValue] }

  /// Counts by bucket.
  public func buckets(_ histogram: QueueStatistics.Histogram) -> [UInt64] {
    Array(words[histogram.firstWord..<(histogram.firstWord + QueueStatistics.bucketCount)])
  }

  public func count(_ histogram: QueueStatistics.Histogram) -> UInt64 { buckets(histogram).reduce(0) { $0 &+ $1 } }

  /// The end of the bucket that holds the value which so many percent do not exceed; nil without any value.
  public func percentile(_ percent: Double, _ histogram: QueueStatistics.Histogram) -> UInt64? {
    let all = buckets(histogram)
    let total = all.reduce(0.0) { $0 + Double($1) }
    guard total > 0 else { return nil }
    var seen = 0.0
    for (index, count) in all.enumerated() {
      seen += Double(count)
      if seen >= total * percent / 100 { return QueueStatistics.end(ofBucket: index) }
    }
    return QueueStatistics.end(ofBucket: QueueStatistics.bucketCount - 1)
  }
}
