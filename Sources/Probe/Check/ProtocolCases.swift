import Glibc
import HostSystem
import VMMemory
import VhostUser
import VirtioQueue
import VirtioSpec

/// What every back end promises whatever its device: negotiation, replies, acknowledgements.
enum ProtocolCases {
  static let all: [CheckCase] = contact + replies + acknowledgements + configuration + lifecycle

  private static let contact: [CheckCase] = [
    CheckCase("features.version1", "VIRTIO_F_VERSION_1 is offered", "virtio 1.4, 6.1") { context in
      try context.expect(
        context.offer.features.contains(.version1),
        "VIRTIO_F_VERSION_1 is missing in 0x\(String(context.offer.features.rawValue, radix: 16))")
    },
    CheckCase("features.stable", "GET_FEATURES answers the same on every connection and after SET_OWNER", "vhost-user, GET_FEATURES") {
      context in
      var link = try context.open()
      let first = try link.number(.getFeatures)
      try link.send(.setOwner)
      let second = try link.number(.getFeatures)
      try context.expect(
        first == second && first == context.offer.features.rawValue,
        "0x\(String(first, radix: 16)), then 0x\(String(second, radix: 16)), and 0x\(String(context.offer.features.rawValue, radix: 16)) on an earlier connection"
      )
    },
    CheckCase("features.dependencies", "No virtio feature is offered without what it needs", "virtio 1.4, 2.2 and the device's own list") {
      context in
      guard let device = context.device else { throw CaseStop.notApplicable("the device is not known") }
      let unmet = context.offer.features.unmetDependencies(for: device)
      try context.expect(unmet.isEmpty, "\(unmet.names(for: device).joined(separator: ", ")) offered without their conditions")
    },
    CheckCase("protocol.dependencies", "No protocol feature is offered without what it needs", "vhost-user, protocol features") { context in
      guard context.offer.hasProtocolFeatures else { throw CaseStop.notOffered("PROTOCOL_FEATURES") }
      let lost = context.offer.protocolFeatures.subtracting(context.offer.protocolFeatures.withoutUnmetDependencies)
      try context.expect(lost.isEmpty, "\(lost.featureNames.joined(separator: ", ")) offered without their conditions")
    },
    CheckCase("protocol.none", "A front end may acknowledge no protocol feature at all", "vhost-user, SET_PROTOCOL_FEATURES") { context in
      guard context.offer.hasProtocolFeatures else { throw CaseStop.notOffered("PROTOCOL_FEATURES") }
      var link = try context.negotiated([])
      try link.accept(.version1)
    },
    CheckCase(
      "protocol.not-offered", "Acknowledging a protocol feature that is not offered is refused, or without effect",
      "vhost-user, SET_PROTOCOL_FEATURES"
    ) { context in
      guard context.offer.hasProtocolFeatures else { throw CaseStop.notOffered("PROTOCOL_FEATURES") }
      var link = try context.open()
      try link.send(.setOwner)
      _ = try link.number(.getFeatures)
      let bits = context.offer.protocolFeatures.rawValue | 1 << 55
      do throws(ProbeError) {
        try link.tell(.setProtocolFeatures(ProtocolFeatures(rawValue: bits)))
        _ = try link.number(.getFeatures)
      } catch {
        guard case .protocolError(_, .closed) = error else { throw error }
      }
    },
    CheckCase("order.features-first", "GET_FEATURES may come before SET_OWNER", "vhost-user, starting and stopping rings") { context in
      var link = try context.open()
      _ = try link.number(.getFeatures)
      if context.offer.hasProtocolFeatures { _ = try link.number(.getProtocolFeatures) }
      try link.send(.setOwner)
    },
    CheckCase("queues.count", "GET_QUEUE_NUM answers with 1 to 32768", "vhost-user, multiple queue support") { context in
      try context.needs(.mq)
      let count = context.offer.queueCount ?? 0
      try context.expect((1...32768).contains(count), "\(count) queues")
    },
    CheckCase("memory.slots", "GET_MAX_MEM_SLOTS answers with at least one", "vhost-user, GET_MAX_MEM_SLOTS") { context in
      try context.needs(.configureMemSlots)
      try context.expect((context.offer.memorySlots ?? 0) >= 1, "no slot at all")
    },
  ]

