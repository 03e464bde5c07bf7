import Glibc
import HostSystem
import VirtioSpec

@testable import VhostUser

// Both ends of vhost-user, each fed by a hostile peer through a real socket with real descriptors.

let frontEndMessages = Target(
  name: "frontend-messages", about: "a back end's session: requests of a hostile front end, with descriptors", seeds: frontEndSeeds,
  run: attackBackEnd)

let backEndMessages = Target(
  name: "backend-messages", about: "a front end's session: answers and own messages of a hostile back end, with descriptors",
  seeds: backEndSeeds, run: attackFrontEnd)

private let offer = BackEndOffer(
  features: [.version1, .indirectDescriptors, .eventIndex, .packedRing, .vhostLogAll], protocolFeatures: BackEndOffer.implemented,
  queueCount: 3, maximumQueueSize: 256, maximumMemorySlots: 12)

/// Descriptors of every kind, made once.
private struct Attachments: Sendable {
  let numbers: [CInt]
  init() {
    let memory = sure { try SharedMemory.sealed(name: "fuzz", byteCount: 1 << 20) }
    let small = sure { try SharedMemory.sealed(name: "fuzz", byteCount: 512) }
    let event = sure { try EventFD() }
    let pair = sure { try UnixSocket.pair(.stream) }
    // They stay for the process's life.
    numbers = [
      memory.release(), small.release(), sure { try event.fd.duplicate() }.release(), sure { try pair.first.duplicate() }.release(),
      sure { try OwnedFD.open("/dev/null", 2) }.release(),
    ]
  }
}
private let attachments = Attachments()

// MARK: A request as a script has it

/// `how`: bits 0 to 5 choose the request (63: any number), bit 6 asks for an acknowledgement, bit 7 bends what comes out.
private func request(_ script: inout Script) -> (bytes: [UInt8], descriptors: [CInt]) {
  let how = script.byte()
  let number = how & 63
  guard let request = FrontEndRequest(rawValue: UInt32(number)) else {
    let header = MessageHeader(request: UInt32(truncatingIfNeeded: script.number()), flags: flags(&script), size: UInt32(script.byte()))
    return (header.encoded + script.take(Int(header.size)), descriptors(&script, 0...3))
  }
  let message = sound(request, &script)
  var payload = message?.payload ?? script.take(Int(script.byte()))
  var header = MessageHeader(
    request: request.rawValue, flags: how & 64 != 0 ? [.version1, .needReply] : .version1, size: UInt32(payload.count))
  var count = message?.descriptorCounts ?? 0...1
  if how & 128 != 0 {
    switch script.byte() % 5 {
    case 0: header.flags = flags(&script)
    case 1: header.size = UInt32(truncatingIfNeeded: script.number())
    case 2: if !payload.isEmpty { payload[script.below(payload.count)] = script.byte() }
    case 3: count = 0...Int(script.byte() % 34)
    default:
      payload += script.take(Int(script.byte() & 15))
      header.size = UInt32(payload.count)
    }
  }
  return (header.encoded + payload, descriptors(&script, count))
}

private func flags(_ script: inout Script) -> MessageFlags {
  MessageFlags(rawValue: script.byte() & 1 == 0 ? UInt32(script.byte()) : UInt32(truncatingIfNeeded: script.number()))
}

private func descriptors(_ script: inout Script, _ counts: ClosedRange<Int>) -> [CInt] {
  guard counts.upperBound > 0 else { return [] }
  let choice = script.byte()
  let count = counts.lowerBound + Int(choice >> 3) % (counts.count)
  return (0..<count).map { attachments.numbers[(Int(choice & 7) + ($0 == 0 ? 0 : $0)) % attachments.numbers.count] }
}

private let user: UInt64 = 0x7F00_0000_0000

private func region(_ script: inout Script, _ index: Int) -> RegionDescription {
  let how = script.byte()
  let start = UInt64(index) << 16
  if how & 0xC0 != 0xC0 {
    return RegionDescription(guestAddress: start, size: 1 << 16, userAddress: user + start, mapOffset: start & 0x7_0000)
  }
  return RegionDescription(
    guestAddress: script.number(), size: script.number(), userAddress: script.number(), mapOffset: script.number())
}

