import CLinux
import Glibc
import HostSystem
import Synchronization
import VirtioSpec

/// The back end under test: how it is reached, and its process where we started it or can see it.
package final class Target {
  enum Reach: Sendable {
    case path(String)
    /// Inherited and connected: one connection, no second one.
    case descriptor(CInt)
    /// Started by us; it listens at the path.
    case command([String], socket: String)
    /// Started by us with one connected socket as descriptor 3: a new connection is a new process.
    case commandWithSocket([String])
  }

  let reach: Reach
  /// The command line or the path, for people.
  let name: String
  let timeout: Duration
  /// `--type`
  let askedType: DeviceID?
  private let processor: Int
  private(set) var process: BackEndProcess?
  private var scratch: String?
  private var startCount = 0
  /// Whether the present process was ever connected to.
  private var wasReached = false
  private var inherited: OwnedFD?
  /// Seen by credentials when we did not start it.
  private(set) var peerProcess: Int32?
  /// Ends that nobody asked for.
  private(set) var crashes: [ProcessEnd] = []

  package init(_ options: Options) throws(ProbeError) {
    timeout = try options.duration("timeout", in: 0.05...600) ?? .seconds(5)
    askedType = options.has("type") ? try DeviceGuess.device(options, Offer()).device : nil
    let pinned = try options.number("pin-backend", in: 0...1023)
    if let pinned { try Processors.expect([pinned], "pin-backend") }
    processor = pinned ?? -1
    let socket = options.text("socket")
    let number = try options.number("fd", in: 0...1 << 20)
    if let socket, socket.utf8.count > 107 { throw .badOption("socket", why: "is longer than the 107 bytes of a socket path") }
    if !options.command.isEmpty {
      if number != nil { throw .noTarget("--fd and a command exclude each other; leave one out") }
      let command = options.command
      name = command.joined(separator: " ")
      if command.contains(where: { $0.hasPlaceholder("{fd}") }) {
        reach = .commandWithSocket(command.map { $0.replacing("{fd}", with: "3") })
      } else if command.contains(where: { $0.hasPlaceholder("{socket}") }) {
        let path: String
        if let socket {
          path = socket
        } else {
          let directory = try Self.makeScratch()
          scratch = directory
          path = directory + "/s"
        }
        reach = .command(command.map { $0.replacing("{socket}", with: path) }, socket: path)
      } else if let socket {
        reach = .command(command, socket: socket)
      } else {
        throw .noTarget("The command has neither {socket} nor {fd} in it, and no --socket says where it will listen")
      }
    } else if let number {
      if socket != nil { throw .noTarget("--fd and --socket exclude each other; leave one out") }
      reach = .descriptor(CInt(number))
      name = "descriptor \(number)"
      inherited = try wrapping { () throws(SystemError) in try OwnedFD.inherited(CInt(number)) }
    } else if let socket {
      reach = .path(socket)
      name = socket
    } else {
      throw .noTarget("No back end: give --socket PATH, --fd NUMBER, or -- COMMAND with {socket} in it")
    }
  }

  deinit { close() }

  /// Ends what we started and removes what we made.
  package func close() {
    process?.kill()
    process = nil
    if case .command(_, let path) = reach, scratch != nil { _ = unsafe unlink(path) }
    if let scratch { _ = unsafe rmdir(scratch) }
    scratch = nil
  }

  /// Whether we can start it, and so kill it.
  var isOurs: Bool {
    switch reach {
    case .command, .commandWithSocket: true
    default: false
    }
  }

  /// Whether another connection can be made.
  var canReconnect: Bool { if case .descriptor = reach { false } else { true } }

  /// Where it listens, when it does.
  var address: Reach {
    if case .command(_, let path) = reach { return .path(path) }
    return reach
  }

  var processID: Int32? { process?.processID ?? peerProcess }

  /// Whether what we started has started another process: how that one ends is hidden from us.
  var worksInChild: Bool {
    guard let process = process?.processID, let file = try? OwnedFD.open("/proc/\(process)/task/\(process)/children", O_RDONLY),
      let bytes = try? file.readToEnd(limit: 4096)
    else { return false }
    return !bytes.isEmpty
  }

  /// A fresh connection, starting the back end where that is ours to do.
  func connect() throws(ProbeError) -> OwnedFD {
    switch reach {
    case .descriptor:
      guard let fd = inherited.take() else { throw .unsuitable("A second connection is needed, and --fd gives only one") }
      peerProcess = (try? UnixSocket.peer(of: fd))?.pid
      return fd
    case .path(let path):
      let fd = try Self.dial(path, timeout)
      peerProcess = (try? UnixSocket.peer(of: fd))?.pid
      return fd
    case .commandWithSocket(let command):
      stop()
      let pair = try wrapping { () throws(SystemError) in try UnixSocket.pair(.stream) }
      return try pair.split { (ours, theirs) throws(ProbeError) in
        process = try BackEndProcess(command, extra: theirs.rawValue, processor: processor)
        return ours
      }
    case .command(let command, let path):
      collect()
      // A predecessor that was killed may hold locks for a moment, until the kernel has taken it apart.
      let patience = MonotonicTime.now.advanced(by: startCount > 0 ? .seconds(3) : .zero)
      while true {
        if process == nil {
          _ = unsafe unlink(path)
          process = try BackEndProcess(command, extra: -1, processor: processor)
          startCount += 1
          wasReached = false
        }
        do throws(ProbeError) {
          return try dialOurs(path)
        } catch {
          guard case .ended(let how, _) = error, how.hasPrefix("exited"), MonotonicTime.now < patience else { throw error }
          usleep(30_000)
        }
      }
    }
  }

  /// Waits for a back end that has just been started to listen.
  private func dialOurs(_ path: String) throws(ProbeError) -> OwnedFD {
    let end = MonotonicTime.now.advanced(by: max(timeout, .seconds(2)))
    var why = "nobody listens there"
    while MonotonicTime.now < end {
      if let ended = process?.collect() {
        let words = process?.lastWords ?? ""
        process = nil
        // The end of one that served before is seen here when it comes between two connections.
        if wasReached {
          crashes.append(ended)
          lastWords = words
        }
        throw .ended("\(ended) before it could be reached", lastWords: words)
      }
      do throws(SystemError) {
        let fd = try UnixSocket.connect(to: path, timeout: .milliseconds(500))
        wasReached = true
        return fd
      } catch {
        why = error.errno.explanation
      }
      usleep(1000)
    }
    throw .unreachable(path, why: why + (process.map { $0.lastWords.isEmpty ? "" : "; it said: \($0.lastWords)" } ?? ""))
  }

  private static func dial(_ path: String, _ timeout: Duration) throws(ProbeError) -> OwnedFD {
    do throws(SystemError) {
      return try UnixSocket.connect(to: path, timeout: timeout)
    } catch {
      throw .unreachable(path, why: error.errno.explanation)
    }
  }

  /// Notices an end that nobody asked for; the next `connect` starts a new process.
  @discardableResult
  func collect() -> ProcessEnd? {
    guard let end = process?.collect() else { return nil }
    crashes.append(end)
    lastWords = process?.lastWords ?? ""
    process = nil
    return end
  }

  private(set) var lastWords = ""

  /// Ends our process; the next `connect` starts a new one.
  func stop() {
    collect()
    process?.kill()
    process = nil
  }

  func signal(_ number: CInt) { process?.signal(number) }

  private static func makeScratch() throws(ProbeError) -> String {
    var template = Array("/tmp/martlet-probe.XXXXXX".utf8CString)
    // SAFETY: a writable NUL-terminated template of ours.
    let made = unsafe template.withUnsafeMutableBufferPointer { buffer in unsafe buffer.baseAddress.flatMap { unsafe mkdtemp($0) } != nil }
    guard made else { throw .system(SystemError("make a directory under /tmp", Errno.current)) }
    return String(decoding: template.dropLast().map { UInt8(bitPattern: $0) }, as: UTF8.self)
  }
}

