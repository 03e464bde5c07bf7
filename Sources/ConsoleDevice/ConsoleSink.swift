import CLinux
import Glibc
import HostSystem

/// Where the bytes of a console go on the host. Every descriptor is non-blocking.
///
/// A class and not an enum with owned payloads: there is one per process, and it must live until the terminal has been
/// put back, whoever holds it last.
package final class ConsoleSink {
  package enum Kind: Sendable {
    /// A person's terminal: raw mode, escape key, window size.
    case terminal
    /// Pipes or files in a terminal's place, passed through as they are.
    case pipes
    /// Our side of a pseudo-terminal.
    case pseudoTerminal
    /// Output only, appended.
    case file
    /// One client at a time; others wait in the listener's queue.
    case socket
    /// Output is dropped, there is no input.
    case null
  }

  package let kind: Kind
  /// What is read (terminal, pipes, pseudo-terminal), or listened on (socket).
  let input: OwnedFD?
  /// What is written (terminal, pipes, file); a pseudo-terminal is written through `input`.
  let output: OwnedFD?
  /// The other side of a pseudo-terminal, held open: without it the kernel would report a hang-up without end while
  /// nobody is attached, and throw away what was written.
  private let peer: OwnedFD?
  private let rawMode: RawTerminal?
  /// Descriptors whose description had to be shared and was made non-blocking here.
  private let madeNonBlocking: [CInt]
  /// A listening socket's file, when it was made here.
  private let path: String?

  private init(
    _ kind: Kind, input: consuming OwnedFD? = nil, output: consuming OwnedFD? = nil, peer: consuming OwnedFD? = nil,
    rawMode: consuming RawTerminal? = nil, madeNonBlocking: [CInt] = [], path: String? = nil
  ) {
    self.kind = kind
    self.input = input
    self.output = output
    self.peer = peer
    self.rawMode = rawMode
    self.madeNonBlocking = madeNonBlocking
    self.path = path
  }

  deinit {
    if let path { _ = unsafe unlink(path) }
    for number in madeNonBlocking {
      let flags = clinux_fcntl(number, F_GETFL, 0)
      if flags >= 0 { _ = clinux_fcntl(number, F_SETFL, CLong(flags & ~O_NONBLOCK)) }
    }
  }

  // MARK: The kinds

  /// A terminal, in raw mode until the sink ends, or pipes.
  /// - Parameters: descriptors that the caller gives up; two numbers, even where both lead to the same terminal.
  package static func terminal(input: consuming OwnedFD, output: consuming OwnedFD) throws(SystemError) -> ConsoleSink {
    var shared: [CInt] = []
    let ownInput = try unshared(input, O_RDONLY, &shared)
    let ownOutput = try unshared(output, O_WRONLY, &shared)
    let rawMode = RawTerminal(ownInput)
    let kind: Kind = rawMode == nil ? .pipes : .terminal
    return ConsoleSink(kind, input: ownInput, output: ownOutput, rawMode: rawMode, madeNonBlocking: shared)
  }

  /// A pseudo-terminal by its master side.
  package static func pseudoTerminal(_ master: consuming OwnedFD) throws(SystemError) -> ConsoleSink {
    try master.setNonBlocking(true)
    let peer = try PseudoTerminal.openPeer(of: master)
    RawTerminal.setRaw(peer)
    return ConsoleSink(.pseudoTerminal, input: master, peer: peer)
  }

  /// A listening socket for clients.
  /// - Parameter path: its file, to be removed at the end.
  package static func socket(_ listener: consuming OwnedFD, path: String? = nil) throws(SystemError) -> ConsoleSink {
    try listener.setNonBlocking(true)
    return ConsoleSink(.socket, input: listener, path: path)
  }

  package static func appending(_ file: consuming OwnedFD) throws(SystemError) -> ConsoleSink {
    // Regular files never block in this sense; a fifo or a socket given as "file" does.
    try file.setNonBlocking(true)
    return ConsoleSink(.file, output: file)
  }

  package static func null() -> ConsoleSink { ConsoleSink(.null) }

  /// A terminal's open file description is shared with the shell that started us, and non-blocking mode belongs to the
  /// description. So it is opened anew where that is allowed, and only otherwise changed (and put back at the end).
  private static func unshared(_ fd: consuming OwnedFD, _ access: CInt, _ shared: inout [CInt]) throws(SystemError) -> OwnedFD {
    switch try fd.status().kind {
    case .regular: return fd  // Never blocks, and a second opening would lose the position.
    case .characterDevice, .pipe:
      if let own = try? OwnedFD.open("/proc/self/fd/\(fd.rawValue)", access | O_NONBLOCK | O_NOCTTY) { return own }
    default: break
    }
    let flags = clinux_fcntl(fd.rawValue, F_GETFL, 0)
    if flags >= 0, flags & O_NONBLOCK == 0 {
      try fd.setNonBlocking(true)
      shared.append(fd.rawValue)
    }
    return fd
  }

  // MARK: Use

  /// The size of the terminal, where there is one.
  var windowSize: WindowSize? {
    guard kind == .terminal else { return nil }
    return output.with({ WindowSize(of: $0) }, else: nil) ?? input.with({ WindowSize(of: $0) }, else: nil)
  }

  /// Writes what the sink takes now; a socket's bytes go to its client.
  func write(_ bytes: UnsafeRawBufferPointer, client: borrowing OwnedFD?) -> Transfer {
    switch kind {
    case .terminal, .pipes, .file: output.with({ unsafe $0.write(bytes) }, else: .end)
    case .pseudoTerminal: input.with({ unsafe $0.write(bytes) }, else: .end)
    case .socket: client.with({ unsafe UnixSocket.send($0, bytes, waiting: false) }, else: .wouldBlock)
    case .null: .bytes(bytes.count)
    }
  }

  /// Reads what has been typed.
  func read(into buffer: UnsafeMutableRawBufferPointer, client: borrowing OwnedFD?) -> Transfer {
    switch kind {
    case .terminal, .pipes, .pseudoTerminal: input.with({ unsafe $0.read(into: buffer) }, else: .end)
    case .socket: client.with({ unsafe $0.read(into: buffer) }, else: .wouldBlock)
    case .file, .null: .end
    }
  }

  func waitUntilWritable(client: borrowing OwnedFD?, timeout: Duration) {
    func wait(_ fd: borrowing OwnedFD) { _ = try? fd.waitUntil(.writable, timeout: timeout) }
    switch kind {
    case .terminal, .pipes, .file: output.with({ wait($0) }, else: ())
    case .pseudoTerminal: input.with({ wait($0) }, else: ())
    case .socket: client.with({ wait($0) }, else: ())
    case .null: break
    }
  }

  /// The next client of a listening socket, or nil when none waits.
  func accept() throws(SystemError) -> OwnedFD? {
    guard kind == .socket, let number = input.number else { return nil }
    let result = clinux_accept_nonblocking(number)
    if result < 0 {
      let error = Errno(-result)
      if error == .again || error == .interrupted || error == Errno(ECONNABORTED) { return nil }
      throw SystemError("accept a console client", error)
    }
    return OwnedFD(owning: result)
  }
}

extension Optional where Wrapped == OwnedFD {
  /// Lends the descriptor, if there is one.
  borrowing func with<R>(_ body: (borrowing OwnedFD) -> R, else otherwise: R) -> R {
    switch self {
    case .some(let fd): body(fd)
    case .none: otherwise
    }
  }

  /// The descriptor's number, for a call to the kernel.
  var number: CInt? {
    borrowing get { with({ $0.rawValue }, else: nil) }
  }
}
