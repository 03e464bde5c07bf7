import Foundation
import Probe
import Synchronization
import TestSupport
import Testing
import VhostUser

/// The program with a defect of choice, beside the tests.
private var brokenBackEnd: String {
  URL(fileURLWithPath: "/proc/self/exe").resolvingSymlinksInPath().deletingLastPathComponent().appendingPathComponent("broken-backend").path
}

/// - Parameter timeout: what has to happen on a loaded machine has this long; what never happens is waited for so long.
private func check(_ type: String, _ defects: [String], only: String? = nil, timeout: String = "15") throws -> CheckReport {
  var words = ["--type", type, "--writes", "--timeout", timeout]
  if let only { words += ["--only", only] }
  let options = try Options.parse(words + ["--", brokenBackEnd, "{socket}", type] + defects, verb: .check)
  let target = try Target(options)
  defer { target.close() }
  return try Check(target, options).run(endurance: .milliseconds(300))
}

/// Which defect each case catches: type, defect, cases that must fail with it.
private let catches: [(String, String, [String])] = [
  ("block", "no-version1", ["features.version1"]), ("block", "features-change", ["features.stable"]),
  ("net", "dependencies", ["features.dependencies"]), ("block", "protocol-dependency", ["protocol.dependencies"]),
  ("block", "protocol-none", ["protocol.none"]), ("block", "protocol-abort", ["protocol.not-offered"]),
  ("block", "queue-count-zero", ["queues.count"]), ("block", "slots-zero", ["memory.slots"]), ("block", "reply-echo", ["reply.need-reply"]),
  ("block", "pieces", ["reply.pieces"]), ("block", "ack-missing", ["ack.success"]), ("block", "ack-always", ["ack.unasked"]),
  ("block", "accept-index", ["ack.index"]), ("block", "accept-wide", ["ack.index-wide"]), ("block", "accept-zero", ["ack.size-zero"]),
  ("block", "accept-huge", ["ack.size-huge"]), ("block", "accept-odd", ["ack.size-odd"]), ("block", "accept-features", ["ack.features"]),
  ("block", "accept-overflow", ["ack.memory-overflow"]), ("block", "accept-unknown", ["request.unknown"]),
  ("block", "config-changes", ["config.stable"]), ("block", "config-part", ["config.part"]), ("block", "config-beyond", ["config.beyond"]),
  ("block", "config-writable", ["config.read-only"]), ("block", "base-zero", ["base.echo", "stop.base"]),
  ("block", "base-index", ["base.echo"]), ("block", "base-packed", ["stop.packed-base"]), ("block", "call-early", ["call.early"]),
  ("block", "reset-owner", ["reset-owner.keeps"]), ("block", "reset-closes", ["reset-device.keeps"]),
  ("block", "reset-runs", ["reset-device.stops"]),
  ("block", "status-lost", ["status.echo"]), ("block", "inflight-small", ["inflight.area"]), ("block", "log-refused", ["log.base"]),
  ("block", "state-endless", ["device-state.save"]), ("block", "channel-refused", ["channel.accepted"]),
  ("block", "stale", ["reconnect.clean"]),
  ("block", "reconnect-dies", ["reconnect.many"]),
  ("block", "split-dead", ["ring.split.request", "ring.split-event-idx.request", "ring.split-indirect.request"]),
  ("block", "packed-dead", ["ring.packed.request", "ring.packed-event-idx.request", "ring.packed-indirect.request"]),
  (
    "block", "wrap",
    [
      "ring.split.wrap", "ring.split-event-idx.wrap", "ring.split-indirect.wrap", "ring.packed.wrap", "ring.packed-event-idx.wrap",
      "ring.packed-indirect.wrap",
    ]
  ),
  (
    "block", "no-call",
    [
      "ring.split.call", "ring.split-event-idx.call", "ring.split-indirect.call", "ring.packed.call", "ring.packed-event-idx.call",
      "ring.packed-indirect.call",
    ]
  ),
  ("block", "split-dead", ["ring.split.no-call", "ring.split-event-idx.no-call", "ring.split-indirect.no-call"]),
  ("block", "packed-dead", ["ring.packed.no-call", "ring.packed-event-idx.no-call", "ring.packed-indirect.no-call"]),
  ("block", "no-indirect", ["ring.split-indirect.request", "layout.indirect-bytes"]),
  ("block", "framing", ["layout.bytes", "layout.odd"]), ("block", "start-skips", ["start.waiting"]),
  ("block", "enable-ignored", ["enable.off"]),
  ("block", "enable-implicit", ["enable.implicit"]), ("block", "stop-runs", ["stop.stops"]), ("block", "stop-late", ["stop.at-rest"]),
  ("block", "resume-loses", ["stop.resume"]),
  ("block", "stop-twice", ["stop.twice"]), ("block", "call-old", ["call.replace"]), ("block", "kick-old", ["kick.replace"]),
  ("block", "kick-spurious", ["kick.spurious"]), ("block", "last-queue", ["queues.last"]), ("block", "regions", ["memory.regions"]),
  ("block", "high", ["memory.high"]), ("block", "replace", ["memory.replace"]), ("block", "replace-running", ["memory.replace-running"]),
  ("block", "add-ignored", ["memory.add-remove"]), ("block", "remove-unknown", ["memory.remove-unknown"]),
  ("block", "log-nothing", ["log.pages"]),
  ("block", "log-everything", ["log.pages"]), ("block", "inflight-clear", ["inflight.clear"]),
  ("block", "inflight-marks", ["inflight.clear"]),
  ("block", "capacity-zero", ["blk.capacity"]), ("block", "size-max-zero", ["blk.size-max"]), ("block", "seg-max-zero", ["blk.seg-max"]),
  ("block", "blk-size-odd", ["blk.blk-size"]), ("block", "queues-zero", ["blk.queues"]), ("block", "wce-alone", ["blk.wce-needs-flush"]),
  ("block", "discard-zero", ["blk.discard-limits"]), ("block", "write-zeroes-zero", ["blk.write-zeroes-limits"]),
  ("block", "read-length", ["blk.read"]), ("block", "read-partial", ["blk.read-fills"]), ("block", "large-fails", ["blk.read-large"]),
  ("block", "last-fails", ["blk.read-last"]), ("block", "segments-fail", ["blk.seg-max-used"]), ("block", "id-garbage", ["blk.id"]),
  ("block", "flush-fails", ["blk.flush"]), ("block", "status-first", ["blk.status-last"]), ("block", "wrap", ["blk.many"]),
  ("block", "unknown-ok", ["blk.unknown"]), ("block", "beyond-ok", ["blk.beyond"]), ("block", "across-ok", ["blk.across-end"]),
  ("block", "wraps-ok", ["blk.wraps"]), ("block", "unaligned-ok", ["blk.unaligned"]), ("block", "discard-flags-ok", ["blk.discard-flags"]),
  ("block", "write-zeroes-flags-ok", ["blk.write-zeroes-flags"]), ("block", "discard-beyond-ok", ["blk.discard-beyond"]),
  ("block", "discard-large-ok", ["blk.discard-large"]), ("block", "no-status", ["blk.no-status"]),
  ("block", "short-header", ["blk.short-header"]),
  ("block", "write-corrupt", ["blk.write", "blk.write-pieces", "blk.survives-reconnect"]),
  ("block", "write-beyond-ok", ["blk.write-beyond"]),
  ("block", "write-zeroes-lost", ["blk.write-zeroes"]), ("block", "write-zeroes-wide", ["blk.write-zeroes"]),
  ("block", "discard-fails", ["blk.discard"]),
  ("block", "reply-flags", ["reply.flags"]), ("block", "features-first", ["order.features-first"]),
  ("block", "config-size", ["config.echo"]),
  ("block", "reorder-number", ["reply.order"]), ("net", "mac-group", ["net.mac"]),
  ("net", "transmit-length", ["net.transmit", "net.transmit-pieces"]),
  ("net", "transmit-abort", ["net.transmit-short", "net.transmit-offload"]), ("net", "receive-uses", ["net.receive-idle"]),
  ("console", "transmit-length", ["console.transmit"]), ("console", "receive-uses", ["console.receive-idle"]),
  ("console", "transmit-abort", ["console.wrong-way"]), ("fs", "fuse-unique", ["fs.init"]), ("fs", "fuse-accepts", ["fs.unknown"]),
  ("fs", "fuse-abort", ["fs.short", "fs.no-room"]), ("rng", "rng-empty", ["rng.fill"]), ("rng", "rng-same", ["rng.different"]),
  ("rng", "rng-abort", ["rng.readable"]),
  ("net", "rarp-refused", ["rarp.accepted"]), ("net", "mtu-refused", ["mtu.accepted"]), ("block", "endian-refused", ["endian.little"]),
  ("block", "iotlb-refused", ["iotlb.update"]),
  ("block", "postcopy-empty", ["postcopy.advise"]), ("block", "postcopy-fails", ["postcopy.end"]),
  ("block", "object-invented", ["shared-object.unknown"]), ("block", "regions-wrong", ["shared-memory.regions"]),
  ("block", "inflight-version", ["inflight.header"]), ("block", "inflight-clear", ["inflight.header"]),
  ("block", "inflight-counter", ["inflight.counters"]), ("block", "inflight-forgets", ["inflight.resubmits"]),
  ("net", "status-odd", ["net.status"]), ("net", "pairs-zero", ["net.pairs"]), ("net", "pairs-many", ["net.pairs"]),
  ("net", "mtu-small", ["net.mtu"]), ("console", "console-ports", ["console.ports"]), ("fs", "tag-empty", ["fs.tag"]),
  ("fs", "fs-queues", ["fs.queues"]),
  ("block", "needs-ack", ["ack.none"]), ("block", "enable-early-lost", ["enable.early"]), ("block", "call-late-lost", ["order.call-last"]),
  ("block", "base-zero-late", ["order.base-last"]), ("block", "queues-one", ["queues.together"]),
  ("block", "framing", ["layout.full", "layout.full-packed"]), ("block", "no-indirect", ["layout.direct-then-indirect"]),
  ("block", "listen-refused", ["postcopy.listen"]), ("block", "log-fd-refused", ["log.fd"]), ("block", "inband-deaf", ["inband.ring"]),
  ("block", "inband-mute", ["inband.ring"]), ("block", "crypto-invented", ["crypto.unknown"]),
  ("block", "crypto-close-ends", ["crypto.close"]), ("gpu", "gpu-refused", ["gpu.socket"]),
  ("block", "state-lost", ["device-state.load"]), ("block", "write-cache-stuck", ["blk.write-cache"]),
  ("block", "inflight-head", ["inflight.batch"]), ("block", "inflight-place", ["inflight.packed-header"]),
  ("block", "inflight-list", ["inflight.packed-free"]), ("block", "inflight-copies", ["inflight.packed-copies"]),
  ("block", "inflight-forgets", ["inflight.packed-resubmits"]), ("block", "iotlb-deaf", ["iotlb.translation"]),
  ("block", "iotlb-stale", ["iotlb.invalidate"]), ("console", "port-queues", ["console.port-queues"]),
  ("console", "port-number", ["console.port-add"]), ("console", "port-twice", ["console.port-add"]),
  ("console", "port-event", ["console.port-messages"]), ("console", "port-abort", ["console.port-odd"]),
  ("console", "port-transmit", ["console.port-transmit"]),
]