  private static let replies: [CheckCase] = [
    CheckCase("reply.flags", "A reply carries the request's number, flags 0x5 and the exact size", "vhost-user, message header") {
      context in
      var link = try context.negotiated()
      try exactReply(context, &link, .getFeatures, byteCount: 8)
      if context.offer.hasProtocolFeatures { try exactReply(context, &link, .getProtocolFeatures, byteCount: 8) }
      if link.agreed.contains(.mq) { try exactReply(context, &link, .getQueueNum, byteCount: 8) }
      if link.agreed.contains(.configureMemSlots) { try exactReply(context, &link, .getMaxMemSlots, byteCount: 8) }
      try exactReply(context, &link, .getVringBase(VringState(index: 0, number: 0)), byteCount: 8)
    },
    CheckCase(
      "reply.need-reply", "NEED_REPLY on a request with a reply of its own changes nothing: one reply, flags 0x5", "vhost-user, REPLY_ACK"
    ) { context in
      try context.needs(.replyAck)
      var link = try context.negotiated()
      try link.tell(.getFeatures, needsReply: true)
      let reply = try heard(&link)
      try context.expect(reply.flags == .replyExactly, "the reply's flags are 0x\(String(reply.flags.rawValue, radix: 16)) instead of 0x5")
      try silence(context, &link, "a second reply came")
    },
    CheckCase("reply.order", "Several requests sent at once are answered in their order", "vhost-user, communication") { context in
      guard context.offer.hasProtocolFeatures else { throw CaseStop.notOffered("PROTOCOL_FEATURES") }
      var link = try context.open()
      for _ in 0..<8 {
        try link.tell(.getFeatures)
        try link.tell(.getProtocolFeatures)
      }
      for _ in 0..<8 {
        let first = try heard(&link)
        let second = try heard(&link)
        try context.expect(
          first.request == 1 && second.request == 15, "replies to \(first.request) and \(second.request) where 1 and 15 were due")
      }
    },
    CheckCase("reply.pieces", "A message that arrives byte by byte is understood", "vhost-user, communication over a stream socket") {
      context in
      var link = try context.open()
      for byte in FrontEndMessage.getFeatures.header().encoded {
        _ = link.frontEnd.sendRaw([byte])
        usleep(300)
      }
      let reply = try heard(&link)
      try context.expect(reply.request == 1, "the reply is to request \(reply.request)")
    },
  ]

