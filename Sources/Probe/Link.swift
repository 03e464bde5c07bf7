import CLinux
import Glibc
import HostSystem
import VMMemory
import VhostUser
import VirtioQueue
import VirtioSpec

/// What a back end offers, as far as asking shows.
package struct Offer: Sendable {
  var features: FeatureSet = []
  var protocolFeatures: ProtocolFeatures = []
  /// `GET_QUEUE_NUM`; nil without `MQ`.
  var queueCount: UInt64?
  /// `GET_MAX_MEM_SLOTS`; nil without `CONFIGURE_MEM_SLOTS`.
  var memorySlots: UInt64?
  /// The configuration space as far as it could be read; nil when it was refused or is not there.
  var configuration: [UInt8]?
  var configurationProblem: String?

  var hasProtocolFeatures: Bool { features.contains(.vhostUserProtocolFeatures) }
}

/// The last bytes of a conversation, for findings.
final class Trace {
  private(set) var lines: [String] = []

  func note(_ line: String) {
    lines.append(line)
    if lines.count > 12 { lines.removeFirst() }
  }

  func reset() {
    lines = []
    sawClosing = false
  }

  /// Whether the back end closed a connection.
  var sawClosing = false
}

/// A reply with what came along.
struct Answered: ~Copyable {
  let reply: Reply
  var descriptors: ReceivedDescriptors
}

/// One conversation with a back end.
struct Link: ~Copyable {
  var frontEnd: BlockingFrontEnd
  var offer = Offer()
  let trace: Trace

  init(_ socket: consuming OwnedFD, timeout: Duration, trace: Trace = Trace()) {
    frontEnd = BlockingFrontEnd(socket)
    frontEnd.timeout = timeout
    self.trace = trace
  }

  /// Connects to the back end; nothing has been said yet.
  init(_ target: Target, trace: Trace = Trace()) throws(ProbeError) {
    self.init(try target.connect(), timeout: target.timeout, trace: trace)
  }

  var agreed: ProtocolFeatures { frontEnd.protocolFeatures }
  var hasAcknowledgements: Bool { agreed.contains(.replyAck) }

  /// Sends a message as it is.
  mutating func tell(_ message: FrontEndMessage, descriptors: [CInt] = [], needsReply: Bool = false) throws(ProbeError) {
    try tell(message.header(needsReply: needsReply), message.payload, descriptors: descriptors, name: message.request.name)
  }

  /// Sends any header with any payload.
  mutating func tell(_ header: MessageHeader, _ payload: [UInt8], descriptors: [CInt] = [], name: String = "") throws(ProbeError) {
    let fds = descriptors.isEmpty ? "" : " +\(descriptors.count) fd"
    trace.note("> " + (header.encoded + payload).hexText() + fds + (name.isEmpty ? "" : "  " + name))
    switch frontEnd.sendRaw(header, payload, descriptors: descriptors) {
    case .bytes(let count) where count == MessageHeader.byteCount + payload.count: return
    case .failed(let errno):
      trace.sawClosing = true
      throw .protocolError(
        "send \(name)", errno == .brokenPipe || errno == .connectionReset ? .closed(midMessage: false) : .system("sending", errno))
    default: throw .protocolError("send \(name)", .peerDoesNotRead)
    }
  }

  /// The next message; nil when none came in time.
  mutating func hear() throws(ProbeError) -> IncomingMessage? {
    do throws(VhostUserError) {
      guard let message = try frontEnd.receiveRaw() else {
        trace.note("< nothing in \(decimal(Double(frontEnd.timeout.nanoseconds) / 1e9, 1)) s")
        return nil
      }
      let fds = message.descriptors.isEmpty ? "" : " +\(message.descriptors.count) fd"
      trace.note("< " + (message.header.encoded + message.payload).hexText() + fds)
      return message
    } catch {
      trace.note("< \(error)")
      if case .closed = error { trace.sawClosing = true }
      throw .protocolError("hear", error)
    }
  }

