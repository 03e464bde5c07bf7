import CLinux
import Glibc
import HostSystem
import VMMemory
import VhostUser
import VirtioQueue
import VirtioSpec

/// What outlives connections.
struct Disk {
  var bytes = [UInt8](repeating: 0x11, count: 8 << 20)
  var staleBase: UInt32?
  var writeback: UInt8 = 1
}

struct Closed: Error {}

/// A region that the front end shares, and its file.
final class Shared {
  let description: RegionDescription
  let region: MemoryRegion
  let file: OwnedFD

  init(_ description: RegionDescription, _ region: MemoryRegion, _ file: consuming OwnedFD) {
    self.description = description
    self.region = region
    self.file = file
  }
}

/// One ring as the front end described it.
final class Ring {
  var size: UInt32 = 0
  var base: UInt32 = 0
  var address: VringAddress?
  var kick: OwnedFD?
  var call: OwnedFD?
  var oldCall: OwnedFD?
  var queue: Virtqueue?
  var isEnabled = false
  var isStarted = false
  var done: UInt32 = 0
  var wasKicked = false
  /// For translations of its own place.
  var isWaiting = false
}

/// One front end, from its connection to its end.
final class Session {
  private let socket: OwnedFD
  let device: DeviceID
  var disk: Disk
  private let number: Int
  private(set) var protocolFeatures: ProtocolFeatures = []
  private(set) var features: FeatureSet = []
  private var regions: [Shared] = []
  private var memory: GuestMemory?
  let rings: [Ring]
  private var status: UInt64 = 0
  private var log: MemoryMapping?
  private var inflight: (mapping: MemoryMapping, area: InflightDescription)?
  private var leaked: [CInt] = []
  private var configReads = 0
  private var chain = DescriptorChain(capacity: 2048)
  private var inbox: [UInt8] = []
  private var inboxFDs: [CInt] = []
  /// For requests of our own.
  private var channel: OwnedFD?
  /// With ACCESS_PLATFORM: pages of the front end's that we have been told of.
  var translation = Translation()
  /// Control messages of a console that wait for a buffer.
  var announcements: [[UInt8]] = []

  init(_ socket: consuming OwnedFD, _ device: DeviceID, _ disk: Disk, _ number: Int) {
    self.socket = socket
    self.device = device
    self.disk = disk
    self.number = number
    rings = (0..<(device == .console ? 6 : 4)).map { _ in Ring() }
  }

  // MARK: What is offered

  var offered: FeatureSet {
    var features: FeatureSet = [.version1, .indirectDescriptors, .eventIndex, .packedRing, .vhostUserProtocolFeatures, .vhostLogAll]
    if device == .block {
      features.formUnion([
        .blockFlush, .blockBlockSize, .blockSegMax, .blockSizeMax, .blockMultipleQueues, .blockDiscard, .blockWriteZeroes,
        .blockConfigWriteCache,
      ])
      if has("read-only") { features.insert(.blockReadOnly) }
      if has("wce-alone") { features.remove(.blockFlush) }
    }
    if device == .net { features.insert([.netMAC, .netChecksum, .netHostTSO4, .netStatus, .netMultipleQueues, .netControlQueue, .netMTU]) }
    if device == .net, has("dependencies") { features.remove(.netChecksum) }
    if device == .console { features.insert([.consoleSize, .consoleMultiplePorts]) }
    features.insert(.accessPlatform)
    if has("no-version1") { features.remove(.version1) }
    if has("features-change"), number % 2 == 0 { features.remove(.indirectDescriptors) }
    return features
  }

  private var offeredProtocol: ProtocolFeatures {
    var features: ProtocolFeatures = [
      .mq, .replyAck, .config, .inflightShmFD, .resetDevice, .configureMemSlots, .status, .logShmFD, .backEndRequests, .deviceState,
      .backEndSendsFD,
    ]
    if device == .net { features.formUnion([.rarp, .netMTU]) }
    features.formUnion([.crossEndian, .pageFault, .sharedObject, .sharedMemory, .inbandNotifications, .cryptoSession])
    if has("protocol-dependency") {
      features.remove(.backEndRequests)
    }
    return features
  }

