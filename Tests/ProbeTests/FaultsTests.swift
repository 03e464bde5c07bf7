import Foundation
import Probe
import TestSupport
import Testing

private var brokenBackEnd: String {
  URL(fileURLWithPath: "/proc/self/exe").resolvingSymlinksInPath().deletingLastPathComponent().appendingPathComponent("broken-backend").path
}

private func attack(_ type: String, _ defects: [String], only: String, exact: Bool = false) throws -> [FaultResult] {
  let options = try Options.parse(
    ["--type", type, "--timeout", "0.7", "--only", only] + (exact ? ["--exact"] : []) + ["--", brokenBackEnd, "{socket}", type] + defects,
    verb: .faults)
  let target = try Target(options)
  defer { target.close() }
  return try Faults(target, options).run()
}

@Suite(.serialized) struct FaultsTests {
  @Test(arguments: ["message.", "place.", "ring.", "repeat.,leave.", "header.,order."])
  func aGoodBackEndStandsUpToEverything(family: String) throws {
    let results = try attack("block", [], only: family)
    #expect(results.count > 10)
    for result in results where result.verdict.isFinding { Issue.record("\(result.id): \(result.verdict) \(result.trace)") }
  }

  @Test func malformedMessagesAreSeenToCrash() throws {
    let results = try attack("block", ["abort-malformed"], only: "message.set_vring_num,message.get_features.huge")
    for form in ["none", "short", "long", "full", "huge", "ones", "reply", "version", "reserved", "descriptors", "cut"] {
      guard let result = results.first(where: { $0.id == "message.set_vring_num.\(form)" }) else {
        Issue.record("\(form) is missing")
        continue
      }
      guard case .crashed = result.verdict else {
        Issue.record("\(form): \(result.verdict)")
        continue
      }
    }
  }

  @Test func aBackEndThatHangsIsSeen() throws {
    for result in try attack("block", ["hang-malformed"], only: "message.set_vring_addr.short,ring.loop,memory.wraps") {
      guard case .hung = result.verdict else {
        Issue.record("\(result.id): \(result.verdict)")
        continue
      }
    }
  }

  @Test func aBackEndThatLeaksIsSeen() throws {
    for result in try attack("block", ["leak-malformed"], only: "message.set_vring_addr.short,header.ones") {
      guard case .leaked = result.verdict else {
        Issue.record("\(result.id): \(result.verdict)")
        continue
      }
    }
    for result in try attack("block", ["leak-calls"], only: "repeat.call") {
      guard case .leaked = result.verdict else {
        Issue.record("\(result.id): \(result.verdict)")
        continue
      }
    }
  }

  @Test(arguments: [
    "ring.head", "ring.index-jump", "ring.next", "ring.self", "ring.loop", "ring.data-outside", "ring.indirect-nested", "ring.packed-loop",
  ])
  func aRingThatIsNotCheckedIsSeenToCrash(id: String) throws {
    let results = try attack("block", ["abort-malformed"], only: id)
    #expect(!results.isEmpty)
    for result in results {
      guard case .crashed = result.verdict else {
        Issue.record("\(result.id): \(result.verdict)")
        continue
      }
    }
  }

  /// As `EveryAttackTests`, with back ends that stop, or lose descriptors. In a short run a choice of attacks, since hanging takes its
  /// time-out each; with MARTLET_TEST_ALL set, all of them.
  @Test(arguments: ["fragile-hang", "fragile-leak"])
  func harmOfOtherKindsIsSeen(defect: String) throws {
    let isWhole = ProcessInfo.processInfo.environment["MARTLET_TEST_ALL"] != nil
    let ordinary: Set = ["repeat.sessions"]
    let chosen = Faults.ids.filter { !ordinary.contains($0) }.enumerated().filter {
      isWhole || $0.offset % ($0.element.hasPrefix("message.") ? 60 : 9) == 0
    }.map(\.element)
    let results = try attack("block", [defect], only: chosen.joined(separator: ","), exact: true)
    #expect(results.map(\.id) == chosen)
    let harmless = results.filter { !$0.verdict.isFinding }.map { "\($0.id): \($0.verdict.word) \($0.verdict.reason)" }
    #expect(harmless.isEmpty, "\(harmless)")
  }

  @Test func aBackEndThatTiresOfSessionsIsSeen() throws {
    let results = try attack("block", ["tires"], only: "repeat.sessions", exact: true)
    #expect(results.map(\.verdict.word) == ["CRASHED"])
  }

  @Test func memoryThatIsCutOffEndsWhoDoesNotCheckSeals() throws {
    let results = try attack("block", [], only: "memory.truncated")
    guard case .crashed? = results.first?.verdict else {
      Issue.record("\(results)")
      return
    }
  }
}

/// Against a back end that dies of anything but the ordinary.
@Suite struct EveryAttackTests {
  private static let parts = 4

  /// Every attack there is, by its id, has to be seen to do harm.
  @Test(arguments: 0..<parts) func isSeenToDoHarm(part: Int) throws {
    // Ordinary in everything but their number: these have a defect of their own (`aBackEndThatTiresOfSessionsIsSeen`).
    let ordinary: Set = ["repeat.sessions"]
    let chosen = Faults.ids.enumerated().filter { $0.offset % Self.parts == part }.map(\.element).filter { !ordinary.contains($0) }
    let results = try attack("block", ["fragile"], only: chosen.joined(separator: ","), exact: true)
    let harmful = Set(results.filter(\.verdict.isFinding).map(\.id))
    let harmless = chosen.filter { !harmful.contains($0) }
    #expect(harmless.isEmpty, "\(harmless)")
  }
}
