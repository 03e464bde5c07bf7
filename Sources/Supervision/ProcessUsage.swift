import Glibc

/// What a process has used of the host so far. By its clock, which needs neither /proc nor a right.
struct ProcessUsage {
  /// Processor time of all its threads, in nanoseconds; nil where it cannot be known.
  let processorTime: UInt64?

  init(_ processID: Int32) {
    // As clock_getcpuclockid(3) makes it of a process id, which would make a call more: CPUCLOCK_SCHED of all threads.
    let clock = clockid_t(~processID << 3 | 2)
    var time = timespec()
    // SAFETY: `time` is ours and alive for the call.
    let result = unsafe clock_gettime(clock, &time)
    processorTime = result == 0 ? UInt64(time.tv_sec) &* 1_000_000_000 &+ UInt64(time.tv_nsec) : nil
  }
}