  private static let acknowledgements: [CheckCase] = [
    CheckCase(
      "ack.success", "With NEED_REPLY every request without a reply of its own is acknowledged with one zero of 8 bytes",
      "vhost-user, REPLY_ACK"
    ) { context in
      try context.needs(.replyAck)
      var link = try context.negotiated()
      let arena = try Arena(byteCount: 1 << 20)
      let ring = try ProbeRing(0, size: 64, features: .version1, arena: arena)
      let base = VringState(index: 0, number: 0)
      let bit30: FeatureSet = context.offer.hasProtocolFeatures ? .vhostUserProtocolFeatures : []
      try acknowledged(context, &link, .setFeatures(context.offer.features.intersection(.version1).union(bit30)))
      try acknowledged(context, &link, .setMemTable(RegionTable(regions: arena.descriptions)), arena.descriptors)
      try acknowledged(context, &link, .setVringNum(VringState(index: 0, number: 64)))
      try acknowledged(context, &link, .setVringBase(base))
      try acknowledged(context, &link, .setVringAddr(try ring.address()))
      let event = VringEvent(index: 0, carriesDescriptor: true)
      try acknowledged(context, &link, .setVringErr(event), [ring.call.fd.rawValue])
      try acknowledged(context, &link, .setVringCall(event), [ring.call.fd.rawValue])
      try acknowledged(context, &link, .setVringKick(event), [ring.kick.fd.rawValue])
      try acknowledged(context, &link, .setVringEnable(VringState(index: 0, number: 1)))
      try acknowledged(context, &link, .setVringEnable(base))
      _ = try link.stop(0)
    },
    CheckCase("ack.unasked", "Without NEED_REPLY nothing is acknowledged", "vhost-user, REPLY_ACK") { context in
      try context.needs(.replyAck)
      var link = try context.negotiated()
      try link.tell(.setVringNum(VringState(index: 0, number: 64)))
      try link.tell(.setVringBase(VringState(index: 0, number: 0)))
      try link.tell(.getFeatures)
      let reply = try heard(&link)
      try context.expect(reply.request == 1, "request \(reply.request) was answered though nobody asked")
    },
    refused("ack.index", "A ring index beyond the device's rings is refused", .setVringNum(VringState(index: 4096, number: 64))),
    refused("ack.index-wide", "A ring index is compared as the 32-bit number it is", .setVringNum(VringState(index: 0x1_0000, number: 64))),
    refused("ack.size-zero", "A ring of no entries is refused", .setVringNum(VringState(index: 0, number: 0))),
    refused("ack.size-huge", "A ring of more than 32768 entries is refused", .setVringNum(VringState(index: 0, number: 65536))),
    refused("ack.size-odd", "A split ring whose size is no power of two is refused", .setVringNum(VringState(index: 0, number: 100))),
    refused("ack.features", "Features that are not offered are refused", nil),
    CheckCase("ack.memory-overflow", "A memory table whose region wraps around is refused", "vhost-user, SET_MEM_TABLE") { context in
      var link = try context.negotiated()
      let arena = try Arena(byteCount: 1 << 20)
      let region = RegionDescription(guestAddress: 0xFFFF_FFFF_FFFF_F000, size: 1 << 20, userAddress: Arena.userBase, mapOffset: 0)
      let answer = try link.refusal(.setMemTable(RegionTable(regions: [region])), descriptors: arena.descriptors)
      try context.expect(answer != nil, "it was accepted")
    },
    CheckCase("request.unknown", "A request that does not exist is refused, not accepted", "vhost-user, REPLY_ACK") { context in
      try context.needs(.replyAck)
      var link = try context.negotiated()
      try link.tell(MessageHeader(request: 200, flags: [.version1, .needReply], size: 0), [], name: "request 200")
      do throws(ProbeError) {
        guard let message = try link.hear() else { throw .notVhostUser("no answer and no end of the connection") }
        let code = message.payload.number(at: 0, 8)
        if message.header.request == 200, code == 0 { throw .notVhostUser("request 200 was acknowledged as done") }
      } catch {
        guard case .protocolError(_, .closed) = error else { throw error }
      }
    },
  ]

  private static let configuration: [CheckCase] = [
    CheckCase("config.echo", "GET_CONFIG answers with the offset and size that were asked for", "vhost-user, GET_CONFIG") { context in
      try context.needs(.config)
      var link = try context.negotiated()
      let count = try readable(context)
      let zeros = [UInt8](repeating: 0, count: count)
      guard case .config(let piece) = try link.ask(.getConfig(ConfigMessage(offset: 0, bytes: zeros))) else {
        throw CaseStop.fail("the configuration was refused")
      }
      try context.expect(
        piece.offset == 0 && piece.bytes.count == count, "offset \(piece.offset), \(piece.bytes.count) bytes instead of 0 and \(count)")
    },
    CheckCase("config.stable", "The configuration is the same when it is read again", "virtio 1.4, 2.5") { context in
      try context.needs(.config)
      var link = try context.negotiated()
      let count = try readable(context)
      let first = try link.configuration(byteCount: count)
      let second = try link.configuration(byteCount: count)
      try context.expect(first != nil && first == second, "it changed between two readings")
    },
    CheckCase("config.part", "A part of the configuration is that part of the whole", "vhost-user, GET_CONFIG") { context in
      try context.needs(.config)
      var link = try context.negotiated()
      let count = try readable(context)
      guard let whole = try link.configuration(byteCount: count) else { throw CaseStop.fail("the configuration was refused") }
      guard case .config(let piece) = try link.ask(.getConfig(ConfigMessage(offset: 4, bytes: [0, 0, 0, 0]))) else { return }
      try context.expect(
        piece.bytes == Array(whole[4..<8]), "bytes 4 to 7 are \(piece.bytes.hexText()) alone and \(whole[4..<8].hexText()) in the whole")
    },
    CheckCase(
      "config.beyond", "Reading beyond the configuration is answered with an error or zeros, not with other memory",
      "vhost-user, GET_CONFIG"
    ) { context in
      try context.needs(.config)
      var link = try context.negotiated()
      do throws(ProbeError) {
        let payload = BlockWire.bytes(200, 4) + BlockWire.bytes(56, 4) + BlockWire.bytes(0, 4) + [UInt8](repeating: 0xA5, count: 56)
        try link.tell(MessageHeader(request: 24, flags: .version1, size: UInt32(payload.count)), payload, name: "GET_CONFIG 200..255")
        guard let message = try link.hear() else { throw .notVhostUser("no answer and no end of the connection") }
        let bytes = message.payload.dropFirst(12)
        if bytes.contains(where: { $0 != 0 && $0 != 0xA5 }) { throw .notVhostUser("bytes 200 to 255 are \(bytes.hexText())") }
      } catch {
        guard case .protocolError(_, .closed) = error else { throw error }
      }
    },
    CheckCase("config.read-only", "A write to a field that is not writable has no effect", "virtio 1.4, 2.5; vhost-user, SET_CONFIG") {
      context in
      try context.needs(.config)
      let count = try readable(context)
      let before = context.offer.configuration?.prefix(count).map { $0 } ?? []
      do {
        var link = try context.negotiated()
        _ = try link.refusal(.setConfig(ConfigMessage(offset: 0, bytes: before.prefix(8).map { ~$0 })))
      }
      var other = try context.negotiated()
      let after = try other.configuration(byteCount: count)
      try context.expect(
        after == before, "the first 8 bytes were \(before.prefix(8).hexText()) and are \((after ?? []).prefix(8).hexText())")
    },
  ]

