import Foundation
import TestSupport
import Testing

/// What `info` makes of a back end, in words and as JSON.
@Suite("Probe: info")
struct InfoTests {
  struct Offer: Sendable, CustomTestStringConvertible {
    var type = "block"
    var lacks: [String] = []
    /// Martlet, QEMU, Cloud Hypervisor.
    var works: [Bool]
    /// Parts of remarks, by front end.
    var remarks: [[String]]
    var testDescription: String { "\(type) \(lacks)" }
  }

  private static let legacy = "for drivers of legacy devices only"
  private static let noLog = "no LOG_SHMFD with LOG_ALL"

  private static let offers: [Offer] = [
    Offer(works: [true, true, true], remarks: [[], [], []]),
    Offer(lacks: ["no-version1"], works: [false, true, false], remarks: [["needs VERSION_1"], [legacy], ["needs VERSION_1"]]),
    Offer(
      type: "fs", lacks: ["no-version1"], works: [false, false, false],
      remarks: [["needs VERSION_1"], ["needs VERSION_1"], ["needs VERSION_1"]]),
    Offer(
      lacks: ["no-config", "no-platform"], works: [false, false, false],
      remarks: [["needs CONFIG for a block"], ["needs CONFIG for a block"], ["needs CONFIG for a block"]]),
    Offer(
      lacks: ["config-short"], works: [false, false, false], remarks: [["needs 60 bytes"], ["needs 60 bytes"], ["needs 60 bytes"]]),
    Offer(
      type: "vsock", lacks: ["config-refused"], works: [false, false, false],
      remarks: [["configuration space of a vsock"], ["configuration space of a vsock"], ["configuration space of a vsock"]]),
    Offer(
      lacks: ["no-ack"], works: [true, false, true], remarks: [["set-up errors show late"], ["with ACCESS_PLATFORM"], ["no REPLY_ACK"]]),
    Offer(
      lacks: ["no-ack", "no-platform"], works: [true, true, true], remarks: [["set-up errors show late"], [], ["no REPLY_ACK"]]),
    Offer(
      lacks: ["no-mq", "no-slots", "no-inflight", "no-reset"], works: [true, true, true],
      remarks: [
        ["requests in flight are lost", "a guest's reset only stops the rings"],
        ["say num-queues=1", "a reconnect may lose requests", "at most 8 memory regions"],
        ["one queue only", "a reconnect loses requests", "the whole table again"],
      ]),
    Offer(
      lacks: ["no-protocol", "no-platform"], works: [false, false, false],
      remarks: [["needs CONFIG"], ["needs CONFIG", noLog], ["needs PROTOCOL_FEATURES", "needs CONFIG", noLog]]),
    Offer(lacks: ["no-log", "no-state"], works: [true, true, true], remarks: [[], [noLog], [noLog, "not in a snapshot"]]),
    Offer(
      lacks: ["inflight-refused"], works: [false, false, false],
      remarks: [["needs the inflight area"], ["needs the inflight area"], ["needs the inflight area"]]),
    Offer(
      type: "net", lacks: ["inflight-refused"], works: [false, true, false],
      remarks: [["needs the inflight area"], [], ["needs the inflight area"]]),
    Offer(type: "net", lacks: ["no-config", "no-platform"], works: [true, true, true], remarks: [[], [], []]),
    Offer(type: "net", lacks: ["no-mq"], works: [true, true, true], remarks: [[], ["one pair of queues"], []]),
    Offer(type: "net", lacks: ["config-refused"], works: [true, true, false], remarks: [[], [], ["of a card that offers CONFIG"]]),
    Offer(
      type: "net", lacks: ["queue-count-one"], works: [true, true, false],
      remarks: [[], ["one pair of queues"], ["needs 2 queues, not pairs"]]),
    Offer(
      type: "fs", lacks: ["queue-count-one", "no-state"], works: [false, true, false],
      remarks: [["needs 2 queues"], ["no DEVICE_STATE: no migration"], ["needs 2 queues"]]),
    Offer(
      type: "console", works: [true, true, true],
      remarks: [
        [], ["vhost-user-test-device (QEMU 10.2 on) with virtio-id=3"], ["--generic-vhost-user (version 52 on) with device_type=3"],
      ]),
    Offer(type: "rng", works: [true, true, true], remarks: [[], [], ["--generic-vhost-user"]]),
    Offer(type: "gpu", works: [false, true, false], remarks: [["GPU_SET_SOCKET"], [], ["GPU_SET_SOCKET"]]),
    Offer(
      type: "scsi", lacks: ["no-config"], works: [false, true, false],
      remarks: [["needs CONFIG for a scsi"], [], ["needs CONFIG for a scsi"]]),
    Offer(type: "crypto", works: [false, true, false], remarks: [["CREATE_CRYPTO_SESSION"], [], ["CREATE_CRYPTO_SESSION"]]),
    Offer(type: "crypto", lacks: ["no-crypto"], works: [true, false, true], remarks: [[], ["needs CRYPTO_SESSION"], []]),
  ]

