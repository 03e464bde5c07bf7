import HostSystem
import VirtioSpec

extension FrontEndSession {
  /// The requests an operation begins with. Answers may add more.
  mutating func plan(_ operation: Operation) throws(VhostUserError) -> [Step] {
    switch operation {
    case .negotiate:
      guard offer == nil else { throw .misuse("a second first contact") }
      // Owner first: some back ends insist on it, and none minds.
      return [step(.setOwner), step(.getFeatures)]
    case .activate(let activation):
      try check(activation)
      self.activation = activation
      return try activationSteps(activation)
    case .prepare(let activation):
      try check(activation)
      self.activation = activation
      return try preparationSteps(activation) + sizeSteps(activation)
    case .begin(let bases):
      guard let activation, !isRunning else { throw .misuse("rings are begun that were not prepared") }
      return vringSteps(activation, bases: bases)
    case .stop(let mode): return stopSteps(mode)
    case .resume:
      guard let activation, !isRunning else { throw .misuse("rings are resumed that are not stopped") }
      return vringSteps(activation, bases: bases)
    case .reset:
      guard let offer else { throw .misuse("a reset before first contact") }
      guard activation != nil else { return [] }
      return stopSteps(.drain) + (offer.protocolFeatures.contains(.resetDevice) ? [step(.resetDevice)] : [])
    case .readConfiguration(let offset, let count):
      try checkConfiguration(offset, count)
      return [step(.getConfig(ConfigMessage(offset: UInt32(offset), bytes: Array(repeating: 0, count: count))))]
    case .writeConfiguration(let offset, let bytes):
      try checkConfiguration(offset, bytes.count)
      return [step(.setConfig(ConfigMessage(offset: UInt32(offset), bytes: bytes)))]
    case .replaceCall(let index, let call):
      guard let activation, activation.vrings.contains(where: { $0.index == index }) else {
        throw .misuse("a call for ring \(index), which was not activated")
      }
      if let position = activation.vrings.firstIndex(where: { $0.index == index }) {
        self.activation?.vrings[position].call = call
      }
      return [callStep(index, call)]
    case .replaceKicks(let kick):
      guard let activation, isRunning else { throw .misuse("kicks for rings that do not run") }
      return activation.vrings.map { vring in
        step(.setVringKick(VringEvent(index: UInt8(vring.index), carriesDescriptor: true)), [kick ?? vring.kick])
      }
    }
  }

  /// What an operation ends with.
  mutating func finish(_ operation: Operation) {
    switch operation {
    case .negotiate:
      offer = draft
      events.append(.negotiated(draft))
    case .prepare: events.append(.prepared)
    case .activate, .begin:
      isRunning = true
      events.append(.activated)
    case .stop:
      isRunning = false
      hasBegunRings = false
      events.append(.stopped(bases))
    case .resume:
      isRunning = true
      events.append(.resumed)
    case .reset:
      isRunning = false
      hasBegunRings = false
      activation = nil
      // A reset guest starts with a new area.
      inflight = nil
      events.append(.reset(bases))
      bases = []
    case .readConfiguration, .writeConfiguration: break  // said when the answer came
    case .replaceCall(let index, _): events.append(.callReplaced(index: index))
    case .replaceKicks: events.append(.kicksReplaced)
    }
  }

  func step(_ message: FrontEndMessage, _ descriptors: [SharedDescriptor] = []) -> Step {
    Step(message: message, descriptors: descriptors, timeout: configuration.timeouts.setUp)
  }

  // MARK: Checks of what the owner asks for

  private func check(_ activation: BackEndActivation) throws(VhostUserError) {
    guard let offer else { throw .misuse("an activation before first contact") }
    guard !isRunning else { throw .misuse("an activation while rings run") }
    guard activation.features.isSubset(of: offer.features) else {
      throw .misuse("features 0x\(hex(activation.features.subtracting(offer.features).rawValue)) were not offered")
    }
    guard !activation.vrings.isEmpty, activation.vrings.allSatisfy({ (0...255).contains($0.index) && (1...32768).contains($0.size) })
    else { throw .misuse("rings that cannot be") }
    guard !activation.regions.isEmpty else { throw .misuse("an activation without memory") }
  }

  private func checkConfiguration(_ offset: Int, _ count: Int) throws(VhostUserError) {
    guard offer?.protocolFeatures.contains(.config) == true else { throw .misuse("configuration without CONFIG") }
    guard offset >= 0, count > 0, count <= ConfigMessage.maximumSpace - offset else {
      throw .misuse("configuration bytes \(offset) to \(offset + count)")
    }
  }

  // MARK: Sequences

  private mutating func activationSteps(_ activation: BackEndActivation) throws(VhostUserError) -> [Step] {
    try preparationSteps(activation) + vringSteps(activation, bases: [])
  }

