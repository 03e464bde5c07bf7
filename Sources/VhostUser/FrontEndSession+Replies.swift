import HostSystem
import VirtioSpec

extension FrontEndSession {
  /// Takes the answer to the outstanding request. The connection has checked number and flags.
  mutating func take(_ incoming: consuming IncomingMessage, _ now: MonotonicTime) throws(VhostUserError) {
    // An area comes with its descriptor; no other answer does.
    recorder.note(
      .backEnd, incoming.header, incoming.payload,
      incoming.descriptors.isEmpty ? [] : Array(repeating: "other", count: incoming.descriptors.count),
      now)
    guard let request = outstanding.take() else { throw .unsolicited(request: incoming.header.request) }
    let reply = try Reply(request.expected, payload: incoming.payload)
    try reply.checkDescriptorCount(incoming.descriptors.count, request.expected)
    connection.expectation = .nothing
    isUnacknowledged = false
    if request.isAcknowledgement {
      try takeAcknowledgement(reply, of: request.message)
    } else {
      try take(reply, to: request.message, &incoming.descriptors)
    }
    advance(now)
  }

  private mutating func takeAcknowledgement(_ reply: Reply, of message: FrontEndMessage) throws(VhostUserError) {
    guard case .number(let code) = reply else { return }
    if case .setConfig = message {
      events.append(code == 0 ? .configurationWritten : .configurationRefused)
      return
    }
    guard code == 0 else { throw .peerRefused(request: message.request.name, code: code) }
  }

  private mutating func take(
    _ reply: Reply, to message: FrontEndMessage, _ descriptors: inout ReceivedDescriptors
  ) throws(VhostUserError) {
    switch (message, reply) {
    case (.getFeatures, .number(let bits)):
      // Later ones are barriers; what was fixed at first contact stays.
      if !sawFeatures { try takeFeatures(FeatureSet(rawValue: bits)) }
    case (.getProtocolFeatures, .number(let bits)): try takeProtocolFeatures(ProtocolFeatures(rawValue: bits))
    case (.getQueueNum, .number(let count)):
      guard (1...65536).contains(count) else { throw .invalidValue(field: "queue count", value: count) }
      if let fixed = configuration.fixedOffer?.queueCount, count < UInt64(fixed) {
        throw .offerShrank("\(count) queues instead of \(fixed)")
      }
      draft.queueCount = Int(count)
    case (.getMaxMemSlots, .number(let count)):
      guard count > 0 else { throw .invalidValue(field: "number of memory slots", value: count) }
      draft.maximumMemorySlots = Int(clamping: count)
    case (.getConfig(let asked), .config(let config)):
      guard config.offset == asked.offset, config.bytes.count == asked.bytes.count else {
        throw .wrongSize(of: "configuration at \(asked.offset)", expected: asked.bytes.count, actual: config.bytes.count)
      }
      if case .negotiate = running {
        draft.configuration = config.bytes
      } else {
        events.append(.configuration(offset: Int(config.offset), bytes: config.bytes))
      }
    case (.getConfig(let asked), .configRefused):
      if case .negotiate = running { throw .missingFeature("\(asked.bytes.count) bytes of configuration space, though it offers CONFIG") }
      events.append(.configurationRefused)
    case (.getVringBase(let asked), .vringState(let state)):
      guard state.index == asked.index else { throw .invalidValue(field: "ring index of GET_VRING_BASE", value: UInt64(state.index)) }
      bases.append(state)
    case (.getInflightFD(let wanted), .inflight(let area)): try takeInflight(area, wanted, descriptors.takeFirst())
    default: throw .unexpectedReply(to: message.request.rawValue, awaiting: message.request.rawValue)
    }
  }

  // MARK: First contact

  private mutating func takeFeatures(_ offered: FeatureSet) throws(VhostUserError) {
    sawFeatures = true
    let required = configuration.requiredFeatures
    guard required.isSubset(of: offered) else {
      throw .missingFeature("feature bits \(required.subtracting(offered).bits)")
    }
    if let fixed = configuration.fixedOffer {
      guard fixed.features.isSubset(of: offered) else {
        throw .offerShrank("feature bits \(fixed.features.subtracting(offered).bits) are gone")
      }
      draft.features = fixed.features
    } else {
      draft.features = offered.intersection(configuration.allowedFeatures).subtracting(.vhostOnlyMask)
    }
    draft.hasProtocolFeatures = offered.contains(.vhostUserProtocolFeatures)
    if draft.hasProtocolFeatures {
      steps.append(step(.getProtocolFeatures))
    } else {
      try takeProtocolFeatures([])
    }
  }

