import Foundation
import Probe
import TestSupport
import Testing

private var brokenBackEnd: String {
  URL(fileURLWithPath: "/proc/self/exe").resolvingSymlinksInPath().deletingLastPathComponent().appendingPathComponent("broken-backend").path
}

/// - Parameter timeout: a good back end on a loaded machine gets more of it than one that is known to hang.
private func attack(_ type: String, _ defects: [String], only: String, exact: Bool = false, timeout: String = "0.7") throws -> [FaultResult]
{
  let options = try Options.parse(
    ["--type", type, "--timeout", timeout, "--only", only] + (exact ? ["--exact"] : []) + ["--", brokenBackEnd, "{socket}", type] + defects,
    verb: .faults)
  let target = try Target(options)
  defer { target.close() }
  return try Faults(target, options).run()
}

@Suite(.serialized) struct FaultsTests {
  @Test(arguments: ["message.", "place.", "ring.", "repeat.,leave.", "header.,order."])
  func aGoodBackEndStandsUpToEverything(family: String) throws {
    let results = try attack("block", [], only: family, timeout: "10")
    #expect(results.count > 10)
    for result in results where result.verdict.isFinding { Issue.record("\(result.id): \(result.verdict) \(result.trace)") }
  }

  /// Our own programs, behind their walls.
  @Test(arguments: [
    ["block", "martlet-block", "--blk-null=1048576", "--num-queues=2"], ["console", "martlet-console", "--null"],
    ["rng", "martlet-template"],
    ["net", "martlet-net", "--tap=t0"],
  ])
  func ourBackEndsStandUpToEverything(words: [String]) throws {
    let program = DeviceProcess.programs.appendingPathComponent(words[1]).path
    var command = [program, "--socket-path={socket}", "--sandbox=on"] + words.dropFirst(2)
    if words[0] == "net" {
      guard geteuid() == 0, access("/dev/net/tun", R_OK | W_OK) == 0 else { return }
      command = ["/usr/bin/unshare", "-n", "/bin/sh", "-c", "ip tuntap add dev t0 mode tap && exec \"$@\"", "sh"] + command
    }
    let isWhole = ProcessInfo.processInfo.environment["MARTLET_TEST_ALL"] != nil
    let chosen = Faults.ids.enumerated().filter { isWhole || !$0.element.hasPrefix("message.") || $0.offset % 5 == 0 }.map(\.element)
    let options = try Options.parse(
      ["--type", words[0], "--timeout", "10", "--only", chosen.joined(separator: ","), "--exact", "--"] + command, verb: .faults)
    let target = try Target(options)
    defer { target.close() }
    let results = try Faults(target, options).run()
    // Attacks on what a device does not have are left out.
    #expect(results.count > 200)
    for result in results where result.verdict.isFinding { Issue.record("\(result.id): \(result.verdict) \(result.trace)") }
  }

  @Test func malformedMessagesAreSeenToCrash() throws {
    let results = try attack("block", ["abort-malformed"], only: "message.set_vring_num,message.get_features.huge", timeout: "10")
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
    for result in try attack("block", ["leak-malformed"], only: "message.set_vring_addr.short,header.ones", timeout: "5") {
      guard case .leaked = result.verdict else {
        Issue.record("\(result.id): \(result.verdict)")
        continue
      }
    }
    for result in try attack("block", ["leak-calls"], only: "repeat.call", timeout: "5") {
      guard case .leaked = result.verdict else {
        Issue.record("\(result.id): \(result.verdict)")
        continue
      }
    }
  }

  /// It is made again to be sure, and is not held against the next one.
  @Test func oneDescriptorLostIsALeakOfTheAttackThatDidIt() throws {
    let ids = "message.set_vring_addr.short,message.get_features.none,message.set_vring_num.short,message.get_features.early"
    let results = try attack("block", ["leak-one"], only: ids, exact: true, timeout: "5")
    let leaks = results.filter { $0.verdict.word == "LEAKED" }.map(\.id)
    #expect(Set(leaks) == ["message.set_vring_addr.short", "message.set_vring_num.short"], "\(results.map { ($0.id, $0.verdict) })")
  }

  @Test(arguments: [
    "ring.head", "ring.index-jump", "ring.next", "ring.self", "ring.loop", "ring.data-outside", "ring.indirect-nested", "ring.packed-loop",
  ])
  func aRingThatIsNotCheckedIsSeenToCrash(id: String) throws {
    let results = try attack("block", ["abort-malformed"], only: id, timeout: "10")
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
    let results = try attack("block", ["tires"], only: "repeat.sessions", exact: true, timeout: "10")
    #expect(results.map(\.verdict.word) == ["CRASHED"])
  }

  @Test func everyFormNamesEveryAttackAndItsVerdict() throws {
    let words = ["--type", "block", "--timeout", "10", "--only", "message.set_vring_num.short,message.get_features.none"]
    let options = try Options.parse(words + ["--", brokenBackEnd, "{socket}", "block", "abort-malformed"], verb: .faults)
    let target = try Target(options)
    defer { target.close() }
    let faults = try Faults(target, options)
    let results = try faults.run()
    #expect(results.count == 2)
    let text = faults.written(results, as: .text, isVerbose: false)
    #expect(text.contains("CRASHED   message.set_vring_num.short") && text.contains("was killed by signal 6") && text.contains("1 crashed"))
    #expect(faults.written(results, as: .tap, isVerbose: false).hasPrefix("TAP version 13\n1..2\n"))
    let junit = faults.written(results, as: .junit, isVerbose: false)
    #expect(junit.contains("failures=\"1\"") && junit.contains("message.get_features.none"))
    #expect(try XMLDocumentCheck.isWellFormed(junit))
    let json = try JSONSerialization.jsonObject(with: Data(faults.written(results, as: .json, isVerbose: false).utf8)) as? [String: Any]
    #expect((json?["cases"] as? [Any])?.count == 2)
  }

  @Test func memoryThatIsCutOffEndsWhoDoesNotCheckSeals() throws {
    let results = try attack("block", [], only: "memory.truncated", timeout: "10")
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
