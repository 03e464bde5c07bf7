import Glibc
import HostSystem
import VhostUser
import VirtioSpec
import VirtioTransport

/// A back end that dies, and the one that comes after it. The guest notices a pause: doorbells and vectors stay what they
/// are, kicks are counted meanwhile, a reset is over at once, and a driver that sets the device up is served when there is
/// somebody to serve it.
extension DeviceFrontEnd {
  func detach(_ error: VhostUserError) {
    abandonExchange()
    // Without rings that have run nothing is in flight: an area from before a reset speaks of rings that are no more.
    inflight = hasRun ? session?.inflight ?? inflight : nil
    session?.abandon()
    settling = nil
    quieting = nil
    telling = nil
    calls = [:]
    configurationIsStale = false
    isRestoring = false
    if state == .resetting { completeReset() }
    state = .detached
    events.append(.detached(error))
    carryOutDeferred(.now)
  }

  /// Begins first contact with a successor; ends with `.ready` and `.restored`, or with `.detached`.
  ///
  /// - Returns: false when there is a back end already, or never was one.
  package func reattach(_ socket: consuming OwnedFD, now: MonotonicTime) throws(VhostUserError) -> Bool {
    guard let offer, awaitsSuccessor, state == .detached || state == .lost else { return false }
    // Some back ends take the next connection only when the one before is gone.
    session = nil
    var configuration = configuration
    // What the guest was shown cannot be taken back.
    configuration.fixedOffer = offer
    configuration.inflight = inflight
    session = try FrontEndSession(socket, configuration)
    state = .reattaching
    session?.negotiate(now: now)
    work(now)
    return true
  }

  /// No successor will come: the guest is told that the device needs a reset.
  package func giveUp() {
    guard state == .detached || state == .reattaching else { return }
    lose(.closed(midMessage: false), mayAwait: false)
  }

  /// A successor offers what its predecessor did: it gets what the driver has set up.
  func restore(_ offer: Offer, _ now: MonotonicTime) {
    events.append(.ready(offer))
    if let bytes = offer.configuration, bytes != self.offer?.configuration {
      self.offer?.configuration = bytes
      host?.update { $0.updateConfiguration(from: 0, with: withTold(bytes)) }
    }
    writes.removeAll()
    guard var activation, !activeQueues.isEmpty else {
      state = isBroken ? .broken : driverFeatures.isEmpty ? .idle : .running
      return events.append(.restored)
    }
    unrecorded = 0
    if hasRun {
      if inflight == nil, !offer.protocolFeatures.contains(.inflightShmFD) { unrecorded = countWaiting(now) }
      for position in activation.vrings.indices {
        guard let base = base(of: activation.vrings[position], activation.features) else {
          return lose(.missingFeature("the record of requests in flight, without which its rings cannot go on"), mayAwait: false)
        }
        activation.vrings[position].base = base
      }
    }
    activation.configuration = toldBytes
    hasRun = true
    isRestoring = true
    state = .activating
    session?.activate(activation, now: now)
  }

  /// Where a ring goes on. A split ring says in memory what was answered: from there on everything is taken again, or, with a
  /// record, what the record says. A packed ring does not say; only the record does, whatever is named here.
  func base(of vring: VringActivation, _ features: FeatureSet) -> UInt32? {
    guard features.contains(.packedRing) else {
      return usedRings[vring.index].flatMap { host?.usedIndex(ofUsedRing: $0) }.map(UInt32.init)
    }
    // Without an area yet, rings were never started: the area comes first.
    let isRecorded = inflight != nil || offer?.protocolFeatures.contains(.inflightShmFD) == true
    return isRecorded ? vring.base : nil
  }

  /// A configuration space as it will be when the back end has heard what the driver wrote.
  func withTold(_ bytes: [UInt8]) -> [UInt8] {
    var bytes = bytes
    for (offset, byte) in told where offset < bytes.count { bytes[offset] = byte }
    return bytes
  }

  /// What the driver wrote, in runs. At most as many as the space has bytes.
  var toldBytes: [ConfigMessage] {
    var messages: [ConfigMessage] = []
    for (offset, byte) in told.sorted(by: { $0.key < $1.key }) {
      if let last = messages.last, Int(last.offset) + last.bytes.count == offset {
        messages[messages.count - 1].bytes.append(byte)
      } else {
        messages.append(ConfigMessage(offset: UInt32(offset), bytes: [byte]))
      }
    }
    return messages
  }

  /// Makes good what may have been missed: a kick that the dead process had taken, a call that it owed.
  /// - Parameter isSuccessor: the one before is dead.
  func finishRestoring(isSuccessor: Bool = true) {
    isRestoring = false
    for vring in activation?.vrings ?? [] {
      vring.kick.fd.signalDistrusted()
      vring.call?.fd.signalDistrusted()
    }
    if isSuccessor { events.append(.restored) }
  }
}
