import CLinux
import CSandbox
import Glibc
import HostSystem
import Sandbox

/// What must be put right at the end, whatever dies: the terminal's settings and the socket files we have made. A guardian
/// process does it, when we ask or when we are killed.
final class TerminalGuard {
  private var settings = termios()
  /// Descriptor of the terminal whose settings were saved, or -1.
  private let terminal: CInt
  private(set) var files: [(path: String, status: FileStatus)] = []
  /// Sockets of devices that were added while the VM runs, by device: the guardian takes no file any more, the spawner
  /// unlinks them.
  private(set) var added: [(id: String, path: String, status: FileStatus)] = []
  private var guardian: ProcessHandle?
  private(set) var hasGuardian = false
  private var pipe: OwnedFD?
  private let title: String
  /// Whoever starts the guardian has a keeper above it, whose child the guardian is to be.
  var startsSibling = false
  /// Descriptors whose description we share with the shell and made non-blocking.
  private(set) var madeNonBlocking: [CInt] = []

  private let walls: WallMode
  /// The control groups of the VM, which go at the end.
  private let groups: ControlGroups?

  /// - Parameters:
  ///   - usesTerminal: a console or the serial port is on our terminal.
  ///   - walls: how the guardian is closed in.
  init(title: String, usesTerminal: Bool, walls: WallMode, groups: ControlGroups?) throws(SupervisionError) {
    self.groups = groups
    self.title = title
    self.walls = walls
    // Putting the settings back from the background must not stop us.
    _ = signal(SIGTTOU, SIG_IGN)
    // SAFETY: `settings` is ours and alive for the call.
    let isTerminal = unsafe tcgetattr(0, &settings) == 0
    terminal = usesTerminal && isTerminal ? 0 : -1
    if terminal >= 0 || groups != nil { try startGuardian() }
  }

  /// After an upgrade, in the supervisor: the guardian lives.
  init(title: String, walls: WallMode, _ state: SupervisorState) throws(SupervisionError) {
    groups = nil
    self.title = title
    self.walls = walls
    terminal = -1
    madeNonBlocking = state.madeNonBlocking
    guard let known = state.guardian else { return }
    hasGuardian = true
    guardian = ProcessHandle(processID: known.processID, adopting: try UpgradedProgram.adopt(known.pidfd))
    pipe = try UpgradedProgram.adopt(known.pipe)
  }

  /// After an upgrade, in the spawner: what a guardian is told.
  init(title: String, walls: WallMode, _ state: SpawnerState, _ groups: ControlGroups?) {
    self.groups = groups
    self.title = title
    self.walls = walls
    terminal = state.isOnTerminal ? 0 : -1
    hasGuardian = state.hasGuardian
    files = state.files.map { ($0.path, $0.numbers.status) }
    added = state.added.map { ($0.id, $0.file.path, $0.file.numbers.status) }
    if !added.isEmpty { csandbox_outlive() }
    _ = signal(SIGTTOU, SIG_IGN)
    // SAFETY: the state was read with exactly so many bytes, and any bytes are settings.
    unsafe withUnsafeMutableBytes(of: &settings) { unsafe $0.copyBytes(from: state.settings) }
  }

  /// The terminal's settings of before.
  var settingBytes: [UInt8] { unsafe withUnsafeBytes(of: settings) { unsafe Array($0) } }

  /// The guardian that lives, for a state.
  var living: SupervisorState.Guardian? {
    switch guardian {
    case .some(let process):
      switch pipe {
      case .some(let pipe):
        return .init(processID: process.processID, pidfd: process.fd.rawValue, pipe: pipe.rawValue)
      case .none: return nil
      }
    case .none: return nil
    }
  }

  /// Readable when the guardian has ended; nil while there is none.
  var endNumber: CInt? {
    switch guardian {
    case .some(let process): process.fd.rawValue
    case .none: nil
    }
  }

  /// A guardian that another one has followed.
  struct Predecessor: ~Copyable {
    fileprivate let process: ProcessHandle
    fileprivate let pipe: OwnedFD

    /// Without having done anything: killed before its pipe ends.
    consuming func end() {
      process.signal(SIGKILL)
      _ = process.waitForEnd()
    }
  }

  /// A new guardian stands beside the old one, which is to go.
  func replace(by process: consuming ProcessHandle, _ newPipe: consuming OwnedFD) -> Predecessor? {
    let old = guardian.take()
    let oldPipe = pipe.take()
    guardian = consume process
    pipe = consume newPipe
    guard case .some(let process) = old, case .some(let pipe) = oldPipe else { return nil }
    return Predecessor(process: process, pipe: pipe)
  }

  /// A guardian for the supervisor, which is not us: told of everything, and of no more.
  func startForParent() throws(SupervisionError) -> (number: Int32, process: FDBox, pipe: FDBox) {
    let started = try launchGuardian(asSibling: true)
    pipe = started.pipe.take()
    for file in files { tell(device: file.status.device, inode: file.status.inode, path: file.path) }
    seal()
    if case .some(let end) = pipe.take() { return (started.number, started.process, FDBox(end)) }
    preconditionFailure("The pipe that was just put there")
  }

  var isOnTerminal: Bool { terminal >= 0 }