  var configuration: [UInt8] {
    var bytes = [UInt8](repeating: 0, count: 256)
    switch device {
    case .block:
      var config = BlockConfiguration()
      config.capacity = has("capacity-zero") ? 0 : UInt64(disk.bytes.count / 512)
      config.sizeMax = has("size-max-zero") ? 0 : 1 << 20
      config.segmentMax = has("seg-max-zero") ? 0 : 62
      config.blockSize = has("blk-size-odd") ? 1000 : 512
      config.queueCount = has("queues-zero") ? 0 : 4
      config.writeback = disk.writeback
      config.maxDiscardSectors = has("discard-zero") ? 0 : 1024
      config.maxDiscardSegments = 1
      config.discardSectorAlignment = 1
      config.maxWriteZeroesSectors = has("write-zeroes-zero") ? 0 : 1024
      config.maxWriteZeroesSegments = 1
      bytes.replaceSubrange(0..<96, with: config.encoded())
    case .net:
      bytes.replaceSubrange(0..<6, with: has("mac-group") ? [3, 0, 0, 0, 0, 1] : [2, 0, 0, 0, 0, 1])
      bytes[6] = has("status-odd") ? 0xF1 : 1
      bytes[8] = has("pairs-zero") ? 0 : has("pairs-many") ? 200 : 2
      bytes.replaceSubrange(10..<12, with: has("mtu-small") ? [20, 0] : [0xDC, 5])
    case .console: bytes.replaceSubrange(0..<8, with: has("console-ports") ? [80, 0, 25, 0, 0, 0, 0, 0] : [80, 0, 25, 0, 2, 0, 0, 0])
    case .fileSystem:
      if !has("tag-empty") { bytes.replaceSubrange(0..<4, with: Array("test".utf8)) }
      bytes[36] = has("fs-queues") ? 0 : 1
    default: break
    }
    if has("config-changes") {
      configReads += 1
      bytes[20] = UInt8(truncatingIfNeeded: configReads)
    }
    if disk.staleBase == 0xC0FF { bytes[0] ^= 0xFF }
    return bytes
  }

  // MARK: The loop

  func run() {
    Habits.begin()
    do {
      while true {
        try wait()
        while let message = try nextMessage() { try handle(message.0, message.1, message.2) }
        for ring in rings { process(ring) }
      }
    } catch {
      if has("leak-descriptors") { leaked += rings.compactMap { $0.kick.take()?.release() } }
    }
    for number in inboxFDs { _ = close(number) }
    Habits.note("\(kicks) kicks")
    Habits.end()
  }

  private var kicks: UInt64 = 0

  private func wait() throws {
    var entries = [pollfd(fd: socket.rawValue, events: Int16(POLLIN), revents: 0)]
    var owners: [Ring] = []
    for ring in rings where ring.isStarted {
      if let number = ring.kick?.rawValue {
        entries.append(pollfd(fd: number, events: Int16(POLLIN), revents: 0))
        owners.append(ring)
      }
    }
    if poll(&entries, nfds_t(entries.count), 1000) < 0 { return }
    for (entry, ring) in zip(entries.dropFirst(), owners) where entry.revents != 0 {
      var value: UInt64 = 0
      _ = read(entry.fd, &value, 8)
      kicks &+= value
      if has("kick-spurious"), ring.queue?.hasAvailable() == false { abort() }
      ring.wasKicked = true
    }
    if entries[0].revents != 0 { try fill() }
  }

  private func fill() throws {
    let buffer = UnsafeMutableRawBufferPointer.allocate(byteCount: 65536, alignment: 16)
    defer { buffer.deallocate() }
    var reception = UnixSocket.receive(socket, into: buffer, descriptorLimit: 32, waiting: false)
    while let fd = reception.descriptors.takeFirst() { inboxFDs.append(fd.release()) }
    if reception.truncated { try violation("descriptors were cut off") }
    switch reception.transfer {
    case .bytes(let count):
      if has("pieces"), count < 12, inbox.isEmpty { throw Closed() }
      inbox += buffer[..<count]
    case .wouldBlock: return
    default:
      if !inbox.isEmpty { try violation("the end came in the middle of a message") }
      throw Closed()
    }
  }