  /// A request with the reply or acknowledgement that belongs to it, checked. Without either, `GET_FEATURES` follows, so
  /// that the request has been processed when this returns.
  mutating func perform(_ message: FrontEndMessage, descriptors: [CInt] = []) throws(ProbeError) -> Answered {
    let request = message.request
    var expected: ReplyPayload?
    switch request.rules.reply {
    case .always(let payload): expected = payload
    case .with(let feature, let payload): expected = agreed.contains(feature) ? payload : nil
    case .acknowledgement: expected = nil
    }
    let acknowledges = expected == nil && hasAcknowledgements && request != .setProtocolFeatures
    try tell(message, descriptors: descriptors, needsReply: acknowledges)
    if case .setProtocolFeatures(let features) = message { frontEnd.protocolFeatures = features }
    if expected == nil, !acknowledges { return try perform(.getFeatures) }
    guard let incoming = try hear() else {
      throw .protocolError("do \(request.name)", .noReply(to: request.name, milliseconds: Int(frontEnd.timeout.nanoseconds / 1_000_000)))
    }
    do throws(VhostUserError) {
      try incoming.header.checkReply(to: request.rawValue)
      let reply = try Reply(expected ?? .number, payload: incoming.payload)
      try reply.checkDescriptorCount(incoming.descriptors.count, expected ?? .number)
      if acknowledges, case .number(let code) = reply, code != 0 { throw .peerRefused(request: request.name, code: code) }
      return Answered(reply: reply, descriptors: incoming.descriptors)
    } catch {
      throw .protocolError("do \(request.name)", error)
    }
  }

  /// Sends a request and returns when it has been processed.
  mutating func send(_ message: FrontEndMessage, descriptors: [CInt] = []) throws(ProbeError) {
    _ = try perform(message, descriptors: descriptors)
  }

  mutating func ask(_ message: FrontEndMessage, descriptors: [CInt] = []) throws(ProbeError) -> Reply {
    try perform(message, descriptors: descriptors).reply
  }

  mutating func number(_ message: FrontEndMessage) throws(ProbeError) -> UInt64 {
    guard case .number(let value) = try ask(message) else { return 0 }
    return value
  }

  /// How a request that must not succeed was answered; nil when it seems to have been accepted.
  mutating func refusal(_ message: FrontEndMessage, descriptors: [CInt] = []) throws(ProbeError) -> String? {
    do throws(ProbeError) {
      try send(message, descriptors: descriptors)
      return nil
    } catch {
      switch error {
      case .protocolError(_, .peerRefused(_, let code)): return "acknowledged with \(code)"
      case .protocolError(_, .closed): return "closed"
      default: throw error
      }
    }
  }

  /// Protocol features that we can live with.
  static let wanted: ProtocolFeatures = [
    .mq, .replyAck, .config, .inflightShmFD, .resetDevice, .configureMemSlots, .status, .logShmFD, .deviceState,
  ]

  /// The first contact: features, protocol features, and what they allow to ask.
  mutating func negotiate(_ wanted: ProtocolFeatures = Link.wanted, configurationByteCount: Int = 0) throws(ProbeError) {
    try send(.setOwner)
    offer.features = FeatureSet(rawValue: try number(.getFeatures))
    guard offer.hasProtocolFeatures else { return }
    offer.protocolFeatures = ProtocolFeatures(rawValue: try number(.getProtocolFeatures))
    let agreed = offer.protocolFeatures.intersection(wanted).withoutUnmetDependencies
    try send(.setProtocolFeatures(agreed))
    if agreed.contains(.mq) { offer.queueCount = try number(.getQueueNum) }
    if agreed.contains(.configureMemSlots) { offer.memorySlots = try number(.getMaxMemSlots) }
    if agreed.contains(.config), configurationByteCount > 0 {
      do throws(ProbeError) {
        offer.configuration = try configuration(byteCount: configurationByteCount)
        if offer.configuration == nil { offer.configurationProblem = "the back end refused to give it" }
      } catch {
        offer.configurationProblem = "\(error)"
        throw error
      }
    }
  }