  /// Listens at `path` and remembers to unlink it.
  func listen(at path: String, option: String) throws(SupervisionError) -> OwnedFD {
    if !hasGuardian { try startGuardian() }
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
    tell(device: status.device, inode: status.inode, path: path)
  }

  private func tell(device: UInt64, inode: UInt64, path: String) {
    var bytes: [UInt8] = []
    for number in [device, inode] {
      for shift in stride(from: 0, to: 64, by: 8) { bytes.append(UInt8(truncatingIfNeeded: number >> UInt64(shift))) }
    }
    bytes.append(contentsOf: path.utf8.prefix(107))
    bytes.append(contentsOf: repeatElement(0, count: MemoryLayout<csandbox_guarded>.stride - bytes.count))
    // A guardian that is gone has left its work undone; nothing else depends on it.
    switch pipe {
    case .some(let pipe): try? pipe.writeAll(bytes)
    case .none: break
    }
  }

  /// No file is added to the guardian's list any more, whoever asks.
  func seal() { tell(device: 0, inode: 0, path: "") }

  private func startGuardian() throws(SupervisionError) {
    let started = try launchGuardian(asSibling: startsSibling)
    hasGuardian = true
    if let process = started.process.take() { guardian = ProcessHandle(processID: started.number, adopting: process) }
    pipe = started.pipe.take()
  }

  private func launchGuardian(asSibling: Bool) throws(SupervisionError) -> (number: Int32, process: FDBox, pipe: FDBox) {
    var pidfd: CInt = -1
    var end: CInt = -1
    let filter = ProcessWalls.filter(groups == nil ? [.guardian] : [.guardian, .guardianGroups], walls)
    let text = Array("\(title)/guardian".utf8CString)
    // SAFETY: title, settings and filter live for the call; the child works on its own copy of memory. `Instruction` has the
    // layout of struct sock_filter.
    let pid = unsafe text.withUnsafeBufferPointer { name in
      unsafe withUnsafePointer(to: &settings) { settings in
        unsafe (filter?.instructions ?? []).withUnsafeBytes { program in
          var guardian = unsafe csandbox_guardian(
            title: name.baseAddress, terminal: terminal, settings: settings, filter: filter == nil ? nil : program.baseAddress,
            filter_length: UInt16(filter?.instructions.count ?? 0), groups: nil, drops_privileges: walls == .off ? 0 : 1,
            is_sibling: asSibling ? 1 : 0)
          guard let groups else { return unsafe csandbox_start_guardian(&guardian, &pidfd, &end) }
          return unsafe groups.withGuarded { groups in
            unsafe guardian.groups = groups
            return unsafe csandbox_start_guardian(&guardian, &pidfd, &end)
          }
        }
      }
    }
    guard pid > 0 else { throw .system(SystemError("start the guardian process", Errno(-pid))) }
    return (pid, FDBox(OwnedFD(owning: pidfd)), FDBox(OwnedFD(owning: end)))
  }

  /// What a hung file system may cost us.
  private static let patience = Duration.seconds(4)

  /// Puts everything right; idempotent. Files and terminal are the guardian's, because we may have walls around us.
  /// - Returns: false when there was no guardian any more to do its part.
  func restore() -> Bool {
    for number in madeNonBlocking {
      let flags = clinux_fcntl(number, F_GETFL, 0)
      if flags >= 0 { _ = clinux_fcntl(number, F_SETFL, CLong(flags & ~O_NONBLOCK)) }
    }
    madeNonBlocking = []
    // The end of the pipe is its order.
    _ = pipe.take()
    switch guardian.take() {
    case .some(let process):
      if (try? process.fd.waitUntil(.readable, timeout: Self.patience)) != true { process.signal(SIGKILL) }
      return process.waitForEnd() == .exited(code: 0)
    case .none: return true
    }
  }

  /// Listens at the path of a device that is added.
  func listenLate(at path: String, id: String) throws(SupervisionError) -> OwnedFD {
    do {
      let fd = try UnixSocket.listen(at: path)
      csandbox_outlive()
      added.append((id, path, try OwnedFD.open(path, pathOnly | noFollow).status()))
      return fd
    } catch { throw .ownSocket(option: "console \(id)", path: path, error.errno) }
  }

  /// The device is gone, and its socket with it.
  func forget(_ id: String) {
    for file in added where file.id == id { Self.unlink(file.path, if: file.status) }
    added.removeAll { $0.id == id }
  }

  /// What was added, at the end.
  func tidyAdded() { for file in added { Self.unlink(file.path, if: file.status) } }

  /// Only while it is still ours.
  private static func unlink(_ path: String, if status: FileStatus) {
    guard let fd = try? OwnedFD.open(path, pathOnly | noFollow), let now = try? fd.status(), now.device == status.device,
      now.inode == status.inode
    else { return }
    // SAFETY: the path is a NUL-terminated copy that lives for the call.
    _ = unsafe Glibc.unlink(path)
  }

  /// The guardian's part, for a process that may open files.
  func tidy() {
    for file in files {
      Self.unlink(file.path, if: file.status)
    }
    if terminal >= 0 {
      // SAFETY: `settings` was filled in `init`.
      _ = unsafe tcsetattr(terminal, TCSANOW, &settings)
    }
    groups?.remove()
  }
}
