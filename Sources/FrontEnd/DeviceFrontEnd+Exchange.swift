import HostSystem
import VhostUser
import VirtioSpec
import VirtioTransport

/// Another back end in place of one that serves: looked at, given features, memory and ring sizes while the old one goes on;
/// then the old one's rings are stopped and the new one goes on from where they stand. Until the new one has said that it does,
/// the old one keeps everything it needs to go on itself, and does so if anything fails.
///
/// 1. `examine`: ends with `.examined`. Nothing the guest could notice has happened; `forget` undoes it.
/// 2. `exchange`: ends with `.exchanged`, or with `.exchangeFailed`.
/// 3. `forget`, when the process that is not needed any more has ended: it lets go of the connection to it. After a failure
///    the rings stand still until then, because the one that failed may still be at work on them.
extension DeviceFrontEnd {
  enum Exchange: Equatable {
    case none
    /// First contact.
    case contacting
    /// Features, memory and ring sizes; whether the exchange follows at once.
    case preparing(commits: Bool)
    /// All that can be done beforehand is done.
    case ready
    /// Agreed on, and the device is in the middle of being set up or reset, which comes first.
    case awaiting
    /// The old one's rings are being stopped.
    case draining
    /// The new one's rings are being started.
    case starting
    /// The new one failed; the old one goes on when `forget` says that it may.
    case failed
    /// The old one goes on.
    case undoing
    /// The old one is not needed any more.
    case exchanged
  }

  /// Begins first contact with a back end that might take over.
  ///
  /// - Returns: false when the device cannot be given another one now.
  package func examine(_ socket: consuming OwnedFD, now: MonotonicTime) throws(VhostUserError) -> Bool {
    guard exchange == .none, offer != nil, !isExchanging else { return false }
    switch state {
    case .idle, .activating, .running, .resetting, .broken, .detached, .lost: break
    case .negotiating, .pausing, .paused, .exchanging, .reattaching: return false
    }
    var configuration = configuration
    configuration.fixedOffer = nil
    configuration.inflight = nil
    candidate = try FrontEndSession(socket, configuration)
    exchange = .contacting
    findings = []
    candidate?.negotiate(now: now)
    work(now)
    return true
  }

  /// The candidate takes over. Only after `.examined` without a refusal.
  ///
  /// - Parameter drain: how long the old one may take to finish what is in flight.
  /// - Returns: false when there is no candidate.
  package func exchange(drain: Duration, now: MonotonicTime) -> Bool {
    guard exchange == .ready else { return false }
    drainTime = drain
    exchange = .awaiting
    work(now)
    return true
  }

  /// Lets go of the candidate, or of the back end that was replaced.
  package func forget(now: MonotonicTime) {
    switch exchange {
    case .none, .undoing: return
    case .ready:
      exchange = .none
      candidate = nil
    case .contacting, .preparing, .awaiting:
      // Whoever asked waits for an answer, or has been followed by somebody who does not know that.
      exchange = .none
      candidate = nil
      events.append(.exchangeFailed("it was called off"))
    case .draining, .starting:
      failExchange(.closed(midMessage: false), now)
      if exchange == .failed { undo(now) }
    case .failed: undo(now)
    case .exchanged:
      exchange = .none
      retired = nil
    }
    work(now)
  }

  /// The rings stand still, or are on their way between two back ends.
  var isExchanging: Bool { state == .exchanging }

  // MARK: What the candidate says

  func takeCandidate(_ event: FrontEndSession.Event, _ now: MonotonicTime) {
    switch event {
    case .negotiated(let offer):
      findings = check(offer).findings(offer)
      if findings.contains(where: { $0.verdict == .refusal }) { return refuseCandidate() }
      keepWriteCache(offer)
      prepare(offer, commits: false, now)
    case .prepared:
      guard case .preparing(let commits) = exchange else { break }
      exchange = commits ? .awaiting : .ready
      guard !commits else { break }
      findings.append(.init(.fine, "memory and rings", "taken as the guest has them"))
      events.append(.examined(findings))
    case .activated:
      if exchange == .starting { finishExchange(now) }
    case .failed(let error): candidateFailed(error, now)
    case .stopped, .resumed, .reset, .configuration, .configurationWritten, .configurationRefused, .callReplaced, .kicksReplaced,
      .configurationChanged, .channelClosed:
      break
    }
  }

