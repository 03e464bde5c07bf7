import Glibc
import HostSystem
import Sandbox

/// The system calls a program made, and those of their arguments that a filter should look at.
struct CallNotes {
  /// Calls whose one argument says which of many things they do: its index, and the bits that count.
  private static let selecting: [String: (argument: Int, mask: UInt64)] = [
    "ioctl": (1, 0xFFFF_FFFF), "fcntl": (1, 0xFFFF_FFFF), "madvise": (2, 0xFFFF_FFFF), "prctl": (0, 0xFFFF_FFFF),
    "socket": (0, 0xFFFF_FFFF), "socketpair": (0, 0xFFFF_FFFF), "arch_prctl": (0, 0xFFFF_FFFF), "personality": (0, 0xFFFF_FFFF),
    "fallocate": (1, 0xFFFF_FFFF), "unshare": (0, 0xFFFF_FFFF), "prlimit64": (0, 0xFFFF_FFFF),
  ]

  private(set) var counts: [UInt32: Int] = [:]
  private var values: [UInt32: Set<UInt64>] = [:]
  private var isExecutable: Set<UInt32> = []
  /// Writable and executable at once, or executable without a file.
  private var isWild = false
  private var hasChildren = false

  mutating func add(_ number: UInt32, _ arguments: [UInt64], isRoot: Bool) {
    counts[number, default: 0] += 1
    let name = SystemCall.name(number)
    if let (argument, mask) = Self.selecting[name] { values[number, default: []].insert(arguments[argument] & mask) }
    switch name {
    case "mmap" where arguments[2] & 4 != 0:
      isExecutable.insert(number)
      if arguments[2] & 2 != 0 || arguments[3] & 0x20 != 0 { isWild = true }
    case "mprotect" where arguments[2] & 4 != 0: isExecutable.insert(number)
    case "fork", "vfork": hasChildren = true
    // CLONE_THREAD
    case "clone" where arguments[0] & 0x10000 == 0: hasChildren = true
    default: break
    }
  }

  private static let unseen = [
    ("clone3", "its flags lie in memory, which no filter sees; libc falls back to clone"),
    ("io_uring_setup", "what a ring does passes by every filter; most programs fall back to ordinary calls"),
  ]

  /// Every program ends and returns from signals, whether it did in this run or not; and libc calls these when it likes: the
  /// allocator, locks, waits, abort(3).
  private static let always = [
    "exit", "exit_group", "rt_sigreturn", "restart_syscall", "futex", "brk", "close", "clock_gettime", "mmap", "munmap", "mprotect",
    "madvise",
    "sched_yield", "clock_nanosleep", "rt_sigprocmask", "getpid", "gettid", "tgkill",
    // In the jail it is another user than here, and may want to know more about that.
    "getuid", "geteuid", "getgid", "getegid",
  ]

  /// AF_INET, AF_INET6.
  var usesNetwork: Bool {
    guard let socket = SystemCall.number("socket"), let families = values[socket] else { return false }
    return families.contains(2) || families.contains(10)
  }

  /// Rule lines, the most frequent call first.
  var lines: [String] {
    var counts = counts
    for name in Self.always { if let number = SystemCall.number(name), counts[number] == nil { counts[number] = 0 } }
    var refusals: [String] = []
    for (name, why) in Self.unseen {
      guard let number = SystemCall.number(name), counts.removeValue(forKey: number) != nil else { continue }
      refusals.append("refuse \(name) ENOSYS  # \(why)")
    }
    // execve of the program itself was over before the first note.
    let order = counts.sorted { $0.value != $1.value ? $0.value > $1.value : $0.key < $1.key }
    return order.flatMap { rules($0.key, $0.value) } + refusals
  }

