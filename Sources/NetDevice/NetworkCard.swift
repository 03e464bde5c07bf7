import BackendKit
import HostSystem
import VirtioSpec

/// A virtio network card behind vhost-user: queue pairs between a driver and ports. One thread, the kit's.
package final class NetworkCard: DeviceBackend {
  /// What the card says of itself.
  package struct Identity: Sendable {
    /// Nil leaves the choice to the driver.
    package var mac: MACAddress?
    /// Nil leaves it to the driver too.
    package var mtu: UInt16?
    package init(mac: MACAddress? = nil, mtu: UInt16? = nil) {
      self.mac = mac
      self.mtu = mtu
    }
  }

  private enum Token {
    /// Ports are registered under their pair's number, which is smaller.
    static let again = 1000
  }

  private let identity: Identity
  private let pairs: [QueuePair]
  /// Signalled by ourselves when a turn ended with work left.
  private let again: EventFD
  private var transmitOffloads: TransmitOffloads = []
  private var receiveOffloads: ReceiveOffloads = []
  private var complaints = RateLimit(burst: 2, per: .seconds(60))

  /// - Parameter ports: one per queue pair.
  package static func make(ports: [PacketPort], identity: Identity = Identity()) throws(SystemError) -> NetworkCard {
    NetworkCard(ports, identity, try EventFD())
  }

  private init(_ ports: [PacketPort], _ identity: Identity, _ again: consuming EventFD) {
    precondition(!ports.isEmpty && ports.count < 128, "A card has 1 to 127 queue pairs.")
    pairs = ports.map(QueuePair.init)
    self.identity = identity
    self.again = again
  }

  package var profile: DeviceProfile {
    var features: FeatureSet = [
      .version1, .indirectDescriptors, .eventIndex, .packedRing, .netMergeableReceiveBuffers, .netStatus,
      .netChecksum, .netHostTSO4, .netHostTSO6, .netHostECN,
      .netGuestChecksum, .netGuestTSO4, .netGuestTSO6, .netGuestECN,
    ]
    if identity.mac != nil { features.insert(.netMAC) }
    if identity.mtu != nil { features.insert(.netMTU) }
    var profile = DeviceProfile(device: .net, queueCount: 2 * pairs.count, features: features)
    profile.servesDisabledQueues = true
    return profile
  }

  package var systemCalls: SystemCallNeeds { SystemCallNeeds([.net]) }

  package var configuration: [UInt8] {
    var space = NetConfiguration()
    if let mac = identity.mac { space.mac = mac }
    if let mtu = identity.mtu { space.mtu = mtu }
    space.status = pairs.contains { $0.linkIsUp } ? NetSpec.linkUp : 0
    space.maxQueuePairs = UInt16(pairs.count)
    return space.encoded()
  }

  /// Of all pairs together.
  package var counters: NetCounters {
    var sum = NetCounters()
    for pair in pairs {
      let (sent, received) = (pair.transmit.counters, pair.receive.counters)
      sum.transmitted &+= sent.transmitted
      sum.refused &+= sent.refused
      sum.notSent &+= sent.notSent
      sum.received &+= received.received
      sum.tooLong &+= received.tooLong
      sum.unsuitable &+= received.unsuitable
      sum.uselessBuffers &+= received.uselessBuffers
      sum.starvations &+= received.starvations
    }
    return sum
  }

  // MARK: Life

  package func prepare(_ context: inout BackendContext) throws(BackendError) {
    do { try context.watch(again.fd, for: .readable, token: Token.again) } catch { throw .system(error) }
  }

  package func negotiated(_ features: FeatureSet, _ context: inout BackendContext) {
    transmitOffloads = TransmitOffloads(features)
    for pair in pairs { pair.receive.isMergeable = features.contains(.netMergeableReceiveBuffers) }
    setReceiveOffloads(ReceiveOffloads(features))
  }

  private func setReceiveOffloads(_ offloads: ReceiveOffloads) {
    receiveOffloads = offloads
    for pair in pairs {
      do { try pair.port.setOffloads(offloads) } catch {
        // Frames that need more than was agreed are dropped one by one then.
        if complaints.allows() { Log.warning("\(error)") }
      }
    }
  }

  package func start(_ queue: consuming DeviceQueue, _ context: inout BackendContext) throws(BackendError) {
    let pair = pairs[queue.index / 2]
    if queue.index % 2 == 0 { pair.receive.start(queue) } else { pair.transmit.start(queue) }
  }

  package func enabled(queue index: Int, _ isEnabled: Bool, _ context: inout BackendContext) {
    let pair = pairs[index / 2]
    if index % 2 == 0 {
      pair.receiveIsEnabled = isEnabled
      if !isEnabled { pair.wantsFrames = false }
    } else {
      pair.transmitIsEnabled = isEnabled
    }
    watch(index / 2, &context)
  }

  package func stop(queue index: Int, _ context: inout BackendContext) throws(BackendError) -> DeviceQueue? {
    let pair = pairs[index / 2]
    if index % 2 == 0 {
      pair.wantsFrames = false
      watch(index / 2, &context)
      return pair.receive.stop()
    }
    pair.isBlocked = false
    watch(index / 2, &context)
    return pair.transmit.stop()
  }

  package func reset(_ context: inout BackendContext) { forgetDriver() }

  package func disconnected(_ context: inout BackendContext) {
    let counters = counters
    Log.info(counters.summary)
    forgetDriver()
  }

  private func forgetDriver() {
    transmitOffloads = []
    setReceiveOffloads([])
  }

  // MARK: Frames

  package func kicked(queue index: Int, _ context: inout BackendContext) {
    if index % 2 == 0 { receive(index / 2, &context) } else { transmit(index / 2, &context) }
  }

  package func ready(_ token: Int, _ readiness: Readiness, _ context: inout BackendContext) {
    if token == Token.again {
      again.drainAfterReport()
      for index in pairs.indices where pairs[index].transmit.isHere && !pairs[index].isBlocked { transmit(index, &context) }
      return
    }
    guard token < pairs.count else { return }
    let pair = pairs[token]
    // The port's end shows in reads and writes; where neither is wanted it is not registered.
    if !readiness.isDisjoint(with: [.readable, .hangUp, .error]), pair.wantsFrames { receive(token, &context) }
    if !readiness.isDisjoint(with: [.writable, .hangUp, .error]), pair.isBlocked { transmit(token, &context) }
  }

  private func transmit(_ index: Int, _ context: inout BackendContext) {
    let pair = pairs[index]
    let end = pair.transmit.drain(to: pair.linkIsUp && pair.transmitIsEnabled ? pair.port : nil, transmitOffloads)
    pair.isBlocked = end == .blocked
    if end == .turnOver { again.signal() }
    watch(index, &context)
  }

  private func receive(_ index: Int, _ context: inout BackendContext) {
    let pair = pairs[index]
    guard pair.linkIsUp, pair.receiveIsEnabled else { return }
    switch pair.receive.fill(from: pair.port, receiveOffloads) {
    case .drained, .turnOver: pair.wantsFrames = true
    case .starved, .stopped: pair.wantsFrames = false
    case .portGone:
      pair.wantsFrames = false
      linkIsLost(index, &context)
    }
    watch(index, &context)
  }

  private func linkIsLost(_ index: Int, _ context: inout BackendContext) {
    Log.warning("The other side of queue pair \(index) is gone; the link is down")
    pairs[index].linkIsUp = false
    pairs[index].isBlocked = false
    context.configurationChanged()
    // What waits for the port is dropped.
    again.signal()
  }

  private func watch(_ index: Int, _ context: inout BackendContext) {
    do { try pairs[index].watch(&context, token: index) } catch { context.end(because: "\(error)") }
  }
}
