import ControlProtocol
import Glibc
import HostSystem

/// What a process uses of the host: from /proc, and from its control group where it has one.
package struct ProcessUsage {
  /// In the order in which they are told. Of the kernel's numbers for the process itself:
  package enum Key: String, CaseIterable {
    case processorTime = "cpu_ns"
    /// Pages of its own and shared ones that it has touched (guest memory), in bytes.
    case resident = "memory_rss", own = "memory_anonymous", shared = "memory_shared"
    /// Shared pages divided by the number of their users.
    case proportional = "memory_pss"
    case threads
    case read = "io_read", written = "io_written"
    /// Of its control group: with what the kernel did on its behalf.
    case groupProcessorTime = "group_cpu_ns", groupMemory = "group_memory", groupPeak = "group_memory_peak"
    case groupThreads = "group_pids", groupRead = "group_io_read", groupWritten = "group_io_written"
  }

  private var values: [Key: UInt64] = [:]

  package subscript(key: Key) -> UInt64? { values[key] }

  /// Reads what `text` wrote.
  package init(_ text: String) {
    for word in text.split(separator: " ") {
      let parts = word.split(separator: "=")
      guard parts.count == 2, let key = Key(rawValue: String(parts[0])), let value = UInt64(parts[1]) else { continue }
      values[key] = value
    }
  }

  /// What there is to know, where it can be read. For a process that may open files.
  static func text(of process: Int32, group: String?) -> String {
    var words: [String] = []
    func add(_ key: Key, _ value: UInt64?) { if let value { words.append("\(key.rawValue)=\(value)") } }
    // As clock_getcpuclockid(3) makes it of a process id, which would make a call more: CPUCLOCK_SCHED of all threads.
    let clock = clockid_t(~process << 3 | 2)
    var time = timespec()
    // SAFETY: `time` is ours and alive for the call.
    if unsafe clock_gettime(clock, &time) == 0 { add(.processorTime, UInt64(time.tv_sec) &* 1_000_000_000 &+ UInt64(time.tv_nsec)) }
    let status = Table("/proc/\(process)/status")
    add(.resident, status.kibibytes("VmRSS:"))
    add(.own, status.kibibytes("RssAnon:"))
    add(.shared, status.kibibytes("RssShmem:"))
    add(.proportional, Table("/proc/\(process)/smaps_rollup").kibibytes("Pss:"))
    add(.threads, status["Threads:"])
    let transfers = Table("/proc/\(process)/io")
    add(.read, transfers["read_bytes:"])
    add(.written, transfers["write_bytes:"])
    guard let group else { return words.joined(separator: " ") }
    add(.groupProcessorTime, Table("\(group)/cpu.stat")["usage_usec"].map { $0 &* 1000 })
    add(.groupMemory, ControlGroups.words("\(group)/memory.current").first.flatMap { UInt64($0) })
    add(.groupPeak, ControlGroups.words("\(group)/memory.peak").first.flatMap { UInt64($0) })
    add(.groupThreads, ControlGroups.words("\(group)/pids.current").first.flatMap { UInt64($0) })
    let storage = ControlGroups.words("\(group)/io.stat")
    func sum(_ name: String) -> UInt64 {
      storage.filter { $0.hasPrefix(name) }.compactMap { UInt64($0.dropFirst(name.count)) }.reduce(0, &+)
    }
    // An empty file is a group that has moved nothing yet.
    // SAFETY: a NUL-terminated copy that lives for the call.
    if unsafe access("\(group)/io.stat", R_OK) == 0 {
      add(.groupRead, sum("rbytes="))
      add(.groupWritten, sum("wbytes="))
    }
    return words.joined(separator: " ")
  }

  /// Lines of a name and a number, as the kernel writes many.
  private struct Table {
    private var values: [Substring: UInt64] = [:]

    init(_ path: String) {
      guard let fd = try? OwnedFD.open(path, O_RDONLY), let bytes = try? fd.readToEnd(limit: 65536) else { return }
      for line in String(decoding: bytes, as: UTF8.self).split(separator: "\n") {
        let words = line.split { $0 == " " || $0 == "\t" }
        if words.count >= 2, let value = UInt64(words[1]) { values[words[0]] = value }
      }
    }

    subscript(name: Substring) -> UInt64? { values[name] }

    func kibibytes(_ name: Substring) -> UInt64? { values[name].map { $0 &* 1024 } }
  }
}
