import Testing
import VirtioSpec
import VirtioTransport

/// A small generator with a seed, so that a failure can be repeated.
struct SeededGenerator: RandomNumberGenerator {
  var state: UInt64
  mutating func next() -> UInt64 {
    state &+= 0x9E37_79B9_7F4A_7C15
    var mixed = state
    mixed = (mixed ^ mixed >> 30) &* 0xBF58_476D_1CE4_E5B9
    mixed = (mixed ^ mixed >> 27) &* 0x94D0_49BB_1331_11EB
    return mixed ^ mixed >> 31
  }
}

@Suite("A guest that writes nonsense")
struct RandomAccessTests {
  /// A million accesses, half of them aimed at registers that do something; what an observer outside was told must stay
  /// true at every step.
  @Test(arguments: [1, 2, 3] as [UInt64])
  func neverTrapsAndNeverBreaksWhatWasAnnounced(seed: UInt64) throws {
    var random = SeededGenerator(state: seed)
    var driver = try GuestDriver()
    var observer = Observer(offered: driver.function.state.offered, queueSizes: [256, 128])
    for step in 0..<350_000 {
      switch Int.random(in: 0..<100, using: &random) {
      case 0..<45: access(registers: &driver, &random)
      case 45..<70: accessAnything(&driver, &random)
      case 70..<85: accessConfigurationSpace(&driver, &random)
      case 85..<88:
        driver.start([[], .eventIndex, .ringReset, .packedRing].randomElement(using: &random).map { [$0, .version1] } ?? .version1)
      case 88..<91:
        if observer.isResetting {
          driver.function.resetCompleted()
          observer.resetCompleted()
        }
      case 91..<93:
        let queue = Int.random(in: 0..<4, using: &random)
        driver.function.queueResetCompleted(queue)
        observer.queueResetCompleted(queue)
      case 93..<95:
        driver.effects += driver.function.updateConfiguration(
          from: Int.random(in: -2..<100, using: &random), with: [UInt8.random(in: 0...255, using: &random)])
      case 95: driver.effects += driver.function.setNeedsReset()
      case 96: if step % 16 == 0 { driver.effects += driver.function.powerOnReset() }
      default: driver.status = []
      }
      for effect in driver.takeEffects() { observer.apply(effect) }
      observer.check(driver.function)
      if observer.complaint != nil { break }
    }
    #expect(observer.complaint == nil)
    #expect(observer.activationCount > 100)
    #expect(observer.resetCount > 100)
  }

  private func value(_ random: inout SeededGenerator) -> UInt64 {
    switch Int.random(in: 0..<4, using: &random) {
    case 0: UInt64.random(in: 0..<16, using: &random)
    case 1: 1 << UInt64.random(in: 0..<64, using: &random)
    case 2: [0xFFFF, 0xFFFF_FFFF, .max, 0x8000, 0x10_0000, 256, 128, 64].randomElement(using: &random) ?? 0
    default: random.next()
    }
  }

  private func access(registers driver: inout GuestDriver, _ random: inout SeededGenerator) {
    let offset = Int.random(in: 0..<64, using: &random)
    let width = [1, 2, 4, 8].randomElement(using: &random) ?? 1
    if Bool.random(using: &random) {
      driver.write(offset & ~(width - 1), value(&random), width)
    } else {
      _ = driver.read(offset, width)
    }
  }

  private func accessAnything(_ driver: inout GuestDriver, _ random: inout SeededGenerator) {
    let bases: [UInt64] = [0, 0x1000, 0x2000, 0x4000, 0x8000, 0xC000, 0xFFF8, 0x1_0000, .max - 8]
    let offset = (bases.randomElement(using: &random) ?? 0) &+ UInt64.random(in: 0..<80, using: &random)
    let width = Int.random(in: 1...8, using: &random)
    if Bool.random(using: &random) {
      driver.effects += driver.function.writeBAR(offset: offset, width: width, value: value(&random))
    } else {
      _ = driver.function.readBAR(offset: offset, width: width, isSignalled: { $0 & 1 == 0 })
    }
  }

  private func accessConfigurationSpace(_ driver: inout GuestDriver, _ random: inout SeededGenerator) {
    let offset = Bool.random(using: &random) ? Int.random(in: 0..<0x100, using: &random) : Int.random(in: 0..<4096, using: &random)
    let width = Int.random(in: 1...8, using: &random)
    if Bool.random(using: &random) {
      driver.writeConfiguration(offset, value(&random), width)
    } else {
      _ = driver.function.readConfigurationSpace(offset: offset, width: width)
    }
  }
}

