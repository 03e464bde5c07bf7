import Foundation
import HostSystem
import Probe
import TestSupport
import Testing

private let programs = URL(fileURLWithPath: "/proc/self/exe").resolvingSymlinksInPath().deletingLastPathComponent().path

/// Somebody who listens and is no back end.
private final class Stranger: Sendable {
  enum Manner: String, CaseIterable, Sendable, CustomTestStringConvertible {
    case hangsUp, saysNothing, speaksAnotherLanguage
    var testDescription: String { rawValue }
  }

  let path: String

  init(_ manner: Manner) throws {
    let path = NSTemporaryDirectory() + "probe-stranger-\(UUID().uuidString.prefix(8))"
    self.path = path
    let listener = try UnixSocket.listen(at: path).release()
    Thread.detachNewThread {
      let own = OwnedFD(owning: listener)
      var held: [CInt] = []
      while let socket = try? UnixSocket.accept(own) {
        switch manner {
        case .hangsUp: break
        case .saysNothing: held.append(socket.release())
        case .speaksAnotherLanguage:
          _ = UnixSocket.send(socket, Array("HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n".utf8))
          held.append(socket.release())
        }
      }
    }
  }
}

@Suite("Probe: bad input", .serialized)
struct BadInputTests {
  private static let recording =
    "martlet-recording 1\nconnection 1\n1 f 010000000100000000000000\n2 b 01000000050000000800000000000000000000ff\n"

  /// Every verb that needs a back end at once, with what else it needs.
  private static func verbs(_ place: String) throws -> [[String]] {
    try recording.write(toFile: place + ".talk", atomically: true, encoding: .utf8)
    return [
      ["info"], ["check"], ["faults"], ["verify", "--runtime", "1"], ["bench", "--runtime", "0.2"],
      ["bench", "--type", "net", "--mode", "send", "--runtime", "0.2"], ["bridge", "--nbd", place + ".nbd"],
      ["bridge", "--pcap-out", place + ".pcap"],
    ]
  }

  private static func run(_ words: [String]) -> Int32 { ProbeProgram.run(["martlet-probe"] + words) }

  @Test("Whoever listens and is no back end ends every verb with 2", arguments: Stranger.Manner.allCases)
  private func strangers(manner: Stranger.Manner) throws {
    let stranger = try Stranger(manner)
    for verb in try Self.verbs(stranger.path) {
      #expect(Self.run(verb + ["--timeout", "0.2", "--socket", stranger.path]) == 2, "\(verb)")
    }
    // A recording has something to compare with: that is a finding.
    #expect(Self.run(["replay", "--timeout", "0.2", "--input", stranger.path + ".talk", "--socket", stranger.path]) == 1)
  }

  @Test("No socket, no program, and a program that ends at once end every verb with 2")
  func nobody() throws {
    let place = NSTemporaryDirectory() + "probe-nobody-\(UUID().uuidString.prefix(8))"
    for verb in try Self.verbs(place) + [["replay", "--input", place + ".talk"]] {
      #expect(Self.run(verb + ["--socket", place]) == 2, "\(verb)")
      #expect(Self.run(verb + ["--", "/nowhere/program", "{socket}"]) == 2, "\(verb)")
      #expect(Self.run(verb + ["--", "/bin/false", "{socket}"]) == 2, "\(verb)")
      #expect(Self.run(verb) == 2, "\(verb) without a back end")
      #expect(Self.run(verb + ["--socket", place, "--fd", "3"]) == 2, "\(verb) with two")
      #expect(Self.run(verb + ["--nonsense"]) == 2, "\(verb)")
    }
    #expect(Self.run([]) == 2)
    #expect(Self.run(["benhc"]) == 2)
    #expect(Self.run(["bench", "--help"]) == 0)
  }

