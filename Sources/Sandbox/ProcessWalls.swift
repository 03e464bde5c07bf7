import CLinux
import Glibc
import HostSystem

/// How strictly a process is walled in (`--sandbox=`).
package enum WallMode: String, CaseIterable, Sendable {
  case on
  /// For debugging: no namespaces, no Landlock, no filter.
  case off
  /// For debugging: as `on`, but calls outside the list are carried out and written to the kernel's log.
  case log
}

/// The second half of the walls: what a program does itself. In this order:
///
///     try ProcessWalls.raise(title: "vm/web1/blk0")    // first thing
///     ...                                              // by hand only: open what was named by a path
///     try ProcessWalls.closeFiles(.on)                 // before any thread
///     ...                                              // rings, threads; all of them have said that they are ready
///     try ProcessWalls.closeCalls([.base, .block], .on)
///     ...                                              // READY
package enum ProcessWalls {
  /// First thing in a process of a VM. After this the program's arguments must not be read again: the title stands there.
  /// - Parameter title: `vm/NAME/ID`; nil for a program started by hand, which keeps its arguments.
  package static func raise(title: String?) throws(SandboxError) {
    // PR_SET_DUMPABLE: no core file, no ptrace by the same uid, /proc/PID owned by root.
    try step(.undumpable, clinux_prctl(4, 0, 0, 0, 0))
    // PR_SET_NO_NEW_PRIVS: the launcher has set it; a program started by hand does it itself.
    try step(.noNewPrivileges, clinux_prctl(38, 1, 0, 0, 0))
    if let title { setTitle(title) }
  }

  /// Takes every capability, for a program that was started by hand: a launcher has done it for others.
  package static func giveUpCapabilities(_ mode: WallMode) throws(SandboxError) {
    guard mode != .off else { return }
    try step(.identity, -clinux_keep_only(0))
  }

  /// Takes every right over files, TCP ports, abstract sockets and other processes that Landlock knows. What is open stays
  /// usable. Before any thread exists: they inherit it.
  /// - Parameters:
  ///   - keepsSignals: for the supervisor, which ends the others. Landlock would also hold back the signal that they get when
  ///     it dies.
  ///   - programs: a directory whose programs can still be executed, -1 for none.
  package static func closeFiles(_ mode: WallMode, keepsSignals: Bool = false, programs: CInt = -1) throws(SandboxError) {
    guard mode != .off else { return }
    let level = clinux_landlock_abi()
    // The supervisor has said once that the host has none; `--hardened` ended there.
    guard level > 0 else { return }
    try step(.landlock, clinux_landlock_restrict(level, keepsSignals ? 1 : 0, programs))
  }

  /// Leaves all threads the system calls of `lists`, for ever. Last: every thread must have said that it runs, because one
  /// that is still starting needs calls that no list has.
  package static func closeCalls(_ lists: [SystemCallList], _ mode: WallMode) throws(SandboxError) {
    try install(lists.flatMap(\.rules), mode, allThreads: true)
  }

  /// As `closeCalls`, for the calling thread only. A thread with a list of its own does this itself; the process-wide call
  /// cannot be used in such a process, because the kernel synchronises no thread that has another filter.
  package static func closeCallsOfThread(_ lists: [SystemCallList], _ mode: WallMode) throws(SandboxError) {
    try install(lists.flatMap(\.rules), mode, allThreads: false)
  }

  /// `closeCalls` with rules of an author's own.
  package static func closeCalls(_ rules: [SystemCallRule], _ mode: WallMode) throws(SandboxError) {
    try install(rules, mode, allThreads: true)
  }

  /// The filter of `lists`, for a process that is not this program; nil when there is none to be had, or wanted.
  package static func filter(_ lists: [SystemCallList], _ mode: WallMode) -> SystemCallFilter? {
    filter(lists.flatMap(\.rules), mode, processID: 0)
  }

  /// The same of rules.
  package static func filter(_ rules: [SystemCallRule], _ mode: WallMode, processID: Int32) -> SystemCallFilter? {
    guard mode != .off, clinux_seccomp_can_kill() == 1 else { return nil }
    return SystemCallFilter(rules, refusal: mode == .log ? .log : .killProcess, processID: processID)
  }

  private static func install(
    _ rules: [SystemCallRule], _ mode: WallMode, allThreads: Bool
  ) throws(SandboxError) {
    guard mode != .off else { return }
    // A kernel without filters: said once by the supervisor, as for Landlock above.
    guard clinux_seccomp_can_kill() == 1 else { return }
    let refusal = mode == .log ? SystemCallFilter.Refusal.log : .killProcess
    let filter = SystemCallFilter(rules, refusal: refusal, processID: getpid())
    precondition(filter.instructions.count <= 4096, "A filter has at most BPF_MAXINSNS instructions.")
    // SAFETY: `Instruction` has the layout of struct sock_filter (CLinux asserts its side, SandboxTests ours); the kernel
    // copies the program during the call.
    let result = unsafe filter.instructions.withUnsafeBytes { bytes in
      let count = UInt16(filter.instructions.count)
      let log: CInt = mode == .log ? 1 : 0
      return unsafe allThreads
        ? clinux_seccomp_install(bytes.baseAddress, count, log) : clinux_seccomp_install_thread(bytes.baseAddress, count, log)
    }
    // A positive result is a thread that has a filter of its own.
    try step(.systemCallFilter, result > 0 ? -CInt(EBUSY) : result)
  }

  private static func step(_ stage: Stage, _ result: CInt) throws(SandboxError) {
    if result < 0 { throw .step(stage, program: "this process", Errno(-result)) }
  }

  /// Shows `title` in ps; also the speaker of the process's log lines.
  package static func setTitle(_ title: String) {
    // SAFETY: the text is a NUL-terminated copy that lives for the call.
    _ = unsafe clinux_set_title(title)
    Log.setSpeaker(title)
  }
}