  private static func info(_ offer: Offer, _ extra: [String]) throws -> ProgramResult {
    let words = ["info", "--type", offer.type == "block" ? "blk" : offer.type] + extra
    return try RunningProgram(
      BuiltPrograms.path("martlet-probe"), words + ["--", BuiltPrograms.path("broken-backend"), "{socket}", offer.type] + offer.lacks
    ).wait(seconds: 60)
  }

  @Test("What works with which front end, and what would not, follows from what is offered", arguments: offers)
  func judgement(offer: Offer) throws {
    let result = try Self.info(offer, ["--json"])
    #expect(result.code == 0 && result.errors.isEmpty, "\(result.errors)")
    let json = try #require(try JSONSerialization.jsonObject(with: Data(result.output.utf8)) as? [String: Any])
    let fronts = try #require(json["front_ends"] as? [[String: Any]])
    #expect(fronts.map { $0["name"] as? String } == ["Martlet", "QEMU", "Cloud Hypervisor"])
    #expect(fronts.map { $0["works"] as? Bool } == offer.works)
    let words = try Self.info(offer, []).output
    for (front, parts) in zip(fronts, offer.remarks) {
      let remarks = front["remarks"] as? [String] ?? []
      for part in parts { #expect(remarks.contains { $0.contains(part) }, "\(part) is not in \(remarks)") }
      if parts.isEmpty, offer.lacks.isEmpty { #expect(remarks.isEmpty, "\(offer.type): \(remarks)") }
      // The same in words: the verdict behind the name, then the remarks.
      let name = (front["name"] as? String) ?? ""
      let line = words.split(separator: "\n").first { $0.hasPrefix("  \(name) ") }
      #expect(line?.hasSuffix(front["works"] as? Bool == true ? " works" : " does not work") == true, "\(words)")
      for remark in remarks { #expect(words.contains("- " + remark), "\(words)") }
    }
  }

  @Test("Device, features, queues, slots, configuration and inflight area are told, and how the device was known")
  func contents() throws {
    let backEnd = ["--", BuiltPrograms.path("broken-backend"), "{socket}", "block"]
    let guessed = try RunningProgram(BuiltPrograms.path("martlet-probe"), ["info", "--json"] + backEnd).wait(seconds: 60)
    let json = try #require(try JSONSerialization.jsonObject(with: Data(guessed.output.utf8)) as? [String: Any])
    #expect(json["device"] as? String == "block")
    #expect((json["device_reason"] as? String)?.contains("guess") == true, "\(guessed.output)")
    #expect(json["queues"] as? Int == 4)
    #expect(json["memory_slots"] as? Int == 16)
    #expect((json["configuration"] as? [String: Any])?["capacity"] as? String == "16384 sectors (8M bytes)", "\(guessed.output)")
    #expect((json["inflight"] as? String)?.contains("bytes for one queue of 128") == true)
    #expect((json["setup_ms"] as? Double ?? 0) > 0)
    let names = (json["features"] as? [String: Any])?["names"] as? [String] ?? []
    #expect(names.contains { $0.contains("VERSION_1") } && names.contains { $0.contains("FLUSH") }, "\(names)")
    let asked = try RunningProgram(BuiltPrograms.path("martlet-probe"), ["info", "--type", "blk"] + backEnd).wait(seconds: 60)
    #expect(asked.output.contains("asked for"), "\(asked.output)")
  }
}
