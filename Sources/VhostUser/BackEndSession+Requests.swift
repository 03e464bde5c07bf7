import HostSystem
import VirtioSpec

extension BackEndSession {
  /// Carries out one request whose form was checked.
  mutating func perform<D: BackEndDelegate & ~Copyable>(
    _ message: FrontEndMessage, _ descriptors: inout ReceivedDescriptors, _ delegate: inout D, acknowledge: Bool
  ) throws(VhostUserError) -> Outcome {
    let name = message.request.name
    switch message {
    case .getFeatures: return .reply(.number(offeredFeatures.rawValue), nil)
    case .setFeatures(let wanted): try setFeatures(wanted, &delegate)
    case .setOwner: hasOwner = true
    case .resetOwner:
      // Deprecated. Not a reset: front ends that have no better message send it and go on with what they negotiated.
      for index in vrings.indices { setEnabled(index, false, &delegate) }
    case .getProtocolFeatures: return .reply(.number(offer.protocolFeatures.rawValue), nil)
    case .setProtocolFeatures(let wanted):
      guard wanted.isSubset(of: offer.protocolFeatures) else {
        throw .wrongState(request: name, why: "features that were not offered: \(wanted.subtracting(offer.protocolFeatures).featureNames)")
      }
      guard wanted == wanted.withoutUnmetDependencies else {
        throw .wrongState(request: name, why: "a feature without one that it needs")
      }
      guard isSuspended || wanted == protocolFeatures else { throw .wrongState(request: name, why: "rings are running") }
      protocolFeatures = wanted
      negotiatedProtocolFeatures = true
    case .getQueueNum: return .reply(.number(UInt64(offer.queueCount)), nil)

    case .setMemTable(let table): try replaceMemory(table.regions, &descriptors, &delegate)
    case .addMemReg(let single): try addMemory(single.region, &descriptors, &delegate)
    case .remMemReg(let single):
      descriptors.closeAll()
      try removeMemory(single.region, &delegate)
    case .getMaxMemSlots: return .reply(.number(UInt64(offer.maximumMemorySlots)), nil)

    case .setVringNum(let state): try setVringNum(state)
    case .setVringAddr(let address): try setVringAddr(address, &delegate)
    case .setVringBase(let state): try setVringBase(state)
    case .getVringBase(let state): return try getVringBase(state, &delegate)
    case .setVringKick(let event): try setVringKick(Int(event.index), descriptors.takeFirst(), &delegate)
    case .setVringCall(let event):
      let vring = try vring(UInt32(event.index), name)
      if vring.isStarted {
        delegate.replaceCall(at: Int(event.index), descriptors.takeFirst())
      } else {
        vring.call = descriptors.takeFirst()
      }
    case .setVringErr(let event):
      let vring = try vring(UInt32(event.index), name)
      vring.err = Self.shared(descriptors.takeFirst())
      if vring.isStarted { delegate.replaceErr(at: Int(event.index), vring.err) }
    case .setVringEnable(let state):
      _ = try vring(state.index, name)
      setEnabled(Int(state.index), state.number == 1, &delegate)

    case .setBackEndRequestFD:
      guard let fd = descriptors.takeFirst() else { throw .misuse("a checked descriptor is missing") }
      guard let status = try? fd.status(), status.kind == .socket else {
        throw .refused(request: name, why: "the descriptor is no socket", code: UInt64(Errno.invalid.rawValue))
      }
      channel = Connection(fd, expecting: .nothing, descriptorLimit: 0)
      sendDueConfigurationChange()
    case .getConfig(let config):
      let start = Int(config.offset)
      let bytes = try allowing(name) { () throws(Refusal) in
        try delegate.configuration(start..<start + config.bytes.count)
      }
      guard bytes.count == config.bytes.count else { throw .misuse("the device gave another number of configuration bytes") }
      return .reply(.config(ConfigMessage(offset: config.offset, flags: config.flags, bytes: bytes)), nil)
    case .setConfig(let config):
      // Flag 1 is "migration" to the specification and "writable" to others; only flag 2 can be nothing but migration.
      try allowing(name) { () throws(Refusal) in
        try delegate.writeConfiguration(at: Int(config.offset), config.bytes, migrating: config.flags & 2 != 0)
      }

    case .getInflightFD(let wanted): return try getInflight(wanted, &delegate)
    case .setInflightFD(let area):
      try checkInflight(area, name)
      guard isSuspended else { throw .wrongState(request: name, why: "rings are running") }
      guard let fd = descriptors.takeFirst() else { throw .misuse("a checked descriptor is missing") }
      do { try delegate.setInflightArea(area, fd) } catch { throw refused(name, error) }

    case .resetDevice: return reset(message.request, acknowledge, &delegate)
    case .setStatus(let value):
      if value == 0 { return reset(message.request, acknowledge, &delegate) }
      try allowing(name) { () throws(Refusal) in
        try delegate.setStatus(DeviceStatus(rawValue: UInt8(truncatingIfNeeded: value)))
      }
      status = UInt8(truncatingIfNeeded: value)
    case .getStatus: return .reply(.number(UInt64(status)), nil)

    case .setLogBase(let log):
      guard protocolFeatures.contains(.logShmFD) else { throw .notNegotiated(request: name) }
      guard let fd = descriptors.takeFirst() else { throw .misuse("a checked descriptor is missing") }
      do { try delegate.setLog(log, fd) } catch { throw refused(name, error) }
      return .reply(.log(log), nil)
    case .setLogFD:
      guard let fd = descriptors.takeFirst() else { throw .misuse("a checked descriptor is missing") }
      do { try delegate.setLogSignal(fd) } catch { throw refused(name, error) }
    case .netSetMTU(let bytes):
      try allowing(name) { () throws(Refusal) in try delegate.setMTU(Int(bytes)) }
    case .sendRARP(let number):
      let address = (0..<6).map { UInt8(truncatingIfNeeded: number >> (8 * $0)) }
      try allowing(name) { () throws(Refusal) in try delegate.sendRARP(address) }

    // Known, and never offered.
    case .setLogBaseAddress, .iotlb, .setVringEndian, .createCryptoSession, .closeCryptoSession, .postcopyAdvise,
      .postcopyListen, .postcopyEnd, .gpuSetSocket, .vringKick, .getSharedObject, .setDeviceStateFD, .checkDeviceState,
      .getShmemConfig:
      throw .notNegotiated(request: name)
    }
    return .done
  }