  /// Everything of an activation but its rings.
  private mutating func preparationSteps(_ activation: BackEndActivation) throws(VhostUserError) -> [Step] {
    guard let offer else { return [] }
    var features = activation.features
    if offer.hasProtocolFeatures { features.insert(.vhostUserProtocolFeatures) }
    let told = offer.protocolFeatures.contains(.config) ? activation.configuration.map { step(.setConfig($0)) } : []
    return [step(.setFeatures(features))] + told + (try memorySteps(activation.regions, offer))
  }

  private func sizeSteps(_ activation: BackEndActivation) -> [Step] {
    activation.vrings.map { step(.setVringNum(VringState(index: UInt32($0.index), number: UInt32($0.size)))) }
  }

  /// The whole table in one message where it fits, else region by region.
  private mutating func memorySteps(_ regions: [SharedRegion], _ offer: Offer) throws(VhostUserError) -> [Step] {
    if regions.count <= RegionTable.baselineCount {
      addedRegions = []
      return [step(.setMemTable(RegionTable(regions: regions.map(\.description))), regions.map(\.descriptor))]
    }
    guard let slots = offer.maximumMemorySlots else { throw .missingFeature("CONFIGURE_MEM_SLOTS (\(regions.count) memory regions)") }
    guard regions.count <= slots else { throw .missingFeature("\(regions.count) memory slots (it has \(slots))") }
    // A table is taken back region by region, the last first.
    let old = addedRegions.reversed().map { step(.remMemReg(SingleRegion($0))) }
    addedRegions = regions.map(\.description)
    return old + regions.map { step(.addMemReg(SingleRegion($0.description)), [$0.descriptor]) }
  }

  /// Sizes of all rings first (some back ends need them before the inflight area), then each ring with its kick last,
  /// because the kick starts it. It is enabled before that: the driver may have made buffers available and kicked already,
  /// and a network card drops what a ring that runs but is disabled contains.
  private func vringSteps(_ activation: BackEndActivation, bases: [VringState]) -> [Step] {
    var steps = sizeSteps(activation)
    if offer?.protocolFeatures.contains(.inflightShmFD) == true {
      let wanted = InflightDescription(
        queueCount: UInt16((activation.vrings.map(\.index).max() ?? 0) + 1),
        queueSize: UInt16(activation.vrings.map(\.size).max() ?? 1))
      if let inflight, inflight.description.queueCount == wanted.queueCount, inflight.description.queueSize == wanted.queueSize {
        steps.append(step(.setInflightFD(inflight.description), [inflight.descriptor]))
      } else {
        steps.append(step(.getInflightFD(wanted)))
      }
    }
    for vring in activation.vrings {
      let index = UInt32(vring.index)
      let base = bases.first { $0.index == index }?.number ?? vring.base
      steps.append(step(.setVringBase(VringState(index: index, number: base))))
      steps.append(
        step(
          .setVringAddr(
            VringAddress(
              index: index, descriptorTable: vring.descriptorTable, availableRing: vring.availableRing, usedRing: vring.usedRing))))
      // Always, also without a descriptor: some back ends start a ring only when they have seen it.
      steps.append(callStep(vring.index, vring.call))
      if let err = vring.err {
        steps.append(step(.setVringErr(VringEvent(index: UInt8(vring.index), carriesDescriptor: true)), [err]))
      }
      if offer?.hasProtocolFeatures == true { steps.append(step(.setVringEnable(VringState(index: index, number: 1)))) }
      steps.append(step(.setVringKick(VringEvent(index: UInt8(vring.index), carriesDescriptor: true)), [vring.kick]))
    }
    return steps
  }

  private func callStep(_ index: Int, _ call: SharedDescriptor?) -> Step {
    step(.setVringCall(VringEvent(index: UInt8(index), carriesDescriptor: call != nil)), call.map { [$0] } ?? [])
  }

  private mutating func stopSteps(_ mode: StopMode) -> [Step] {
    guard isRunning, let activation else { return [] }
    bases = []
    let suspends = mode == .suspend && offer?.protocolFeatures.contains(.getVringBaseInflight) == true
    return activation.vrings.map { vring in
      var step = Step(
        message: .getVringBase(VringState(index: UInt32(vring.index), number: suspends ? 1 : 0)),
        timeout: suspends ? configuration.timeouts.suspend : configuration.timeouts.drain)
      // QEMU's storage daemon (7.2) finishes requests after its answer, and panics if it has no call descriptor then: stopping
      // a ring took it. Mostly it finds both messages at once.
      if mayFinishLate, let call = vring.call {
        step.companion = Companion(
          message: .setVringCall(VringEvent(index: UInt8(vring.index), carriesDescriptor: true)), descriptors: [call])
      }
      return step
    }
  }
}