  private static let lifecycle: [CheckCase] = [
    CheckCase(
      "base.echo", "GET_VRING_BASE of a ring that did nothing gives the base that was set, with the ring's index",
      "vhost-user, GET_VRING_BASE"
    ) { context in
      var link = try context.negotiated()
      try link.accept(context.offer.features.intersection(.version1))
      try link.send(.setVringNum(VringState(index: 0, number: 64)))
      try link.send(.setVringBase(VringState(index: 0, number: 17)))
      guard case .vringState(let state) = try link.ask(.getVringBase(VringState(index: 0, number: 0))) else { return }
      try context.expect(state.index == 0 && state.number == 17, "index \(state.index), base \(state.number)")
    },
    CheckCase("call.early", "SET_VRING_CALL may come before anything else about a ring", "vhost-user, SET_VRING_CALL") { context in
      var link = try context.negotiated()
      let call = try EventFD()
      for _ in 0..<3 { try link.send(.setVringCall(VringEvent(index: 0, carriesDescriptor: true)), descriptors: [call.fd.rawValue]) }
      try link.send(.setVringCall(VringEvent(index: 0, carriesDescriptor: false)))
    },
    CheckCase("reset-owner.keeps", "RESET_OWNER, deprecated, does not end the connection", "vhost-user, RESET_OWNER") { context in
      var link = try context.negotiated()
      try link.tell(.resetOwner)
      _ = try link.number(.getFeatures)
    },
    CheckCase(
      "reset-device.keeps", "RESET_DEVICE keeps connection and protocol features, and the device can be set up again",
      "vhost-user, RESET_DEVICE"
    ) { context in
      try context.needs(.resetDevice)
      let client = try context.client()
      try client.ping()
      try client.link.send(.resetDevice)
      try client.link.accept(client.features)
      try client.link.share(client.arena)
      client.ring = try ProbeRing(client.ring.index, size: 64, features: client.features, arena: client.arena)
      try client.start()
      try client.ping()
    },
    CheckCase("reset-device.stops", "After RESET_DEVICE no ring is processed", "vhost-user, RESET_DEVICE") { context in
      try context.needs(.resetDevice)
      let client = try context.client()
      try client.link.send(.resetDevice)
      try context.expect(try client.tryPing(within: .milliseconds(150)) == nil, "a request was completed")
    },
    CheckCase("status.echo", "GET_STATUS answers what SET_STATUS said", "vhost-user, SET_STATUS") { context in
      try context.needs(.status)
      var link = try context.negotiated()
      try link.send(.setStatus(3))
      let status = try link.number(.getStatus)
      try context.expect(status & 3 == 3, "status \(status) after 3 was set")
    },
    CheckCase(
      "inflight.area", "GET_INFLIGHT_FD gives an area large enough for queues and size, with a descriptor that can be mapped",
      "vhost-user, inflight I/O tracking"
    ) { context in
      try context.needs(.inflightShmFD)
      var link = try context.negotiated()
      try link.accept(context.offer.features.intersection(.version1))
      for index in 0..<2 as Range<UInt32> where UInt64(index) < context.offer.queueCount ?? 1 {
        try link.send(.setVringNum(VringState(index: index, number: 64)))
      }
      let wanted = InflightDescription(queueCount: 1, queueSize: 64)
      var answered = try link.perform(.getInflightFD(wanted))
      guard case .inflight(let area) = answered.reply, area.size > 0 else { throw CaseStop.fail("no area was given") }
      try context.expect(area.queueCount == 1 && area.queueSize == 64, "the area is for \(area.queueCount) queues of \(area.queueSize)")
      try context.expect(area.size >= 16 * 64 + 16, "\(area.size) bytes do not hold 64 entries of 16 bytes and a header")
      guard let fd = answered.descriptors.takeFirst() else { throw CaseStop.fail("no descriptor came along") }
      let end = area.mapOffset + area.size
      try context.expect(try fd.status().byteCount >= end, "the file ends before the area does")
      let bytes = try MemoryMapping.shared(fd, offset: 0, byteCount: Int(end))
      try context.expect(bytes.byte(at: Int(area.mapOffset)) == 0, "the features word of a new area is not zero")
      try link.send(.setInflightFD(area), descriptors: [fd.rawValue])
    },
    CheckCase("log.base", "SET_LOG_BASE with a file is answered, and the old log is not written after that", "vhost-user, migration") {
      context in
      try context.needs(.logShmFD)
      try context.needs(.vhostLogAll)
      var link = try context.negotiated()
      let log = try SharedMemory.sealed(name: "probe-log", byteCount: 65536)
      try link.send(.setLogBase(LogDescription(size: 65536, mapOffset: 0)), descriptors: [log.rawValue])
    },
    CheckCase("device-state.save", "The state of a stopped device can be read to its end", "vhost-user, device state") { context in
      try context.needs(.deviceState)
      var link = try context.negotiated()
      let pair = try UnixSocket.pair(.stream)
      try pair.split { (ours, theirs) throws in
        var answered = try link.perform(.setDeviceStateFD(DeviceStateTransfer(direction: .save)), descriptors: [theirs.rawValue])
        guard case .number(let flags) = answered.reply else { return }
        try context.expect(flags & 0xFF == 0, "refused with \(flags & 0xFF)")
        let source = flags & 0x100 == 0 ? answered.descriptors.takeFirst() : nil
        _ = theirs.release().closing()
        var isComplete = false
        if let source {
          isComplete = try source.readToEndWaiting(limit: 16 << 20, patience: context.target.timeout) != nil
        } else {
          isComplete = try ours.readToEndWaiting(limit: 16 << 20, patience: context.target.timeout) != nil
        }
        try context.expect(isComplete, "its end did not come")
        try context.expect(try link.number(.checkDeviceState) == 0, "CHECK_DEVICE_STATE reports a failure")
      }
    },
    CheckCase("channel.accepted", "SET_BACKEND_REQ_FD is accepted", "vhost-user, back-end communication") { context in
      try context.needs(.backEndRequests)
      var link = try context.negotiated(Link.wanted.union(.backEndRequests))
      let pair = try UnixSocket.pair(.stream)
      try pair.split { (_, theirs) throws in try link.send(.setBackEndRequestFD, descriptors: [theirs.rawValue]) }
    },
    CheckCase("reconnect.clean", "A new connection starts from a clean state", "vhost-user, communication") { context in
      do {
        var first = try context.negotiated()
        try first.accept(context.offer.features.intersection(.version1))
        try first.send(.setVringNum(VringState(index: 0, number: 64)))
        try first.send(.setVringBase(VringState(index: 0, number: 99)))
      }
      var second = try context.negotiated()
      try second.accept(context.offer.features.intersection(.version1))
      guard case .vringState(let state) = try second.ask(.getVringBase(VringState(index: 0, number: 0))) else { return }
      try context.expect(state.number != 99, "the base set on an earlier connection is still there")
    },
    CheckCase("reconnect.many", "Twenty front ends one after another are served", "vhost-user, communication") { context in
      for _ in 0..<20 { _ = try context.negotiated() }
    },
  ]