  /// The start of the configuration space; nil when the back end refuses.
  mutating func configuration(byteCount: Int) throws(ProbeError) -> [UInt8]? {
    let zeros = [UInt8](repeating: 0, count: byteCount)
    guard case .config(let piece) = try ask(.getConfig(ConfigMessage(offset: 0, bytes: zeros))) else { return nil }
    return piece.bytes
  }

  /// Acknowledges virtio features; bit 30 goes along where it is offered.
  mutating func accept(_ features: FeatureSet) throws(ProbeError) {
    var all = features
    if offer.hasProtocolFeatures { all.insert(.vhostUserProtocolFeatures) }
    try send(.setFeatures(all))
    // ACKNOWLEDGE, DRIVER and FEATURES_OK.
    if agreed.contains(.status) { try send(.setStatus(11)) }
  }

  /// All rings are started: some back ends that hear of the status wait for this.
  mutating func ready() throws(ProbeError) {
    if agreed.contains(.status) { try send(.setStatus(15)) }
  }

  /// Gives the back end the memory.
  mutating func share(_ arena: Arena) throws(ProbeError) {
    try send(.setMemTable(RegionTable(regions: arena.descriptions)), descriptors: arena.descriptors)
  }

  /// An area in which the back end records what is in flight, as a front end that can replace it gives it one.
  mutating func shareInflightArea(queueCount: Int, queueSize: Int) throws(ProbeError) {
    guard agreed.contains(.inflightShmFD) else { throw .unsuitable("The back end does not offer INFLIGHT_SHMFD") }
    for index in 0..<queueCount { try send(.setVringNum(VringState(index: UInt32(index), number: UInt32(queueSize)))) }
    var answered = try perform(
      .getInflightFD(InflightDescription(queueCount: UInt16(queueCount), queueSize: UInt16(queueSize))))
    guard case .inflight(let area) = answered.reply, let fd = answered.descriptors.takeFirst() else {
      throw .unsuitable("The back end gives no area for requests in flight")
    }
    try send(.setInflightFD(area), descriptors: [fd.rawValue])
  }

  /// Everything a ring needs, its kick last, then enabled.
  mutating func start(_ ring: borrowing ProbeRing, base: UInt32? = nil) throws(ProbeError) {
    try describe(ring, base: base)
    try send(.setVringCall(VringEvent(index: UInt8(ring.index), carriesDescriptor: true)), descriptors: [ring.call.fd.rawValue])
    try send(.setVringKick(VringEvent(index: UInt8(ring.index), carriesDescriptor: true)), descriptors: [ring.kick.fd.rawValue])
    if offer.hasProtocolFeatures { try enable(ring.index, true) }
  }

  /// Size, base and place of a ring.
  mutating func describe(_ ring: borrowing ProbeRing, base: UInt32? = nil) throws(ProbeError) {
    let index = UInt32(ring.index)
    let layout = ring.queue.configuration
    try send(.setVringNum(VringState(index: index, number: UInt32(layout.size))))
    try send(.setVringBase(VringState(index: index, number: base ?? VringBase.start(packed: layout.isPacked).rawValue)))
    try send(.setVringAddr(try ring.address()))
  }

  mutating func enable(_ index: Int, _ isEnabled: Bool) throws(ProbeError) {
    try send(.setVringEnable(VringState(index: UInt32(index), number: isEnabled ? 1 : 0)))
  }

  /// Stops a ring; where it stood.
  mutating func stop(_ index: Int) throws(ProbeError) -> UInt32 {
    guard case .vringState(let state) = try ask(.getVringBase(VringState(index: UInt32(index), number: 0))) else { return 0 }
    return state.number
  }
}

/// Memory that plays the guest's: one sealed object, in one region or several.
final class Arena {
  let fd: OwnedFD
  let memory: GuestMemory
  let descriptions: [RegionDescription]
  private var next: UInt64
  private let end: UInt64
  private let start: UInt64

  /// Ring addresses on the wire are of this space; it is ours to choose.
  static let userBase: UInt64 = 0x7F00_0000_0000