/// What one row of `catches` came to when it was not what it says.
private func problem(_ row: (String, String, [String])) -> String? {
  let (type, defect, cases) = row
  do {
    let report = try check(type, [defect], only: cases.joined(separator: ","), timeout: "1.5")
    let failed = Set(report.failures.map(\.id))
    let missed = cases.filter { !failed.contains($0) }
    return missed.isEmpty
      ? nil : "\(defect) was not caught by \(missed): \(report.results.filter { missed.contains($0.id) }.map(\.verdict))"
  } catch {
    return "\(defect): \(error)"
  }
}

@Suite struct CheckTests {
  @Test(arguments: ["block", "net", "console", "fs", "rng", "gpu"]) func aGoodBackEndPassesEveryCase(type: String) throws {
    let report = try check(type, [])
    for failure in report.failures { Issue.record("\(failure.id): \(failure.verdict.reason) \(failure.trace)") }
    #expect(report.results.count == Check.ids.count)
    #expect(report.results.count { $0.verdict == .pass } > (type == "gpu" ? 30 : 40))
  }

  @Test func aReadOnlyDiskIsCheckedAsSuch() throws {
    let good = try check("block", ["read-only"], only: "blk.read-only")
    #expect(good.results.first?.verdict == .pass)
    let bad = try check("block", ["read-only", "read-only-ok"], only: "blk.read-only")
    #expect(bad.failures.map(\.id) == ["blk.read-only"])
  }