  func refused(_ request: String, _ refusal: Refusal) -> VhostUserError {
    .refused(request: request, why: refusal.why, code: UInt64(max(1, refusal.errno.rawValue)))
  }

  /// Runs a piece of the delegate's, turning its refusal into the session's error.
  private func allowing<R>(_ request: String, _ body: () throws(Refusal) -> R) throws(VhostUserError) -> R {
    do { return try body() } catch { throw refused(request, error) }
  }

  private static func shared(_ fd: consuming OwnedFD?) -> SharedDescriptor? {
    guard let fd = fd.take() else { return nil }
    return SharedDescriptor(fd)
  }

  // MARK: Features

  private mutating func setFeatures<D: BackEndDelegate & ~Copyable>(
    _ wanted: FeatureSet, _ delegate: inout D
  ) throws(VhostUserError) {
    let name = FrontEndRequest.setFeatures.name
    guard wanted.isSubset(of: offeredFeatures) else {
      throw .wrongState(request: name, why: "bits that were not offered: 0x\(hex(wanted.subtracting(offeredFeatures).rawValue))")
    }
    if !isSuspended, wanted.symmetricDifference(features) != [], wanted.symmetricDifference(features) != .vhostLogAll {
      throw .wrongState(request: name, why: "rings are running")
    }
    do {
      try delegate.setFeatures(wanted.subtracting(.vhostOnlyMask), logging: wanted.contains(.vhostLogAll))
    } catch { throw refused(name, error) }
    features = wanted
    // Without protocol features there is no message to enable a ring: they all are.
    if !wanted.contains(.vhostUserProtocolFeatures) {
      for index in vrings.indices { setEnabled(index, true, &delegate) }
    }
  }

  func setEnabled<D: BackEndDelegate & ~Copyable>(_ index: Int, _ isEnabled: Bool, _ delegate: inout D) {
    let vring = vrings[index]
    guard vring.isEnabled != isEnabled else { return }
    vring.isEnabled = isEnabled
    if vring.isStarted { delegate.enableVring(at: index, isEnabled) }
  }

  // MARK: Inflight area

  private func checkInflight(_ area: InflightDescription, _ name: String) throws(VhostUserError) {
    guard (1...offer.queueCount).contains(Int(area.queueCount)), (1...offer.maximumQueueSize).contains(Int(area.queueSize)) else {
      throw .wrongState(request: name, why: "\(area.queueCount) rings of \(area.queueSize) entries are not what the device has")
    }
  }

  private mutating func getInflight<D: BackEndDelegate & ~Copyable>(
    _ wanted: InflightDescription, _ delegate: inout D
  ) throws(VhostUserError) -> Outcome {
    let name = FrontEndRequest.getInflightFD.name
    try checkInflight(wanted, name)
    let area: InflightArea?
    do {
      area = try delegate.makeInflightArea(queueCount: Int(wanted.queueCount), queueSize: Int(wanted.queueSize))
    } catch { throw refused(name, error) }
    guard let area = consume area else {
      return .reply(.inflight(InflightDescription(queueCount: wanted.queueCount, queueSize: wanted.queueSize)), nil)
    }
    return .reply(.inflight(area.description), area.fd)
  }

  // MARK: Reset

  private mutating func reset<D: BackEndDelegate & ~Copyable>(
    _ request: FrontEndRequest, _ acknowledge: Bool, _ delegate: inout D
  ) -> Outcome {
    switch delegate.resetDevice() {
    case .done:
      resetDone()
      return .done
    case .pending:
      pending = .reset(request: request, acknowledge: acknowledge)
      return .later
    }
  }

  /// Memory table, owner and protocol features stay.
  mutating func resetDone() {
    for vring in vrings { vring.reset() }
    features = []
    status = 0
    configurationChangeIsDue = false
  }

  // MARK: The back end's own channel

  /// Tells the front end that the configuration space changed. While all rings are stopped nothing may be sent; it is made
  /// up for when one starts.
  ///
  /// - Returns: whether the front end can be told at all.
  @discardableResult
  public mutating func notifyConfigurationChange() -> Bool {
    guard protocolFeatures.contains([.config, .backEndRequests]) else { return false }
    configurationChangeIsDue = true
    sendDueConfigurationChange()
    return channel != nil
  }

  mutating func sendDueConfigurationChange() {
    guard configurationChangeIsDue, !isSuspended, channel != nil else { return }
    configurationChangeIsDue = false
    let message = BackEndMessage.configChange
    // No reply is asked for: waiting for it here could be a deadlock, and nothing would be done with it. A channel that
    // cannot be written to is given up; the device goes on without it.
    do { try channel?.send(message.header(), message.payload) } catch { channel = nil }
  }
}
