import ControlProtocol
import Glibc
import HostSystem
import VhostUser
import VirtioSpec

extension Verb {
  /// What a back end offers, and who could use it.
  package static let info = Verb(
    name: "info", summary: "what the back end offers, and which front ends can use it",
    options: [OptionRow("json", nil, "print JSON")],
    run: { options throws(ProbeError) in
      let target = try Target(options)
      let card = try InfoCard(target, options)
      target.close()
      Output.write(options.has("json") ? card.json.text + "\n" : card.text)
      return .passed
    })
}

/// Everything `info` finds out.
struct InfoCard {
  let name: String
  var offer: Offer
  var guess: DeviceGuess
  /// Bytes and shape of the inflight area for one queue of 128, or why there is none.
  var inflight: String
  /// An inflight area is offered, and none is given.
  var inflightFails: Bool
  var connectTime: Duration
  var setUpTime: Duration
  /// Looked at during the conversation: some end with it.
  let worksInChild: Bool

  init(_ target: Target, _ options: Options) throws(ProbeError) {
    name = target.name
    let begin = MonotonicTime.now
    let socket = try target.connect()
    let connected = MonotonicTime.now
    connectTime = connected.since(begin)
    var link = Link(socket, timeout: target.timeout)
    do throws(ProbeError) {
      try link.negotiate()
    } catch {
      usleep(20_000)
      if let end = target.collect() { throw .ended("\(end) at first contact", lastWords: target.lastWords) }
      throw .notVhostUser("\(error)")
    }
    setUpTime = MonotonicTime.now.since(connected)
    offer = link.offer
    if offer.protocolFeatures.contains(.config) { (offer.configuration, offer.configurationProblem) = Self.configuration(&link, target) }
    guess = try DeviceGuess.device(options, offer)
    worksInChild = target.worksInChild
    (inflight, inflightFails) = Self.inflight(&link, offer)
  }

  /// Back ends differ in how much they give: the whole space, then what devices have.
  private static func configuration(_ link: inout Link, _ target: Target) -> ([UInt8]?, String?) {
    var problem: String?
    for count in [256, 96, 60, 40, 28, 12] {
      do throws(ProbeError) {
        if let bytes = try link.configuration(byteCount: count), bytes.count == count { return (bytes, nil) }
        problem = "the back end refused to give it"
      } catch {
        problem = "\(error)"
        // A closed connection cannot be asked again; a new one can.
        guard target.canReconnect else { return (nil, problem) }
        guard let socket = try? target.connect() else { return (nil, problem) }
        var again = Link(socket, timeout: target.timeout)
        do throws(ProbeError) { try again.negotiate() } catch { return (nil, problem) }
        link = again
      }
    }
    return (nil, problem)
  }

  private static func inflight(_ link: inout Link, _ offer: Offer) -> (String, fails: Bool) {
    guard offer.protocolFeatures.contains(.inflightShmFD) else { return ("not offered", false) }
    do throws(ProbeError) {
      try link.accept(offer.features.intersection([.version1, .eventIndex, .indirectDescriptors]))
      try link.send(.setVringNum(VringState(index: 0, number: 128)))
      guard case .inflight(let area) = try link.ask(.getInflightFD(InflightDescription(queueCount: 1, queueSize: 128))) else {
        return ("a strange answer", true)
      }
      return area.size == 0 ? ("offered, but no area given", true) : ("\(area.size) bytes for one queue of 128", false)
    } catch {
      return ("offered, but: \(error)", true)
    }
  }

  // MARK: Words

  var text: String {
    var text = "Back end          \(name)\n"
    text += "Device            \(guess.device?.name ?? "unknown") (\(guess.reason))\n"
    text += "Set-up            connected in \(Self.milliseconds(connectTime)) ms, first contact \(Self.milliseconds(setUpTime)) ms\n"
    text += Self.list("Features", offer.features.names(for: guess.device), offer.features.rawValue)
    text += Self.list("Protocol features", offer.protocolFeatures.featureNames, offer.protocolFeatures.rawValue)
    text += "Queues            \(offer.queueCount.map(String.init) ?? "not told (MQ is not offered)")\n"
    text += "Memory slots      \(offer.memorySlots.map(String.init) ?? "8 (CONFIGURE_MEM_SLOTS is not offered)")\n"
    text += "Inflight area     \(inflight)\n"
    if offer.protocolFeatures.contains(.config) {
      if let space = offer.configuration {
        text += "Configuration     \(space.count) bytes\n"
        for (field, value) in Self.fields(guess.device, space, offer.features) { text += "  " + field.padded(to: 24) + value + "\n" }
      } else {
        text += "Configuration     \(offer.configurationProblem ?? "none")\n"
      }
    } else {
      text += "Configuration     not offered\n"
    }
    text += "Front ends\n"
    for judgement in judgements {
      text += "  " + judgement.frontEnd.padded(to: 18) + (judgement.works ? "works" : "does not work") + "\n"
      for remark in judgement.remarks { text += "                    - \(remark)\n" }
    }
    return text
  }

  private static func milliseconds(_ duration: Duration) -> String { decimal(Double(duration.nanoseconds) / 1e6, 2) }

  private static func list(_ title: String, _ names: [String], _ bits: UInt64) -> String {
    var lines = [""]
    for name in names {
      if lines[lines.count - 1].utf8.count + name.utf8.count > 84 { lines.append("") }
      lines[lines.count - 1] += (lines[lines.count - 1].isEmpty ? "" : " ") + name
    }
    return title.padded(to: 18) + "0x" + String(bits, radix: 16) + "\n" + lines.map { $0.isEmpty ? "" : "  \($0)\n" }.joined()
  }

