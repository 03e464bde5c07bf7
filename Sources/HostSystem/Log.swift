import CLinux
import Glibc
import Synchronization

/// Log lines to standard error, one `write(2)` a line, no locale, no clock. An action the user asked for that failed is
/// an error; an oddity that was absorbed is a warning, rate-limited where a guest or peer can cause it.
public enum Log {
  public enum Level: Int, Sendable, Comparable {
    case error = 0
    case warning, info, debug
    public static func < (a: Level, b: Level) -> Bool { a.rawValue < b.rawValue }
    var label: String {
      switch self {
      case .error: "error: "
      case .warning: "warning: "
      case .info: ""
      case .debug: "debug: "
      }
    }
  }

  private static let threshold = Atomic<Int>(Level.warning.rawValue)
  private static let speaker = Mutex<String>("martlet")

  /// Lines above this level are not made at all; the default is `.warning`.
  public static var level: Level {
    get { Level(rawValue: threshold.load(ordering: .relaxed)) ?? .warning }
    set { threshold.store(newValue.rawValue, ordering: .relaxed) }
  }

  /// Who speaks, at the start of every line: the program or the process title.
  public static func setSpeaker(_ name: String) { speaker.withLock { $0 = name } }

  public static func error(_ message: @autoclosure () -> String) { line(.error, message) }
  public static func warning(_ message: @autoclosure () -> String) { line(.warning, message) }
  public static func info(_ message: @autoclosure () -> String) { line(.info, message) }
  public static func debug(_ message: @autoclosure () -> String) { line(.debug, message) }

  private static func line(_ level: Level, _ message: () -> String) {
    guard level.rawValue <= threshold.load(ordering: .relaxed) else { return }
    write(speaker.withLock { $0 } + ": " + level.label + message(), to: 2)
  }

  /// One line, at most 2 KiB, control characters made harmless (text may stem from a peer).
  public static func write(_ text: String, to number: CInt) {
    var bytes = [UInt8]()
    bytes.reserveCapacity(text.utf8.count + 1)
    for byte in text.utf8.prefix(2048) { bytes.append(byte < 0x20 || byte == 0x7F ? UInt8(ascii: "?") : byte) }
    bytes.append(UInt8(ascii: "\n"))
    // SAFETY: the array is not changed during the call. A full or closed pipe loses the line, never the process.
    _ = unsafe bytes.withUnsafeBytes { unsafe Glibc.write(number, $0.baseAddress, $0.count) }
  }
}

/// Lets a burst through and then holds back until its time is over: for log lines a guest or peer can cause.
public struct RateLimit: Sendable {
  private let burst: Int
  private let interval: Duration
  private var used = 0
  private var windowStart = MonotonicTime(nanoseconds: 0)

  public init(burst: Int = 10, per interval: Duration = .seconds(5)) {
    self.burst = burst
    self.interval = interval
  }

  /// Whether one more may pass now.
  public mutating func allows(_ now: MonotonicTime = .now) -> Bool {
    if now.since(windowStart) >= interval {
      windowStart = now
      used = 0
    }
    guard used < burst else { return false }
    used += 1
    return true
  }
}