  /// - Parameter regionCount: the memory is cut into so many regions that follow one another in the guest.
  init(byteCount: UInt64, regionCount: Int = 1, guestStart: UInt64 = 0, isSealed: Bool = true) throws(ProbeError) {
    let size = (byteCount + 0xFFFF) & ~0xFFFF
    let fd =
      try isSealed
      ? wrapping { () throws(SystemError) in try SharedMemory.sealed(name: "martlet-probe", byteCount: size) } : Self.unsealed(size)
    let piece = size / UInt64(regionCount) & ~0xFFF
    var descriptions: [RegionDescription] = []
    var regions: [MemoryRegion] = []
    for index in 0..<UInt64(regionCount) {
      let offset = index * piece
      let count = index == UInt64(regionCount) - 1 ? size - offset : piece
      let description = RegionDescription(
        guestAddress: guestStart + offset, size: count, userAddress: Self.userBase + offset, mapOffset: offset)
      descriptions.append(description)
      regions.append(
        try wrapping { () throws(MemoryError) in
          try MemoryRegion.mapping(
            fd, guestAddress: GuestAddress(description.guestAddress), byteCount: count, frontEndAddress: description.userAddress,
            fileOffset: offset, allowUnsealed: true)
        })
    }
    self.descriptions = descriptions
    memory = try wrapping { () throws(MemoryError) in try GuestMemory(regions: regions) }
    self.fd = fd
    start = guestStart + 4096
    next = guestStart + 4096
    end = guestStart + size
  }

  /// Memory that can be cut off, as some front ends give it.
  private static func unsealed(_ size: UInt64) throws(ProbeError) -> OwnedFD {
    let fd = try wrapping { () throws(SystemError) in
      OwnedFD(owning: try checked(unsafe clinux_memfd_create("martlet-probe-unsealed", 1), "make memory"))
    }
    guard ftruncate(fd.rawValue, Int(size)) == 0 else { throw .system(SystemError("size memory", Errno.current)) }
    return fd
  }

  var descriptors: [CInt] { descriptions.map { _ in fd.rawValue } }

  /// Guest memory of so many bytes that nobody else uses.
  func allocate(_ byteCount: Int, alignment: UInt64 = 64) throws(ProbeError) -> GuestAddress {
    let address = (next + alignment - 1) & ~(alignment - 1)
    guard byteCount >= 0, UInt64(byteCount) <= end - min(end, address) else {
      throw .unsuitable("The probe's own memory is too small for this run; lower depth, block size or queues")
    }
    next = address + UInt64(byteCount)
    return GuestAddress(address)
  }

  /// Everything allocated is free again.
  func reset() { next = start }

  func userAddress(_ address: GuestAddress, _ byteCount: Int) throws(ProbeError) -> UInt64 {
    guard let user = memory.frontEndAddress(of: address, byteCount: UInt64(byteCount)) else {
      throw .unsuitable("A ring does not fit into one region of the probe's memory")
    }
    return user
  }
}

/// One ring with its descriptors.
struct ProbeRing: ~Copyable {
  let index: Int
  var queue: DriverQueue
  let kick: EventFD
  let call: EventFD
  let arena: Arena

  init(_ index: Int, size: UInt16, features: FeatureSet, arena: Arena) throws(ProbeError) {
    let byteCount = VirtqueueConfiguration.contiguousByteCount(size: size, features: features)
    let place = try arena.allocate(byteCount, alignment: 4096)
    let kick = try wrapping { () throws(SystemError) in try EventFD() }
    let call = try wrapping { () throws(SystemError) in try EventFD() }
    let queue = try wrapping { () throws(VirtqueueError) in
      try DriverQueue(.contiguous(size: size, features: features, at: place), memory: arena.memory)
    }
    self.index = index
    self.arena = arena
    self.kick = kick
    self.call = call
    self.queue = queue
  }

  func address() throws(ProbeError) -> VringAddress {
    let layout = queue.configuration
    let base = try arena.userAddress(layout.descriptors, 1)
    return VringAddress(
      index: UInt32(index), descriptorTable: base,
      availableRing: base + (layout.driver.rawValue - layout.descriptors.rawValue),
      usedRing: base + (layout.device.rawValue - layout.descriptors.rawValue))
  }
}
