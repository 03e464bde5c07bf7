import CLinux
import Glibc
import HostSystem
import VMMemory
import VhostUser
import VirtioQueue
import VirtioSpec

/// What is said to a message.
extension Session {
  func reply(_ request: UInt32, _ payload: [UInt8], flags: UInt32 = 5, descriptor: CInt? = nil) {
    var flags = flags
    if has("reply-flags"), sessionNumber > 1 { flags |= 8 }
    let header = MessageHeader(request: request, flags: MessageFlags(rawValue: flags), size: UInt32(payload.count))
    _ = UnixSocket.send(socket, header.encoded + payload, descriptors: descriptor.map { [$0] } ?? [])
  }

  func number(_ value: UInt64) -> [UInt8] { (0..<8).map { UInt8(truncatingIfNeeded: value >> UInt64(8 * $0)) } }

  func handle(_ header: MessageHeader, _ payload: [UInt8], _ numbers: [CInt]) throws {
    var fds = ReceivedFDs(numbers)
    let message: FrontEndMessage
    do {
      message = try decode(header, payload)
      if !has("accept-overflow") { try message.checkDescriptorCount(fds.count) }
    } catch {
      // With an acknowledgement asked for, saying no is enough for values; framing is over.
      let asked = header.flags.contains(.needReply) && protocolFeatures.contains(.replyAck)
      if Self.minds || !asked { try violation("\(error)") }
      reply(header.request, number(22))
      return
    }
    let asked = header.flags.contains(.needReply) && protocolFeatures.contains(.replyAck)
    do {
      let isAnswered = try perform(message, header, &fds)
      if isAnswered { return }
      if has("ack-missing"), header.request == 10 { return }
      if asked || has("ack-always") && header.request != 16 && protocolFeatures.contains(.replyAck) { reply(header.request, zero) }
    } catch let refusal as Refused {
      if Self.minds { try violation(refusal.why) }
      if !asked { throw Closed() }
      reply(header.request, number(22))
    }
  }

  /// Whether it takes harm from what it should just refuse.
  private static let minds = ["abort-malformed", "hang-malformed", "leak-malformed", "leak-one"].contains(where: has)

  struct Refused: Error { let why: String }

  func decode(_ header: MessageHeader, _ payload: [UInt8]) throws -> FrontEndMessage {
    guard let request = FrontEndRequest(rawValue: header.request) else { throw Closed() }
    if request == .setVringNum, has("accept-zero") || has("accept-huge") { return .setVringNum(try VringState(decoding: payload)) }
    if request == .setMemTable, has("accept-overflow") {
      if (try? FrontEndMessage(request: request, payload: payload)) == nil { return .getShmemConfig }
    }
    return try FrontEndMessage(request: request, payload: payload)
  }

  func ring(_ index: UInt32) throws -> Ring {
    if has("accept-wide"), index >= 0x1_0000 { return rings[Int(index & 0xFFFF) % rings.count] }
    if has("accept-index"), index < 0x1_0000 { return rings[Int(index) % rings.count] }
    guard index < rings.count else { throw Refused(why: "ring \(index)") }
    return rings[Int(index)]
  }

