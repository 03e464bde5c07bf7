import CLinux
import Glibc
import HostSystem

/// What the machine can do without any back end, measured in the same round.
struct LimitResult: Sendable {
  /// Round trips between two threads over two eventfds, each reading blocked.
  var eventRoundTripsPerSecond: Double?
  /// Copies of one block within memory much larger than the caches' share of one block.
  var copiesPerSecond: Double?
  /// A bare io_uring with the same pattern, block size and depth.
  var ringRequestsPerSecond: Double?
  var ringProblem: String?

  static func measure(blockSize: Int, _ job: BlockJob?, file: String?) -> LimitResult {
    var result = LimitResult()
    result.eventRoundTripsPerSecond = eventRoundTrips(for: .milliseconds(200))
    result.copiesPerSecond = copies(of: blockSize, for: .milliseconds(200))
    guard let file, let job else { return result }
    do throws(SystemError) {
      result.ringRequestsPerSecond = try ringRequests(job, file, for: min(job.runtime, .seconds(1)))
    } catch {
      result.ringProblem = "\(error)"
    }
    return result
  }

  /// Told before anything is measured: a file that is not there, or smaller than one block.
  static func expect(_ path: String, blockSize: Int) throws(ProbeError) {
    let size = try wrapping { () throws(SystemError) in byteCount(of: try OwnedFD.open(path, O_RDONLY)) }
    guard size >= UInt64(blockSize) else {
      throw .badOption("limit-file", why: "names \(path), which has \(size) bytes; one block is \(blockSize)")
    }
  }

  /// Of a file or a block device.
  private static func byteCount(of file: borrowing OwnedFD) -> UInt64 { UInt64(max(0, lseek(file.rawValue, 0, SEEK_END))) }

  private static func eventRoundTrips(for duration: Duration) -> Double? {
    let there = eventfd(0, CInt(EFD_CLOEXEC))
    let back = eventfd(0, CInt(EFD_CLOEXEC))
    guard there >= 0, back >= 0 else { return nil }
    defer {
      _ = close(there)
      _ = close(back)
    }
    // A value of two or more ends the other thread.
    let echo = try? HostThread.start(name: "echo") {
      while read(there) == 1 { write(back, 1) }
    }
    guard let echo else { return nil }
    var count = 0
    let begin = MonotonicTime.now
    let end = begin.advanced(by: duration)
    while MonotonicTime.now < end {
      for _ in 0..<16 {
        write(there, 1)
        _ = read(back)
      }
      count += 16
    }
    let seconds = Double(MonotonicTime.now.since(begin).nanoseconds) / 1e9
    write(there, 2)
    echo.join()
    return Double(count) / seconds
  }

  private static func read(_ number: CInt) -> UInt64 {
    var value: UInt64 = 0
    // SAFETY: eight bytes of ours.
    return unsafe Glibc.read(number, &value, 8) == 8 ? value : 0
  }

  private static func write(_ number: CInt, _ count: UInt64) {
    var value = count
    // SAFETY: eight bytes of ours.
    _ = unsafe Glibc.write(number, &value, 8)
  }

  private static func copies(of byteCount: Int, for duration: Duration) -> Double? {
    let slots = max(2, (64 << 20) / byteCount)
    guard let memory = try? MemoryMapping.anonymous(byteCount: slots * byteCount) else { return nil }
    memory.advise(14)  // MADV_HUGEPAGE
    // SAFETY: slots * byteCount bytes were mapped; every slot index is below `slots`.
    unsafe memset(memory.baseAddress, 1, slots * byteCount)
    var random: UInt64 = 0x9E37_79B9_7F4A_7C15
    var count = 0
    let begin = MonotonicTime.now
    let end = begin.advanced(by: duration)
    while MonotonicTime.now < end {
      for _ in 0..<32 {
        random ^= random << 13
        random ^= random >> 7
        random ^= random << 17
        let from = Int(random % UInt64(slots))
        let to = (from + slots / 2) % slots
        unsafe memcpy(memory.baseAddress + to * byteCount, memory.baseAddress + from * byteCount, byteCount)
      }
      count += 32
    }
    return Double(count) / (Double(MonotonicTime.now.since(begin).nanoseconds) / 1e9)
  }

  private static func ringRequests(_ job: BlockJob, _ path: String, for duration: Duration) throws(SystemError) -> Double {
    // Reading is enough for a limit, and never harms the file.
    let file = try OwnedFD.open(path, O_RDONLY)
    let size = byteCount(of: file)
    let blockSize = UInt64(job.blockSize)
    let blocks = min(job.size ?? size, size) / blockSize
    guard blocks > 0 else { throw SystemError("read blocks of \(blockSize) bytes from \(path)", .invalid) }
    let buffers = try MemoryMapping.anonymous(byteCount: job.depth * Int(blockSize))
    var ring = try IORing(IORing.Configuration(capacity: min(4096, max(64, job.depth))))
    var random: UInt64 = 0x2545_F491_4F6C_DD1D
    var next: UInt64 = 0
    func block() -> UInt64 {
      guard job.pattern.isRandom else {
        next = next + 1 == blocks ? 0 : next + 1
        return next
      }
      random ^= random << 13
      random ^= random >> 7
      random ^= random << 17
      return random % blocks
    }
    func prepare(_ slot: Int, _ ring: inout IORing) {
      // SAFETY: slot < depth; the mapping lives until the ring was drained below.
      _ = unsafe ring.prepareRead(
        .descriptor(file.rawValue), into: buffers.baseAddress + slot * Int(blockSize), byteCount: job.blockSize,
        offset: block() * blockSize, userData: UInt64(slot))
    }
    let depth = min(job.depth, 4096)
    for slot in 0..<depth { prepare(slot, &ring) }
    var inFlight = depth
    var count = 0
    let begin = MonotonicTime.now
    let end = begin.advanced(by: duration)
    var stop = begin
    while inFlight > 0 {
      let result = ring.enter(waitingFor: 1)
      if result < 0, result != -EINTR, result != -EBUSY, result != -EAGAIN { throw SystemError("use an io_uring", Errno(-result)) }
      let isOver = MonotonicTime.now >= end
      if isOver, stop == begin { stop = .now }
      while let completion = ring.nextCompletion() {
        if completion.result < 0 { throw SystemError("read \(path)", Errno(-completion.result)) }
        inFlight -= 1
        if !isOver {
          count += 1
          prepare(Int(completion.userData), &ring)
          inFlight += 1
        }
      }
    }
    return Double(count) / (Double(stop.since(begin).nanoseconds) / 1e9)
  }
}
