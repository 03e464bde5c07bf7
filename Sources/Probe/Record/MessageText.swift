import ControlProtocol
import VhostUser
import VirtioSpec

/// Messages in words.
enum MessageText {
  /// What the front end says.
  static func request(_ header: MessageHeader, _ payload: [UInt8], device: DeviceID? = nil) -> String {
    guard let request = FrontEndRequest(rawValue: header.request) else { return "request \(header.request): \(payload.hexText())" }
    let wish = header.flags.contains(.needReply) ? " (wants a reply)" : ""
    guard let message = try? FrontEndMessage(request: request, payload: payload) else {
      return "\(request.name)\(wish): cannot be decoded: \(payload.hexText())"
    }
    let words = describe(message, device)
    return request.name + wish + (words.isEmpty ? "" : ": " + words)
  }

  /// What the back end answers.
  static func reply(_ header: MessageHeader, _ payload: [UInt8], device: DeviceID? = nil) -> String {
    guard header.flags.contains(.reply), let request = FrontEndRequest(rawValue: header.request) else {
      return "request \(header.request) of the back end: \(payload.hexText())"
    }
    let words: String
    let value = payload.number(at: 0, 8)
    switch request.rules.reply {
    case .always(let expected), .with(_, let expected): words = describe(request, expected, payload, value, device)
    case .acknowledgement: words = value == 0 ? "done" : "refused with \(value)"
    }
    return "\(request.name) answered: \(words)"
  }

  /// What the back end asks on its own channel.
  static func channelRequest(_ header: MessageHeader, _ payload: [UInt8]) -> String {
    guard let request = BackEndRequest(rawValue: header.request) else { return "request \(header.request): \(payload.hexText())" }
    let wish = header.flags.contains(.needReply) ? " (wants a reply)" : ""
    guard let message = try? BackEndMessage(request: request, payload: payload) else {
      return "\(request.name)\(wish): cannot be decoded: \(payload.hexText())"
    }
    let words: String =
      switch message {
      case .iotlb(let entry): iotlb(entry)
      case .configChange: ""
      case .vringHostNotifier(let area):
        "ring \(area.event.index)" + (area.event.carriesDescriptor ? ", \(area.size) bytes at \(hex(area.offset))" : ", taken back")
      case .vringCall(let state), .vringErr(let state): "ring \(state.index)"
      case .sharedObjectAdd, .sharedObjectRemove, .sharedObjectLookup: message.payload.hexText()
      case .shmemMap(let range), .shmemUnmap(let range):
        "region \(range.id), \(range.length) bytes at \(hex(range.offset)), of the file from \(hex(range.fileOffset))"
      }
    return request.name + wish + (words.isEmpty ? "" : ": " + words)
  }

  /// What the front end answers there.
  static func channelAnswer(_ header: MessageHeader, _ payload: [UInt8]) -> String {
    guard let request = BackEndRequest(rawValue: header.request) else { return "request \(header.request) answered: \(payload.hexText())" }
    let value = payload.number(at: 0, 8)
    let words = payload.count != 8 ? payload.hexText() : value == 0 ? "done" : "refused with \(value)"
    return "\(request.name) answered: \(words)"
  }

  private static func iotlb(_ entry: IOTLBMessage) -> String {
    let right = ["no access", "read", "write", "read and write"][Int(entry.permission & 3)]
    let size = entry.size > 0 ? ", \(entry.size) bytes" : ""
    return switch entry.kind {
    case .miss: "\(hex(entry.iova)) is not known, wanted for \(right)"
    case .update: "\(hex(entry.iova))\(size) lies at user address \(hex(entry.userAddress)), \(right)"
    case .invalidate: "\(hex(entry.iova))\(size) is taken back"
    case .accessFail: "\(hex(entry.iova)) may not be accessed"
    }
  }

  private static func describe(
    _ request: FrontEndRequest, _ expected: ReplyPayload, _ payload: [UInt8], _ value: UInt64, _ device: DeviceID?
  ) -> String {
    guard let reply = try? Reply(expected, payload: payload) else { return payload.count == 8 ? "\(value)" : payload.hexText() }
    switch reply {
    case .number(let value):
      switch request {
      case .getFeatures: return features(FeatureSet(rawValue: value), device)
      case .getProtocolFeatures: return ProtocolFeatures(rawValue: value).featureNames.joined(separator: " ")
      default: return "\(value)"
      }
    case .vringState(let state): return "ring \(state.index) stands at \(state.number)"
    case .config(let space): return "from \(space.offset): \(space.bytes.hexText(limit: 96))"
    case .configRefused: return "refused"
    case .inflight(let area): return "\(area.size) bytes at \(hex(area.mapOffset)), \(area.queueCount) queues of \(area.queueSize)"
    case .log(let log): return "\(log.size) bytes at \(hex(log.mapOffset))"
    case .empty: return "no payload"
    default: return payload.hexText()
    }
  }

  private static func features(_ set: FeatureSet, _ device: DeviceID?) -> String {
    hex(set.rawValue) + " " + set.names(for: device).joined(separator: " ")
  }

  private static func hex(_ value: UInt64) -> String { "0x" + String(value, radix: 16) }

  private static func region(_ region: RegionDescription) -> String {
    "\(Quantity.describe(byteCount: region.size)) at \(hex(region.guestAddress)), user address \(hex(region.userAddress)), offset \(hex(region.mapOffset))"
  }

  private static func describe(_ message: FrontEndMessage, _ device: DeviceID?) -> String {
    switch message {
    case .setFeatures(let set): features(set, device)
    case .setProtocolFeatures(let set): set.featureNames.joined(separator: " ")
    case .setMemTable(let table): table.regions.map(region).joined(separator: "; ")
    case .addMemReg(let single), .remMemReg(let single): region(single.region)
    case .setVringNum(let state): "ring \(state.index) has \(state.number) entries"
    case .setVringBase(let state): "ring \(state.index) starts at \(state.number)"
    case .getVringBase(let state): "ring \(state.index)"
    case .setVringEnable(let state): "ring \(state.index) \(state.number == 0 ? "off" : "on")"
    case .setVringKick(let event), .setVringCall(let event), .setVringErr(let event):
      "ring \(event.index)" + (event.carriesDescriptor ? "" : ", no descriptor")
    case .setVringAddr(let address):
      "ring \(address.index): descriptors \(hex(address.descriptorTable)), available \(hex(address.availableRing)), used \(hex(address.usedRing))"
        + (address.flags & VringAddress.logFlag != 0 ? ", log \(hex(address.log))" : "")
    case .getConfig(let config): "\(config.bytes.count) bytes from \(config.offset)"
    case .setConfig(let config): "from \(config.offset): \(config.bytes.hexText())"
    case .getInflightFD(let area): "\(area.queueCount) queues of \(area.queueSize)"
    case .setInflightFD(let area): "\(area.size) bytes at \(hex(area.mapOffset)), \(area.queueCount) queues of \(area.queueSize)"
    case .setLogBase(let log): "\(log.size) bytes at \(hex(log.mapOffset))"
    case .setStatus(let status): hex(status)
    case .iotlb(let entry): iotlb(entry)
    case .vringKick(let state): "ring \(state.index)"
    case .sendRARP(let address):
      "for \((0..<6).map { UInt8(truncatingIfNeeded: address >> UInt64(8 * $0)).hexText }.joined(separator: ":"))"
    case .netSetMTU(let mtu): "\(mtu)"
    default: message.payload.isEmpty ? "" : message.payload.hexText()
    }
  }
}
