import CLinux
import Glibc
import Synchronization

/// A POSIX thread. Every thread of Martlet is born here: named, with a small stack of its own and all signals blocked
/// except those the body unblocks.
public struct HostThread: Sendable {
  private let handle: pthread_t

  /// - Parameters:
  ///   - name: at most 15 bytes are kept by the kernel.
  ///   - stackSize: bytes; pages are only used when touched.
  public static func start(
    name: String, stackSize: Int = 256 << 10, _ body: @escaping @Sendable () -> Void
  ) throws(SystemError) -> HostThread {
    let box = unsafe Unmanaged.passRetained(ThreadBody(name: name, body: body))
    var attributes = pthread_attr_t()
    var handle = pthread_t()
    // SAFETY: `attributes` and `handle` are ours; the box is consumed by the new thread, or here when there is none.
    unsafe pthread_attr_init(&attributes)
    unsafe pthread_attr_setstacksize(&attributes, max(stackSize, 64 << 10))
    let result = unsafe pthread_create(&handle, &attributes, threadEntry, box.toOpaque())
    unsafe pthread_attr_destroy(&attributes)
    if result != 0 {
      unsafe box.release()
      // EAGAIN says no more than that somebody counts.
      let why = result == EAGAIN ? ", for which a limit of threads leaves no room (pids-limit, RLIMIT_NPROC)" : ""
      throw SystemError("start thread \(name)\(why)", Errno(result))
    }
    return HostThread(handle: handle)
  }

  /// Waits for the end; call once.
  public func join() { _ = pthread_join(handle, nil) }

  /// Sends a signal to this thread (it must not have been joined).
  public func signal(_ number: CInt) { _ = pthread_kill(handle, number) }
}

private final class ThreadBody {
  let name: String
  let body: @Sendable () -> Void
  init(name: String, body: @escaping @Sendable () -> Void) {
    self.name = name
    self.body = body
  }
}

private func threadEntry(_ argument: UnsafeMutableRawPointer?) -> UnsafeMutableRawPointer? {
  guard let argument = unsafe argument else { return nil }
  // SAFETY: `start` passed exactly one retained ThreadBody.
  let box = unsafe Unmanaged<ThreadBody>.fromOpaque(argument).takeRetainedValue()
  Signals.blockAll()
  // PR_SET_NAME
  _ = unsafe box.name.withCString { text in clinux_prctl(15, UInt(bitPattern: text), 0, 0, 0) }
  box.body()
  return nil
}

/// Signal masks and signals as readable events.
public enum Signals {
  /// Blocks every signal in the calling thread but those that its own instructions raise: blocked, these end the process
  /// without asking a handler (signal(7)).
  public static func blockAll() {
    var all = sigset_t()
    // SAFETY: the set is ours.
    unsafe sigfillset(&all)
    for number in [SIGBUS, SIGSEGV, SIGILL, SIGFPE, SIGTRAP, SIGSYS] { unsafe sigdelset(&all, number) }
    _ = unsafe pthread_sigmask(SIG_SETMASK, &all, nil)
  }

  /// Unblocks one signal in the calling thread.
  public static func unblock(_ number: CInt) {
    var set = sigset_t()
    unsafe sigemptyset(&set)
    unsafe sigaddset(&set, number)
    _ = unsafe pthread_sigmask(SIG_UNBLOCK, &set, nil)
  }

  /// Blocks one signal in the calling thread.
  package static func block(_ number: CInt) {
    var set = sigset_t()
    // SAFETY: the set is ours.
    unsafe sigemptyset(&set)
    unsafe sigaddset(&set, number)
    _ = unsafe pthread_sigmask(SIG_BLOCK, &set, nil)
  }

  /// A descriptor that becomes readable when one of the signals arrives; they are blocked as ordinary signals.
  /// Read it with `next(from:)`.
  public static func descriptor(for numbers: [CInt]) throws(SystemError) -> OwnedFD {
    var set = sigset_t()
    unsafe sigemptyset(&set)
    for number in numbers { unsafe sigaddset(&set, number) }
    _ = unsafe pthread_sigmask(SIG_BLOCK, &set, nil)
    let result = unsafe signalfd(-1, &set, CInt(SFD_CLOEXEC) | CInt(SFD_NONBLOCK))
    if result < 0 { throw SystemError("make a signal descriptor", Errno.current) }
    return OwnedFD(owning: result)
  }

  /// The number of the next signal waiting, or nil.
  public static func next(from fd: borrowing OwnedFD) -> CInt? {
    var info = signalfd_siginfo()
    let size = MemoryLayout<signalfd_siginfo>.size
    // SAFETY: `info` is ours and of the size the kernel writes.
    return unsafe Glibc.read(fd.rawValue, &info, size) == size ? CInt(info.ssi_signo) : nil
  }

  /// Broken connections are seen as results of writes, not as a signal.
  public static func ignoreBrokenPipes() { _ = Glibc.signal(SIGPIPE, SIG_IGN) }
}

/// How a child process ended.
public enum ProcessEnd: Equatable, Sendable, CustomStringConvertible {
  case exited(code: Int32)
  case killed(signal: Int32)

  public var description: String {
    switch self {
    case .exited(let code): "exited with code \(code)"
    case .killed(let signal): "was killed by signal \(signal)"
    }
  }
}

/// A child process by its pidfd: never confused with another process that got the same number.
public struct ProcessHandle: ~Copyable, Sendable {
  public let processID: Int32
  /// Readable when the process has ended.
  public let fd: OwnedFD

  /// Opens the pidfd of a child that has not been waited for.
  public init(processID: Int32) throws(SystemError) {
    self.processID = processID
    fd = OwnedFD(owning: try checked(clinux_pidfd_open(processID), "watch process \(processID)"))
  }

  /// Takes a pidfd made by clone3.
  public init(processID: Int32, adopting fd: consuming OwnedFD) {
    self.processID = processID
    self.fd = fd
  }

  /// How a process ended that is not our child: asked for its id and pidfd, and whether to wait. Set once, before there are threads,
  /// by a program whose parent collects.
  package nonisolated(unsafe) static var endOfOthers: (@Sendable (Int32, CInt, Bool) -> ProcessEnd?)?

  public borrowing func signal(_ number: CInt) { _ = clinux_pidfd_send_signal(fd.rawValue, number) }

  /// Collects the child if it has ended.
  public borrowing func collect() -> ProcessEnd? { wait(blocking: false) }

  /// Waits for the end and collects the child.
  public borrowing func waitForEnd() -> ProcessEnd? { wait(blocking: true) }

  private borrowing func wait(blocking: Bool) -> ProcessEnd? {
    var code: CInt = 0
    var status: CInt = 0
    // SAFETY: both are ours and alive for the call.
    let result = retrying { unsafe clinux_pidfd_wait(fd.rawValue, &code, &status, blocking ? 1 : 0) }
    // SAFETY: nobody changes it while there is more than one thread.
    if result == -ECHILD, let ask = unsafe Self.endOfOthers { return ask(processID, fd.rawValue, blocking) }
    guard result == 1 else { return nil }
    return code == CLD_EXITED ? .exited(code: status) : .killed(signal: status)
  }
}
