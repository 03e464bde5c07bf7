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
    /// The driver set up rings that cannot be; it must reset.
    case broken
    /// There is no back end any more.
    case lost
  }

  package let name: String
  package private(set) var state = State.negotiating
  /// What first contact brought; nil before.
  package private(set) var offer: Offer?
  /// What the driver acknowledged; empty while there is none.
  package private(set) var driverFeatures: FeatureSet = []
  /// Rings that run, or would but for a pause.
  package private(set) var activeQueues: [Int] = []

  private var session: FrontEndSession
  private let memory: SharedGuestMemory
  private var host: (any DeviceHost)?
  private var events: [Event] = []

  /// Effects that came while the device was paused, carried out afterwards.
  private var deferred: [TransportEffect] = []
  /// The state to return to after the pause.
  private var stateBeforePause = State.idle
  private var writes = ConfigurationWrites()
  /// Calls to be replaced: the vector by queue. Only the last one counts.
  private var calls: [Int: UInt16?] = [:]
  private var configurationIsStale = false
  /// The back end said that it changed: the driver hears of it even if the bytes are what they were.
  private var changeIsAnnounced = false
  /// What is under way of the requests that a guest or the back end can cause at will. The next one waits, so that
  /// nobody can make queues grow.
  private var telling: Telling?

  private enum Telling { case call, configurationWrite, configurationRead }

  /// - Parameter configuration: what to ask of the back end. Features this side cannot carry are removed from it.
  package init(
    name: String, _ socket: consuming OwnedFD, _ configuration: FrontEndConfiguration, _ memory: SharedGuestMemory
  ) throws(VhostUserError) {
    self.name = name
    self.memory = memory
    var configuration = configuration
    // Translated addresses need IOTLB messages; a single queue's reset has no counterpart in vhost-user; doorbells that
    // carry data do not go through an eventfd.
    configuration.allowedFeatures.subtract([
      .accessPlatform, .ringReset, .notificationData, .notificationConfigData, .adminQueue, .suspend, .singleRootIO,
    ])
    session = try FrontEndSession(socket, configuration)
  }

  // MARK: For the event loop

  package var socketNumber: CInt { session.socketNumber }
  /// From `.ready` on, if the back end may tell of configuration changes.
  package var channelNumber: CInt? { session.channelNumber }
  package var deadline: MonotonicTime? { session.deadline }

  package func nextEvent() -> Event? { events.isEmpty ? nil : events.removeFirst() }

  package func receive(now: MonotonicTime) {
    session.receive(now: now)
    work(now)
  }

  package func handleTimeout(now: MonotonicTime) {
    session.handleTimeout(now: now)
    work(now)
  }

  // MARK: Life

  /// Makes first contact; ends with `.ready` or `.lost`.
  package func start(now: MonotonicTime) {
    session.negotiate(now: now)
    work(now)
  }

  /// Plugs the device into a machine. After `.ready`, before the guest runs.
  package func attach(_ host: any DeviceHost) { self.host = host }

  /// Stops the rings, waiting for what is in flight; ends with `.paused`. Only while no processor runs.
  package func pause(now: MonotonicTime) {
    guard state != .paused, state != .pausing else { return }
    guard state != .lost, state != .negotiating else {
      stateBeforePause = state
      events.append(.paused)
      return
    }
    // What is under way is finished first: operations are done in order.
    stateBeforePause = state == .activating ? .running : state == .resetting ? .idle : state
    state = .pausing
    session.stop(now: now)
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
      session.resume(now: now)
    } else {
      state = stateBeforePause
      finishResume(now)
    }
    work(now)
  }

  private func finishResume(_ now: MonotonicTime) {
    events.append(.resumed)
    let waiting = deferred
    deferred = []
    for effect in waiting { carryOut(effect, now) }
  }

  // MARK: What the guest does

  /// Carries out an effect of the device's function. Interrupt and address effects are the machine's and ignored here.
  package func handle(_ effect: TransportEffect, now: MonotonicTime) {
    if state == .paused || state == .pausing {
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
    case .queueVectorChanged(let queue, let vector):
      if activeQueues.contains(queue) { calls[queue] = .some(vector) }
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
    driverFeatures = activation.features
    var vrings: [VringActivation] = []
    for queue in activation.queues {
      guard let vring = vring(queue, activation.features) else {
        state = .broken
        return tellNeedsReset()
      }
      vrings.append(vring)
    }
    activeQueues = vrings.map(\.index)
    calls = [:]
    guard !vrings.isEmpty else {
      // A driver without queues: nothing to serve, and nothing to complain about.
      state = .running
      return
    }
    state = .activating
    // What the core offered on its own account (a card's MAC, say) is between the driver and the core.
    let shared = activation.features.intersection(offer?.features ?? [])
    session.activate(BackEndActivation(features: shared, regions: memory.regions, vrings: vrings), now: now)
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
    calls = [:]
    writes.removeAll()
    activeQueues = []
    guard state != .lost else { return completeReset() }
    state = .resetting
    session.reset(now: now)
  }

  private func completeReset() {
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
  private func work(_ now: MonotonicTime) {
    while let event = session.nextEvent() { take(event, now) }
    tellNext(now)
    while let event = session.nextEvent() { take(event, now) }
  }

  private func take(_ event: FrontEndSession.Event, _ now: MonotonicTime) {
    switch event {
    case .negotiated(let offer):
      self.offer = offer
      state = .idle
      events.append(.ready(offer))
    case .activated: if state == .activating { state = .running }
    case .stopped:
      guard state == .pausing else { break }
      state = .paused
      events.append(.paused)
    case .resumed:
      if state == .activating { state = .running }
      finishResume(now)
    case .reset:
      if state == .resetting { state = .idle }
      completeReset()
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
      session.replaceCall(index: queue, vector.flatMap { host?.call(ofVector: Int($0)) }, now: now)
    } else if let run = writes.takeRun() {
      telling = .configurationWrite
      session.writeConfiguration(offset: run.offset, bytes: run.bytes, now: now)
    } else if configurationIsStale, let count = offer.configuration?.count, count > 0 {
      configurationIsStale = false
      telling = .configurationRead
      session.readConfiguration(offset: 0, count: count, now: now)
    }
  }

  private func lose(_ error: VhostUserError) {
    let wasPausing = state == .pausing
    state = .lost
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