  private func nextMessage() throws -> (MessageHeader, [UInt8], [CInt])? {
    guard inbox.count >= 12 else { return nil }
    let header = try MessageHeader(decoding: inbox.prefix(12))
    do { try header.checkRequest() } catch { try violation("\(error)") }
    guard let request = FrontEndRequest(rawValue: header.request) else {
      if has("accept-unknown") {
        inbox.removeFirst(12)
        reply(header.request, zero)
        return nil
      }
      try violation("unknown request")
      throw Closed()
    }
    if !request.rules.size.allows(Int(header.size)) { try violation("wrong size") }
    guard inbox.count >= 12 + Int(header.size) else { return nil }
    let payload = Array(inbox[12..<12 + Int(header.size)])
    inbox.removeFirst(12 + Int(header.size))
    let fds = inboxFDs
    inboxFDs = []
    Habits.note("\(header.encoded.map(Int.init)) \(payload) \(fds.map(Self.nature))")
    return (header, payload, fds)
  }

  /// The front end broke the protocol: a good back end closes the connection.
  private func violation(_ why: String) throws {
    Habits.stray()
    if has("abort-malformed") { abort() }
    if has("hang-malformed") { while true { pause() } }
    if has("leak-malformed") { for _ in 0..<8 { leaked.append(dup(0)) } }
    throw Closed()
  }

  /// Size and seals of what was passed.
  private static func nature(_ number: CInt) -> String {
    var status = stat()
    fstat(number, &status)
    return "\(status.st_mode & 0o170000) \(status.st_size) \(clinux_fcntl(number, 1034, 0))"
  }

  private var zero: [UInt8] { [UInt8](repeating: 0, count: 8) }

  // MARK: Replies

  func reply(_ request: UInt32, _ payload: [UInt8], flags: UInt32 = 5, descriptor: CInt? = nil) {
    var flags = flags
    if has("reply-flags") { flags |= 8 }
    let header = MessageHeader(request: request, flags: MessageFlags(rawValue: flags), size: UInt32(payload.count))
    _ = UnixSocket.send(socket, header.encoded + payload, descriptors: descriptor.map { [$0] } ?? [])
  }

  private func number(_ value: UInt64) -> [UInt8] { (0..<8).map { UInt8(truncatingIfNeeded: value >> UInt64(8 * $0)) } }

  private func handle(_ header: MessageHeader, _ payload: [UInt8], _ numbers: [CInt]) throws {
    var fds = ReceivedFDs(numbers)
    let message: FrontEndMessage
    do {
      message = try decode(header, payload)
      if !has("accept-overflow") { try message.checkDescriptorCount(fds.count) }
    } catch {
      // With an acknowledgement asked for, saying no is enough for values; framing is over.
      let asked = header.flags.contains(.needReply) && protocolFeatures.contains(.replyAck)
      if has("abort-malformed") || has("hang-malformed") || has("leak-malformed") || !asked { try violation("\(error)") }
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
      if has("abort-malformed") || has("hang-malformed") || has("leak-malformed") { try violation(refusal.why) }
      if !asked { throw Closed() }
      reply(header.request, number(22))
    }
  }

  struct Refused: Error { let why: String }

  private func decode(_ header: MessageHeader, _ payload: [UInt8]) throws -> FrontEndMessage {
    guard let request = FrontEndRequest(rawValue: header.request) else { throw Closed() }
    if request == .setVringNum, has("accept-zero") || has("accept-huge") { return .setVringNum(try VringState(decoding: payload)) }
    if request == .setMemTable, has("accept-overflow") {
      if (try? FrontEndMessage(request: request, payload: payload)) == nil { return .getShmemConfig }
    }
    return try FrontEndMessage(request: request, payload: payload)
  }