  /// Most of their time goes into waiting for what never comes, so several go side by side.
  @Test func everyDefectIsCaught() {
    let next = Mutex(0)
    let problems = Mutex<[String]>([])
    let group = DispatchGroup()
    for _ in 0..<6 {
      group.enter()
      Thread.detachNewThread {
        while let row = next.withLock({ next in
          defer { next += 1 }
          return next < catches.count ? catches[next] : nil
        }) {
          // What the machine had no time for is tried again, as pieces that arrive together on a busy one; a defect that is not
          // caught stays so.
          var text = problem(row)
          for _ in 0..<4 where text != nil { text = problem(row) }
          if let text { problems.withLock { $0.append(text) } }
        }
        group.leave()
      }
    }
    group.wait()
    for text in problems.withLock({ $0 }) { Issue.record("\(text)") }
  }

  @Test func everyCaseHasADefectThatItCatches() {
    let caught = Set(catches.flatMap(\.2) + ["blk.read-only"])
    let missing = Check.ids.filter { !caught.contains($0) }
    #expect(missing.isEmpty, "\(missing)")
  }

  /// What passes a recorder between `check` and the back end.
  @Test func everyMessageThereIsIsSaid() throws {
    var said: Set<UInt32> = []
    for type in ["block", "net", "gpu"] {
      let place = NSTemporaryDirectory() + "probe-messages-\(UUID().uuidString.prefix(8))"
      try FileManager.default.createDirectory(atPath: place, withIntermediateDirectories: true)
      defer { try? FileManager.default.removeItem(atPath: place) }
      let recorder = try RunningProgram(
        BuiltPrograms.path("martlet-probe"),
        ["record", "--listen", place + "/r", "--output", place + "/talk", "--log", "/dev/null", "--", brokenBackEnd, "{socket}", type])
      let patience = Date().addingTimeInterval(30)
      while !FileManager.default.fileExists(atPath: place + "/r"), Date() < patience { usleep(10_000) }
      // Which rings there are makes no difference to what is said about them.
      let words = ["check", "--type", type, "--writes", "--timeout", "15", "--skip", "ring.", "--socket", place + "/r"]
      let result = try RunningProgram(BuiltPrograms.path("martlet-probe"), words).wait(seconds: 120)
      #expect(result.code == 0, "\(result.output)")
      recorder.signal(SIGTERM)
      #expect(recorder.wait(seconds: 30).code == 0)
      for line in try String(contentsOfFile: place + "/talk", encoding: .utf8).split(separator: "\n") {
        let words = line.split(separator: " ")
        guard words.count > 2, words[1] == "f", let number = UInt32(words[2].prefix(8), radix: 16) else { continue }
        said.insert(number.byteSwapped)
      }
    }
    let missing = FrontEndRequest.allCases.filter { !said.contains($0.rawValue) }.map(\.name)
    #expect(missing.isEmpty, "\(missing)")
  }