  // MARK: Pieces

  /// Bytes of the configuration that this back end gives at first contact.
  private static func readable(_ context: CheckContext) throws -> Int {
    guard let count = context.offer.configuration?.count, count >= 8 else { throw CaseStop.notApplicable("it gives no configuration") }
    return count
  }

  static func heard(_ link: inout Link) throws -> MessageHeader {
    guard let message = try link.hear() else { throw CaseStop.fail("no reply came") }
    return message.header
  }

  private static func exactReply(_ context: CheckContext, _ link: inout Link, _ message: FrontEndMessage, byteCount: Int) throws {
    try link.tell(message)
    let header = try heard(&link)
    let name = message.request.name
    try context.expect(header.request == message.request.rawValue, "the reply to \(name) has number \(header.request)")
    try context.expect(
      header.flags == .replyExactly, "the reply to \(name) has flags 0x\(String(header.flags.rawValue, radix: 16)) instead of 0x5")
    try context.expect(Int(header.size) == byteCount, "the reply to \(name) has \(header.size) bytes instead of \(byteCount)")
  }

  private static func silence(_ context: CheckContext, _ link: inout Link, _ sentence: String) throws {
    let before = link.frontEnd.timeout
    link.frontEnd.timeout = .milliseconds(100)
    defer { link.frontEnd.timeout = before }
    if try link.hear() != nil { throw CaseStop.fail(sentence) }
  }

