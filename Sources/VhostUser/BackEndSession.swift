import HostSystem
import VirtioSpec

/// What a back end offers to any front end; fixed for the life of the session.
public struct BackEndOffer: Sendable {
  /// Device features for the guest. The bits between the two ends are added by the session.
  public var features: FeatureSet
  public var protocolFeatures: ProtocolFeatures
  /// Rings the device has; indices from here on are refused.
  public var queueCount: Int
  /// Most entries of a ring.
  public var maximumQueueSize: Int
  /// Most memory regions at a time.
  public var maximumMemorySlots: Int

  /// The protocol features the session has an implementation for.
  public static let implemented: ProtocolFeatures = [
    .mq, .logShmFD, .rarp, .replyAck, .netMTU, .backEndRequests, .config, .inflightShmFD, .resetDevice, .configureMemSlots,
    .status, .getVringBaseInflight,
  ]

  /// What a device gets that says nothing special: everything that needs no more of it than the required methods.
  public static let standard: ProtocolFeatures = [.mq, .replyAck, .backEndRequests, .resetDevice, .configureMemSlots]

  public init(
    features: FeatureSet, protocolFeatures: ProtocolFeatures = standard, queueCount: Int, maximumQueueSize: Int = 32768,
    maximumMemorySlots: Int = RegionTable.maximumCount
  ) {
    precondition(protocolFeatures.isSubset(of: Self.implemented), "Only protocol features with an implementation are offered.")
    precondition((1...256).contains(queueCount), "A vhost-user device has 1 to 256 rings.")
    precondition((1...32768).contains(maximumQueueSize), "A ring has 1 to 32768 entries.")
    precondition((1...509).contains(maximumMemorySlots), "A back end takes 1 to 509 memory regions.")
    self.features = features
    self.protocolFeatures = protocolFeatures.withoutUnmetDependencies
    self.queueCount = queueCount
    self.maximumQueueSize = maximumQueueSize
    self.maximumMemorySlots = maximumMemorySlots
  }
}

/// An answer to be sent.
@frozen public struct OutgoingReply: ~Copyable {
  public let header: MessageHeader
  public let payload: [UInt8]
  public let descriptor: OwnedFD?
}

/// The back end's half of a vhost-user connection: what was negotiated, the memory table, the state of every ring.
///
/// It takes whole messages and produces replies; no I/O. Every request is checked here - exact size and descriptor count,
/// gate, index, state, addresses against the memory table - so that the delegate gets owned, checked things only. What it
/// refuses is answered with a failure where the reply has a form for it, or the front end asked for an acknowledgement; else
/// `handle` throws and the connection is to be closed. Whatever breaks the framing always throws.
///
/// Ring geometry is frozen while a ring runs. A repeated message replaces what the one before left; nothing accumulates.
@safe
public struct BackEndSession: ~Copyable {
  public let offer: BackEndOffer
  /// What the front end acknowledged, with the bits between the two ends.
  public internal(set) var features: FeatureSet = []
  public internal(set) var protocolFeatures: ProtocolFeatures = []
  /// The memory table as it is now.
  public internal(set) var regions: [RegionDescription] = []
  public internal(set) var status: UInt8 = 0
  public internal(set) var hasOwner = false

  let vrings: [Vring]
  var negotiatedProtocolFeatures = false
  /// A request that is answered later.
  var pending: Pending?
  /// The front end's end of the channel for requests of ours.
  var channel: Connection?
  var configurationChangeIsDue = false

  enum Pending {
    case vringBase(index: Int)
    case reset(request: FrontEndRequest, acknowledge: Bool)
  }

  /// One ring as the session remembers it. A class, because an array of values cannot own descriptors.
  final class Vring {
    var size: Int?
    var address: VringAddress?
    var base: UInt32 = 0
    var isStarted = false
    var isEnabled = false
    /// Came before the ring was started; handed over when it starts.
    var call: OwnedFD?
    /// Survives stops: front ends send it once.
    var err: SharedDescriptor?
    /// As told to the delegate.
    var layout: VringLayout?

    /// `RESET_DEVICE`: initial state, but for `err`, which front ends do not send again.
    func reset() {
      size = nil
      address = nil
      base = 0
      isStarted = false
      isEnabled = false
      call = nil
      layout = nil
    }
  }

  public init(offer: BackEndOffer) {
    self.offer = offer
    vrings = (0..<offer.queueCount).map { _ in Vring() }
  }

  /// The features offered on the wire. `ACCESS_PLATFORM` is left out: it would need IOTLB messages.
  public var offeredFeatures: FeatureSet {
    var offered = offer.features.union(.vhostUserProtocolFeatures)
    offered.remove(.accessPlatform)
    if !offer.protocolFeatures.contains(.logShmFD) { offered.remove(.vhostLogAll) }
    return offered
  }

  /// What the driver acknowledged, without the bits between the two ends.
  public var driverFeatures: FeatureSet { features.subtracting(.vhostOnlyMask) }

  public func isStarted(_ index: Int) -> Bool { vrings[index].isStarted }
  public func isEnabled(_ index: Int) -> Bool { vrings[index].isEnabled }

