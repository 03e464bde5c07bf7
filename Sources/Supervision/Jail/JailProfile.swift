import ControlProtocol
import Sandbox

/// What a program of somebody else's may see, keep and do: one file (`protocol/jail.md`), a statement a line.
package struct JailProfile: Sendable {
  package enum Access: String, CaseIterable, Sendable {
    case readOnly = "ro"
    case readWrite = "rw"
    /// Read-only and executable: programs, their loader, their libraries.
    case run
  }

  package struct Place: Equatable, Sendable {
    package enum Kind: String, Sendable { case file, directory, device, temporary }
    package var kind: Kind
    /// As written: may hold `{NAME}`.
    package var path: String
    package var access: Access
    /// Left out where it does not exist.
    package var isOptional = false
    /// Of a temporary directory, in bytes.
    package var size: UInt64 = 0
    package var line = 0
  }

  package enum User: Equatable, Sendable {
    /// As root a uid and gid that nobody else has; otherwise the caller's.
    case own
    /// The caller's, root without its capabilities included.
    case keep
    case ids(uid: UInt32, gid: UInt32)
  }

  /// RLIMIT_... numbers of asm-generic/resource.h.
  package enum Limit: String, CaseIterable, Sendable {
    case descriptors, threads, memory
    case fileSize = "file-size"
    case lockedMemory = "locked-memory"

    package var resource: Int32 {
      switch self {
      case .descriptors: 7
      case .threads: 6
      case .memory: 9
      case .fileSize: 1
      case .lockedMemory: 8
      }
    }
    /// Less cannot be meant: nothing would start.
    package var least: UInt64 {
      switch self {
      case .descriptors: 8
      case .threads: 1
      case .memory: 16 << 20
      case .fileSize, .lockedMemory: 0
      }
    }
    package var isBytes: Bool { self != .descriptors && self != .threads }
  }

  /// For messages.
  package var file: String
  package var program: String?
  package var user = User.own
  package var hasNetwork = false
  /// A /proc of its own: its own processes, or with `all` everything else that is in one, read-only.
  package var hasProc = false
  package var hasWholeProc = false
  package var directory: String?
  package var places: [Place] = []
  package var descriptors: [Int32] = []
  /// A value of nil is taken from the caller's environment.
  package var environment: [(name: String, value: String?)] = []
  /// Numbers of CAP_...
  package var capabilities: [Int] = []
  package var limits: [(limit: Limit, value: UInt64)] = []
  package var calls: [SystemCallRule] = []
  /// Calls that get an error back instead of ending the program.
  package var refused: [(number: UInt32, errno: UInt16)] = []

  /// Statements that there is one of, by what they are about: where they stand, and what they say.
  private var said: [String: (line: Int, text: String)] = [:]

  package init(file: String) { self.file = file }

  /// Two lines about one thing that say two things mean nothing.
  private mutating func say(_ text: String, about what: String, line: Int) throws(Problem) {
    if let before = said[what], before.text != text {
      throw Self.problem("'\(text)' contradicts line \(before.line), '\(before.text)'; take one of the two out")
    }
    said[what] = (line, text)
  }

  static let keywords = [
    "program", "user", "network", "proc", "working-directory", "file", "directory", "device", "temporary", "descriptor",
    "environment", "capability", "limit", "call", "refuse",
  ]

  /// The most of anything that a profile may list, and the length of its text.
  package static let mostEntries = 1024
  package static let longestText = 1 << 20

  package init(_ text: String, file: String) throws(JailError) {
    self.file = file
    for (index, line) in text.split(separator: "\n", omittingEmptySubsequences: false).enumerated() {
      do throws(Problem) { try add(line, number: index + 1) } catch {
        throw .line(file: file, line: index + 1, problem: error.text)
      }
    }
    guard places.count <= Self.mostEntries, calls.count <= Self.mostEntries else {
      throw .contradiction(file: file, problem: "More than \(Self.mostEntries) entries of a kind; show a directory instead of its files")
    }
  }

  private struct Problem: Error { var text: String }

  private static func problem(_ text: String) -> Problem { Problem(text: text) }

  private static func unknown(_ what: String, _ word: String, _ known: [String]) -> Problem {
    // The comparison is made in small letters; some names here are in capitals.
    let small = known.map { $0.lowercased() }
    let near = EditDistance.nearest(to: word, in: small).flatMap { small.firstIndex(of: $0) }.map { "; did you mean '\(known[$0])'?" } ?? ""
    return Problem(
      text: "Unknown \(what) '\(word)'\(near)"
        + (known.count < 20 ? (near.isEmpty ? ";" : "") + " It knows \(known.joined(separator: ", "))" : ""))
  }

  /// Words at blanks; "quotes" keep blanks together. Nil when a quote is not closed.
  static func words(_ text: Substring) -> [String]? {
    var words: [String] = []
    var word: String?
    var isQuoted = false
    for character in text {
      switch character {
      case "\"":
        isQuoted.toggle()
        word = word ?? ""
      case " " where !isQuoted, "\t" where !isQuoted:
        if let done = word { words.append(done) }
        word = nil
      default: word = (word ?? "") + String(character)
      }
    }
    if let done = word { words.append(done) }
    return isQuoted ? nil : words
  }

  private mutating func add(_ line: Substring, number: Int) throws(Problem) {
    let halves = line.split(separator: "#", maxSplits: 1, omittingEmptySubsequences: false)
    guard var words = Self.words(halves[0]) else { throw Self.problem("A quote is not closed; close it") }
    guard let keyword = words.first else { return }
    words.removeFirst()
    let reason = halves.count > 1 && halves[1].contains(where: { $0 != " " && $0 != "\t" })
    func want(_ counts: ClosedRange<Int>, _ form: String) throws(Problem) {
      guard counts.contains(words.count) else { throw Self.problem("'\(keyword)' wants \(form)") }
    }
    func yes() throws(Problem) -> Bool {
      try want(1...1, "yes or no")
      guard words[0] == "yes" || words[0] == "no" else { throw Self.problem("'\(keyword) \(words[0])' is neither yes nor no") }
      return words[0] == "yes"
    }
    switch keyword {
    case "program", "working-directory", "network", "proc", "user":
      try say(([keyword] + words).joined(separator: " "), about: keyword, line: number)
    default: break
    }
    switch keyword {
    case "program":
      try want(1...1, "the path of the program")
      program = try Self.path(words[0])
    case "working-directory":
      try want(1...1, "a path")
      directory = try Self.path(words[0])
    case "network": hasNetwork = try yes()
    case "proc":
      hasWholeProc = words == ["all"]
      if hasWholeProc { hasProc = true } else { hasProc = try yes() }
    case "user":
      try want(1...1, "own, keep, or UID:GID")
      user = try Self.user(words[0])
    case "file", "directory", "device": try addPlace(keyword, words, number)
    case "temporary":
      try want(2...2, "a path and a size such as 64M")
      guard let size = Quantity.byteCount(words[1]), size >= 4096, size <= 1 << 40 else {
        throw Self.problem("Size '\(words[1])' is not one from 4K to 1T")
      }
      let place = Place(kind: .temporary, path: try Self.path(words[0]), access: .readWrite, size: size, line: number)
      try say("temporary \(place.path)", about: "place \(place.path)", line: number)
      places.append(place)
    case "descriptor":
      try want(1...1, "a number from 3 to 31; 0, 1 and 2 are always passed on")
      guard let value = Quantity.unsigned(words[0]), (3...31).contains(value) else {
        throw Self.problem("Descriptor '\(words[0])' is not a number from 3 to 31")
      }
      if !descriptors.contains(Int32(value)) { descriptors.append(Int32(value)) }
    case "environment":
      try want(1...1, "NAME=VALUE, or NAME to take it over")
      let parts = words[0].split(separator: "=", maxSplits: 1, omittingEmptySubsequences: false)
      guard let name = parts.first, !name.isEmpty else { throw Self.problem("'environment' wants a name") }
      try say("environment \(words[0])", about: "environment \(name)", line: number)
      environment.append((String(name), parts.count > 1 ? String(parts[1]) : nil))
    case "capability":
      try want(1...1, "a name such as CAP_CHOWN, and a reason behind #")
      guard let index = Capabilities.names.firstIndex(of: words[0]) else {
        throw Self.unknown("capability", words[0], Capabilities.names)
      }
      guard reason else {
        throw Self.problem("Capability \(words[0]) has no reason; write behind a # what the program cannot do without it")
      }
      if !capabilities.contains(index) { capabilities.append(index) }
    case "limit":
      try want(2...2, "a name and a number")
      try addLimit(words[0], words[1])
    case "call": try addCall(line, number)
    case "refuse":
      try want(2...2, "a system call and an error name, such as clone3 ENOSYS")
      guard let call = SystemCall.number(words[0]) else { throw Self.unknown("system call", words[0], SystemCall.names) }
      guard let errno = Self.errors[words[1]] else {
        throw Self.problem("Error '\(words[1])' is none of \(Self.errors.keys.sorted().joined(separator: ", "))")
      }
      if let always = said["call \(words[0])"] {
        throw Self.problem("'refuse \(words[0])' contradicts line \(always.line), '\(always.text)'; take one of the two out")
      }
      try say("refuse \(words[0]) \(words[1])", about: "refuse \(words[0])", line: number)
      refused.append((call, errno))
    default: throw Self.unknown("keyword", keyword, Self.keywords)
    }
  }

  static let errors: [String: UInt16] = ["EPERM": 1, "ENOENT": 2, "EACCES": 13, "EINVAL": 22, "ENOSYS": 38, "EOPNOTSUPP": 95]

  private mutating func addPlace(_ keyword: String, _ words: [String], _ number: Int) throws(Problem) {
    guard let kind = Place.Kind(rawValue: keyword), (2...3).contains(words.count), words.count == 2 || words[2] == "optional" else {
      throw Self.problem("'\(keyword)' wants a path, one of ro, rw\(keyword == "device" ? "" : ", run"), and perhaps 'optional'")
    }
    guard let access = Access(rawValue: words[1]), kind != .device || access != .run else {
      throw Self.unknown("access", words[1], kind == .device ? ["ro", "rw"] : Access.allCases.map(\.rawValue))
    }
    let place = Place(kind: kind, path: try Self.path(words[0]), access: access, isOptional: words.count == 3, line: number)
    // What is read may be executed by another line: learning goes by steps.
    let same = places.firstIndex { $0.path == place.path && $0.kind == kind && $0.access != .readWrite }
    if let same, access != .readWrite {
      if access == .run { places[same].access = .run }
      return
    }
    try say("\(keyword) \(place.path) \(access.rawValue)", about: "place \(place.path)", line: number)
    places.append(place)
  }

  private mutating func addLimit(_ name: String, _ text: String) throws(Problem) {
    guard let limit = Limit(rawValue: name) else { throw Self.unknown("limit", name, Limit.allCases.map(\.rawValue)) }
    guard let value = limit.isBytes ? Quantity.byteCount(text) : Quantity.unsigned(text) else {
      throw Self.problem("'\(text)' is no \(limit.isBytes ? "size such as 512M" : "number")")
    }
    guard value >= limit.least, value <= UInt64(Int64.max) else {
      throw Self.problem("No program can start with \(name) limited to \(text); at least \(limit.least)")
    }
    guard !limits.contains(where: { $0.limit == limit }) else { throw Self.problem("Limit '\(name)' is given twice; leave one out") }
    limits.append((limit, value))
  }

  private mutating func addCall(_ line: Substring, _ number: Int) throws(Problem) {
    let statement = line.drop { $0 == " " || $0 == "\t" }.dropFirst("call".count).drop { $0 == " " || $0 == "\t" }
    let name = String(statement.prefix { $0 != " " && $0 != "\t" && $0 != "#" })
    guard SystemCall.number(name) != nil else { throw Self.unknown("system call", name, SystemCall.names) }
    let rules: [SystemCallRule]
    do throws(RuleError) { rules = try SystemCallRule.parse(String(statement)) } catch { throw Self.problem(error.problem) }
    // With a condition it may be refused where that does not hold.
    if rules.contains(where: { $0.conditions.isEmpty }) {
      if let refusal = said["refuse \(name)"] {
        throw Self.problem("'call \(name)' contradicts line \(refusal.line), '\(refusal.text)'; take one of the two out")
      }
      try say("call \(name)", about: "call \(name)", line: number)
    }
    calls += rules
  }

  private static func user(_ text: String) throws(Problem) -> User {
    switch text {
    case "own": return .own
    case "keep": return .keep
    default:
      let parts = text.split(separator: ":", omittingEmptySubsequences: false).compactMap { Quantity.unsigned(String($0)) }
      guard let uid = parts.first, let gid = parts.last, parts.count <= 2, let u = UInt32(exactly: uid), let g = UInt32(exactly: gid),
        u != .max, g != .max, parts.count == text.split(separator: ":", omittingEmptySubsequences: false).count
      else { throw problem("User '\(text)' is none of own, keep, UID, UID:GID") }
      return .ids(uid: u, gid: g)
    }
  }

  /// Absolute, or beginning with a `{NAME}`; what stands in braces is checked when it is filled in.
  private static func path(_ text: String) throws(Problem) -> String {
    guard text.hasPrefix("/") || text.hasPrefix("{") else { throw problem("Path '\(text)' is not absolute; begin it with / or {NAME}") }
    return text
  }

  /// Fills `{NAME}` in. Nil: there is no such name (stored in `missing`).
  package static func expand(_ text: String, _ defines: [String: String], missing: inout String?) -> String {
    var result = ""
    var rest = text[...]
    while let open = rest.firstIndex(of: "{"), let close = rest[open...].firstIndex(of: "}") {
      result += rest[..<open]
      let name = String(rest[rest.index(after: open)..<close])
      if let value = defines[name] { result += value } else { missing = missing ?? name }
      rest = rest[rest.index(after: close)...]
    }
    return result + rest
  }

  /// Without `.`, `..` and doubled slashes; nil when it is not absolute or holds `..`.
  package static func normal(_ path: String) -> String? {
    guard path.hasPrefix("/"), path.utf8.count < 4096, !path.utf8.contains(0) else { return nil }
    let parts = path.split(separator: "/").filter { $0 != "." }
    if parts.contains("..") { return nil }
    return "/" + parts.joined(separator: "/")
  }
}

/// Names of capabilities in the order of linux/capability.h.
package enum Capabilities {
  package static let names: [String] = """
    CHOWN DAC_OVERRIDE DAC_READ_SEARCH FOWNER FSETID KILL SETGID SETUID SETPCAP LINUX_IMMUTABLE NET_BIND_SERVICE
    NET_BROADCAST NET_ADMIN NET_RAW IPC_LOCK IPC_OWNER SYS_MODULE SYS_RAWIO SYS_CHROOT SYS_PTRACE SYS_PACCT SYS_ADMIN
    SYS_BOOT SYS_NICE SYS_RESOURCE SYS_TIME SYS_TTY_CONFIG MKNOD LEASE AUDIT_WRITE AUDIT_CONTROL SETFCAP MAC_OVERRIDE
    MAC_ADMIN SYSLOG WAKE_ALARM BLOCK_SUSPEND AUDIT_READ PERFMON BPF CHECKPOINT_RESTORE
    """.split { $0 == " " || $0 == "\n" }.map { "CAP_\($0)" }
}
