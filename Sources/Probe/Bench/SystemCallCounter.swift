import CLinux
import Glibc
import HostSystem
import Synchronization

/// Counts the system calls of another process with all its threads, by ptrace(2). It slows the process down, so this is
/// a run of its own; calls per request stay what they are.
final class SystemCallCounter: Sendable {
  private let process: Int32
  private let isStopping = Atomic<Bool>(false)
  private let stops = Atomic<Int>(0)
  private let isAttached = Atomic<Bool>(false)

  private static let seize: CInt = 0x4206
  private static let interrupt: CInt = 0x4207
  private static let runToCall: CInt = 24  // PTRACE_SYSCALL
  private static let detach: CInt = 17
  private static let options: UInt = 1 | 8  // PTRACE_O_TRACESYSGOOD, PTRACE_O_TRACECLONE

  init(process: Int32) { self.process = process }

  /// Starts counting; nil when this process may not be traced. All ptrace calls come from the one thread made here.
  func start() -> HostThread? {
    guard let thread = try? HostThread.start(name: "tracer", { self.run() }) else { return nil }
    for _ in 0..<1000 {
      if isAttached.load(ordering: .acquiring) { return thread }
      if isStopping.load(ordering: .acquiring) { break }
      usleep(500)
    }
    isStopping.store(true, ordering: .releasing)
    thread.join()
    return nil
  }

  /// Every call is stopped twice, at its entry and at its exit.
  var count: Int { stops.load(ordering: .relaxed) / 2 }

  func stop() { isStopping.store(true, ordering: .releasing) }

  private func run() {
    var threads: Set<Int32> = []
    for name in Self.tasks(of: process) where clinux_ptrace(Self.seize, name, 0, Self.options) == 0 {
      _ = clinux_ptrace(Self.interrupt, name, 0, 0)
      threads.insert(name)
    }
    guard !threads.isEmpty else {
      isStopping.store(true, ordering: .releasing)
      return
    }
    isAttached.store(true, ordering: .releasing)
    while !isStopping.load(ordering: .acquiring) {
      var status: CInt = 0
      // SAFETY: `status` is ours.
      let thread = unsafe clinux_wait_thread(-1, &status, 0)
      if thread <= 0 {
        sched_yield()
        continue
      }
      guard status & 0xFF == 0x7F else {
        threads.remove(thread)
        continue
      }
      threads.insert(thread)
      let signal = (status >> 8) & 0xFF
      if signal == 5 | 0x80 { stops.add(1, ordering: .relaxed) }
      let isOurs = signal == 5 | 0x80 || status >> 16 != 0
      _ = clinux_ptrace(Self.runToCall, thread, 0, isOurs ? 0 : UInt(signal))
    }
    letGo(of: threads)
  }

  /// A thread can be let go only while it stands still.
  private func letGo(of threads: Set<Int32>) {
    var left = threads
    for thread in left { _ = clinux_ptrace(Self.interrupt, thread, 0, 0) }
    let end = MonotonicTime.now.advanced(by: .seconds(1))
    while !left.isEmpty, MonotonicTime.now < end {
      var status: CInt = 0
      let thread = unsafe clinux_wait_thread(-1, &status, 0)
      if thread <= 0 {
        usleep(100)
        continue
      }
      if status & 0xFF == 0x7F {
        let signal = (status >> 8) & 0xFF
        let isOurs = signal == 5 | 0x80 || status >> 16 != 0
        _ = clinux_ptrace(Self.detach, thread, 0, isOurs ? 0 : UInt(signal))
      }
      left.remove(thread)
    }
  }

  /// The threads of a process (`/proc/PID/task`).
  static func tasks(of process: Int32) -> [Int32] { entries(of: "/proc/\(process)/task").compactMap { Int32($0) } }

  /// Names in a directory.
  static func entries(of path: String) -> [String] {
    var names: [String] = []
    // SAFETY: the stream is ours until it is closed; an entry is read before the next call.
    guard let directory = unsafe opendir(path) else { return [] }
    while let entry = unsafe readdir(directory) {
      unsafe withUnsafeBytes(of: entry.pointee.d_name) { bytes in
        let name = unsafe String(decoding: bytes.prefix { $0 != 0 }, as: UTF8.self)
        if name != ".", name != ".." { names.append(name) }
      }
    }
    _ = unsafe closedir(directory)
    return names
  }
}