  @Test(
    "A disk that is too small is named",
    arguments: [["--bs", "16m"], ["--offset", "1g"], ["--size", "9m"], ["--offset", "4m", "--size", "5m"]])
  func small(words: [String]) {
    #expect(
      Self.run(["bench", "--rw", "read", "--runtime", "0.1"] + words + ["--", programs + "/broken-backend", "{socket}", "block"]) == 2)
  }

  @Test("A disk of one sector is no finding, and too small for what needs more")
  func oneSector() throws {
    let place = NSTemporaryDirectory() + "probe-sector-\(UUID().uuidString.prefix(8))"
    #expect(FileManager.default.createFile(atPath: place, contents: Data(count: 512)))
    defer { unlink(place) }
    let backEnd = ["--", programs + "/martlet-block", "--socket-path", "{socket}", "--blk-file", place]
    let only = "blk.,memory.add-remove"
    #expect(Self.run(["check", "--writes", "--timeout", "30", "--only", only, "--output", "/dev/null"] + backEnd) == 0)
    for words in [["bench", "--runtime", "0.1"], ["verify", "--runtime", "0.1"]] { #expect(Self.run(words + backEnd) == 2, "\(words)") }
  }

  @Test("A back end of another type than the verb needs is refused, and a --type that does not fit")
  func otherDevices() {
    for (words, type) in [
      (["verify", "--runtime", "1"], "console"), (["verify", "--runtime", "1"], "net"), (["bench", "--runtime", "0.2"], "console"),
      (["bench", "--mode", "send", "--runtime", "0.2"], "block"), (["bridge", "--nbd", "/tmp/x"], "console"),
      (["bridge", "--pcap-out", "/dev/null", "--runtime", "0.1"], "block"), (["verify", "--runtime", "1", "--type", "net"], "block"),
      (["check", "--type", "nonsense"], "block"), (["bench", "--type", "console"], "console"),
    ] {
      #expect(Self.run(words + ["--", programs + "/broken-backend", "{socket}", type]) == 2, "\(words) \(type)")
    }
  }

  @Test("Processors that are not there are refused", arguments: ["--pin", "--pin-backend"])
  func processors(option: String) {
    let words = ["bench", "--runtime", "0.1", "--no-syscalls", "--", programs + "/broken-backend", "{socket}", "block"]
    #expect(Self.run([words[0], option, "1023"] + words[1...]) == 2)
  }

  @Test("A result that cannot be saved is told before the run, not after it")
  func unwritable() {
    let begin = Date()
    for words in [
      ["check", "--output"], ["faults", "--output"], ["bench", "--runtime", "60", "--output"], ["bench", "--runtime", "60", "--html"],
    ] {
      #expect(Self.run(words + ["/nowhere/x", "--", programs + "/broken-backend", "{socket}", "block"]) == 2, "\(words)")
    }
    #expect(Date().timeIntervalSince(begin) < 30)
  }

  private static func awaitsInterruption(_ process: Int32) -> Bool {
    let children = try? String(contentsOfFile: "/proc/\(process)/task/\(process)/children", encoding: .utf8)
    let status = try? String(contentsOfFile: "/proc/\(process)/status", encoding: .utf8)
    let blocked = status?.split(separator: "\n").first { $0.hasPrefix("SigBlk:") }?.split(separator: "\t").last.flatMap {
      UInt64($0, radix: 16)
    }
    return children?.isEmpty == false && blocked.map { $0 & 2 != 0 } == true
  }

  @Test(
    "Ctrl-C ends with the results so far, and leaves nothing behind",
    arguments: [
      ["bench", "--runtime", "60", "--no-syscalls"], ["verify", "--runtime", "60", "--trouble", "cut"], ["check"], ["faults"],
      ["bench", "--type", "net", "--mode", "send", "--runtime", "60"],
    ])
  func interrupted(words: [String]) throws {
    let type = words.contains("net") ? "net" : "block"
    let process = Process()
    let output = Pipe()
    process.executableURL = URL(fileURLWithPath: programs + "/martlet-probe")
    process.arguments = words + ["--", programs + "/broken-backend", "{socket}", type]
    process.standardOutput = output
    process.standardError = FileHandle.nullDevice
    process.standardInput = FileHandle.nullDevice
    try process.run()
    // At work: it has a child, and takes the interruption itself.
    let patience = Date().addingTimeInterval(60)
    while !Self.awaitsInterruption(process.processIdentifier), Date() < patience { usleep(20_000) }
    usleep(600_000)
    let children =
      (try? String(contentsOfFile: "/proc/\(process.processIdentifier)/task/\(process.processIdentifier)/children", encoding: .utf8)) ?? ""
    let begin = Date()
    process.interrupt()
    let text = String(decoding: output.fileHandleForReading.readDataToEndOfFile(), as: UTF8.self)
    process.waitUntilExit()
    #expect(Date().timeIntervalSince(begin) < 30)
    #expect(process.terminationReason == .exit)
    #expect(process.terminationStatus == 0 || process.terminationStatus == 1)
    #expect(text.lowercased().contains("interrupted"), "\(text)")
    for child in children.split(separator: " ") { #expect(kill(Int32(child) ?? 0, 0) != 0, "process \(child) is left") }
  }
}