  private func ring(_ index: UInt32) throws -> Ring {
    if has("accept-wide"), index >= 0x1_0000 { return rings[Int(index & 0xFFFF) % rings.count] }
    if has("accept-index"), index < 0x1_0000 { return rings[Int(index) % rings.count] }
    guard index < rings.count else { throw Refused(why: "ring \(index)") }
    return rings[Int(index)]
  }

  /// Does what is asked; true when a reply was sent.
  private func perform(_ message: FrontEndMessage, _ header: MessageHeader, _ fds: inout ReceivedFDs) throws -> Bool {
    let request = header.request
    switch message {
    case .getFeatures:
      if has("features-first"), !hasOwner { throw Closed() }
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
      reply(request, number(has("queue-count-zero") ? 0 : has("port-queues") ? 4 : UInt64(rings.count)))
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
      var bytes = Array(configuration[Int(asked.offset)..<Int(asked.offset) + asked.bytes.count])
      if has("config-part") { bytes = Array(configuration.prefix(asked.bytes.count)) }
      if has("config-beyond"), asked.offset >= 96 { bytes = [UInt8](repeating: 0x77, count: bytes.count) }
      if has("config-size") { bytes = Array(bytes.dropLast()) }
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
  private static let state = Array("state of a broken back end".utf8)
  private var loading: OwnedFD?
  private var stateCode: UInt64 = 0
  private var hasOwner = false
  private var featureQuestions = 0

  // MARK: Memory and rings

  private func map(_ region: RegionDescription, _ fds: inout ReceivedFDs) throws -> Shared {
    guard let fd = fds.takeFirst() else { throw Refused(why: "no descriptor") }
    var guest = region.guestAddress
    if has("high") { guest &= 0xFFFF_FFFF }
    do {
      let mapped = try MemoryRegion.mapping(
        fd, guestAddress: GuestAddress(guest), byteCount: region.size, frontEndAddress: region.userAddress, fileOffset: region.mapOffset,
        allowUnsealed: true)
      return Shared(region, mapped, fd)
    } catch { throw Refused(why: "\(error)") }
  }

  private func remap() throws {
    do { memory = try GuestMemory(regions: regions.map(\.region)) } catch { throw Refused(why: "\(error)") }
    guard let memory else { return }
    for ring in rings where ring.queue != nil {
      do { try ring.queue?.replaceMemory(memory) } catch {
        ring.queue = nil
        ring.isStarted = false
        throw Refused(why: "\(error)")
      }
    }
  }

  private func configuration(_ ring: Ring, _ address: VringAddress) throws -> VirtqueueConfiguration {
    let isTranslated = features.contains(.accessPlatform)
    guard let memory = present, ring.size > 0, ring.size <= 32768,
      let descriptors = isTranslated
        ? GuestAddress(address.descriptorTable) : memory.guestAddress(ofFrontEnd: address.descriptorTable, byteCount: 1),
      let driver = isTranslated
        ? GuestAddress(address.availableRing) : memory.guestAddress(ofFrontEnd: address.availableRing, byteCount: 1),
      let device = isTranslated ? GuestAddress(address.usedRing) : memory.guestAddress(ofFrontEnd: address.usedRing, byteCount: 1)
    else { throw Refused(why: "the ring is not in memory") }
    var features = self.features
    if has("no-indirect") { features.remove(.indirectDescriptors) }
    if has("no-event-index") { features.remove(.eventIndex) }
    let configuration = VirtqueueConfiguration(
      size: UInt16(ring.size), descriptors: descriptors, driver: driver, device: device, features: features,
      base: VringBase(rawValue: ring.base))
    do {
      _ = try Virtqueue(
        VirtqueueConfiguration(
          size: UInt16(ring.size), descriptors: descriptors, driver: driver, device: device, features: features, base: nil), memory: memory)
    } catch VirtqueueError.base {
    } catch { throw Refused(why: "\(error)") }
    return configuration
  }

  /// With ACCESS_PLATFORM a ring whose pages are not known yet starts when they are.
  private func start(_ ring: Ring) throws {
    if features.contains(.accessPlatform), !has("iotlb-deaf"), let address = ring.address {
      let missing = translation.missing(ring: address, size: ring.size)
      ring.isWaiting = !missing.isEmpty
      for page in missing { miss(page) }
      if ring.isWaiting { return }
    }
    guard let memory = present, let address = ring.address else { throw Refused(why: "the ring is not described") }
    let configuration = try configuration(ring, address)
    do { ring.queue = try Virtqueue(configuration, memory: memory, inflight: inflightRegion(ring)) } catch {
      throw Refused(why: "\(error)")
    }
    ring.isStarted = true
    ring.wasKicked = !has("start-waits")
    if features.contains(.accessPlatform) { ring.wasKicked = true }
    if has("start-skips"), !configuration.isPacked {
      // Pretends that what lies there is done.
      var lost = DescriptorChain(capacity: 64)
      while case .chain = ring.queue?.next(&lost) {}
    }
  }

  /// What addresses in the ring mean: guest memory, or the pages we know.
  private var present: GuestMemory? { features.contains(.accessPlatform) && !has("iotlb-deaf") ? translation.memory : memory }

  /// An entry is there, or gone.
  private func translate(_ entry: IOTLBMessage) throws {
    switch entry.kind {
    case .update:
      guard let place = memory?.guestAddress(ofFrontEnd: entry.userAddress, byteCount: entry.size),
        let shared = regions.first(where: { place.rawValue &- $0.description.guestAddress < $0.description.size })
      else { throw Refused(why: "no memory behind that") }
      let offset = shared.description.mapOffset + place.rawValue - shared.description.guestAddress
      try translation.add(entry, shared.file, offset: offset)
    case .invalidate: if !has("iotlb-stale") { try translation.remove(entry) }
    default: throw Refused(why: "no entry")
    }
    guard let pages = translation.memory else { return }
    for ring in rings {
      if ring.isWaiting { try start(ring) } else { try? ring.queue?.replaceMemory(pages) }
      ring.wasKicked = true
    }
  }

  /// Asks the front end for a page.
  private func miss(_ page: UInt64) {
    guard translation.asks(page) else { return }
    ask(.iotlb(IOTLBMessage(iova: page, size: Translation.pageSize, userAddress: 0, permission: 3, kind: .miss)))
  }

  /// Says something on our own channel.
  func ask(_ message: BackEndMessage) {
    guard let number = channel?.rawValue else { return }
    let bytes = message.header().encoded + message.payload
    _ = bytes.withUnsafeBytes { write(number, $0.baseAddress, $0.count) }
  }

  private func stop(_ ring: Ring) -> UInt32 {
    var base = ring.queue?.base.rawValue ?? ring.base
    if has("base-zero") { base = 0 }
    if has("base-packed"), features.contains(.packedRing) { base &= 0xFFFF }
    if has("stale"), ring.queue == nil, ring.base == 0, let stale = disk.staleBase { base = stale }
    if has("stop-twice"), ring.queue == nil { base += 1 }
    if has("resume-loses"), ring.queue != nil { base += 1 }
    if has("stop-runs") { return base }
    ring.queue = nil
    ring.isStarted = false
    ring.isWaiting = false
    ring.kick = nil
    ring.call = nil
    ring.base = base
    return base
  }

  // MARK: Requests

  private func process(_ ring: Ring) {
    guard ring.isStarted, ring.isEnabled, ring.wasKicked || has("polls") else { return }
    ring.wasKicked = false
    guard let index = rings.firstIndex(where: { $0 === ring }) else { return }
    if has("last-queue"), index == rings.count - 1 { return }
    if has("queues-one"), rings.firstIndex(where: \.isStarted) != index { return }
    if device == .console, features.contains(.consoleMultiplePorts), index == 2 || index == 4 {
      if index == 2 { announce(ring) }
      return
    }
    if device != .block, device != .entropy, index == 0 {
      guard has("receive-uses"), case .chain? = ring.queue?.next(&chain) else { return }
      ring.queue?.complete(chain.token, written: 3 + (device == .console ? 1000 : 0))
      _ = ring.queue?.publish()
      return
    }
    if has("packed-dead"), features.contains(.packedRing) { return }
    if has("split-dead"), !features.contains(.packedRing) { return }
    var turns = 0
    while turns < 100_000 {
      turns += 1
      if features.contains(.accessPlatform), let queue = ring.queue?.base.rawValue, let address = ring.address {
        let missing = translation.missing(next: UInt16(truncatingIfNeeded: queue), of: address, size: UInt16(ring.size))
        for page in missing { miss(page) }
        if !missing.isEmpty { return }
      }
      let outcome = ring.queue?.next(&chain) ?? .empty
      switch outcome {
      case .chain:
        let written = serve(index)
        let token = chain.token
        let head = token.head
        if has("wrap"), ring.done >= 20 { return }
        ring.done += 1
        ring.queue?.complete(token, written: written)
        let wantsCall = ring.queue?.publish() ?? false
        if let inflight { spoil(inflight.mapping, inflight.area, index, head) }
        if has("dies-early"), ring.done == 300 { abort() }
        if has("answers-twice"), ring.done == 50 { answerAgain(ring) }
        if wantsCall { call(ring, index) }
        if device == .console, index == 3, features.contains(.consoleMultiplePorts) { announce(rings[2]) }
      case .empty:
        if ring.queue?.enableKicks() != true { return }
      case .broken:
        Habits.stray()
        if has("abort-malformed") { abort() }
        if has("hang-malformed") { while true { pause() } }
        if has("leak-malformed") { for _ in 0..<8 { leaked.append(dup(0)) } }
        return
      }
    }
  }

  private func call(_ ring: Ring, _ index: Int) {
    if has("no-call") { return }
    if let number = ring.call?.rawValue {
      var one: UInt64 = 1
      _ = write(number, &one, 8)
    } else if protocolFeatures.contains(.inbandNotifications), !has("inband-mute") {
      ask(.vringCall(VringState(index: UInt32(index), number: 0)))
    }
  }

  /// The last used element once more (split rings).
  private func answerAgain(_ ring: Ring) {
    guard let memory, let device = ring.queue?.configuration.device.rawValue,
      let index = memory.load(UInt16.self, at: GuestAddress(device + 2))
    else { return }
    let size = UInt16(ring.size)
    guard let element = memory.load(UInt64.self, at: GuestAddress(device + 4 + 8 * UInt64((index &- 1) % size))) else { return }
    _ = memory.store(element, at: GuestAddress(device + 4 + 8 * UInt64(index % size)))
    _ = memory.store(index &+ 1, at: GuestAddress(device + 2))
  }

  /// Gives the driver the control messages that wait, as far as there are buffers.
  private func announce(_ ring: Ring) {
    guard ring.isStarted, ring.isEnabled else { return }
    while let message = announcements.first, case .chain? = ring.queue?.next(&chain) {
      announcements.removeFirst()
      let count = message.withUnsafeBytes { chain.put($0) }
      ring.queue?.complete(chain.token, written: UInt32(count))
      if ring.queue?.publish() == true { call(ring, 2) }
    }
    _ = ring.queue?.enableKicks()
  }

  /// What is wrong with the record, if anything is.
  private func spoil(_ mapping: MemoryMapping, _ area: InflightDescription, _ index: Int, _ head: UInt16) {
    guard index < Int(area.queueCount) else { return }
    let start = Int(area.mapOffset) + Int(area.size) / Int(area.queueCount) * index
    if has("inflight-marks") { mapping.baseAddress.storeBytes(of: 1, toByteOffset: start + 16, as: UInt8.self) }
    if has("inflight-version") { mapping.baseAddress.storeBytes(of: 2, toByteOffset: start + 8, as: UInt16.self) }
    if features.contains(.packedRing) {
      if has("inflight-place") { mapping.baseAddress.storeBytes(of: 9, toByteOffset: start + 18, as: UInt16.self) }
      if has("inflight-list") { mapping.baseAddress.storeBytes(of: 0, toByteOffset: start + 34, as: UInt16.self) }
      if has("inflight-copies") {
        for entry in 1...64 { mapping.baseAddress.storeBytes(of: 0, toByteOffset: start + 32 * entry + 24, as: UInt64.self) }
      }
      return
    }
    if has("inflight-head") { mapping.baseAddress.storeBytes(of: 63, toByteOffset: start + 12, as: UInt16.self) }
    if has("inflight-counter") { mapping.baseAddress.storeBytes(of: 7, toByteOffset: start + 24 + 16 * Int(head), as: UInt64.self) }
  }

  /// Where this ring's part of the inflight area is, when there is one.
  private func inflightRegion(_ ring: Ring) -> InflightRegion? {
    guard let (mapping, area) = inflight, !has("inflight-clear"), !has("inflight-forgets"),
      let index = rings.firstIndex(where: { $0 === ring }), index < Int(area.queueCount)
    else { return nil }
    let stride = Int(area.size) / Int(area.queueCount)
    return InflightRegion(mapping, offset: Int(area.mapOffset) + stride * index, byteCount: stride)
  }

  private func serve(_ index: Int) -> UInt32 {
    let answer: [UInt8]
    if has("framing"), chain.readable.count + chain.writable.count > 3 || chain.readable.count > 2 { return 0 }
    var readable = [UInt8](repeating: 0, count: chain.readableByteCount)
    readable.withUnsafeMutableBytes { chain.takeReadable(into: $0) }
    Habits.note("chain \(readable.count) \(Habits.digest(readable)) \(chain.writable.count) \(chain.writableByteCount)")
    switch device {
    case .block: answer = block(readable, chain.writableByteCount)
    case .fileSystem: answer = fuse(readable, chain.writableByteCount)
    case .entropy:
      if has("rng-abort"), !readable.isEmpty { abort() }
      if has("rng-empty") { return 0 }
      answer = (0..<chain.writableByteCount).map { has("rng-same") ? UInt8(truncatingIfNeeded: $0) : .random(in: 0...255) }
    case .console where index == 3 && features.contains(.consoleMultiplePorts):
      control(readable)
      return 0
    default: return transmit(readable, index)
    }
    let count = answer.withUnsafeBytes { chain.put($0) }
    touch()
    if device == .block, has("read-length"), count > 1 { return UInt32(count - 1) }
    return UInt32(count)
  }

  private func transmit(_ readable: [UInt8], _ index: Int) -> UInt32 {
    if has("port-transmit"), index == 5 { return UInt32(readable.count) }
    if has("transmit-length") { return UInt32(readable.count) }
    if has("transmit-abort"), readable.isEmpty || readable.count < 26 || readable.first == 0xFF {
      if device == .net || readable.isEmpty { abort() }
    }
    return 0
  }

  private func fuse(_ readable: [UInt8], _ room: Int) -> [UInt8] {
    if readable.count < 40 || room < 16 {
      if has("fuse-abort") { abort() }
      return []
    }
    let operation = readable[4]
    let unique = Array(readable[8..<16])
    if operation == 26, readable[5] == 0 {
      let body = [7, 0, 0, 0, 31, 0, 0, 0] + [UInt8](repeating: 0, count: 56)
      return [80, 0, 0, 0, 0, 0, 0, 0] + (has("fuse-unique") ? zero : unique) + body
    }
    let error: Int32 = has("fuse-accepts") ? 0 : -38
    return [16, 0, 0, 0] + (0..<4).map { UInt8(truncatingIfNeeded: error >> Int32(8 * $0)) } + unique
  }

  /// Marks what was written in the dirty log: all of it, which is more than needed, and never wrong.
  private func touch() {
    guard let log, features.contains(.vhostLogAll), !has("log-nothing") else { return }
    let limit = min(log.byteCount, has("log-everything") ? log.byteCount : 4096)
    memset(log.baseAddress, 0xFF, limit)
  }
}

/// Received descriptor numbers, closed when nobody takes them.
struct ReceivedFDs: ~Copyable {
  private var numbers: [CInt]
  init(_ numbers: [CInt]) { self.numbers = numbers }
  var count: Int { numbers.count }
  mutating func takeFirst() -> OwnedFD? { numbers.isEmpty ? nil : OwnedFD(owning: numbers.removeFirst()) }
  deinit { for number in numbers { _ = close(number) } }
}
