import Foundation
import TestSupport
import Testing

/// Front ends that harm themselves to harm the device: cut memory, a call eventfd that is blocking and full.
@Suite(.enabled(if: BuiltPrograms.exists("martlet-probe") && BuiltPrograms.exists("martlet-block"), "The programs are not built."))
struct HostileFrontEndTests {
  @Test(arguments: [["martlet-block", "--blk-file="]])
  func neitherCutMemoryNorAFullCallEndsOrHangsTheDevice(words: [String]) throws {
    let directory = NSTemporaryDirectory() + "martlet-hostile-\(UUID().uuidString)"
    try FileManager.default.createDirectory(atPath: directory, withIntermediateDirectories: true)
    defer { try? FileManager.default.removeItem(atPath: directory) }
    try Data(count: 1 << 20).write(to: URL(fileURLWithPath: directory + "/image"))
    let command =
      [BuiltPrograms.path(words[0])] + words.dropFirst().map { $0.hasSuffix("=") ? $0 + directory + "/image" : $0 } + [
        "--socket-path={socket}"
      ]
    let result = try RunningProgram(
      BuiltPrograms.path("martlet-probe"), ["faults", "--only", "memory.truncated,flood.call-full", "--timeout", "3", "--"] + command
    ).wait(seconds: 60)
    #expect(result.code == 0, "\(result.output)\(result.errors)")
  }
}
