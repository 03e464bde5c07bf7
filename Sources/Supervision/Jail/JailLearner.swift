import CLinux
import Glibc
import HostSystem
import Sandbox

/// Runs a program once without walls, by ptrace(2), and adds to a profile what it needed: the calls it made with the
/// arguments that matter, the files it opened. Works for root and for everybody whom Yama lets trace their own children.
final class JailLearner {
  private static let runToCall: CInt = 24  // PTRACE_SYSCALL
  private static let setOptions: CInt = 0x4200
  /// TRACESYSGOOD, FORK, VFORK, CLONE, EXEC, EXITKILL
  private static let options: UInt = 1 | 2 | 4 | 8 | 16 | 0x10_0000

  /// One call between its entry and its exit.
  private struct Pending {
    var number: UInt64
    var arguments: [UInt64]
    /// What its path argument held at entry, and whether that existed then.
    var path: String?
    var existed = false
    var isRefused = false
  }

  /// Calls that a filter cannot judge: a ring's operations and clone3's flags lie in memory. They get ENOSYS already while
  /// we watch, so that what the program does instead is seen. The argument named is made zero for the call, a size without which
  /// nothing is done: a program with a filter of its own would die of another call's number.
  private static let refused: [UInt64: Int] = [425: 0, 435: 1]
  /// Offsets in struct user of rax and of the first two arguments, rdi and rsi.
  private static let resultOffset: UInt = 80
  private static let argumentOffsets: [UInt] = [112, 104]
  private static let poke: CInt = 6  // PTRACE_POKEUSER

  private let root: Int32
  private var pending: [Int32: Pending] = [:]
  private var threads: Set<Int32> = []
  private var hasStarted = false
  private(set) var notes = CallNotes()
  private(set) var files = FileNotes()
  private var end: ProcessEnd?

  private init(root: Int32) { self.root = root }

  static func run(profile path: String, defines: [String: String], words: [String]) throws(JailError) -> Int32 {
    // SAFETY: the path is a NUL-terminated copy.
    let known = unsafe access(path, F_OK) == 0 ? try JailProgram.load(path) : JailProfile(file: path)
    let searchPath = unsafe getenv("PATH").map { unsafe String(cString: $0) }
    guard let program = JailPlan.find(words[0], searchPath), unsafe access(program, X_OK) == 0 else {
      throw .program(path: words[0], .noEntry)
    }
    let signals: OwnedFD
    do { signals = try Signals.descriptor(for: [SIGTERM, SIGINT, SIGHUP, SIGQUIT]) } catch { throw .host(error.description) }
    // The environment that the jail will give it, because what a program does depends on it.
    var variables: [(String, String)] = []
    for (name, value) in known.environment {
      if let value {
        variables.append((name, value))
      } else if let text = unsafe getenv(name) {
        variables.append((name, unsafe String(cString: text)))
      }
    }
    _ = clearenv()
    // SAFETY: setenv copies both strings.
    for (name, value) in variables { _ = unsafe setenv(name, value, 1) }
    let strings = CStrings([program] + words.dropFirst())
    // SAFETY: the strings live for the call; the child has its own copy of memory.
    let pid = unsafe clinux_spawn_traced(strings.pointers)
    guard pid > 0 else { throw .host("Cannot start a process: \(Errno(-pid).explanation)") }
    let learner = JailLearner(root: pid)
    try learner.follow(signals)
    guard learner.hasStarted else { throw .program(path: program, .accessDenied) }
    learner.files.add(program: program)
    learner.files.finish()
    let learned = LearnedProfile(learner.notes, learner.files, program: program, words: words, defines: defines, known: known)
    try append(learned.text, to: path)
    switch learner.end {
    case .exited(let code): return code
    case .killed(let signal): return 128 + signal
    case nil: return JailProgram.ownFailure
    }
  }

  private static func append(_ text: String, to path: String) throws(JailError) {
    do {
      let fd = try OwnedFD.openNamed(path, O_WRONLY | O_CREAT | O_APPEND, mode: 0o644)
      try fd.writeAll(Array(text.utf8))
    } catch { throw .profile(path: path, error.errno) }
    Log.write("martlet jail: what the program needed stands in '\(path)'; read it before you use it", to: 2)
  }

  private func follow(_ signals: borrowing OwnedFD) throws(JailError) {
    var status: CInt = 0
    // SAFETY: `status` is ours, here and below.
    guard unsafe clinux_wait_thread(root, &status, 1) == root, status & 0xFF == 0x7F,
      clinux_ptrace(Self.setOptions, root, 0, Self.options) == 0
    else {
      throw .host("The program cannot be watched (ptrace); allow it: sysctl kernel.yama.ptrace_scope=1, and CAP_SYS_PTRACE in containers")
    }
    threads = [root]
    _ = clinux_ptrace(Self.runToCall, root, 0, 0)
    while !threads.isEmpty {
      let thread = unsafe clinux_wait_thread(-1, &status, 0)
      if thread < 0 { break }
      if thread == 0 {
        while let number = Signals.next(from: signals) { _ = kill(root, number) }
        _ = usleep(200)
        continue
      }
      if status & 0x7F == 0 || status & 0xFF != 0x7F {
        ended(thread, status)
        continue
      }
      threads.insert(thread)
      _ = clinux_ptrace(Self.runToCall, thread, 0, stopped(thread, status))
    }
  }