  private func candidateFailed(_ error: VhostUserError, _ now: MonotonicTime) {
    switch exchange {
    case .contacting, .preparing(commits: false):
      findings.append(.init(.refusal, exchange == .contacting ? "first contact" : "memory and rings", "\(error)"))
      refuseCandidate()
    case .draining, .starting: failExchange(error, now)
    case .ready, .awaiting, .preparing(commits: true):
      candidate = nil
      if exchange != .ready { events.append(.exchangeFailed("\(error)")) }
      exchange = .none
    case .none, .failed, .undoing, .exchanged: break
    }
  }

  /// A driver that was told that its writes are stable at once does not ask for it: whoever comes next must hear that.
  private func keepWriteCache(_ new: Offer) {
    host?.update { function in
      let offset = BlockConfiguration.Offset.writeback
      let space = function.configuration.bytes
      guard function.state.device == .block, function.state.status.contains(.featuresOK),
        function.state.accepted.contains(.blockConfigWriteCache), space.count > offset, let bytes = new.configuration,
        bytes.count > offset, bytes[offset] != space[offset]
      else { return [] }
      told[offset] = space[offset]
      return []
    }
  }

  private func refuseCandidate() {
    exchange = .none
    candidate = nil
    events.append(.examined(findings))
  }

  private func check(_ new: Offer) -> ReplacementCheck {
    var device = DeviceID(rawValue: 0)
    var agreed: FeatureSet = []
    var shown: FeatureSet = []
    var space: [UInt8] = []
    var queueCount = 0
    host?.update { function in
      device = function.state.device
      if function.state.status.contains(.featuresOK) { agreed = function.state.accepted }
      shown = function.state.offered
      space = function.configuration.bytes
      queueCount = function.state.queues.count
      return []
    }
    return ReplacementCheck(
      device: device, agreed: agreed.subtracting(ownFeatures), shown: shown.subtracting(ownFeatures), hidden: hiddenFeatures, space: space,
      servesSpace: configuration.configurationByteCount == 0, queueCount: queueCount, regionCount: memory.regions.count, old: offer)
  }

  /// What the driver has set up, in the candidate's terms; without a driver there is nothing to prepare.
  private func prepare(_ offer: Offer, commits: Bool, _ now: MonotonicTime) {
    preparedGeneration = generation
    guard var wanted = activation, !activeQueues.isEmpty else {
      exchange = commits ? .awaiting : .ready
      if !commits { events.append(.examined(findings)) }
      return
    }
    wanted.features = driverFeatures.intersection(offer.features)
    wanted.configuration = toldBytes
    exchange = .preparing(commits: commits)
    candidate?.prepare(wanted, now: now)
  }

  // MARK: The exchange

  /// Goes on as far as the device's own doings allow.
  func workOnExchange(_ now: MonotonicTime) {
    guard exchange == .awaiting, let offer = candidate?.offer else { return }
    switch state {
    case .activating, .resetting, .negotiating, .reattaching, .pausing, .paused, .exchanging: return
    case .idle, .running, .broken, .detached, .lost: break
    }
    // Something is still on its way to the old one, and is answered first.
    guard telling == nil else { return }
    // A driver may have come, gone, or come again since it was looked at.
    let refusals = check(offer).findings(offer).filter { $0.verdict == .refusal }
    if let refusal = refusals.first {
      exchange = .none
      candidate = nil
      return events.append(.exchangeFailed("\(refusal.subject): \(refusal.sentence)"))
    }
    guard preparedGeneration == generation else { return prepare(offer, commits: true, now) }
    stateBeforePause = state
    guard let activation, !activeQueues.isEmpty, state == .running || state == .detached else { return finishExchange(now) }
    if state == .detached {
      guard let bases = standing(of: activation) else {
        exchange = .none
        candidate = nil
        return events.append(.exchangeFailed("there is no record of requests in flight, without which its rings cannot go on"))
      }
      state = .exchanging
      return startCandidate(bases, now)
    }
    state = .exchanging
    exchange = .draining
    drainDeadline = now.advanced(by: drainTime)
    if !deafen(now) { session?.stop(now: now) }
  }

  /// The old one has stopped.
  func finishDraining(_ bases: [VringState], _ now: MonotonicTime) {
    oldBases = bases
    switch exchange {
    case .draining: settle(bases, .exchange, now)
    case .undoing: resumeOld(now)
    default: break
    }
  }