  @Test func everyFormNamesEveryCase() throws {
    let report = try check("block", ["id-garbage"], only: "blk.id,blk.read")
    let tap = report.written(as: .tap, isVerbose: false)
    #expect(tap.hasPrefix("TAP version 13\n1..\(report.results.count)\n"))
    #expect(tap.contains("not ok") && tap.contains("blk.id"))
    let junit = report.written(as: .junit, isVerbose: false)
    #expect(junit.contains("failures=\"1\""))
    #expect(try XMLDocumentCheck.isWellFormed(junit))
    let json = try JSONSerialization.jsonObject(with: Data(report.written(as: .json, isVerbose: false).utf8)) as? [String: Any]
    #expect((json?["cases"] as? [Any])?.count == report.results.count)
  }
}

/// Tags that open must close in order: enough to see broken escaping.
enum XMLDocumentCheck {
  static func isWellFormed(_ text: String) throws -> Bool {
    var open: [Substring] = []
    var rest = text[...]
    while let start = rest.firstIndex(of: "<") {
      guard let end = rest[start...].firstIndex(of: ">") else { return false }
      let tag = rest[rest.index(after: start)..<end]
      rest = rest[rest.index(after: end)...]
      if tag.hasPrefix("?") || tag.hasSuffix("/") { continue }
      if tag.hasPrefix("/") {
        guard open.popLast() == tag.dropFirst() else { return false }
      } else {
        open.append(tag.prefix { $0 != " " })
      }
    }
    return open.isEmpty
  }
}