  private func ended(_ thread: Int32, _ status: CInt) {
    threads.remove(thread)
    pending[thread] = nil
    guard thread == root else { return }
    end = status & 0x7F == 0 ? .exited(code: status >> 8 & 0xFF) : .killed(signal: status & 0x7F)
    // What it leaves behind goes with it, as in the jail.
    for other in threads { _ = kill(other, SIGKILL) }
  }

  /// The signal to hand on.
  private func stopped(_ thread: Int32, _ status: CInt) -> UInt {
    let signal = status >> 8 & 0xFF
    let event = status >> 16
    if event == 4 {  // PTRACE_EVENT_EXEC: the first is the program itself
      if !hasStarted {
        hasStarted = true
        notes = CallNotes()
        files = FileNotes()
        pending = [:]
      }
      return 0
    }
    if event != 0 { return 0 }
    if signal == 5 | 0x80 {
      if hasStarted { look(thread) }
      return 0
    }
    // The stop with which a new thread or process begins.
    if signal == SIGSTOP { return 0 }
    return UInt(signal)
  }

  private func look(_ thread: Int32) {
    var words = [UInt64](repeating: 0, count: 7)
    // SAFETY: seven words of ours.
    switch unsafe clinux_trace_call(thread, &words) {
    case 1:
      var call = Pending(number: words[0], arguments: Array(words[1...6]))
      if let index = FileNotes.pathArgument(words[0]) {
        call.path = path(thread, directory: index > 0 ? CInt(truncatingIfNeeded: words[index]) : -100, address: words[index + 1])
        // SAFETY: a NUL-terminated copy.
        if let path = call.path { call.existed = unsafe access(path, F_OK) == 0 }
      }
      notes.add(UInt32(truncatingIfNeeded: words[0]), call.arguments, isRoot: thread == root)
      if let argument = Self.refused[call.number] {
        call.isRefused = true
        _ = clinux_ptrace(Self.poke, thread, Self.argumentOffsets[argument], 0)
      }
      pending[thread] = call
    case 2:
      guard let call = pending.removeValue(forKey: thread) else { return }
      if call.isRefused, let argument = Self.refused[call.number] {
        _ = clinux_ptrace(Self.poke, thread, Self.resultOffset, UInt(bitPattern: -Int(ENOSYS)))
        // Programs count on their registers.
        _ = clinux_ptrace(Self.poke, thread, Self.argumentOffsets[argument], UInt(call.arguments[argument]))
        return
      }
      finish(call, Int64(bitPattern: words[0]), thread)
    default: break
    }
  }

  private func finish(_ call: Pending, _ result: Int64, _ thread: Int32) {
    switch call.number {
    case 9 where result >= 0 && call.arguments[2] & 4 != 0 && call.arguments[3] & 0x20 == 0:
      if let path = link("/proc/\(thread)/fd/\(CInt(truncatingIfNeeded: call.arguments[4]))") { files.isMapped(path) }
    case 42, 49:  // connect, bind
      guard result >= 0, let path = socketPath(thread, call.arguments[1], call.arguments[2]) else { return }
      if call.number == 42 { files.add(path, .readWrite) } else { files.addParent(of: path) }
    default:
      guard let path = call.path else { return }
      files.note(call.number, call.arguments, path, existed: call.existed, result: result)
    }
  }

  private func path(_ thread: Int32, directory: CInt, address: UInt64) -> String? {
    guard let text = text(thread, address, 4096), !text.isEmpty else { return nil }
    if text.hasPrefix("/") { return text }
    guard directory == -100 else { return link("/proc/\(thread)/fd/\(directory)").map { $0 + "/" + text } }
    return inWorkingDirectory(thread, text)
  }

  private func text(_ thread: Int32, _ address: UInt64, _ capacity: Int) -> String? {
    var bytes = [UInt8](repeating: 0, count: capacity)
    // SAFETY: the buffer is lent for the call.
    let got = unsafe bytes.withUnsafeMutableBytes { unsafe clinux_read_memory(thread, address, $0.baseAddress, UInt($0.count)) }
    guard got > 0, let end = bytes[..<got].firstIndex(of: 0) else { return nil }
    return String(decoding: bytes[..<end], as: UTF8.self)
  }

  private func socketPath(_ thread: Int32, _ address: UInt64, _ length: UInt64) -> String? {
    guard length > 3, let family = text(thread, address, 2), family.utf8.first == 1 else { return nil }
    guard let path = text(thread, address + 2, 108), path.hasPrefix("/") else {
      guard let relative = text(thread, address + 2, 108), !relative.isEmpty else { return nil }
      return inWorkingDirectory(thread, relative)
    }
    return path
  }

  private func inWorkingDirectory(_ thread: Int32, _ path: String) -> String? {
    guard let base = link("/proc/\(thread)/cwd") else { return nil }
    // Where it went by itself, it goes in the jail too.
    if base == link("/proc/self/cwd"), base != "/" { files.directory = base }
    return base + "/" + path
  }

  private func link(_ path: String) -> String? {
    var buffer = [CChar](repeating: 0, count: 4096)
    // SAFETY: readlink stores at most the given count.
    let count = unsafe readlink(path, &buffer, buffer.count - 1)
    guard count > 0 else { return nil }
    let text = String(decoding: buffer[..<count].map { UInt8(bitPattern: $0) }, as: UTF8.self)
    return text.hasPrefix("/") ? text : nil
  }
}