  private func rules(_ number: UInt32, _ count: Int) -> [String] {
    let name = SystemCall.name(number)
    let reason = "  # \(count) times"
    guard SystemCall.number(name) == number else {
      return ["# left out: \(name), \(count) times; it has no name here, and ends the program in the jail"]
    }
    switch name {
    case "mmap":
      if isWild { return ["call mmap\(reason), also writable and executable or executable without a file: a weak spot"] }
      var lines = ["call mmap arg2 & 0x4 == 0\(reason)"]
      if isExecutable.contains(number) {
        lines.append("call mmap arg2 & 0x2 == 0 and arg3 & 0x20 == 0  # its libraries: executable from files only, never writable")
      }
      return lines
    case "mprotect":
      return isExecutable.contains(number)
        ? ["call mprotect\(reason), also executable: a weak spot"] : ["call mprotect arg2 & 0x4 == 0\(reason)"]
    // CLONE_NEWNS, CGROUP, UTS, IPC, USER, PID, NET
    case "clone": return ["call clone arg0 & 0x7E020000 == 0\(reason), without new namespaces"]
    case "madvise" where values[number] == nil: return ["call madvise arg2 == 4\(reason)"]
    case "tgkill" where !hasChildren: return ["call tgkill arg0 == self\(reason)"]
    default: break
    }
    guard let (argument, mask) = Self.selecting[name], let seen = values[number], !seen.isEmpty, seen.count <= 24 else {
      return ["call \(name)\(reason)"]
    }
    return seen.sorted().map { "call \(name) arg\(argument) & \(Self.hexadecimal(mask)) == \(Self.hexadecimal($0))\(reason)" }
  }

  private static func hexadecimal(_ value: UInt64) -> String { "0x" + String(value, radix: 16) }
}

/// The files a program needed.
struct FileNotes {
  enum Use: Int, Comparable {
    case read, readWrite, run
    static func < (a: Use, b: Use) -> Bool { a.rawValue < b.rawValue }
  }

  /// A file by what no link hides.
  private struct FileIdentity: Hashable {
    let device: UInt64
    let number: UInt64

    init?(_ path: String) {
      var status = stat()
      // SAFETY: a NUL-terminated copy; `status` is ours.
      guard unsafe stat(path, &status) == 0, status.st_mode & S_IFMT == S_IFREG else { return nil }
      (device, number) = (UInt64(status.st_dev), UInt64(status.st_ino))
    }
  }

  /// Where it was when it used a name that does not say where.
  var directory: String?
  private(set) var uses: [String: Use] = [:]
  private(set) var usesProc = false
  /// More of it than what belongs to processes.
  private(set) var usesWholeProc = false
  /// What was mapped to be executed, by whichever name.
  private var mapped: Set<FileIdentity> = []
  /// Directories that it went into: what it did there goes by names that are not seen from outside.
  private(set) var entered: Set<String> = []
  /// Directories of which it only asked whether they are there.
  private(set) var lookedAt: Set<String> = []
  /// What the program made itself: the next run makes it again, in a directory that it may write to.
  private var made: Set<String> = []

  /// Where the path stands among the arguments; its directory descriptor, if any, is the one before. Nil: no path.
  static func pathArgument(_ number: UInt64) -> Int? {
    switch SystemCall.name(UInt32(truncatingIfNeeded: number)) {
    case "open", "stat", "lstat", "access", "readlink", "statfs", "mkdir", "rmdir", "unlink", "creat", "chdir", "execve", "truncate",
      "chroot", "chmod", "chown", "rename", "link", "symlink", "mknod", "getxattr", "lgetxattr", "listxattr":
      0
    case "openat", "openat2", "newfstatat", "statx", "faccessat", "faccessat2", "readlinkat", "mkdirat", "unlinkat", "fchmodat",
      "fchownat", "renameat", "renameat2", "mknodat", "utimensat":
      1
    default: nil
    }
  }

  mutating func note(_ number: UInt64, _ arguments: [UInt64], _ path: String, existed: Bool, result: Int64) {
    guard result >= 0 else { return }
    switch SystemCall.name(UInt32(truncatingIfNeeded: number)) {
    case "open": open(path, arguments[1], existed)
    case "openat": open(path, arguments[2], existed)
    case "openat2": open(path, 0, existed)
    case "creat", "mkdir", "rmdir", "unlink", "mkdirat", "unlinkat", "rename", "renameat", "renameat2", "link", "symlink", "mknod",
      "mknodat":
      if !existed { made.insert(path) }
      addParent(of: path)
    case "truncate", "chmod", "chown", "fchmodat", "fchownat", "utimensat": add(path, .readWrite)
    case "execve": add(path, .run)
    case "chdir", "chroot": if let path = JailProfile.normal(path) ?? JailPlan.real(path) { entered.insert(path) }
    default:
      var status = stat()
      // SAFETY: a NUL-terminated copy; `status` is ours.
      guard unsafe stat(path, &status) == 0 else { return }
      if status.st_mode & S_IFMT != S_IFDIR { return add(path, .read) }
      if let path = JailProfile.normal(path) ?? JailPlan.real(path), path != "/", path != "/proc", !path.hasPrefix("/proc/") {
        lookedAt.insert(path)
      }
    }
  }