  private static func acknowledged(_ context: CheckContext, _ link: inout Link, _ message: FrontEndMessage, _ fds: [CInt] = []) throws {
    try link.tell(message, descriptors: fds, needsReply: true)
    guard let reply = try link.hear() else { throw CaseStop.fail("\(message.request.name) was not acknowledged") }
    let name = message.request.name
    try context.expect(reply.header.request == message.request.rawValue, "\(name) was answered with number \(reply.header.request)")
    try context.expect(
      reply.header.flags == .replyExactly, "the acknowledgement of \(name) has flags 0x\(String(reply.header.flags.rawValue, radix: 16))")
    try context.expect(reply.payload.count == 8, "the acknowledgement of \(name) has \(reply.payload.count) bytes")
    try context.expect(reply.payload.allSatisfy { $0 == 0 }, "\(name) was refused: \(reply.payload.hexText())")
  }

  /// A request that must not be accepted; nil stands for features that are not offered.
  private static func refused(_ id: String, _ sentence: String, _ message: FrontEndMessage?) -> CheckCase {
    CheckCase(id, sentence, "vhost-user, REPLY_ACK") { context in
      try context.needs(.replyAck)
      var link = try context.negotiated()
      // A split ring, if it matters.
      try link.accept(context.offer.features.intersection(.version1))
      let request = message ?? .setFeatures(context.offer.features.union(FeatureSet(bit: 49)))
      let answer = try link.refusal(request)
      try context.expect(answer != nil, "\(request.request.name) \(request.payload.hexText()) was accepted")
    }
  }
}

extension MemoryMapping {
  /// One byte, loaded once; beyond the end it is zero.
  func byte(at offset: Int) -> UInt8 {
    guard offset >= 0, offset < byteCount else { return 0 }
    // SAFETY: the offset lies inside the mapping.
    return unsafe baseAddress.load(fromByteOffset: offset, as: UInt8.self)
  }

  func bytes(_ range: Range<Int>) -> [UInt8] { range.map { byte(at: $0) } }
}

extension CInt {
  /// Closes a descriptor number that was given up.
  func closing() -> Bool { close(self) == 0 }
}

extension OwnedFD {
  /// Everything up to the end; nil when it does not come in time, or there is more.
  borrowing func readToEndWaiting(limit: Int, patience: Duration) throws(SystemError) -> [UInt8]? {
    var bytes: [UInt8] = []
    let end = MonotonicTime.now.advanced(by: patience)
    var chunk = [UInt8](repeating: 0, count: 65536)
    while bytes.count < limit {
      guard try waitUntil(.readable, timeout: end.since(.now)) else { return nil }
      // SAFETY: the buffer is ours.
      switch unsafe chunk.withUnsafeMutableBytes({ unsafe read(into: $0) }) {
      case .bytes(let count): bytes += chunk[..<count]
      case .end: return bytes
      case .wouldBlock: continue
      case .failed: return nil
      }
    }
    return nil
  }
}