  /// Does what is asked; true when a reply was sent.
  func perform(_ message: FrontEndMessage, _ header: MessageHeader, _ fds: inout ReceivedFDs) throws -> Bool {
    let request = header.request
    switch message {
    case .getFeatures:
      if has("features-first"), sessionNumber > 1, !hasOwner { throw Closed() }
      let echo: UInt32 = has("reply-echo") && header.flags.contains(.needReply) ? 13 : 5
      featureQuestions += 1
      reply(has("reorder-number") && featureQuestions > 5 ? 15 : request, number(offered.rawValue), flags: echo)
      return true
    case .setFeatures(let wanted):
      guard wanted.isSubset(of: offered) || has("accept-features") else { throw Refused(why: "features") }
      features = wanted
      if !wanted.contains(.vhostUserProtocolFeatures), !has("enable-implicit") { for ring in rings { ring.isEnabled = true } }
    case .setOwner:
      hasOwner = true
    case .resetOwner: if has("reset-owner") { throw Closed() }
    case .getProtocolFeatures:
      reply(request, number(offeredProtocol.rawValue))
      return true
    case .setProtocolFeatures(let wanted):
      if has("protocol-none"), wanted.isEmpty { throw Closed() }
      if has("needs-ack"), !wanted.isEmpty, !wanted.contains(.replyAck) { throw Closed() }
      if has("protocol-abort"), !wanted.isSubset(of: offeredProtocol) { abort() }
      guard wanted.isSubset(of: offeredProtocol) else { throw Closed() }
      protocolFeatures = wanted
    case .getQueueNum:
      reply(request, number(has("queue-count-zero") ? 0 : has("queue-count-one") ? 1 : has("port-queues") ? 4 : UInt64(rings.count)))
      return true
    case .getMaxMemSlots:
      reply(request, number(has("slots-zero") ? 0 : 16))
      return true
    case .setMemTable(let table):
      if has("regions"), table.regions.count > 4 { throw Refused(why: "regions") }
      if has("replace"), memory != nil { throw Refused(why: "a second table") }
      if has("replace-running"), rings.contains(where: \.isStarted) { throw Refused(why: "a table while running") }
      var fresh: [Shared] = []
      for region in table.regions { fresh.append(try map(region, &fds)) }
      regions = fresh
      try remap()
    case .addMemReg(let single):
      guard regions.count < 16 else { throw Refused(why: "too many regions") }
      let region = try map(single.region, &fds)
      guard !regions.contains(where: { $0.description.overlaps(single.region) }) else { throw Refused(why: "overlap") }
      if !has("add-ignored") { regions.append(region) }
      try remap()
    case .remMemReg(let single):
      guard let position = regions.firstIndex(where: { $0.description.isSameRegion(as: single.region) }) else {
        if has("remove-unknown") || has("add-ignored") { break }
        throw Refused(why: "no such region")
      }
      regions.remove(at: position)
      try remap()
    case .setVringNum(let state):
      let ring = try ring(state.index)
      guard state.number > 0 || has("accept-zero") else { throw Refused(why: "no entries") }
      guard state.number <= 32768 || has("accept-huge") else { throw Refused(why: "too many entries") }
      guard features.contains(.packedRing) || state.number & (state.number &- 1) == 0 || has("accept-odd") else {
        throw Refused(why: "an odd size")
      }
      guard !ring.isStarted else { throw Refused(why: "the size of a running ring") }
      ring.size = state.number
    case .setVringBase(let state):
      let ring = try ring(state.index)
      if !has("base-zero-late") || ring.address == nil { ring.base = state.number } else { throw Refused(why: "the place is known") }
      if has("stale") { disk.staleBase = state.number }
    case .setVringAddr(let address):
      let ring = try ring(address.index)
      guard !ring.isStarted || ring.address.map({ $0.descriptorTable == address.descriptorTable }) == true else {
        throw Refused(why: "the place of a running ring")
      }
      // Places that are to be translated are looked at when their pages are known.
      if !features.contains(.accessPlatform) || has("iotlb-deaf") { _ = try configuration(ring, address) }
      ring.address = address
    case .setVringKick(let event):
      let ring = try ring(UInt32(event.index))
      if ring.isStarted {
        if let fd = fds.takeFirst(), !has("kick-old") { ring.kick = consume fd }
        break
      }
      ring.kick = fds.takeFirst()
      try start(ring)
    case .setVringCall(let event):
      let ring = try ring(UInt32(event.index))
      if has("call-early"), ring.size == 0 { throw Closed() }
      if has("call-old") || has("call-late-lost"), ring.isStarted { break }
      if has("leak-calls"), let old = ring.call.take() { leaked.append(old.release()) }
      ring.call = fds.takeFirst()
    case .setVringErr(let event): _ = try ring(UInt32(event.index))
    case .setVringEnable(let state):
      let ring = try ring(state.index)
      if !has("enable-early-lost") || ring.isStarted { ring.isEnabled = state.number == 1 || has("enable-ignored") }
    case .getVringBase(let state):
      let ring = try ring(state.index)
      let base = stop(ring)
      reply(request, VringState(index: has("base-index") ? 9 : state.index, number: base).encoded)
      return true
    case .getConfig(let asked):
      if has("config-refused") || has("config-short") && asked.bytes.count > 40 {
        reply(request, ConfigMessage(offset: asked.offset, bytes: []).encoded)
        return true
      }
      var bytes = Array(configuration[Int(asked.offset)..<Int(asked.offset) + asked.bytes.count])
      if has("config-part") { bytes = Array(configuration.prefix(asked.bytes.count)) }
      if has("config-beyond"), asked.offset >= 96 { bytes = [UInt8](repeating: 0x77, count: bytes.count) }
      if has("config-size"), sessionNumber > 1 { bytes = Array(bytes.dropLast()) }
      reply(request, ConfigMessage(offset: asked.offset, bytes: bytes).encoded)
      return true
    case .setConfig(let config):
      if has("config-writable") {
        disk.staleBase = 0xC0FF
        break
      }
      guard config.offset == 32, config.bytes.count == 1, device == .block else { throw Refused(why: "not writable") }
      if !has("write-cache-stuck") { disk.writeback = config.bytes[0] & 1 }
    case .getInflightFD(let wanted):
      if has("inflight-refused") {
        reply(request, InflightDescription(size: 0, mapOffset: 0, queueCount: wanted.queueCount, queueSize: wanted.queueSize).encoded)
        return true
      }
      let one = UInt64(InflightRegion.byteCount(size: wanted.queueSize, packed: features.contains(.packedRing)))
      let size = has("inflight-small") ? 64 : UInt64(wanted.queueCount) * one
      guard size <= 1 << 22 else { throw Closed() }
      let area = InflightDescription(size: size, mapOffset: 0, queueCount: wanted.queueCount, queueSize: wanted.queueSize)
      let fd = try SharedMemory.sealed(name: "broken-inflight", byteCount: size)
      reply(request, area.encoded, descriptor: fd.rawValue)
      return true
    case .setInflightFD(let area):
      guard let fd = fds.takeFirst(), try fd.status().byteCount >= area.mapOffset + area.size,
        area.size >= UInt64(area.queueCount) * (16 * UInt64(area.queueSize) + 16)
      else { throw Refused(why: "the area is too small") }
      inflight = (try MemoryMapping.shared(fd, offset: 0, byteCount: Int(area.mapOffset + area.size)), area)
    case .setLogBase(let description):
      guard !has("log-refused"), let fd = fds.takeFirst(), try fd.status().byteCount >= description.mapOffset + description.size else {
        throw Closed()
      }
      log = try MemoryMapping.shared(fd, offset: 0, byteCount: Int(description.mapOffset + description.size))
      reply(request, description.encoded)
      return true
    case .resetDevice:
      if has("reset-closes") { throw Closed() }
      if has("reset-runs") { break }
      for ring in rings {
        _ = stop(ring)
        ring.size = 0
        ring.address = nil
        ring.base = 0
        ring.isEnabled = false
      }
    case .setStatus(let value): status = has("status-lost") ? 0 : value
    case .getStatus:
      reply(request, number(status))
      return true
    case .setBackEndRequestFD:
      if has("channel-refused") { throw Refused(why: "no channel") }
      channel = fds.takeFirst()
    case .setLogFD: if has("log-fd-refused") { throw Refused(why: "no eventfd for the log") }
    case .vringKick(let state):
      let ring = try ring(state.index)
      if !has("inband-deaf") { ring.wasKicked = true }
    case .gpuSetSocket:
      guard device == .gpu, !has("gpu-refused") else { throw Closed() }
    case .createCryptoSession(let bytes):
      let session: UInt64 = has("crypto-invented") ? 3 : .max
      reply(request, Array(bytes.dropLast(8)) + number(session))
      return true
    case .closeCryptoSession: if has("crypto-close-ends") { throw Closed() }
    case .postcopyListen: if has("listen-refused") { throw Refused(why: "nothing to listen to") }
    case .setDeviceStateFD(let transfer):
      guard let fd = fds.takeFirst() else { throw Closed() }
      if has("state-endless") { leaked.append(dup(fd.rawValue)) }
      stateCode = 0
      if transfer.direction == .load {
        loading = consume fd
      } else {
        try fd.writeAll(Self.state)
      }
      reply(request, number(0x100))
      return true
    case .checkDeviceState:
      if let fd = loading.take() { stateCode = try fd.readToEnd(limit: 4096) == Self.state && !has("state-lost") ? 0 : 1 }
      reply(request, number(stateCode))
      return true
    case .sendRARP, .netSetMTU:
      if has(request == 19 ? "rarp-refused" : "mtu-refused") { throw Refused(why: "not today") }
    case .iotlb(let entry):
      // Answered whether or not it is asked to be; a number of its own.
      if has("iotlb-refused") {
        reply(request, number(22))
        return true
      }
      try translate(entry)
      reply(request, number(0))
      return true
    case .setVringEndian(let state):
      _ = try ring(state.index)
      if has("endian-refused") { throw Refused(why: "no endianness") }
    case .postcopyAdvise:
      let fd = try EventFD()
      reply(request, [], descriptor: has("postcopy-empty") ? nil : fd.fd.rawValue)
      return true
    case .postcopyEnd:
      reply(request, number(has("postcopy-fails") ? 5 : 0))
      return true
    case .getSharedObject:
      reply(request, number(has("object-invented") ? 0 : 1))
      return true
    case .getShmemConfig:
      if has("accept-overflow") { break }
      reply(request, [UInt8](repeating: has("regions-wrong") ? 1 : 0, count: 2056))
      return true
    default: throw Closed()
    }
    return false
  }

  /// What a stopped device would take elsewhere.
  static let state = Array("state of a broken back end".utf8)
}

/// Received descriptor numbers, closed when nobody takes them.
struct ReceivedFDs: ~Copyable {
  private var numbers: [CInt]
  init(_ numbers: [CInt]) { self.numbers = numbers }
  var count: Int { numbers.count }
  mutating func takeFirst() -> OwnedFD? { numbers.isEmpty ? nil : OwnedFD(owning: numbers.removeFirst()) }
  deinit { for number in numbers { _ = close(number) } }
}
