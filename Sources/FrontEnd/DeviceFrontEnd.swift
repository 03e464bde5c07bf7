// FrontEnd: joins one transport device (what the guest sees) to one vhost-user session (the process that serves it).
//
// It lives in the core's main loop. The machine's effects come in, session operations go out; the answers come back
// through the event loop and end in the device's registers. No processor ever waits for any of it: configuration reads
// are answered from a copy, DRIVER_OK and resets are carried out here, and the guest sees a reset end when it has.
//
//     let device = try DeviceFrontEnd(name: "disk0", socket, configuration, memory)
//     device.start(now: .now)                         // first contact
//     // ... `.ready(offer)`: build the PCI function from the offer, then
//     device.attach(host)
//     device.handle(effect, now: .now)                // every effect of that function
//     // on readable `socketNumber` or `channelNumber`: device.receive(now:)
//     // at `deadline`: device.handleTimeout(now:)
//     while let event = device.nextEvent() { ... }

import HostSystem
import VhostUser
import VirtioSpec
import VirtioTransport

/// One virtio device of the guest, served by another process.
package final class DeviceFrontEnd {
  package enum Event: Equatable, Sendable {
    /// First contact is made; the guest may be shown the device.
    case ready(Offer)
    /// All rings are stopped, for a pause.
    case paused
    case resumed
    /// The back end closed the channel on which it tells of configuration changes: stop watching `channelNumber`.
    case channelClosed
    /// The back end is of no more use. The guest has been told (`DEVICE_NEEDS_RESET`).
    case lost(VhostUserError)
    /// The back end is of no more use. The guest has not been told: a successor is awaited (`reattach`, `giveUp`).
    case detached(VhostUserError)
    /// The successor does what its predecessor did.
    case restored
    /// What was found of a candidate; any refusal, and it has been let go.
    case examined([ReplacementCheck.Finding])
    /// The candidate serves the device.
    case exchanged
    /// It does not; the one before serves on, or will after `forget`.
    case exchangeFailed(String)
  }

  /// Where the device is, for reports.
  package enum State: String, Sendable {
    case negotiating
    /// No driver.
    case idle
    case activating
    case running
    case resetting
    case pausing
    case paused
    /// Its rings are between two back ends.
    case exchanging
    /// The driver set up rings that cannot be; it must reset.
    case broken
    /// There is no back end now; a successor is awaited.
    case detached
    /// First contact with a successor.
    case reattaching
    /// There is no back end any more.
    case lost
  }

  /// A back end that is lost may be followed by another one. Set once the guest runs: before, there is nothing to go on with.
  package var awaitsSuccessor = false

  package let name: String
  package internal(set) var state = State.negotiating
  /// What first contact brought; nil before.
  package internal(set) var offer: Offer?
  /// What the driver acknowledged; empty while there is none.
  package private(set) var driverFeatures: FeatureSet = []
  /// Rings that run, or would but for a pause.
  package private(set) var activeQueues: [Int] = []

  /// Nil while there is no back end.
  var session: FrontEndSession?
  let configuration: FrontEndConfiguration
  /// What the driver has set up, for the next back end; nil while there is no driver, or it set up what cannot be.
  var activation: BackEndActivation?
  /// Used rings of a split device in guest memory, by queue.
  var usedRings: [Int: UInt64] = [:]
  /// The driver's rings have been started by some back end, so that they no longer stand at their beginning.
  var hasRun = false
  /// A successor is being brought to where its predecessor was. A reset meanwhile is carried out behind that.
  var isRestoring = false
  /// The driver set up rings that cannot be.
  var isBroken = false
  /// Requests in flight, as the back ends have recorded them.
  var inflight: InflightKept?
  /// Chains that were in flight when the latest back end died, where it kept no record of them: a split ring says in memory how many
  /// there were, but not which ones, unless they were answered in the order of the ring.
  package var unrecorded = 0
  /// Configuration bytes that the driver has written since its last reset, by offset: a successor must hear of them.
  var told: [Int: UInt8] = [:]
  /// Features that the core offers whatever back ends say.
  package var ownFeatures: FeatureSet = []
  /// Features that the guest is not shown whoever has them.
  package var hiddenFeatures: FeatureSet = []
  let memory: SharedGuestMemory
  /// Rings whose progress is looked at.
  var watches: [QueueWatch] = []
  /// What is watched depends on what the device is.
  private let deviceType: DeviceID
  var host: (any DeviceHost)?
  var events: [Event] = []

  /// Where the rings of a paused device stopped, by its back end's answers.
  private var pausedBases: [VringState] = []
  /// Effects that came while the device was paused, carried out afterwards.
  private var deferred: [TransportEffect] = []
  /// The state to return to after the pause.
  var stateBeforePause = State.idle

  /// A back end that might take over, and how far that has come (DeviceFrontEnd+Exchange).
  var candidate: FrontEndSession?
  var exchange = Exchange.none
  /// The one that was replaced, until its process has ended: the end of the connection would make it clean up.
  var retired: FrontEndSession?
  var findings: [ReplacementCheck.Finding] = []
  var drainTime = Duration.zero
  var drainDeadline: MonotonicTime?
  /// Rings that have stopped, and requests of theirs that may still be under way.
  var settling: Settling?
  /// The present back end hears no kicks, so that it comes to rest before it is stopped.
  var quieting: Quieting?
  /// Where the old one's rings stopped.
  var oldBases: [VringState] = []
  var hasFailedBegun = false
  /// Counts what drivers have set up, to see whether what was prepared is still so.
  var generation = 0
  var preparedGeneration = 0
  /// A pause was asked for while the rings were between two back ends.
  private var awaitsPause = false
  var writes = ConfigurationWrites()
  /// Calls to be replaced: the vector by queue. Only the last one counts.
  var calls: [Int: UInt16?] = [:]
  var configurationIsStale = false
  /// The back end said that it changed: the driver hears of it even if the bytes are what they were.
  private var changeIsAnnounced = false
  /// What is under way of the requests that a guest or the back end can cause at will. The next one waits, so that
  /// nobody can make queues grow.
  var telling: Telling?

  enum Telling { case call, configurationWrite, configurationRead }

  /// - Parameter configuration: what to ask of the back end. Features this side cannot carry are removed from it.
  package init(
    name: String, _ deviceType: DeviceID, _ socket: consuming OwnedFD, _ configuration: FrontEndConfiguration,
    _ memory: SharedGuestMemory
  ) throws(VhostUserError) {
    self.deviceType = deviceType
    self.name = name
    self.memory = memory
    var configuration = configuration
    // Translated addresses need IOTLB messages; a single queue's reset has no counterpart in vhost-user; doorbells that
    // carry data do not go through an eventfd.
    configuration.allowedFeatures.subtract([
      .accessPlatform, .ringReset, .notificationData, .notificationConfigData, .adminQueue, .suspend, .singleRootIO,
    ])
    configuration.mayFinishLate = deviceType == .block
    self.configuration = configuration
    session = try FrontEndSession(socket, configuration)
  }

  // MARK: For the event loop

  /// Nil while there is no back end.
  package var socketNumber: CInt? { session?.socketNumber }
  /// From `.ready` on, if the back end may tell of configuration changes.
  package var channelNumber: CInt? { session?.channelNumber }
  package var deadline: MonotonicTime? {
    [session?.deadline, candidate?.deadline, drainDeadline, settling?.nextLook, quieting?.nextLook].compactMap { $0 }.min()
  }
  /// While there is a back end that might take over.
  package var candidateNumber: CInt? { candidate?.socketNumber }

  /// What was said to and by the present back end lately, as a recording; empty without one.
  package var conversation: String { session?.recorder.text ?? "" }

  /// Closes the connection to a back end that is lost. Not before its descriptors are out of the event loop: their numbers
  /// may come again at once.
  package func closeLost() { if state == .detached || state == .lost { session = nil } }

  package func nextEvent() -> Event? { events.isEmpty ? nil : events.removeFirst() }

  package func receive(now: MonotonicTime) {
    session?.receive(now: now)
    candidate?.receive(now: now)
    work(now)
  }

  package func handleTimeout(now: MonotonicTime) {
    session?.handleTimeout(now: now)
    candidate?.handleTimeout(now: now)
    handleDrainTimeout(now)
    lookWhetherSettled(now)
    lookWhetherQuiet(now)
    work(now)
  }

  // MARK: Life

  /// Makes first contact; ends with `.ready` or `.lost`.
  package func start(now: MonotonicTime) {
    session?.negotiate(now: now)
    work(now)
  }

  /// Plugs the device into a machine. After `.ready`, before the guest runs.
  package func attach(_ host: any DeviceHost) { self.host = host }

  /// Stops the rings, waiting for what is in flight; ends with `.paused`. Only while no processor runs.
  package func pause(now: MonotonicTime) {
    guard state != .paused, state != .pausing else { return }
    if isExchanging {
      awaitsPause = true
      return
    }
    if state == .detached || state == .reattaching { lose(.closed(midMessage: false), mayAwait: false) }
    guard state != .lost, state != .negotiating else {
      stateBeforePause = state
      events.append(.paused)
      return
    }
    // What is under way is finished first: operations are done in order.
    stateBeforePause = state == .activating ? .running : state == .resetting ? .idle : state
    state = .pausing
    session?.stop(now: now)
    work(now)
  }

  /// Starts the rings again from where they were; ends with `.resumed`.
  package func resume(now: MonotonicTime) {
    guard state == .paused else {
      events.append(.resumed)
      return
    }
    if stateBeforePause == .running, !activeQueues.isEmpty {
      state = .activating
      session?.resume(at: pausedBases.isEmpty ? nil : notBehindUsed(pausedBases), now: now)
    } else {
      state = stateBeforePause
      finishResume(now)
    }
    work(now)
  }

  private func finishResume(_ now: MonotonicTime) {
    events.append(.resumed)
    carryOutDeferred(now)
  }

  /// What came while the rings stood still.
  func carryOutDeferred(_ now: MonotonicTime) {
    if awaitsPause {
      awaitsPause = false
      return pause(now: now)
    }
    let waiting = deferred
    deferred = []
    for effect in waiting { carryOut(effect, now) }
  }

  // MARK: What the guest does

  /// Carries out an effect of the device's function. Interrupt and address effects are the machine's and ignored here.
  package func handle(_ effect: TransportEffect, now: MonotonicTime) {
    if state == .paused || state == .pausing || isExchanging {
      deferred.append(effect)
    } else {
      carryOut(effect, now)
    }
    work(now)
  }

  private func carryOut(_ effect: TransportEffect, _ now: MonotonicTime) {
    switch effect {
    case .activate(let activation): activate(activation, now)
    case .reset: reset(now)
    case .configurationWritten(let offset, let bytes):
      guard state != .lost, offer?.protocolFeatures.contains(.config) == true else { break }
      writes.add(offset: offset, bytes)
      generation += 1
      for (index, byte) in bytes.enumerated() { told[offset + index] = byte }
    case .queueVectorChanged(let queue, let vector):
      if activeQueues.contains(queue) { calls[queue] = .some(vector) }
      if let position = activation?.vrings.firstIndex(where: { $0.index == queue }) {
        activation?.vrings[position].call = vector.flatMap { host?.call(ofVector: Int($0)) }
      }
    case .queueReset(let queue):
      // Not offered, hence not reached; answered all the same.
      host?.update { function in
        function.queueResetCompleted(queue)
        return []
      }
    case .queueEnabled, .barMoved, .vectorChanged, .notify, .signal: break
    }
  }

  private func activate(_ activation: VirtioTransport.Activation, _ now: MonotonicTime) {
    guard state != .lost else { return tellNeedsReset() }
    let hasBackEnd = state != .detached && state != .reattaching
    driverFeatures = activation.features
    generation += 1
    var vrings: [VringActivation] = []
    usedRings = [:]
    for queue in activation.queues {
      guard let vring = vring(queue, activation.features) else {
        isBroken = true
        if hasBackEnd { state = .broken }
        return tellNeedsReset()
      }
      vrings.append(vring)
      if !activation.features.contains(.packedRing) { usedRings[queue.index] = queue.device }
    }
    activeQueues = vrings.map(\.index)
    watches = activation.queues.compactMap { QueueWatch($0, activation.features, of: deviceType) }
    calls = [:]
    hasRun = false
    guard !vrings.isEmpty else {
      // A driver without queues: nothing to serve, and nothing to complain about.
      if hasBackEnd { state = .running }
      return
    }
    // What the core offered on its own account (a card's MAC, say) is between the driver and the core.
    let shared = activation.features.intersection(offer?.features ?? [])
    let wanted = BackEndActivation(features: shared, regions: memory.regions, vrings: vrings)
    self.activation = wanted
    guard hasBackEnd else { return }
    state = .activating
    hasRun = true
    session?.activate(wanted, now: now)
  }

  /// A queue in the addresses that are named to back ends; nil when the driver put a part of it where no memory is.
  private func vring(_ queue: QueueGeometry, _ features: FeatureSet) -> VringActivation? {
    let isPacked = features.contains(.packedRing)
    let sizes =
      isPacked
      ? (PackedRing.descriptorRingByteCount(queueSize: queue.size), PackedRing.eventByteCount, PackedRing.eventByteCount)
      : (
        SplitRing.descriptorTableByteCount(queueSize: queue.size), SplitRing.availableRingByteCount(queueSize: queue.size),
        SplitRing.usedRingByteCount(queueSize: queue.size)
      )
    guard let descriptors = memory.userAddress(of: queue.descriptors, byteCount: sizes.0),
      let driver = memory.userAddress(of: queue.driver, byteCount: sizes.1),
      let device = memory.userAddress(of: queue.device, byteCount: sizes.2), let kick = host?.kick(ofQueue: queue.index)
    else { return nil }
    return VringActivation(
      index: queue.index, size: Int(queue.size), descriptorTable: descriptors, availableRing: driver, usedRing: device,
      base: isPacked ? 0x8000_8000 : 0, kick: kick, call: queue.vector.flatMap { host?.call(ofVector: Int($0)) })
  }

  private func reset(_ now: MonotonicTime) {
    driverFeatures = []
    generation += 1
    calls = [:]
    writes.removeAll()
    activeQueues = []
    watches = []
    activation = nil
    hasRun = false
    isBroken = false
    told = [:]
    inflight = nil
    if state == .reattaching { session?.forgetInflight() }
    // Without a back end there is nothing that would have to stop.
    guard state != .lost, state != .detached, state != .reattaching else { return completeReset() }
    state = .resetting
    session?.reset(now: now)
  }

  func completeReset() {
    host?.update { function in
      function.resetCompleted()
      return []
    }
  }

  private func tellNeedsReset() {
    host?.update { $0.setNeedsReset() }
  }

  // MARK: What the back end does

  /// Takes what the session says until it says nothing more, and gives it what is waiting.
  func work(_ now: MonotonicTime) {
    takeEvents(now)
    tellNext(now)
    takeEvents(now)
    workOnExchange(now)
    takeEvents(now)
  }

  private func takeEvents(_ now: MonotonicTime) {
    while true {
      if let event = session?.nextEvent() {
        take(event, now)
      } else if let event = candidate?.nextEvent() {
        takeCandidate(event, now)
      } else {
        return
      }
    }
  }

  private func take(_ event: FrontEndSession.Event, _ now: MonotonicTime) {
    switch event {
    case .negotiated(let offer):
      if state == .reattaching { return restore(offer, now) }
      self.offer = offer
      state = .idle
      events.append(.ready(offer))
    case .activated:
      if state == .activating { state = .running }
      if isRestoring { finishRestoring() }
    case .prepared: break
    case .stopped(let bases):
      if isExchanging { return finishDraining(bases, now) }
      pausedBases = bases
      settle(bases, .pause, now)
    case .resumed:
      if isExchanging { return finishUndoing(now) }
      if state == .activating { state = .running }
      finishResume(now)
    case .reset(let bases): settle(bases, .reset, now)
    case .configuration(let offset, let bytes):
      telling = nil
      // A write that came meanwhile is newer than what was read.
      guard writes.isEmpty else {
        configurationIsStale = true
        break
      }
      let isAnnounced = changeIsAnnounced
      changeIsAnnounced = false
      host?.update { $0.updateConfiguration(from: offset, with: bytes, isAnnounced: isAnnounced) }
    case .configurationWritten, .configurationRefused:
      // Writing one field may change others, and a refused write must not stay in the guest's view. A refused read is
      // not repeated.
      if telling == .configurationWrite { configurationIsStale = true }
      telling = nil
    case .callReplaced: telling = nil
    case .kicksReplaced: kicksReplaced(now)
    case .configurationChanged:
      configurationIsStale = true
      changeIsAnnounced = true
    case .channelClosed: events.append(.channelClosed)
    case .failed(let error): lose(error)
    }
  }

  /// One request at a time for what a guest or back end can ask for as often as it likes.
  private func tellNext(_ now: MonotonicTime) {
    guard telling == nil, state == .running || state == .idle || state == .activating, let offer else { return }
    if let (queue, vector) = calls.first {
      calls[queue] = nil
      telling = .call
      session?.replaceCall(index: queue, vector.flatMap { host?.call(ofVector: Int($0)) }, now: now)
    } else if let run = writes.takeRun() {
      telling = .configurationWrite
      session?.writeConfiguration(offset: run.offset, bytes: run.bytes, now: now)
    } else if configurationIsStale, let count = offer.configuration?.count, count > 0 {
      configurationIsStale = false
      telling = .configurationRead
      session?.readConfiguration(offset: 0, count: count, now: now)
    }
  }

  func lose(_ error: VhostUserError, mayAwait: Bool = true) {
    if mayAwait, awaitsSuccessor, offer != nil, state != .pausing, state != .paused { return detach(error) }
    abandonExchange()
    let wasPausing = state == .pausing || awaitsPause
    awaitsPause = false
    settling = nil
    quieting = nil
    state = .lost
    session?.abandon()
    activation = nil
    inflight = nil
    telling = nil
    writes.removeAll()
    calls = [:]
    activeQueues = []
    // Whoever waits for something gets it: a reset is over (and not marked as needed again, for the driver waits until
    // the status is zero), a pause reached.
    host?.update { function in
      guard function.state.isResetting else { return function.setNeedsReset() }
      function.resetCompleted()
      return []
    }
    events.append(.lost(error))
    if wasPausing { events.append(.paused) }
    let waiting = deferred
    deferred = []
    for effect in waiting { carryOut(effect, .now) }
  }
}