/// A message that is mostly well-formed, so that it gets past the framing. Nil: bytes of the script's.
private func sound(_ request: FrontEndRequest, _ script: inout Script) -> FrontEndMessage? {
  let index = UInt32(script.byte() % 4)
  func event() -> VringEvent { VringEvent(index: UInt8(index), carriesDescriptor: script.byte() & 7 != 0) }
  switch request {
  case .getFeatures: return .getFeatures
  case .setFeatures:
    let choice = script.byte()
    var features: FeatureSet = [.version1, .vhostUserProtocolFeatures]
    if choice & 1 != 0 { features.insert(.packedRing) }
    if choice & 2 != 0 { features.insert(.eventIndex) }
    if choice & 4 != 0 { features.insert(.vhostLogAll) }
    if choice & 8 != 0 { features.remove(.vhostUserProtocolFeatures) }
    if choice & 0xF0 == 0xF0 { features = FeatureSet(rawValue: script.u64()) }
    return .setFeatures(features)
  case .setOwner: return .setOwner
  case .resetOwner: return .resetOwner
  case .setMemTable: return .setMemTable(RegionTable(regions: (0...Int(script.byte() % 10)).map { region(&script, $0) }))
  case .setVringNum: return .setVringNum(VringState(index: index, number: script.bool() ? 64 : UInt32(truncatingIfNeeded: script.number())))
  case .setVringAddr:
    let start = user + UInt64(index) * 0x3000
    var address = VringAddress(
      index: index, flags: UInt32(script.byte() & 1), descriptorTable: start, availableRing: start + 0x1000, usedRing: start + 0x2000)
    switch script.byte() % 5 {
    case 0: address.descriptorTable = script.number()
    case 1: address.usedRing = user &+ script.number()
    case 2: address.availableRing = user + 0x10000 &- UInt64(script.byte())
    default: break
    }
    return .setVringAddr(address)
  case .setVringBase: return .setVringBase(VringState(index: index, number: script.bool() ? 0 : script.u32()))
  case .getVringBase: return .getVringBase(VringState(index: index, number: UInt32(script.byte() & 1)))
  case .setVringKick: return .setVringKick(event())
  case .setVringCall: return .setVringCall(event())
  case .setVringErr: return .setVringErr(event())
  case .getProtocolFeatures: return .getProtocolFeatures
  case .setProtocolFeatures:
    return .setProtocolFeatures(script.byte() & 7 != 7 ? BackEndOffer.implemented : ProtocolFeatures(rawValue: script.number()))
  case .getQueueNum: return .getQueueNum
  case .setVringEnable: return .setVringEnable(VringState(index: index, number: UInt32(script.byte() & 1)))
  case .sendRARP: return .sendRARP(script.u64())
  case .netSetMTU: return .netSetMTU(UInt64(script.u16()))
  case .setBackEndRequestFD: return .setBackEndRequestFD
  case .getConfig, .setConfig:
    // Small, or so large that a sum wraps.
    let offset = script.byte() & 7 == 0 ? UInt32.max - UInt32(script.byte()) : UInt32(script.byte())
    let message = ConfigMessage(
      offset: offset, flags: UInt32(script.byte() & 3), bytes: [UInt8](repeating: 7, count: 1 + Int(script.byte())))
    return request == .getConfig ? .getConfig(message) : .setConfig(message)
  case .getInflightFD:
    return .getInflightFD(
      InflightDescription(size: 0, mapOffset: 0, queueCount: UInt16(script.byte() & 3), queueSize: script.u16() & 0x1FF))
  case .setInflightFD:
    return .setInflightFD(
      InflightDescription(
        size: script.bool() ? 4096 : script.number(), mapOffset: script.number(), queueCount: UInt16(script.byte() & 3),
        queueSize: script.u16() & 0x1FF))
  case .resetDevice: return .resetDevice
  case .getMaxMemSlots: return .getMaxMemSlots
  case .addMemReg: return .addMemReg(SingleRegion(region(&script, Int(script.byte() & 15))))
  case .remMemReg: return .remMemReg(SingleRegion(region(&script, Int(script.byte() & 15))))
  case .setStatus: return .setStatus(UInt64(script.byte()))
  case .getStatus: return .getStatus
  case .setLogBase: return .setLogBase(LogDescription(size: script.number(), mapOffset: script.number()))
  case .setLogFD: return .setLogFD
  default: return nil
  }
}