  /// All rings are stopped: the device must not write guest memory, signal the guest or send messages of its own.
  public var isSuspended: Bool { !vrings.contains { $0.isStarted } }

  /// A request waits for `finishStop` or `finishReset`; no other may be handled before.
  public var isBusy: Bool { pending != nil }

  /// Handles one request.
  ///
  /// - Returns: the reply, if the request gets one now.
  /// - Throws: when the connection is to be closed.
  public mutating func handle<D: BackEndDelegate & ~Copyable>(
    _ message: consuming IncomingMessage, _ delegate: inout D
  ) throws(VhostUserError) -> OutgoingReply? {
    guard pending == nil else { throw .misuse("a request was handled before the one before it was answered") }
    guard let request = FrontEndRequest(rawValue: message.header.request) else {
      throw .unknownRequest(message.header.request)
    }
    let needsReply = message.header.flags.contains(.needReply)
    do throws(VhostUserError) {
      let decoded = try FrontEndMessage(request: request, payload: message.payload)
      try decoded.checkDescriptorCount(message.descriptors.count)
      try checkGate(decoded)
      let outcome = try perform(decoded, &message.descriptors, &delegate, acknowledge: needsReply)
      switch consume outcome {
      case .done: return acknowledgement(of: request, needsReply, code: 0)
      case .later: return nil
      case .reply(let reply, let descriptor):
        return OutgoingReply(header: reply.header(to: request.rawValue), payload: reply.payload, descriptor: descriptor)
      }
    } catch {
      guard let code = error.acknowledgementCode else { throw error }
      if case .always(let payload) = request.rules.reply, let reply = payload.failure(code) {
        return OutgoingReply(header: reply.header(to: request.rawValue), payload: reply.payload, descriptor: nil)
      }
      if let reply = acknowledgement(of: request, needsReply, code: code) { return reply }
      throw error
    }
  }

  /// The acknowledgement, if the request gets one: it has no reply of its own, was marked, and `REPLY_ACK` is negotiated.
  /// `SET_PROTOCOL_FEATURES` is acknowledged whenever it is marked, because it may be what negotiates `REPLY_ACK`.
  private func acknowledgement(of request: FrontEndRequest, _ needsReply: Bool, code: UInt64) -> OutgoingReply? {
    guard needsReply, protocolFeatures.contains(.replyAck) || request == .setProtocolFeatures else { return nil }
    switch request.rules.reply {
    case .acknowledgement: break
    case .always: return nil
    case .with(let feature, _): if protocolFeatures.contains(feature) { return nil }
    }
    let reply = Reply.number(code)
    return OutgoingReply(header: reply.header(to: request.rawValue), payload: reply.payload, descriptor: nil)
  }

  /// What became of a request.
  enum Outcome: ~Copyable {
    case done
    case reply(Reply, OwnedFD?)
    /// The answer comes with `finishStop` or `finishReset`.
    case later
  }

  private func checkGate(_ message: FrontEndMessage) throws(VhostUserError) {
    let request = message.request
    // DPDK's virtio-user says to the next back end what the one before did not live to hear: that its rings are to be off. They are.
    if case .setVringEnable(let state) = message, state.number == 0, features.isEmpty { return }
    // Numbers without a value that would mean "not negotiated", and a wait for them has no other end.
    if [.getQueueNum, .getMaxMemSlots, .getStatus].contains(request) { return }
    let isOpen =
      switch request.rules.gate {
      case .none, .protocolFeaturesOffered: true
      // Some front ends enable rings after the protocol features and before they acknowledge bit 30.
      case .protocolFeaturesAcknowledged: negotiatedProtocolFeatures || features.contains(.vhostUserProtocolFeatures)
      case .feature(let feature): protocolFeatures.contains(feature)
      case .accessPlatform: features.contains(.accessPlatform)
      }
    guard isOpen else { throw .notNegotiated(request: request.name) }
  }

  // MARK: Answers that came later

  /// A ring that was draining is stopped now; send what this returns.
  public mutating func finishStop(at index: Int, base: UInt32) throws(VhostUserError) -> OutgoingReply {
    guard case .vringBase(index) = pending else { throw .misuse("ring \(index) was not being stopped") }
    pending = nil
    let reply = stopped(index, base)
    return OutgoingReply(header: reply.header(to: FrontEndRequest.getVringBase.rawValue), payload: reply.payload, descriptor: nil)
  }

  /// A reset that took its time is done; send what this returns, if anything.
  public mutating func finishReset() throws(VhostUserError) -> OutgoingReply? {
    guard case .reset(let request, let acknowledge) = pending else { throw .misuse("no reset was under way") }
    pending = nil
    resetDone()
    return acknowledgement(of: request, acknowledge, code: 0)
  }
}

extension VhostUserError {
  /// What a failed request is acknowledged with; nil where the connection has to end, because its framing cannot be
  /// trusted any more.
  var acknowledgementCode: UInt64? {
    switch self {
    case .invalidValue, .overlappingRegions, .wrongState: UInt64(Errno.invalid.rawValue)
    case .notNegotiated: UInt64(Errno.notSupported.rawValue)
    case .refused(_, _, let code): code == 0 ? 1 : code
    default: nil
    }
  }
}