  private mutating func takeProtocolFeatures(_ offered: ProtocolFeatures) throws(VhostUserError) {
    guard configuration.requiredProtocolFeatures.isSubset(of: offered) else {
      throw .missingFeature("protocol features \(configuration.requiredProtocolFeatures.subtracting(offered).featureNames)")
    }
    if let fixed = configuration.fixedOffer {
      guard fixed.protocolFeatures.isSubset(of: offered) else {
        throw .offerShrank("protocol features \(fixed.protocolFeatures.subtracting(offered).featureNames) are gone")
      }
    }
    var wanted = configuration.fixedOffer?.protocolFeatures ?? configuration.wantedProtocolFeatures
    if configuration.fixedOffer == nil {
      // The channel is there for changes of the configuration only.
      if channel != nil, wanted.contains(.config), offered.contains(.config) {
        wanted.insert(.backEndRequests)
      } else {
        wanted.remove(.backEndRequests)
      }
    }
    let agreed = wanted.intersection(offered).withoutUnmetDependencies
    guard draft.hasProtocolFeatures else { return }
    // Not acknowledged itself, and what it negotiates holds for everything after it.
    steps.append(step(.setProtocolFeatures(agreed)))
    draft.protocolFeatures = agreed
    if agreed.contains(.mq) { steps.append(step(.getQueueNum)) }
    if agreed.contains(.configureMemSlots) { steps.append(step(.getMaxMemSlots)) }
    if agreed.contains(.config), configuration.configurationByteCount > 0 {
      var count = configuration.configurationByteCount
      for growth in configuration.configurationGrowth where !growth.feature.isDisjoint(with: draft.features) {
        count = max(count, growth.byteCount)
      }
      let bytes = [UInt8](repeating: 0, count: count)
      steps.append(step(.getConfig(ConfigMessage(offset: 0, bytes: bytes))))
    }
    if agreed.contains(.backEndRequests), let peer = channelPeer.take() {
      steps.append(step(.setBackEndRequestFD, [peer]))
    } else {
      channel = nil
      channelPeer = nil
    }
  }

  // MARK: Inflight area

  /// The area is kept and passed on, and never looked into; only its size must make sense for the rings it is for.
  private mutating func takeInflight(
    _ area: InflightDescription, _ wanted: InflightDescription, _ descriptor: consuming OwnedFD?
  ) throws(VhostUserError) {
    guard area.size != 0 else { return }
    guard let fd = descriptor else { throw .strayDescriptors }
    guard area.queueCount == wanted.queueCount, area.queueSize == wanted.queueSize else {
      throw .invalidValue(field: "inflight queue count or size", value: UInt64(area.queueCount) << 16 | UInt64(area.queueSize))
    }
    // One 16-byte entry per descriptor at least; a header and a 32-byte entry, each rounded up to a page, at most.
    let entries = UInt64(area.queueCount) * UInt64(area.queueSize)
    guard area.size >= entries * 16, area.size <= entries * 32 + UInt64(area.queueCount) * 8192 else {
      throw .invalidValue(field: "inflight size", value: area.size)
    }
    // The sum was checked when the answer was decoded.
    guard let file = try? fd.status(), file.byteCount >= area.mapOffset + area.size else {
      throw .invalidValue(field: "inflight size beyond its file", value: area.size)
    }
    let shared = SharedDescriptor(fd)
    inflight = InflightKept(area, shared)
    steps.insert(step(.setInflightFD(area), [shared]), at: nextStep)
  }

  // MARK: The back end's channel

  mutating func receiveOnChannel(_ now: MonotonicTime) throws(VhostUserError) {
    guard channelNumber != nil else { return }
    do throws(VhostUserError) {
      // Bounded by the budget: the message after the last one allowed ends the session.
      while let message = try channel?.receive(now: now) { try takeChannel(message, now) }
    } catch .closed(midMessage: false) {
      channel = nil
      events.append(.channelClosed)
    }
  }

  private mutating func takeChannel(_ incoming: consuming IncomingMessage, _ now: MonotonicTime) throws(VhostUserError) {
    guard let request = BackEndRequest(rawValue: incoming.header.request) else {
      throw .unknownRequest(incoming.header.request)
    }
    guard channelBudget.allows(now) else { throw .tooManyMessages }
    guard request == .configChange else { throw .notNegotiated(request: request.name) }
    if incoming.header.flags.contains(.needReply), draft.protocolFeatures.contains(.replyAck) {
      // Answered before anything is asked back: a back end with one thread waits for this.
      let reply = Reply.number(0)
      try channel?.send(reply.header(to: request.rawValue), reply.payload)
    }
    if !events.contains(.configurationChanged) { events.append(.configurationChanged) }
  }
}