private func frontEndSeeds() -> [[UInt8]] {
  // Owner, protocol features, features, memory; a ring with size, base, address, call, kick, enabled.
  let start: [UInt8] = [0, 3, 0, 0, 16, 0, 0, 0, 2, 0, 0, 0, 5, 0, 0, 0, 0]
  let ring: [UInt8] = [0, 8, 0, 1, 0, 10, 0, 1, 0, 9, 0, 0, 4, 0, 13, 0, 1, 2, 0, 12, 0, 1, 2, 0, 18, 0, 1]
  let slots: [UInt8] = [0, 37, 0, 3, 0, 0, 0, 37, 0, 4, 0, 0, 0, 38, 0, 3, 0, 0]
  let inflight: [UInt8] = [0, 31, 0, 1, 64, 0, 0, 32, 0, 1, 0, 0, 1, 64, 0, 0]
  return [
    start, start + ring, start + ring + [0, 11, 0, 0], start + ring + [0, 64 + 34, 0], start + [0, 24, 0, 0, 0, 3, 0, 25, 0, 1, 0, 3],
    start + inflight + ring, start + slots + ring, start + ring + [0, 64 + 5, 0, 2, 0, 0, 0, 0], start + [0, 21, 0, 3] + ring,
    start + [13] + ring + [0, 11, 0, 0, 0, 34, 0], start + [0, 39, 0, 4, 0, 40, 0, 0, 19, 0, 1, 2, 3, 4, 5, 6, 0, 0, 0, 20, 0, 9, 1],
    [0, 3, 0, 0, 16, 0, 0, 0, 2, 0, 1, 0, 5, 0, 0, 0, 0] + ring,
  ] + vectors().map { [15, UInt8($0.count)] + $0 }
}

/// The messages of `protocol/vectors`, as far as a script can hold them.
private func vectors() -> [[UInt8]] {
  guard let path = getenv("FUZZ_VECTORS"), let file = fopen(path, "r") else { return [] }
  defer { fclose(file) }
  var messages: [[UInt8]] = []
  var line = [CChar](repeating: 0, count: 4096)
  while fgets(&line, CInt(line.count), file) != nil {
    let text = String(decoding: line.prefix { $0 != 0 }.map { UInt8(bitPattern: $0) }, as: UTF8.self)
    if text.hasPrefix("[") { messages.append([]) }
    guard text.hasPrefix("  "), !messages.isEmpty else { continue }
    let digits = Array(text.utf8.filter { $0 > 32 })
    for index in stride(from: 0, to: digits.count - 1, by: 2) {
      messages[messages.count - 1].append(UInt8(String(decoding: digits[index..<index + 2], as: UTF8.self), radix: 16) ?? 0)
    }
  }
  return messages.filter { (1...255).contains($0.count) }
}

// MARK: The back end under attack