  private mutating func open(_ path: String, _ flags: UInt64, _ existed: Bool) {
    if flags & 0o100 != 0, !existed {
      made.insert(path)
      return addParent(of: path)
    }
    add(path, flags & 3 == 0 ? .read : .readWrite)
  }

  mutating func isMapped(_ opened: String) {
    add(opened, .run)
    if let identity = FileIdentity(opened) { mapped.insert(identity) }
  }

  /// What is executed by one of its names is so by all: in the jail a link is a file by itself, so that who resolves links here, or
  /// takes the first name that a directory tells, maps it by another one there.
  mutating func finish() {
    for (path, use) in uses where use != .run {
      if let identity = FileIdentity(path), mapped.contains(identity) { uses[path] = .run }
    }
  }

  mutating func addParent(of path: String) {
    guard let slash = path.lastIndex(of: "/"), slash != path.startIndex else { return }
    add(String(path[..<slash]), .readWrite)
  }

  mutating func add(_ path: String, _ use: Use) {
    guard !made.contains(path), let path = JailProfile.normal(path) ?? JailPlan.real(path), path != "/", !made.contains(path) else {
      return
    }
    if path == "/proc" || path.hasPrefix("/proc/") {
      usesProc = true
      if let name = path.split(separator: "/").dropFirst().first, Int(name) == nil, name != "self", name != "thread-self" {
        usesWholeProc = true
      }
      return
    }
    uses[path] = max(uses[path] ?? use, use)
  }

  mutating func add(program: String) {
    add(program, .run)
    if let loader = (try? ProgramFile(path: program))?.interpreter { add(loader, .run) }
  }
}

/// What was learned, as text to be added to a profile.
struct LearnedProfile {
  let text: String

  init(_ notes: CallNotes, _ files: FileNotes, program: String, words: [String], defines: [String: String], known: JailProfile) {
    var lines: [String] = []
    let isNew = known.calls.isEmpty && known.places.isEmpty
    lines.append("# Learned from: \(Self.harmless(words.joined(separator: " ")))")
    if isNew {
      if Self.canBeWritten(program) { lines.append("program \(Self.quoted(program))") }
      lines += ["user own", "network no", "limit descriptors 1024"]
      if notes.usesNetwork {
        lines.append("# It made sockets of the host's network, which it does not see in the jail unless 'network yes' stands here.")
      }
      if geteuid() == 0 {
        lines.append(
          "# It was watched with root's capabilities. In the jail it has those of 'capability' lines only; they are not learned.")
      }
    }
    if files.usesWholeProc, !known.hasWholeProc {
      lines.append("proc all")
    } else if files.usesProc, !known.hasProc {
      lines.append("proc yes")
    }
    var uses = files.uses
    // Whoever names a directory means what is in it; of others that it entered we would show too much.
    for path in files.entered where defines.values.contains(where: { ($0 == path || JailPlan.real($0) == path) && path != "/" }) {
      uses[path] = .readWrite
    }
    for path in files.lookedAt where defines.values.contains(where: { $0 == path || JailPlan.real($0) == path }) && uses[path] == nil {
      uses[path] = .read
    }
    for (path, use) in uses.sorted(by: { $0.key < $1.key }) {
      guard Self.canBeWritten(path) else {
        lines.append("# left out, because no profile can hold such a path: \(Self.harmless(path))")
        continue
      }
      guard let line = Self.line(path, use, defines) else { continue }
      if known.places.contains(where: { Self.covers($0, path, use, defines) }) { continue }
      lines.append(line)
    }
    // That a directory is there is seen from the places in it; where there is none, an empty one says it, and shows nothing.
    for path in files.lookedAt.sorted() where Self.canBeWritten(path) && !Self.isThere(path, uses.keys, known, defines) {
      lines.append("temporary \(Self.quoted(Self.replaced(path, defines))) 4K  # it only asked whether this is there")
    }
    if let directory = files.directory, known.directory == nil, Self.canBeWritten(directory),
      Self.isThere(directory, uses.keys, known, defines)
    {
      lines.append("working-directory \(Self.quoted(Self.replaced(directory, defines)))")
    }
    for line in notes.lines {
      let statement = line.split(separator: "#")[0].drop { $0 == " " }
      let words = statement.split(separator: " ")
      if words.first == "call", let rule = try? SystemCallRule.parse(statement.dropFirst(5) + "# x").first {
        if known.calls.contains(where: { $0.number == rule.number && ($0.conditions.isEmpty || $0.conditions == rule.conditions) }) {
          continue
        }
      } else if words.first == "refuse", known.refused.contains(where: { SystemCall.name($0.number) == words[1] }) {
        continue
      }
      lines.append(line)
    }
    // A run that brought nothing new leaves no trace.
    text = lines.count > 1 ? lines.joined(separator: "\n") + "\n" : ""
  }

