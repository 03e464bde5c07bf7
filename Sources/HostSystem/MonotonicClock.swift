import CLinux
import Glibc

/// A point on `CLOCK_MONOTONIC`, in nanoseconds.
public struct MonotonicTime: Hashable, Comparable, Sendable {
  public let nanoseconds: UInt64

  @inlinable public init(nanoseconds: UInt64) { self.nanoseconds = nanoseconds }

  public static var now: MonotonicTime {
    var time = timespec()
    // SAFETY: `time` is ours and alive for the call; CLOCK_MONOTONIC always exists.
    _ = unsafe clock_gettime(CLOCK_MONOTONIC, &time)
    return MonotonicTime(nanoseconds: UInt64(time.tv_sec) &* 1_000_000_000 &+ UInt64(time.tv_nsec))
  }

  @inlinable public static func < (a: MonotonicTime, b: MonotonicTime) -> Bool { a.nanoseconds < b.nanoseconds }

  /// Saturating: a deadline far away stays far away.
  @inlinable public func advanced(by duration: Duration) -> MonotonicTime {
    let step = duration.nanoseconds
    if step < 0 { return MonotonicTime(nanoseconds: nanoseconds - min(nanoseconds, step.magnitude)) }
    let (sum, overflow) = nanoseconds.addingReportingOverflow(UInt64(step))
    return MonotonicTime(nanoseconds: overflow ? .max : sum)
  }

  /// The time from `earlier` to here; zero when `earlier` is later.
  @inlinable public func since(_ earlier: MonotonicTime) -> Duration {
    .nanoseconds(Int64(clamping: nanoseconds - min(nanoseconds, earlier.nanoseconds)))
  }
}

/// A timer on `CLOCK_MONOTONIC` that becomes readable when it expires (`timerfd`).
@safe
public struct Timer: ~Copyable {
  public let fd: OwnedFD

  public init() throws(SystemError) {
    let result = timerfd_create(CLOCK_MONOTONIC, CInt(TFD_CLOEXEC) | CInt(TFD_NONBLOCK))
    if result < 0 { throw SystemError("create a timer", Errno.current) }
    fd = OwnedFD(owning: result)
  }

  /// Arms the timer for one expiry at `deadline`, or disarms it with nil.
  public borrowing func set(_ deadline: MonotonicTime?) {
    var setting = itimerspec()
    if let deadline {
      // Zero would disarm: the earliest moment is one nanosecond after boot.
      let nanoseconds = max(deadline.nanoseconds, 1)
      setting.it_value.tv_sec = Int(clamping: nanoseconds / 1_000_000_000)
      setting.it_value.tv_nsec = Int(nanoseconds % 1_000_000_000)
    }
    // SAFETY: `setting` is ours and alive for the call.
    _ = unsafe timerfd_settime(fd.rawValue, CInt(TFD_TIMER_ABSTIME), &setting, nil)
  }

  /// Consumes a reported expiry.
  public borrowing func acknowledge() {
    var count: UInt64 = 0
    // SAFETY: eight bytes of ours.
    _ = unsafe Glibc.read(fd.rawValue, &count, 8)
  }
}