private func attackBackEnd(_ script: inout Script) {
  let pair = sure { try UnixSocket.pair(.stream) }
  var backEnd = BackEndConnection(pair.first, offer: offer)
  var device = QuietDevice()
  let frontEnd = pair.second
  var now = MonotonicTime(nanoseconds: 1_000_000_000)
  while !script.isOver {
    let mode = script.byte() & 15
    switch mode {
    case 15:
      // Bytes without any form.
      let bytes = script.take(Int(script.byte()))
      checkIdentity(bytes)
      _ = UnixSocket.send(frontEnd, bytes, descriptors: [], waiting: false)
    case 14: now = now.advanced(by: .milliseconds(Int(script.byte()) * 10))
    case 13: device.drains.toggle()
    case 12:
      device.refuses = true
      fallthrough
    default:
      let (bytes, descriptors) = request(&script)
      checkIdentity(bytes)
      if mode == 11, bytes.count > 1 {
        // In two pieces, the descriptors with the second.
        let cut = script.below(bytes.count - 1) + 1
        _ = UnixSocket.send(frontEnd, Array(bytes[..<cut]), descriptors: [], waiting: false)
        guard serve(&backEnd, &device, now) else { return }
        _ = UnixSocket.send(frontEnd, Array(bytes[cut...]), descriptors: descriptors, waiting: false)
      } else {
        _ = UnixSocket.send(frontEnd, bytes, descriptors: descriptors, waiting: false)
      }
    }
    guard serve(&backEnd, &device, now) else { return }
    drain(frontEnd)
  }
}

/// Lets the back end work; false when it has closed the connection, which then stays closed.
private func serve(_ backEnd: inout BackEndConnection, _ device: inout QuietDevice, _ now: MonotonicTime) -> Bool {
  do throws(VhostUserError) {
    try backEnd.checkDeadline(now: now)
    try backEnd.receive(now: now, &device)
    if backEnd.isBusy {
      if let index = device.draining {
        device.draining = nil
        try backEnd.finishStop(at: index, base: 7)
      } else if device.isResetting {
        device.isResetting = false
        try backEnd.finishReset()
      }
    }
    backEnd.notifyConfigurationChange()
    checkSession(backEnd.session, device)
    return true
  } catch {
    demand(!error.description.isEmpty, "an error without words")
    return false
  }
}

/// What the session believes and what the device was told must be one thing.
private func checkSession(_ session: borrowing BackEndSession, _ device: borrowing QuietDevice) {
  demand(session.features.isSubset(of: session.offeredFeatures), "features that were never offered")
  demand(session.protocolFeatures.isSubset(of: offer.protocolFeatures), "protocol features that were never offered")
  demand(session.regions.count <= offer.maximumMemorySlots, "more regions than slots")
  for (index, region) in session.regions.enumerated() {
    demand(region.size > 0 && !region.guestAddress.addingReportingOverflow(region.size).overflow, "a region wraps around")
    demand(!session.regions[..<index].contains { $0.overlaps(region) }, "regions overlap")
  }
  demand(device.memoryCount == session.regions.count, "the device has \(device.memoryCount) regions, the session \(session.regions.count)")
  for index in 0..<offer.queueCount {
    demand(session.isStarted(index) == (device.layouts[index] != nil), "ring \(index) runs for one of the two only")
    guard let layout = device.layouts[index] else { continue }
    demand((1...offer.maximumQueueSize).contains(layout.size), "a ring of \(layout.size) entries")
    demand(layout.isPacked || layout.size & (layout.size - 1) == 0, "a split ring of \(layout.size) entries")
    let size = UInt16(layout.size)
    let areas: [(UInt64, Int)] =
      layout.isPacked
      ? [(layout.descriptorTable, 16 * layout.size), (layout.availableRing, 4), (layout.usedRing, 4)]
      : [
        (layout.descriptorTable, 16 * layout.size), (layout.availableRing, SplitRing.availableRingByteCount(queueSize: size)),
        (layout.usedRing, SplitRing.usedRingByteCount(queueSize: size)),
      ]
    for (start, count) in areas {
      let isInside = session.regions.contains {
        start >= $0.guestAddress && start - $0.guestAddress <= $0.size && UInt64(count) <= $0.size - (start - $0.guestAddress)
      }
      demand(isInside, "a running ring lies outside the memory table")
    }
  }
}