/// Believes only what it is told by effects, and compares.
private struct Observer {
  let offered: FeatureSet
  let queueSizes: [UInt16]
  var active: [Int: QueueGeometry]?
  var features: FeatureSet = []
  var isResetting = false
  var resettingQueues: Set<Int> = []
  var mapped: UInt64?
  var masks: [Int: Bool] = [:]
  var activationCount = 0
  var resetCount = 0
  var complaint: String?

  init(offered: FeatureSet, queueSizes: [UInt16]) {
    self.offered = offered
    self.queueSizes = queueSizes
  }

  mutating func complain(_ text: String) { if complaint == nil { complaint = text } }

  mutating func apply(_ effect: TransportEffect) {
    switch effect {
    case .activate(let activation):
      if active != nil { complain("Activated twice") }
      if !activation.features.isSubset(of: offered) { complain("Feature never offered") }
      for queue in activation.queues { check(queue, activation.features) }
      active = Dictionary(uniqueKeysWithValues: activation.queues.map { ($0.index, $0) })
      features = activation.features
      activationCount += 1
    case .reset:
      if active == nil || isResetting { complain("Reset of nothing") }
      isResetting = true
      resetCount += 1
    case .queueReset(let index):
      if active?[index] == nil || !resettingQueues.insert(index).inserted { complain("Queue reset of nothing") }
    case .queueEnabled(let queue):
      if active == nil || active?[queue.index] != nil || isResetting { complain("Enabled a live queue") }
      check(queue, features)
      active?[queue.index] = queue
    case .queueVectorChanged(let index, let vector):
      guard let queue = active?[index] else { return complain("Vector of a dead queue") }
      if let vector, vector > 2 { complain("Vector that does not exist") }
      active?[index] = QueueGeometry(
        index: index, size: queue.size, descriptors: queue.descriptors, driver: queue.driver, device: queue.device,
        vector: vector)
    case .barMoved(let from, let to):
      if from != mapped || from == to { complain("BAR moved from elsewhere") }
      if let to, to % VirtioPCILayout.barByteCount != 0 { complain("BAR not aligned") }
      mapped = to
    case .vectorChanged(let index, _, let isMasked): masks[index] = isMasked
    case .configurationWritten(let offset, let bytes):
      if offset != 32 || bytes.count != 1 { complain("Read-only configuration written") }
    case .notify(let queue):
      if active?[queue] == nil || isResetting || resettingQueues.contains(queue) { complain("Kick of a dead queue") }
    case .signal(let vector):
      if !(0..<3).contains(vector) { complain("Signal on no vector") }
    }
  }

  mutating func check(_ queue: QueueGeometry, _ features: FeatureSet) {
    if !queueSizes.indices.contains(queue.index) { return complain("No such queue") }
    let size = queue.size
    if size == 0 || size > queueSizes[queue.index] { complain("Size out of range") }
    if !features.contains(.packedRing), size & (size - 1) != 0 { complain("Size no power of two") }
    if queue.descriptors % 16 != 0 || queue.device % 4 != 0 || queue.driver % 2 != 0 { complain("Not aligned") }
  }

  mutating func resetCompleted() {
    active = nil
    isResetting = false
    resettingQueues = []
  }

  mutating func queueResetCompleted(_ index: Int) {
    if resettingQueues.remove(index) != nil { active?[index] = nil }
  }

  mutating func check(_ function: VirtioPCIFunction) {
    let state = function.state
    if let active {
      if state.activation.features != features { complain("Features changed while active") }
      let now = Dictionary(uniqueKeysWithValues: state.activation.queues.map { ($0.index, $0) })
      if now != active { complain("Geometry changed while active: \(active) became \(now)") }
      if state.status.isEmpty { complain("Status zero before the reset has finished") }
    } else if state.status.contains(.driverOK) {
      complain("DRIVER_OK without activation")
    }
    if state.status.contains(.featuresOK), !state.accepted.isSubset(of: offered) { complain("Features not offered") }
    if function.decodedAddress != mapped { complain("BAR elsewhere than announced") }
    for index in 0..<3 where function.msix.vector(index).isMasked != masks[index, default: true] {
      complain("Mask of vector \(index) not announced")
    }
  }
}