/// Processors by number.
enum Processors {
  private final class Result: Sendable {
    let code = Atomic<CInt>(0)
  }

  /// Fails for one that is not there, or where we may not run.
  static func expect(_ numbers: [Int], _ option: String) throws(ProbeError) {
    for number in numbers {
      let result = Result()
      // A thread that ends with it: our own processors stay as they are.
      let thread = try wrapping { () throws(SystemError) in
        try HostThread.start(name: "pin") { result.code.store(clinux_pin(CInt(number)), ordering: .releasing) }
      }
      thread.join()
      guard result.code.load(ordering: .acquiring) == 0 else {
        throw .badOption(option, why: "names processor \(number), which is not there or not for this process")
      }
    }
  }
}

extension String {
  func hasPlaceholder(_ mark: String) -> Bool { replacing(mark, with: "") != self }

  /// Every occurrence replaced.
  func replacing(_ mark: String, with text: String) -> String {
    var result = ""
    var rest = self[...]
    while !rest.isEmpty {
      if rest.hasPrefix(mark) {
        result += text
        rest = rest.dropFirst(mark.count)
      } else {
        result.append(rest.removeFirst())
      }
    }
    return result
  }
}

/// A back end that we started. It ends with us.
final class BackEndProcess {
  private let handle: ProcessHandle
  /// Its standard output and error.
  private let output: OwnedFD
  private var end: ProcessEnd?
  let processID: Int32