/// Whatever can be decoded is encoded to the same bytes, but for padding, and decoded to the same value.
private func checkIdentity(_ bytes: [UInt8]) {
  guard bytes.count >= MessageHeader.byteCount, let header = try? MessageHeader(decoding: bytes.prefix(MessageHeader.byteCount)) else {
    return
  }
  demand(header.encoded == Array(bytes.prefix(MessageHeader.byteCount)), "a header changes on its way")
  let payload = Array(bytes.dropFirst(MessageHeader.byteCount))
  if let request = FrontEndRequest(rawValue: header.request), let message = try? FrontEndMessage(request: request, payload: payload) {
    demand(request.rules.size.allows(payload.count), "\(request.name) was decoded from \(payload.count) bytes")
    demand(message.request == request && message.payload.count == payload.count, "\(request.name) changes on its way")
    demand((try? FrontEndMessage(request: request, payload: message.payload)) == message, "\(request.name) does not come back")
  }
  if let request = BackEndRequest(rawValue: header.request), let message = try? BackEndMessage(request: request, payload: payload) {
    demand(message.request == request && message.payload.count == payload.count, "\(request.name) changes on its way")
    demand((try? BackEndMessage(request: request, payload: message.payload)) == message, "\(request.name) does not come back")
  }
}

/// Takes and closes whatever came.
private func drain(_ socket: borrowing OwnedFD) {
  var bytes = [UInt8](repeating: 0, count: 4096)
  for _ in 0..<64 where receive(socket, into: &bytes) == nil { return }
}

/// A device that keeps what it is given as a real one does, and does nothing with it.
private struct QuietDevice: BackEndDelegate, ~Copyable {
  var memory: [SharedDescriptor] = []
  var memoryCount = 0
  var layouts: [Int: VringLayout] = [:]
  var kicks: [Int: SharedDescriptor] = [:]
  var refuses = false
  var drains = false
  var draining: Int?
  var isResetting = false
  var space: [UInt8] = Array(0..<64)

  private mutating func perhaps() throws(Refusal) {
    defer { refuses = false }
    if refuses { throw Refusal("not now") }
  }
  private func keep(_ fd: consuming OwnedFD?) -> SharedDescriptor? {
    guard let fd = fd.take() else { return nil }
    return SharedDescriptor(fd)
  }
  mutating func replaceMemory(_ regions: [RegionDescription], _ descriptors: consuming ReceivedDescriptors) throws(Refusal) {
    demand(regions.count == descriptors.count, "\(descriptors.count) descriptors for \(regions.count) regions")
    try perhaps()
    memory = []
    while let fd = descriptors.takeFirst() { memory.append(SharedDescriptor(fd)) }
    memoryCount = regions.count
  }
  mutating func addMemory(_ region: RegionDescription, _ descriptor: consuming OwnedFD) throws(Refusal) {
    try perhaps()
    memory.append(SharedDescriptor(descriptor))
    memoryCount += 1
  }
  mutating func removeMemory(_ region: RegionDescription) throws(Refusal) {
    try perhaps()
    memory.removeLast()
    memoryCount -= 1
  }
  mutating func setFeatures(_ features: FeatureSet, logging: Bool) throws(Refusal) { try perhaps() }
  mutating func startVring(_ setup: consuming VringSetup) throws(Refusal) {
    try perhaps()
    let index = setup.index
    demand(layouts[index] == nil, "ring \(index) is started twice")
    layouts[index] = setup.layout
    kicks[index] = keep(setup.kick.take())
  }
  mutating func moveVring(at index: Int, to layout: VringLayout) {
    demand(layouts[index] != nil, "ring \(index) is moved and does not run")
    layouts[index] = layout
  }
  mutating func stopVring(at index: Int, suspending: Bool) throws(Refusal) -> StopOutcome {
    try perhaps()
    demand(layouts[index] != nil, "ring \(index) is stopped and does not run")
    layouts[index] = nil
    kicks[index] = nil
    guard drains else { return .stopped(base: 3) }
    draining = index
    return .pending
  }
  mutating func enableVring(at index: Int, _ isEnabled: Bool) { demand(layouts[index] != nil, "a ring that does not run is enabled") }
  mutating func replaceKick(at index: Int, _ kick: consuming OwnedFD?) throws(Refusal) {
    try perhaps()
    kicks[index] = keep(kick)
  }
  mutating func replaceCall(at index: Int, _ call: consuming OwnedFD?) {}
  mutating func resetDevice() -> ResetOutcome {
    layouts = [:]
    kicks = [:]
    isResetting = drains
    return drains ? .pending : .done
  }
  mutating func configuration(_ range: Range<Int>) throws(Refusal) -> [UInt8] {
    demand(range.upperBound <= 256, "configuration bytes beyond 256 are asked for")
    try perhaps()
    guard range.upperBound <= space.count else { throw Refusal("the space ends before that") }
    return Array(space[range])
  }
  mutating func writeConfiguration(at offset: Int, _ bytes: [UInt8], migrating: Bool) throws(Refusal) {
    demand(offset + bytes.count <= 256, "configuration bytes beyond 256 are written")
    guard offset + bytes.count <= space.count else { throw Refusal("the space ends before that") }
    space.replaceSubrange(offset..<offset + bytes.count, with: bytes)
  }
  mutating func makeInflightArea(queueCount: Int, queueSize: Int) throws(Refusal) -> InflightArea? {
    let size = UInt64(queueCount * (queueSize * 16 + 64))
    guard let fd = try? SharedMemory.sealed(name: "inflight", byteCount: size) else { return nil }
    return InflightArea(
      description: InflightDescription(size: size, queueCount: UInt16(queueCount), queueSize: UInt16(queueSize)), fd: fd)
  }
  mutating func setInflightArea(_ description: InflightDescription, _ descriptor: consuming OwnedFD) throws(Refusal) { try perhaps() }
  mutating func setLog(_ log: LogDescription, _ descriptor: consuming OwnedFD) throws(Refusal) { try perhaps() }
  mutating func setLogSignal(_ descriptor: consuming OwnedFD) throws(Refusal) {}
  mutating func setMTU(_ bytes: Int) throws(Refusal) { demand(bytes <= 65535, "an MTU of \(bytes)") }
  mutating func sendRARP(_ address: [UInt8]) throws(Refusal) {}
  mutating func setStatus(_ status: DeviceStatus) throws(Refusal) { try perhaps() }
}

