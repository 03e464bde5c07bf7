import Synchronization

/// Statistics of one queue, written by the thread that serves it and read by any.
public final class QueueCounters: Sendable {
  /// One number with a single writer: a plain addition, never a locked one.
  public struct Counter: ~Copyable, Sendable {
    @usableFromInline let storage = Atomic<UInt64>(0)

    @inlinable @inline(__always)
    public func add(_ count: UInt64) {
      storage.store(storage.load(ordering: .relaxed) &+ count, ordering: .relaxed)
    }

    public var value: UInt64 { storage.load(ordering: .relaxed) }
  }

  /// Requests (chains, packets) completed.
  public let requests = Counter()
  /// Bytes the device read from guest memory.
  public let bytesRead = Counter()
  /// Bytes the device wrote into guest memory.
  public let bytesWritten = Counter()
  /// Requests answered with an error, or dropped.
  public let errors = Counter()
  /// Wake-ups by the driver.
  public let kicks = Counter()
  /// Notifications to the driver.
  public let calls = Counter()

  public init() {}

  /// One log line.
  public var summary: String {
    "\(requests.value) requests, \(bytesRead.value) bytes read, \(bytesWritten.value) written, \(errors.value) errors, "
      + "\(kicks.value) kicks, \(calls.value) calls"
  }
}