  init(_ command: [String], extra: CInt, processor: Int) throws(ProbeError) {
    let output = try wrapping { () throws(SystemError) in
      OwnedFD(owning: try checked(unsafe clinux_memfd_create("martlet-probe-output", 1), "make a file for the back end's words"))
    }
    // SAFETY: each word is a NUL-terminated copy that lives until the call returned; the list ends with nil.
    var words: [UnsafeMutablePointer<CChar>?] = unsafe command.map { unsafe strdup($0) }
    unsafe words.append(nil)
    let result = unsafe words.withUnsafeBufferPointer {
      unsafe clinux_spawn_tied($0.baseAddress, output.rawValue, extra, CInt(processor))
    }
    for index in 0..<command.count { unsafe free(words[index]) }
    guard result > 0 else { throw .cannotStart(command[0], Errno(-result)) }
    self.output = output
    processID = result
    handle = try wrapping { () throws(SystemError) in try ProcessHandle(processID: result) }
  }

  deinit { kill() }

  func collect() -> ProcessEnd? {
    if end == nil { end = handle.collect() }
    return end
  }

  func signal(_ number: CInt) { if end == nil { handle.signal(number) } }

  func kill() {
    guard end == nil else { return }
    // What it started belongs to its process group, which exists as long as it was not waited for.
    _ = Glibc.kill(-processID, SIGKILL)
    handle.signal(SIGKILL)
    end = handle.waitForEnd()
  }

  /// The end of what it printed, in one line.
  var lastWords: String {
    var bytes = [UInt8](repeating: 0, count: 600)
    guard let status = try? output.status(), status.byteCount > 0 else { return "" }
    let start = max(0, Int(status.byteCount) - bytes.count)
    // SAFETY: the buffer is ours and writable for its whole count.
    let count = unsafe bytes.withUnsafeMutableBytes { unsafe pread(output.rawValue, $0.baseAddress, $0.count, start) }
    guard count > 0 else { return "" }
    let text = String(decoding: bytes[..<count], as: UTF8.self)
    return text.split(whereSeparator: { $0 == "\n" || $0 == "\r" }).suffix(2).joined(separator: " / ")
  }
}