// MARK: The front end under attack

private func backEndSeeds() -> [[UInt8]] {
  // Mostly honest answers (0), with an operation now and then.
  let answers = [UInt8](repeating: 0, count: 24)
  return [
    answers, answers + [16, 0] + [UInt8](repeating: 0, count: 40), answers + [16, 0] + answers + [17, 0] + answers + [20] + answers,
    answers + [2, 1, 9] + answers, answers + [3, 2, 4, 8] + answers, answers + [16, 1] + answers + [18, 0, 19, 21, 5, 6, 7],
  ]
}

private func attackFrontEnd(_ script: inout Script) {
  let pair = sure { try UnixSocket.pair(.stream) }
  let backEnd = pair.second
  var configuration = FrontEndConfiguration(allowedFeatures: [.version1, .indirectDescriptors, .eventIndex, .packedRing])
  configuration.wantedProtocolFeatures = [.mq, .replyAck, .config, .resetDevice, .configureMemSlots, .inflightShmFD, .getVringBaseInflight]
  configuration.configurationByteCount = 16
  configuration.hearsConfigurationChanges = true
  guard var session = try? FrontEndSession(pair.first, configuration) else { return demand(false, "no session") }
  var now = MonotonicTime(nanoseconds: 1_000_000_000)
  var stream: [UInt8] = []
  var channel: OwnedFD?
  var negotiated: Offer?
  var failures = 0
  session.negotiate(now: now)
  while !script.isOver {
    // What the front end asks.
    take(backEnd, &stream, &channel)
    let asked = nextRequest(&stream)
    let how = script.byte()
    if how >= 16, how < 24 {
      operate(how, &session, now, &script)
    } else if how == 24 {
      now = now.advanced(by: .milliseconds(Int(script.byte()) * 20))
      session.handleTimeout(now: now)
    } else if how >= 25, how < 32 {
      speakUp(channel, how, &script)
    } else if let asked {
      answer(asked, how, backEnd, &script)
    } else if how & 15 == 15 {
      _ = UnixSocket.send(backEnd, script.take(Int(script.byte())), descriptors: descriptors(&script, 0...2), waiting: false)
    }
    session.receive(now: now)
    while let event = session.nextEvent() {
      demand(failures == 0, "something happens after the failure: \(event)")
      switch event {
      case .failed(let error):
        demand(!error.description.isEmpty && session.hasFailed, "a failure without words")
        failures += 1
      case .negotiated(let offer):
        demand(offer.features.isSubset(of: configuration.allowedFeatures), "features that are not allowed")
        demand(offer.features.contains(.version1), "a required feature is missing")
        demand((offer.configuration?.count ?? 16) == 16, "a configuration of another size")
        negotiated = offer
      case .configuration(let offset, let bytes): demand(offset + bytes.count <= 256, "configuration bytes beyond 256")
      case .activated, .stopped, .resumed: demand(negotiated != nil, "rings run before first contact")
      default: break
      }
    }
    if failures > 0 { return demand(session.isIdle, "a failed session is busy") }
  }
}

