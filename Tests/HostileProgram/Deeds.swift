// What a process calls although no line of ours does: the allocator, the end of a thread, abort(3), a wait that a stop falls
// into. No VM brings all of it about at will. So it is done on purpose, behind a role's filter: with the whole of its lists it
// works, with one of the calls taken away it ends the process. Told is, of each deed, `NAME with all` and `NAME without CALL`, and how
// that ended.

import CLinux
import Glibc
import HostSystem
import HostileAttacks
import Sandbox
import Synchronization

struct Deed: Sendable {
  let name: String
  let calls: [String]
  /// It takes threads, which not every role has.
  var isThreaded = false
  /// The process is stopped and goes on, again and again.
  var isStopped = false
  /// Before the filter; what is returned is done behind it.
  let prepare: @Sendable () -> @Sendable () -> Void

  static let all = [
    Deed(
      name: "heap", calls: ["brk"],
      prepare: { { for _ in 0..<64 { allocate(16 << 10) } } }),
    Deed(
      name: "large", calls: ["mmap", "munmap"],
      prepare: { { allocate(8 << 20, andFree: true) } }),
    Deed(
      name: "thread-heap", calls: ["mprotect"], isThreaded: true,
      prepare: {
        let thread = Helper { for _ in 0..<1024 { allocate(1 << 10) } }
        return { thread.finish() }
      }),
    Deed(
      name: "thread-end", calls: ["madvise", "exit"], isThreaded: true,
      prepare: {
        let thread = Helper {}
        return { thread.finish() }
      }),
    Deed(name: "abort", calls: ["rt_sigprocmask", "gettid", "tgkill"], prepare: { { abort() } }),
    Deed(name: "stop", calls: ["restart_syscall"], isStopped: true, prepare: { { _ = poll(nil, 0, 200) } }),
  ]
}

/// Where each address goes, so that what nobody uses must be had all the same.
private let latest = Atomic<UInt>(0)

private func allocate(_ byteCount: Int, andFree: Bool = false) {
  // SAFETY: freed by nobody else.
  let pointer = unsafe malloc(byteCount)
  latest.store(UInt(bitPattern: pointer), ordering: .relaxed)
  if andFree { unsafe free(pointer) }
}

/// A thread that has its own heap before the filter, and does its part behind it.
private final class Helper: Sendable {
  private let isThere = Atomic<Bool>(false)
  private let mayGo = Atomic<Bool>(false)
  private let thread = Mutex<HostThread?>(nil)

  init(_ body: @escaping @Sendable () -> Void) {
    let started = try? HostThread.start(name: "helper") { [self] in
      allocate(64)
      isThere.store(true, ordering: .releasing)
      while !mayGo.load(ordering: .acquiring) {}
      body()
    }
    guard let started else { _exit(95) }
    thread.withLock { $0 = started }
    while !isThere.load(ordering: .acquiring) { sched_yield() }
  }

  func finish() {
    mayGo.store(true, ordering: .releasing)
    thread.withLock { $0 }?.join()
  }
}

/// With all calls, and with each that the role's lists name taken away.
func tell(_ deed: Deed) {
  func isListed(_ call: String) -> Bool { rules.contains { SystemCall.name($0.number) == call } }
  let calls = deed.calls.filter(isListed)
  // A role without locks has one thread.
  guard !calls.isEmpty, !deed.isThreaded || isListed("futex") else { return }
  report("\(deed.name) with all \(outcome(of: deed, without: nil))")
  for call in calls { report("\(deed.name) without \(call) \(outcome(of: deed, without: call))") }
}

private func outcome(of deed: Deed, without call: String?) -> String {
  let child = attack_fork()
  if child == 0 {
    alarm(60)
    // As in the core, whose processors' list has no room for more heaps.
    if !rules.contains(where: { SystemCall.name($0.number) == "mprotect" }) { clinux_use_one_heap() }
    let act = deed.prepare()
    do { try ProcessWalls.closeCalls(installed.filter { SystemCall.name($0.number) != call }, .on) } catch { _exit(99) }
    act()
    _exit(0)
  }
  guard deed.isStopped else {
    var code: CInt = 0
    // SAFETY: `code` is ours.
    let signal = unsafe attack_wait(child, &code)
    return signal != 0 ? "killed \(signal)" : "ended \(code)"
  }
  // Many stops, because none is known to fall into the wait.
  var status: CInt = 0
  // SAFETY: `status` is ours.
  while unsafe waitpid(child, &status, WNOHANG) == 0 {
    kill(child, SIGSTOP)
    usleep(2000)
    kill(child, SIGCONT)
    usleep(2000)
  }
  return status & 0x7F != 0 ? "killed \(status & 0x7F)" : "ended \(status >> 8 & 0xFF)"
}
