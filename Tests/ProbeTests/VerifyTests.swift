import Foundation
import Probe
import TestSupport
import Testing

private let programs = URL(fileURLWithPath: "/proc/self/exe").resolvingSymlinksInPath().deletingLastPathComponent().path

/// - Parameter timeout: what comes late on a loaded machine is no finding; what never comes is waited for so long.
private func verify(
  _ command: [String], seconds: Double, timeout: String = "15", _ change: (inout Verifier.Plan) -> Void = { _ in }
) throws -> VerifyResult {
  let options = try Options.parse(["--timeout", timeout, "--"] + command, verb: .verify)
  let target = try Target(options)
  defer { target.close() }
  var plan = Verifier.Plan()
  plan.byteCount = 4 << 20
  plan.duration = .nanoseconds(Int64(seconds * 1e9))
  plan.interval = .milliseconds(100)
  plan.kills = false
  plan.stops = false
  change(&plan)
  return try Verifier(target, plan).run { _ in false }
}

private func broken(
  _ defects: [String], seconds: Double = 0.6, timeout: String = "15", _ change: (inout Verifier.Plan) -> Void = { _ in }
) throws -> VerifyResult {
  try verify([programs + "/broken-backend", "{socket}", "block"] + defects, seconds: seconds, timeout: timeout, change)
}

@Suite(.serialized) struct VerifyTests {
  @Test(arguments: [true, false]) func aGoodBackEndKeepsItsPromiseAcrossCuts(inflight: Bool) throws {
    let result = try broken([]) { $0.mayUseInflight = inflight }
    #expect(result.findingCount == 0, "\(result)")
    #expect(result.usesInflight == inflight)
    #expect(result.cuts > 0 && result.writes > 100 && result.reads > 100)
  }

  @Test(arguments: [true, false]) func aDiskWithAFileKeepsItAcrossKillsAndStops(inflight: Bool) throws {
    let path = NSTemporaryDirectory() + "probe-verify-\(UUID().uuidString).raw"
    #expect(FileManager.default.createFile(atPath: path, contents: Data(count: 4 << 20)))
    defer { try? FileManager.default.removeItem(atPath: path) }
    let result = try verify([programs + "/martlet-block", "--socket-path", "{socket}", "--blk-file", path], seconds: 2) {
      $0.kills = true
      $0.stops = true
      $0.mayUseInflight = inflight
    }
    #expect(result.findingCount == 0, "\(result)")
    #expect(result.kills + result.stops + result.cuts > 2 && result.writes > 100)
  }

  @Test func whatADefectDoesIsCalledByItsName() throws {
    let lost = try broken(["write-lost"])
    #expect(!lost.lost.isEmpty || !lost.torn.isEmpty, "\(lost)")
    #expect(!(try broken(["write-torn"])).torn.isEmpty)
    #expect(!(try broken(["write-shifted"])).misplaced.isEmpty)
    // It happens at the fiftieth request of a connection, which on a busy machine may be cut before: then with longer ones.
    let twice = try (1...10).contains { round in
      try !broken(["answers-twice"], seconds: 0.6 * Double(round)) { $0.interval = .milliseconds(100 * round) }.repeated.isEmpty
    }
    #expect(twice)
    #expect(!(try broken(["read-fails"])).failed.isEmpty)
    let stuck = try broken(["wrap"], timeout: "0.7") { $0.cuts = false }
    #expect(!stuck.missing.isEmpty, "\(stuck)")
    let dead = try broken(["dies-early"], timeout: "5") { $0.cuts = false }
    #expect(dead.failed.contains { $0.contains("nobody had killed it") }, "\(dead)")
  }

  @Test func aDiskInMemoryLosesItsContentWhenItIsKilled() throws {
    let result = try broken([], seconds: 1.5) {
      $0.kills = true
      $0.cuts = false
    }
    #expect(!result.lost.isEmpty || !result.torn.isEmpty, "\(result)")
  }

  @Test func findingsEndWithCodeOneAndAreTold() throws {
    let command = ["verify", "--runtime", "0.5", "--trouble", "none", "--json", "--", programs + "/broken-backend", "{socket}", "block"]
    #expect(ProbeProgram.run(["martlet-probe"] + command) == 0)
    #expect(ProbeProgram.run(["martlet-probe"] + command + ["write-shifted"]) == 1)
  }
}