private func take(_ socket: borrowing OwnedFD, _ stream: inout [UInt8], _ channel: inout OwnedFD?) {
  var bytes = [UInt8](repeating: 0, count: 4096)
  for _ in 0..<64 {
    // The first socket that comes is the channel.
    let count = receive(socket, into: &bytes) { fd in
      if channel == nil, (try? fd.status().kind) == .socket { channel = consume fd }
    }
    guard let count else { return }
    stream += bytes[..<count]
  }
}

/// What the front end says must be well-formed, whatever it hears.
private func nextRequest(_ stream: inout [UInt8]) -> (message: FrontEndMessage, wantsReply: Bool)? {
  while stream.count >= MessageHeader.byteCount {
    guard let header = try? MessageHeader(decoding: stream.prefix(MessageHeader.byteCount)), (try? header.checkRequest()) != nil,
      let request = FrontEndRequest(rawValue: header.request)
    else {
      demand(false, "the front end sends what is no request")
      return nil
    }
    let end = MessageHeader.byteCount + Int(header.size)
    guard stream.count >= end else { return nil }
    let payload = Array(stream[MessageHeader.byteCount..<end])
    stream.removeFirst(end)
    guard let message = try? FrontEndMessage(request: request, payload: payload) else {
      demand(false, "the front end sends a bad \(request.name)")
      return nil
    }
    if header.flags.contains(.needReply) { return (message, true) }
    switch request.rules.reply {
    case .always: return (message, false)
    default: continue
    }
  }
  return nil
}

private func answer(
  _ asked: (message: FrontEndMessage, wantsReply: Bool), _ how: UInt8, _ socket: borrowing OwnedFD, _ script: inout Script
) {
  var attached: [CInt] = []
  var reply: Reply
  switch asked.message {
  case .getFeatures: reply = .number(FeatureSet([.version1, .packedRing, .eventIndex, .vhostUserProtocolFeatures]).rawValue)
  case .getProtocolFeatures: reply = .number(BackEndOffer.implemented.rawValue)
  case .getQueueNum: reply = .number(4)
  case .getMaxMemSlots: reply = .number(32)
  case .getConfig(let config): reply = .config(config)
  case .getVringBase(let state): reply = .vringState(VringState(index: state.index, number: 5))
  case .getInflightFD(let wanted):
    let size = UInt64(wanted.queueCount) * UInt64(wanted.queueSize) * 32
    reply = .inflight(InflightDescription(size: size, mapOffset: 0, queueCount: wanted.queueCount, queueSize: wanted.queueSize))
    attached = [attachments.numbers[0]]
  default: reply = .number(0)
  }
  if how == 1 { reply = .number(script.number()) }
  if how == 2 {
    switch script.byte() % 5 {
    case 0: reply = .config(ConfigMessage(offset: UInt32(script.byte()), bytes: [UInt8](repeating: 1, count: Int(script.byte()))))
    case 1:
      reply = .inflight(
        InflightDescription(size: script.number(), mapOffset: script.number(), queueCount: script.u16() & 7, queueSize: script.u16()))
    case 2: reply = .vringState(VringState(index: UInt32(script.byte()), number: script.u32()))
    case 3: reply = .configRefused
    default: reply = .number(script.u64())
    }
  }
  var header = reply.header(to: asked.message.request.rawValue)
  var payload = reply.payload
  if how == 3 { attached = descriptors(&script, 0...9) }
  if how == 4 { header.flags = flags(&script) }
  if how == 5 { header.size = UInt32(truncatingIfNeeded: script.number()) }
  if how == 6 { header.request = UInt32(script.byte()) }
  if how == 7, !payload.isEmpty { payload[script.below(payload.count)] = script.byte() }
  var bytes = header.encoded + payload
  if how == 8 { bytes = Array(bytes.prefix(script.below(bytes.count + 1))) }
  if how == 9 { bytes += bytes }
  _ = UnixSocket.send(socket, bytes, descriptors: attached, waiting: false)
}