  private static func line(_ path: String, _ use: FileNotes.Use, _ defines: [String: String]) -> String? {
    var status = stat()
    // SAFETY: a NUL-terminated copy; `status` is ours.
    guard unsafe stat(path, &status) == 0 else { return nil }
    let name = quoted(replaced(path, defines))
    let kind = status.st_mode & S_IFMT
    switch kind {
    case S_IFDIR:
      if path == "/tmp", use == .readWrite { return "temporary /tmp 64M" }
      return "directory \(name) \(use == .readWrite ? "rw" : "ro")"
    case S_IFCHR, S_IFBLK: return "device \(name) \(use == .readWrite ? "rw" : "ro")"
    default: return "file \(name) \(use == .run ? "run" : use == .readWrite ? "rw" : "ro")"
    }
  }

  /// Whether some place lies in the directory, is it, or has it inside.
  private static func isThere(
    _ path: String, _ places: some Sequence<String>, _ known: JailProfile, _ defines: [String: String]
  ) -> Bool {
    var missing: String?
    let others = known.places.map { JailProfile.expand($0.path, defines, missing: &missing) }
    func touches(_ place: String) -> Bool { place == path || place.hasPrefix(path + "/") || path.hasPrefix(place + "/") }
    return places.contains(where: touches) || others.contains(where: touches)
  }

  /// The value of a define at the start of the path becomes its name.
  private static func replaced(_ path: String, _ defines: [String: String]) -> String {
    for (name, value) in defines {
      guard let whole = JailPlan.real(value) ?? JailProfile.normal(value) else { continue }
      for value in [value, whole] where path == value || path.hasPrefix(value + "/") { return "{\(name)}" + path.dropFirst(value.count) }
    }
    return path
  }

  private static func covers(_ place: JailProfile.Place, _ path: String, _ use: FileNotes.Use, _ defines: [String: String]) -> Bool {
    let enough = use == .read || (use == .run ? place.access == .run : place.access == .readWrite)
    guard enough else { return false }
    var missing: String?
    let shown = JailProfile.expand(place.path, defines, missing: &missing)
    let names = [path, replaced(path, defines)]
    return names.contains(shown) || names.contains(place.path) || (place.kind != .file && path.hasPrefix(shown + "/"))
  }

  /// A program chooses the names of its files. None of them may end a line, begin a comment, or mean something else.
  private static func canBeWritten(_ path: String) -> Bool {
    path.unicodeScalars.allSatisfy { $0.value >= 0x20 && $0.value != 0x7F && !["\"", "#", "{", "}"].contains($0) }
  }

  /// For a comment.
  private static func harmless(_ text: String) -> String {
    String(String.UnicodeScalarView(text.unicodeScalars.map { $0.value < 0x20 || $0.value == 0x7F ? "?" : $0 }))
  }

  private static func quoted(_ text: String) -> String { text.contains(" ") ? "\"\(text)\"" : text }
}
