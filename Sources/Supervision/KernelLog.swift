import Glibc
import HostSystem

/// Reads from the kernel's log which system call a process was killed for. A filter's kill leaves just SIGSYS in the exit
/// status; the number is only in the audit record (type 1326), which the kernel prints there while no audit daemon runs.
struct KernelLog: ~Copyable {
  let fd: OwnedFD

  /// One that was open before an upgrade.
  init(adopting fd: consuming OwnedFD) { self.fd = fd }

  /// nil where the log may not be read (`kernel.dmesg_restrict` without CAP_SYSLOG). From here on: what is there already
  /// is of no interest.
  init?() {
    guard let fd = try? OwnedFD.open("/dev/kmsg", O_RDONLY | O_NONBLOCK), lseek(fd.rawValue, 0, SEEK_END) >= 0 else { return nil }
    self.fd = fd
  }

  /// The call `processID` was killed for: its number and first argument of interest are in the record. Waits for the record
  /// at most a moment, because the kernel's audit thread writes it after the process has ended.
  borrowing func callThatKilled(_ processID: Int32) -> UInt32? {
    let deadline = MonotonicTime.now.advanced(by: .milliseconds(500))
    var record = [UInt8](repeating: 0, count: 8192)
    // Bounded by time, and in number for a log that never runs dry.
    for _ in 0..<10_000 {
      // SAFETY: the array is lent for the call.
      switch unsafe record.withUnsafeMutableBytes({ unsafe fd.read(into: $0) }) {
      case .bytes(let count):
        if let call = Self.call(String(decoding: record[..<count], as: UTF8.self), processID) { return call }
      // Records were overwritten before we came; the next read goes on behind the gap.
      case .failed(.brokenPipe): continue
      case .wouldBlock:
        let left = deadline.since(.now)
        guard left > .zero, (try? fd.waitUntil(.readable, timeout: left)) == true else { return nil }
      case .end, .failed: return nil
      }
    }
    return nil
  }

  /// `... audit: type=1326 audit(...): ... pid=4711 comm="blk0" ... sig=31 arch=c000003e syscall=257 ...`
  static func call(_ record: String, _ processID: Int32) -> UInt32? {
    guard record.split(separator: " ").contains(where: { $0.hasSuffix("type=1326") }) else { return nil }
    var number: UInt32?
    var isOurs = false
    for field in record.split(separator: " ") {
      if field == "pid=\(processID)" { isOurs = true }
      if field.hasPrefix("syscall=") { number = UInt32(field.dropFirst("syscall=".count)) }
    }
    return isOurs ? number : nil
  }
}