private func operate(_ how: UInt8, _ session: inout FrontEndSession, _ now: MonotonicTime, _ script: inout Script) {
  // Only what an owner may ask: the checks of misuse are not what is tried here.
  guard let offer = session.offer, session.isIdle else { return }
  switch how {
  case 16: if !session.isRunning { session.activate(activation(Int(script.byte() % 3), offer), now: now) }
  case 17: session.stop(script.bool() ? .suspend : .drain, now: now)
  case 18: if offer.protocolFeatures.contains(.config) { session.readConfiguration(offset: Int(script.byte() % 32), count: 8, now: now) }
  case 19: if offer.protocolFeatures.contains(.config) { session.writeConfiguration(offset: 3, bytes: [1, 2], now: now) }
  case 20: session.reset(now: now)
  case 21: if session.isRunning { session.replaceCall(index: 0, nil, now: now) }
  case 22: if !session.isRunning, session.activation != nil { session.resume(now: now) }
  default: session.handleTimeout(now: now)
  }
}

private let shared = sure { SharedDescriptor(try SharedMemory.sealed(name: "fuzz", byteCount: 1 << 20)) }
private let kick = sure { SharedDescriptor(try EventFD().fd.duplicate()) }

private func activation(_ kind: Int, _ offer: Offer) -> BackEndActivation {
  let regions = (0..<(kind == 2 ? 9 : 1)).map { index in
    let start = UInt64(index) << 16
    return SharedRegion(RegionDescription(guestAddress: start, size: 1 << 16, userAddress: user + start, mapOffset: start), shared)
  }
  let vrings = (0...kind).map { index in
    let start = user + UInt64(index) * 0x3000
    return VringActivation(
      index: index, size: 64, descriptorTable: start, availableRing: start + 0x1000, usedRing: start + 0x2000, kick: kick,
      call: kind == 0 ? nil : kick)
  }
  return BackEndActivation(features: offer.features.intersection([.version1, .eventIndex]), regions: regions, vrings: vrings)
}

/// Messages of the back end's own.
private func speakUp(_ channel: borrowing OwnedFD?, _ how: UInt8, _ script: inout Script) {
  let number = how == 25 ? 2 : UInt32(script.byte() & 15)
  var header = MessageHeader(request: number, flags: script.bool() ? [.version1, .needReply] : .version1, size: 0)
  var payload: [UInt8] = []
  if how >= 28 {
    payload = script.take(Int(script.byte() & 63))
    header.size = UInt32(payload.count)
  }
  if how == 31 { header.flags = flags(&script) }
  checkIdentity(header.encoded + payload)
  let attached = how == 30 ? descriptors(&script, 0...3) : []
  // Some once, some as a flood.
  for _ in 0..<(how == 27 ? 40 : 1) {
    switch channel {
    case .some(let fd): _ = UnixSocket.send(fd, header.encoded + payload, descriptors: attached, waiting: false)
    case .none: return
    }
  }
}