  /// The configuration space by field; fields whose feature is not offered are left out.
  static func fields(_ device: DeviceID?, _ space: [UInt8], _ features: FeatureSet) -> [(String, String)] {
    switch device {
    case .block?:
      let config = BlockConfiguration(decoding: space)
      let (bytes, overflow) = config.capacity.multipliedReportingOverflow(by: 512)
      var fields = [("capacity", "\(config.capacity) sectors" + (overflow ? "" : " (\(Quantity.describe(byteCount: bytes)) bytes)"))]
      if features.contains(.blockSizeMax) { fields.append(("size_max", "\(config.sizeMax)")) }
      if features.contains(.blockSegMax) { fields.append(("seg_max", "\(config.segmentMax)")) }
      if features.contains(.blockGeometry) {
        fields.append(("geometry", "\(config.cylinders) cylinders, \(config.heads) heads, \(config.sectors) sectors"))
      }
      if features.contains(.blockBlockSize) { fields.append(("blk_size", "\(config.blockSize)")) }
      if features.contains(.blockTopology) {
        fields.append(
          (
            "topology",
            "physical block 2^\(config.physicalBlockExponent) logical, alignment \(config.alignmentOffset), min_io \(config.minimumIOSize), opt_io \(config.optimalIOSize)"
          ))
      }
      if features.contains(.blockConfigWriteCache) { fields.append(("writeback", "\(config.writeback)")) }
      if features.contains(.blockMultipleQueues) { fields.append(("num_queues", "\(config.queueCount)")) }
      if features.contains(.blockDiscard) {
        fields.append(
          (
            "discard",
            "at most \(config.maxDiscardSectors) sectors, \(config.maxDiscardSegments) segments, alignment \(config.discardSectorAlignment)"
          ))
      }
      if features.contains(.blockWriteZeroes) {
        fields.append(
          (
            "write_zeroes",
            "at most \(config.maxWriteZeroesSectors) sectors, \(config.maxWriteZeroesSegments) segments, may unmap \(config.writeZeroesMayUnmap)"
          ))
      }
      return fields
    case .net?:
      func number(_ offset: Int, _ count: Int) -> UInt64 { space.number(at: offset, count) }
      var fields: [(String, String)] = []
      if features.contains(.netMAC) { fields.append(("mac", space.prefix(6).map(\.hexText).joined(separator: ":"))) }
      if features.contains(.netStatus) { fields.append(("status", number(6, 2) & 1 == 1 ? "link up" : "link down")) }
      if features.contains(.netMultipleQueues) { fields.append(("max_virtqueue_pairs", "\(number(8, 2))")) }
      if features.contains(.netMTU) { fields.append(("mtu", "\(number(10, 2))")) }
      if features.contains(.netSpeedDuplex) { fields.append(("speed", "\(number(12, 4)) Mbit/s, duplex \(number(16, 1))")) }
      return fields
    case .console?:
      let config = ConsoleConfiguration(decoding: space)
      var fields: [(String, String)] = []
      if features.contains(.consoleSize) { fields.append(("size", "\(config.columns) columns, \(config.rows) rows")) }
      if features.contains(.consoleMultiplePorts) { fields.append(("max_nr_ports", "\(config.maxPortCount)")) }
      return fields
    case .fileSystem?:
      return [
        ("tag", String(decoding: space.prefix(36).prefix { $0 != 0 }, as: UTF8.self)),
        ("num_request_queues", "\(space.number(at: 36, 4))"),
      ]
    default:
      let used = (space.lastIndex { $0 != 0 } ?? -1) + 1
      return [("bytes", used == 0 ? "all zero" : space.prefix(used).hexText(limit: 64))]
    }
  }

  var json: JSONValue {
    .record([
      "back_end": .string(name), "device": guess.device?.name.map { .string($0) } ?? .null, "device_reason": .string(guess.reason),
      "connect_ms": .number(Double(connectTime.nanoseconds) / 1e6), "setup_ms": .number(Double(setUpTime.nanoseconds) / 1e6),
      "features": .record([
        "bits": .unsigned(offer.features.rawValue),
        "names": .array(offer.features.names(for: guess.device).map { .string($0) }),
      ]),
      "protocol_features": .record([
        "bits": .unsigned(offer.protocolFeatures.rawValue),
        "names": .array(offer.protocolFeatures.featureNames.map { .string($0) }),
      ]),
      "queues": offer.queueCount.map { .unsigned($0) } ?? .null, "memory_slots": offer.memorySlots.map { .unsigned($0) } ?? .null,
      "inflight": .string(inflight),
      "configuration": offer.configuration.map { space in
        .object(Self.fields(guess.device, space, offer.features).map { JSONValue.Member($0.0, .string($0.1)) })
      } ?? .null,
      "front_ends": .array(
        judgements.map { judgement in
          .record([
            "name": .string(judgement.frontEnd), "works": .bool(judgement.works),
            "remarks": .array(judgement.remarks.map { .string($0) }),
          ])
        }),
    ])
  }
}

extension Sequence<UInt8> {
  /// A little-endian number of 1 to 8 bytes; bytes that are not there are zero.
  func number(at offset: Int, _ count: Int) -> UInt64 {
    dropFirst(offset).prefix(count).enumerated().reduce(0) { $0 | UInt64($1.element) << UInt64(8 * $1.offset) }
  }
}
