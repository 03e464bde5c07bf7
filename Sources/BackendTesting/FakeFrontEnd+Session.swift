import HostSystem
import VhostUser
import VirtioQueue
import VirtioSpec

/// The vhost-user half.
extension FakeFrontEnd {
  /// Sends a message as it is, and waits for its reply or acknowledgement.
  @discardableResult
  public func send(_ message: FrontEndMessage, descriptors: [CInt] = []) throws(FakeFrontEndError) -> Reply {
    guard session != nil else { throw FakeFrontEndError("\(message.request.name) after leaving") }
    do throws(VhostUserError) {
      guard let answer = try session?.request(message, descriptors: descriptors) else { throw .closed(midMessage: false) }
      return answer.reply
    } catch { throw FakeFrontEndError("\(message.request.name): \(error)") }
  }

  private func number(_ message: FrontEndMessage) throws(FakeFrontEndError) -> UInt64 {
    guard case .number(let value) = try send(message) else { throw FakeFrontEndError("\(message.request.name) gives no number") }
    return value
  }

  func negotiate() throws(FakeFrontEndError) {
    try send(.setOwner)
    offered = FeatureSet(rawValue: try number(.getFeatures))
    guard offered.contains(.vhostUserProtocolFeatures) else { throw FakeFrontEndError("The back end offers no protocol features") }
    protocolFeatures = ProtocolFeatures(rawValue: try number(.getProtocolFeatures))
    try send(.setProtocolFeatures(protocolFeatures))
    try acknowledge()
    let region = RegionDescription(
      guestAddress: Self.guestStart, size: UInt64(setup.memoryByteCount), userAddress: Self.userStart, mapOffset: 0)
    try send(.setMemTable(RegionTable(regions: [region])), descriptors: [memoryFD.rawValue])
  }

  private func acknowledge() throws(FakeFrontEndError) {
    features = offered.subtracting(.vhostOnlyMask)
    if let wanted = setup.features { features = features.intersection(wanted.union(.version1)) }
    try send(.setFeatures(features.union(.vhostUserProtocolFeatures)))
  }

  /// The device's configuration space.
  public func configuration(_ byteCount: Int, at offset: Int = 0) throws(FakeFrontEndError) -> [UInt8] {
    let wish = ConfigMessage(offset: UInt32(offset), bytes: [UInt8](repeating: 0, count: byteCount))
    guard case .config(let message) = try send(.getConfig(wish)), message.bytes.count == byteCount else {
      throw FakeFrontEndError("The configuration space was refused")
    }
    return message.bytes
  }

  /// As a driver that writes into the configuration space.
  public func writeConfiguration(_ bytes: [UInt8], at offset: Int) throws(FakeFrontEndError) {
    try send(.setConfig(ConfigMessage(offset: UInt32(offset), bytes: bytes)))
  }

  /// Starts a queue, new or stopped before.
  /// - Parameter base: where it stands, by `stop`; nil for a new one.
  public func start(queue index: Int, base: UInt32? = nil) throws(FakeFrontEndError) {
    let queue = queues[index]
    let shape = queue.driver.configuration
    let event = VringEvent(index: UInt8(index), carriesDescriptor: true)
    func user(_ address: UInt64) -> UInt64 { address - Self.guestStart + Self.userStart }
    try send(.setVringNum(VringState(index: UInt32(index), number: UInt32(shape.size))))
    try send(.setVringBase(VringState(index: UInt32(index), number: base ?? shape.base.rawValue)))
    try send(
      .setVringAddr(
        VringAddress(
          index: UInt32(index), descriptorTable: user(shape.descriptors.rawValue), availableRing: user(shape.driver.rawValue),
          usedRing: user(shape.device.rawValue))))
    try send(.setVringCall(event), descriptors: [queue.call.fd.rawValue])
    try send(.setVringErr(event), descriptors: [queue.error.fd.rawValue])
    try kick(queue: index, polled: setup.isPolled)
    try send(.setVringEnable(VringState(index: UInt32(index), number: 1)))
  }

  /// Gives a queue its kick, or takes it away.
  public func kick(queue index: Int, polled: Bool) throws(FakeFrontEndError) {
    let event = VringEvent(index: UInt8(index), carriesDescriptor: !polled)
    try send(.setVringKick(event), descriptors: polled ? [] : [queues[index].kick.fd.rawValue])
  }

  /// Stops a queue; where it stands.
  @discardableResult
  public func stop(queue index: Int) throws(FakeFrontEndError) -> UInt32 {
    guard case .vringState(let state) = try send(.getVringBase(VringState(index: UInt32(index), number: 0))) else {
      throw FakeFrontEndError("GET_VRING_BASE does not say where queue \(index) stands")
    }
    return state.number
  }

  /// As a driver that writes 0 into the device's status: the rings are new after it.
  public func reset() throws(FakeFrontEndError) {
    for index in queues.indices { try stop(queue: index) }
    if protocolFeatures.contains(.resetDevice) { try send(.resetDevice) }
    try acknowledge()
    for index in queues.indices {
      do { queues[index] = try Queue(DriverQueue(queues[index].driver.configuration, memory: memory)) } catch {
        throw FakeFrontEndError("Queue \(index) cannot be made again: \(error)")
      }
      try start(queue: index)
    }
  }
}
