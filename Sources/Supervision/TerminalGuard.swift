import CLinux
import CSandbox
import Glibc
import HostSystem
import Sandbox

/// What must be put right at the end, whatever dies: the terminal's settings and the socket files we have made. While
/// we live we do it ourselves; a guardian process does it should we be killed.
final class TerminalGuard {
  private var settings = termios()
  /// Descriptor of the terminal whose settings were saved, or -1.
  private let terminal: CInt
  private var files: [(path: String, status: FileStatus)] = []
  private var guardian: ProcessHandle?
  private var hasGuardian = false
  private var pipe: OwnedFD?
  private let title: String
  /// Descriptors whose description we share with the shell and made non-blocking.
  private var madeNonBlocking: [CInt] = []

  /// - Parameter usesTerminal: a console or the serial port is on our terminal.
  init(title: String, usesTerminal: Bool) {
    self.title = title
    // Putting the settings back from the background must not stop us.
    _ = signal(SIGTTOU, SIG_IGN)
    // SAFETY: `settings` is ours and alive for the call.
    let isTerminal = unsafe tcgetattr(0, &settings) == 0
    terminal = usesTerminal && isTerminal ? 0 : -1
    if terminal >= 0 { startGuardian() }
  }

  var isOnTerminal: Bool { terminal >= 0 }

  /// Listens at `path` and remembers to unlink it.
  func listen(at path: String, option: String) throws(SupervisionError) -> OwnedFD {
    if !hasGuardian { startGuardian() }
    do {
      let fd = try UnixSocket.listen(at: path)
      try remember(path)
      return fd
    } catch { throw .ownSocket(option: option, path: path, error.errno) }
  }

  /// A descriptor of our own for standard input or output, non-blocking. A terminal is opened anew where that is allowed,
  /// because the mode belongs to a description that the shell shares; where it is not, the mode is put back at the end. Done
  /// here: the console's process sees no /proc and may not change the mode behind its walls.
  func inherited(_ number: CInt) throws(SupervisionError) -> OwnedFD {
    let copy = clinux_fcntl(number, F_DUPFD_CLOEXEC, 3)
    guard copy >= 0 else { return try HostFiles.null() }
    let fd = OwnedFD(owning: copy)
    guard let kind = try? fd.status().kind, kind != .regular else { return fd }
    let flags = clinux_fcntl(number, F_GETFL, 0)
    if kind == .characterDevice || kind == .pipe,
      let own = try? OwnedFD.open("/proc/self/fd/\(number)", flags & O_ACCMODE | O_NONBLOCK | O_NOCTTY)
    {
      return own
    }
    if flags >= 0, flags & O_NONBLOCK == 0, clinux_fcntl(number, F_SETFL, CLong(flags | O_NONBLOCK)) >= 0 {
      madeNonBlocking.append(number)
    }
    return fd
  }

  /// The file's identity goes to the guardian, so that it never unlinks somebody else's socket of that name.
  private func remember(_ path: String) throws(SystemError) {
    let fd = try OwnedFD.open(path, pathOnly | noFollow)
    let status = try fd.status()
    files.append((path, status))
    var bytes: [UInt8] = []
    for number in [status.device, status.inode] {
      for shift in stride(from: 0, to: 64, by: 8) { bytes.append(UInt8(truncatingIfNeeded: number >> UInt64(shift))) }
    }
    bytes.append(contentsOf: path.utf8.prefix(107))
    bytes.append(contentsOf: repeatElement(0, count: MemoryLayout<csandbox_guarded>.stride - bytes.count))
    // A guardian that is gone leaves us to clean up alone.
    switch pipe {
    case .some(let pipe): try? pipe.writeAll(bytes)
    case .none: break
    }
  }

  private func startGuardian() {
    var pidfd: CInt = -1
    var end: CInt = -1
    // SAFETY: title and settings live for the call; the child works on its own copy of memory.
    let pid = unsafe csandbox_start_guardian("\(title)/guardian", terminal, &settings, &pidfd, &end)
    guard pid > 0 else { return }
    hasGuardian = true
    guardian = ProcessHandle(processID: pid, adopting: OwnedFD(owning: pidfd))
    pipe = OwnedFD(owning: end)
  }

  /// Puts everything right; idempotent.
  func restore() {
    for file in files {
      // Only while it is still ours.
      guard let fd = try? OwnedFD.open(file.path, pathOnly | noFollow), let now = try? fd.status(),
        now.device == file.status.device, now.inode == file.status.inode
      else { continue }
      // SAFETY: the path is a NUL-terminated copy that lives for the call.
      _ = unsafe unlink(file.path)
    }
    files = []
    for number in madeNonBlocking {
      let flags = clinux_fcntl(number, F_GETFL, 0)
      if flags >= 0 { _ = clinux_fcntl(number, F_SETFL, CLong(flags & ~O_NONBLOCK)) }
    }
    madeNonBlocking = []
    if terminal >= 0 {
      // SAFETY: `settings` was filled in `init`.
      _ = unsafe tcsetattr(terminal, TCSANOW, &settings)
    }
    switch guardian.take() {
    case .some(let process):
      process.signal(SIGKILL)
      _ = process.waitForEnd()
    case .none: break
    }
    _ = pipe.take()
  }
}
