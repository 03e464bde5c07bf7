// Runs a micro guest (Tests/Guests/Micro) under some virtual machine monitor and reads what it reports.

import Foundation
import Testing

/// One line `MICRO name ok|FAIL detail` of a micro guest.
struct MicroReport: Equatable {
  let name: String
  let passed: Bool
  let detail: String

  init?(line: Substring) {
    let words = line.split(separator: " ", maxSplits: 3, omittingEmptySubsequences: false)
    guard words.count >= 3, words[0] == "MICRO", words[2] == "ok" || words[2] == "FAIL" else { return nil }
    name = String(words[1])
    passed = words[2] == "ok"
    detail = words.count > 3 ? String(words[3]) : ""
  }

  /// The number behind `key` in the detail, e.g. `number(after: "tsc")`.
  func number(after key: String) -> UInt64? {
    let words = detail.split(separator: " ")
    guard let at = words.firstIndex(of: Substring(key)), at + 1 < words.count else { return nil }
    return UInt64(words[at + 1])
  }
}

/// What a finished run left.
struct MicroRun {
  /// The monitor's exit status; nil when a signal (our time limit, or a crash) ended it.
  let exitStatus: Int32?
  let output: String
  let errors: String
  let reports: [MicroReport]

  /// The guest came to its end, and every report of it was good.
  var passed: Bool { reports.last?.name == "done" && reports.allSatisfy(\.passed) }
  /// How often the guest started: more than once where it was rebooted in place.
  var starts: Int { reports.count { $0.name == "start" } }
  func report(_ name: String) -> MicroReport? { reports.first { $0.name == name } }
  /// For a failed expectation: what is worth reading.
  var summary: Comment {
    let failed = reports.filter { !$0.passed }.map { "\($0.name): \($0.detail)" }.joined(separator: "; ")
    let last = output.split(separator: "\n").last ?? "none"
    let status = exitStatus.map(String.init) ?? "by signal"
    return "exit \(status), failed: [\(failed)], last line: \(last), stderr: \(errors.suffix(500))"
  }
}

enum MicroGuest {
  /// How often a test kills: `usual` in every run of the tests, so often as `MARTLET_KILL_ROUNDS` says where it is set.
  static func killRounds(_ usual: Int) -> Int { ProcessInfo.processInfo.environment["MARTLET_KILL_ROUNDS"].flatMap { Int($0) } ?? usual }

  /// As much as one would by hand, not as little as is enough for every change: MARTLET_FULL in the environment.
  static let isFull = ProcessInfo.processInfo.environment["MARTLET_FULL"] != nil

  /// The command lines of this machine's processes by number, a NUL behind each word.
  static func commandLines() -> [Int32: String] {
    var found: [Int32: String] = [:]
    for entry in (try? FileManager.default.contentsOfDirectory(atPath: "/proc")) ?? [] {
      guard let pid = Int32(entry), let words = FileManager.default.contents(atPath: "/proc/\(entry)/cmdline") else { continue }
      found[pid] = String(decoding: words, as: UTF8.self)
    }
    return found
  }

  /// The processes of one VM by the last part of their titles.
  static func processes(ofVM name: String) -> [String: Int32] {
    let prefix = "vm/\(name)/"
    let own = commandLines().filter { $0.value.hasPrefix(prefix) }
    return Dictionary(own.map { (String($0.value.dropFirst(prefix.count).prefix { $0 != "\0" }), $0.key) }) { first, _ in first }
  }

  enum Image: String { case elf = "micro.elf", unpaddedELF = "micro-unpadded.elf", bzImage = "micro.bzimage" }

  /// True where `/dev/kvm` opens; a sentence for tests that skip is `needsKVM`.
  static var hasKVM: Bool { access("/dev/kvm", R_OK | W_OK) == 0 }
  static let needsKVM: Comment = "This machine has no /dev/kvm that we may open."

  static let root = URL(fileURLWithPath: #filePath).deletingLastPathComponent().deletingLastPathComponent().deletingLastPathComponent()

  /// The directory with the built guests; built once per test run, in a second or two. Where the clone is read-only (the lab
  /// shares it so) those already built serve.
  static let directory: Result<URL, any Error> = Result {
    let built = root.appendingPathComponent(".build/micro")
    let present = FileManager.default.fileExists(atPath: built.appendingPathComponent("bare-kvm").path)
    if present && access(built.path, W_OK) != 0 { return built }
    let (status, _, errors) = try execute(root.appendingPathComponent("scripts/micro-guests").path, [built.path], seconds: 120)
    guard status == 0 else { throw BuildFailure(output: errors) }
    return built
  }
  struct BuildFailure: Error { let output: String }

  static func path(of image: Image) throws -> String { try directory.get().appendingPathComponent(image.rawValue).path }
  static func tool(_ name: String) throws -> String { try directory.get().appendingPathComponent(name).path }

  /// Runs a monitor that puts the guest's serial port on its standard output.
  static func run(_ program: String, _ arguments: [String], seconds: Int = 60) throws -> MicroRun {
    let (status, output, errors) = try execute(program, arguments, seconds: seconds)
    let lines = output.split(whereSeparator: \.isNewline)
    return MicroRun(exitStatus: status, output: output, errors: errors, reports: lines.compactMap(MicroReport.init(line:)))
  }

  /// Runs the guest with nothing but KVM below it.
  static func runBare(_ image: Image, _ commandLine: String, options: [String] = [], seconds: Int = 60) throws -> MicroRun {
    try run(try tool("bare-kvm"), options + [try path(of: image), commandLine], seconds: seconds)
  }

  /// Output goes to files, so that neither side can fill a pipe while the other waits; `timeout` keeps the time.
  private static func execute(_ program: String, _ arguments: [String], seconds: Int) throws -> (Int32?, String, String) {
    let scratch = FileManager.default.temporaryDirectory.appendingPathComponent("micro-guest-\(UUID().uuidString)")
    try FileManager.default.createDirectory(at: scratch, withIntermediateDirectories: true)
    defer { try? FileManager.default.removeItem(at: scratch) }
    let files = try ["out", "err"].map { name in
      let url = scratch.appendingPathComponent(name)
      try Data().write(to: url)
      return (url, try FileHandle(forWritingTo: url))
    }
    let process = Process()
    process.executableURL = URL(fileURLWithPath: "/usr/bin/timeout")
    process.arguments = ["--signal=KILL", String(seconds), program] + arguments
    process.currentDirectoryURL = root
    process.standardInput = FileHandle.nullDevice
    process.standardOutput = files[0].1
    process.standardError = files[1].1
    try process.run()
    process.waitUntilExit()
    let killed = process.terminationReason == .uncaughtSignal || process.terminationStatus >= 128
    let texts = try files.map { String(decoding: try Data(contentsOf: $0.0), as: UTF8.self) }
    return (killed ? nil : process.terminationStatus, texts[0], texts[1])
  }
}