  /// Nothing more is in flight at the old one: what is recorded there goes on being recorded in the same place, if the new one
  /// records at all.
  func startCandidate(_ bases: [VringState], _ now: MonotonicTime) {
    drainDeadline = nil
    exchange = .starting
    candidate?.begin(at: bases, session?.inflight ?? inflight, now: now)
  }

  private func finishExchange(_ now: MonotonicTime) {
    guard let new = candidate?.offer else { return }
    let wasSetUp = state == .exchanging
    let before = stateBeforePause
    retired = session.take()
    session = candidate.take()
    exchange = .exchanged
    inflight = nil
    offer = new
    activation?.features = driverFeatures.intersection(new.features)
    configurationIsStale = false
    writes.removeAll()
    host?.update { function in
      function.offer(new.features.union(ownFeatures).subtracting(hiddenFeatures))
      guard let bytes = new.configuration, configuration.configurationByteCount > 0 else { return [] }
      return function.updateConfiguration(from: 0, with: withTold(bytes))
    }
    events.append(.exchanged)
    switch before {
    // The guest has been told that the device needs a reset, and it does.
    case .lost, .broken: state = driverFeatures.isEmpty ? .idle : .broken
    case .detached where !wasSetUp: state = driverFeatures.isEmpty ? .idle : isBroken ? .broken : .running
    default: state = wasSetUp ? .running : before
    }
    guard wasSetUp else { return }
    finishRestoring(isSuccessor: false)
    carryOutDeferred(now)
  }

  /// The new one cannot, or the old one takes too long.
  func failExchange(_ error: VhostUserError, _ now: MonotonicTime) {
    let isBeingStopped = exchange == .draining && settling == nil && quieting == nil
    settling = nil
    quieting?.nextLook = nil
    hasFailedBegun = candidate?.hasBegunRings ?? false
    candidate = nil
    drainDeadline = nil
    events.append(.exchangeFailed("\(error)"))
    // What it had begun it may go on with until its process has ended.
    exchange = isBeingStopped ? .undoing : .failed
  }

  /// The old one goes on from where it was, or from where the new one has brought the rings.
  private func undo(_ now: MonotonicTime) {
    // What it had under way may outlast it. A death is what there is a fence for: the old one's program starts anew.
    if hasFailedBegun, awaitsSuccessor, session != nil {
      exchange = .none
      state = stateBeforePause
      return lose(.closed(midMessage: false))
    }
    exchange = .undoing
    resumeOld(now)
  }

  private func resumeOld(_ now: MonotonicTime) {
    guard session != nil else {
      // It was gone before.
      exchange = .none
      state = .detached
      return
    }
    // It was never stopped.
    guard quieting == nil else {
      session?.replaceKicks(nil, now: now)
      return
    }
    if hasFailedBegun, let activation {
      session?.resume(at: standing(of: activation) ?? oldBases, now: now)
    } else {
      session?.resume(now: now)
    }
  }

  /// The old one does what it did.
  func finishUndoing(_ now: MonotonicTime) {
    exchange = .none
    state = .running
    finishRestoring(isSuccessor: false)
    carryOutDeferred(now)
  }

  /// The old one is lost in the middle: the device is without a back end, as at any other time.
  func abandonExchange() {
    let answers = exchange != .none && exchange != .failed && exchange != .undoing && exchange != .exchanged && exchange != .ready
    let wasExamining: Bool
    switch exchange {
    case .contacting, .preparing(commits: false): wasExamining = true
    default: wasExamining = false
    }
    if isExchanging { state = stateBeforePause }
    guard exchange != .exchanged else { return }
    exchange = .none
    candidate = nil
    settling = nil
    quieting = nil
    drainDeadline = nil
    guard answers else { return }
    let sentence = "the back end to be replaced was lost meanwhile"
    events.append(wasExamining ? .examined([.init(.refusal, "present back end", sentence)]) : .exchangeFailed(sentence))
  }

  func handleDrainTimeout(_ now: MonotonicTime) {
    guard let deadline = drainDeadline, deadline <= now, exchange == .draining, settling == nil else { return }
    failExchange(.noReply(to: "GET_VRING_BASE", milliseconds: Int(drainTime.nanoseconds / 1_000_000)), now)
  }

  private func standing(of activation: BackEndActivation) -> [VringState]? {
    var bases: [VringState] = []
    for vring in activation.vrings {
      guard let base = base(of: vring, activation.features) else { return nil }
      bases.append(VringState(index: UInt32(vring.index), number: base))
    }
    return bases
  }
}
