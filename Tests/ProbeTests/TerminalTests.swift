import Foundation
import Probe
import TestSupport
import Testing

/// What a person sees: progress on a terminal, results so far after Ctrl-C, exit codes; and what a pipe gets.
@Suite("Probe: terminal and exit codes")
struct TerminalTests {
  private static let probe = BuiltPrograms.path("martlet-probe")
  private static let broken = BuiltPrograms.path("broken-backend")

  /// Verb with options, the back end, what its progress looks like, and what its results so far begin with.
  struct Long: Sendable, CustomTestStringConvertible {
    var words: [String]
    var type = "block"
    var progress: String
    var result: String
    var testDescription: String { words[0] + " " + type }
  }

  private static let long: [Long] = [
    Long(words: ["bench", "--runtime", "90", "--no-syscalls"], progress: " k/s, ", result: "IOPS"),
    Long(words: ["bench", "--type", "net", "--mode", "send", "--runtime", "90"], type: "net", progress: " k/s, ", result: "frames"),
    Long(words: ["verify", "--runtime", "90", "--trouble", "cut"], progress: "verify: ", result: "writes"),
    Long(words: ["check"], progress: "/\(Check.ids.count) ", result: "passed"),
    Long(words: ["faults"], progress: "/\(Faults.ids.count) ", result: "survived"),
  ]

  @Test(
    "On a terminal a line tells how far it is; Ctrl-C ends with the results so far",
    .enabled(if: access("/usr/bin/script", X_OK) == 0, "Needs script (Debian's bsdutils)."), arguments: long)
  func onTerminal(long: Long) throws {
    let keyboard = Pipe()
    let command = (["exec", Self.probe] + long.words + ["--", Self.broken, "'{socket}'", long.type]).joined(separator: " ")
    let program = try RunningProgram("/usr/bin/script", ["-qec", command, "/dev/null"], input: keyboard.fileHandleForReading)
    let patience = Date().addingTimeInterval(60)
    // Written over and over again in one line.
    while program.outputText.components(separatedBy: "\r\u{1B}[K").filter({ $0.contains(long.progress) }).count < 3, program.isRunning,
      Date() < patience
    { usleep(20_000) }
    let before = program.outputText
    keyboard.fileHandleForWriting.write(Data([3]))
    let result = program.wait(seconds: 60)
    #expect(before.contains(long.progress), "\(before)")
    #expect(result.code == 0 || result.code == 1, "code \(result.code), signal \(String(describing: result.signal)): \(result.output)")
    #expect(result.output.lowercased().contains("interrupted"), "\(result.output)")
    #expect(result.output.contains(long.result), "\(result.output)")
    try keyboard.fileHandleForWriting.close()
  }

  @Test(
    "A pipe gets results and no progress", arguments: [["bench", "--runtime", "1.2", "--no-syscalls"], ["verify", "--runtime", "1.2"]])
  func piped(words: [String]) throws {
    let result = try RunningProgram(Self.probe, words + ["--", Self.broken, "{socket}", "block"]).wait(seconds: 60)
    #expect(result.errors.isEmpty, "\(result.errors)")
    #expect(!result.output.isEmpty && !result.output.contains("\r") && !result.output.contains("\u{1B}"), "\(result.output)")
  }

  private static let codes: [([String], [String], Int32)] = [
    (["info"], [], 0),
    (["check", "--only", "features.,ack.success"], [], 0), (["check", "--only", "features."], ["no-version1"], 1),
    (["check", "--only", "nothing.such"], [], 2), (["check", "--format", "xml"], [], 2),
    (["faults", "--only", "message.get_features.none,header.half"], [], 0),
    (["faults", "--only", "message.set_vring_num.short"], ["abort-malformed"], 1), (["faults", "--only", "nothing.such"], [], 2),
    (["bench", "--runtime", "0.1", "--no-syscalls"], [], 0), (["bench", "--runtime", "0.1", "--no-syscalls"], ["read-fails"], 1),
    (["bench", "--rw", "sideways"], [], 2), (["bench", "--vs", "'open"], [], 2),
    (["bench", "--limit-file", "/nowhere", "--type", "net"], [], 2), (["bench", "--limit-file", "/nowhere"], [], 2),
    (["bench", "--limit-file", "/dev/null"], [], 2),
    (["verify", "--runtime", "0.4", "--trouble", "none"], [], 0),
    (["verify", "--runtime", "0.4", "--trouble", "none"], ["write-shifted"], 1),
    (["verify", "--trouble", "flood"], [], 2), (["verify", "--size", "1g"], [], 2),
  ]

  @Test("Exit codes: 0 all passed, 1 findings, 2 could not run, and then one line says why", arguments: codes.indices)
  func exitCode(index: Int) throws {
    let (words, defects, code) = Self.codes[index]
    let result = try RunningProgram(Self.probe, words + ["--timeout", "10", "--", Self.broken, "{socket}", "block"] + defects)
      .wait(seconds: 60)
    #expect(result.code == code, "\(words) \(defects): \(result.output) \(result.errors)")
    if code == 2 { #expect(result.errorLines.count == 1 && result.output.isEmpty, "\(result.output) \(result.errors)") }
  }

  @Test("Every verb explains itself", arguments: ["info", "check", "faults", "verify", "bench", "bridge", "record", "replay", "decode"])
  func help(verb: String) throws {
    let result = try RunningProgram(Self.probe, [verb, "--help"]).wait()
    #expect(result.code == 0 && result.errors.isEmpty && result.output.hasPrefix("usage: martlet probe \(verb) "), "\(result.output)")
    // A line fits a terminal that is not narrow.
    for line in result.output.split(separator: "\n") { #expect(line.count <= 140, "\(line)") }
  }
}
