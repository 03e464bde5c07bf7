import VirtioSpec
import VirtioTransport

let pciRegisters = Target(
  name: "pci-registers", about: "the registers of a virtio-pci function: accesses of any width at any place", seeds: registerSeeds,
  run: accessRegisters)

private let queueSizes: [UInt16] = [256, 128]

private func registerSeeds() -> [[UInt8]] {
  // A driver's start (kind 6), then single accesses, resets, vectors, configuration space, power-on.
  [
    [6, 0, 0, 20, 1, 3, 4, 6, 0], [6, 1, 0, 20, 0, 0, 3, 0, 6, 2], [6, 0, 1, 0, 22, 2, 1, 2, 7, 0, 1, 0x10, 4, 4],
    [1, 0, 4, 2, 0, 6, 1, 0, 2, 8, 0, 4, 3, 1, 2, 5, 9], [6, 3, 0, 28, 2, 1, 1, 7, 0, 5, 3, 0, 32, 1, 0, 9],
  ]
}

/// What an observer outside believes, from nothing but the effects he is told.
private struct Witness {
  var active: [Int: QueueGeometry]?
  var features: FeatureSet = []
  var isResetting = false
  var resetting: Set<Int> = []
  var mapped: UInt64?
  var masks = [true, true, true]

  mutating func hear(_ effect: TransportEffect, offered: FeatureSet) {
    switch effect {
    case .activate(let activation):
      demand(active == nil, "activated while active")
      demand(activation.features.isSubset(of: offered) && activation.features.contains(.version1), "features that were never offered")
      features = activation.features
      active = [:]
      for queue in activation.queues { add(queue) }
    case .reset:
      demand(active != nil && !isResetting, "a reset of nothing")
      isResetting = true
    case .queueReset(let index): demand(active?[index] != nil && resetting.insert(index).inserted, "a reset of no queue")
    case .queueEnabled(let queue):
      demand(!isResetting && active?[queue.index] == nil, "a live queue is enabled")
      add(queue)
    case .queueVectorChanged(let index, let vector):
      guard let queue = active?[index] else { return demand(false, "a vector of a dead queue") }
      demand(vector.map { $0 < 3 } ?? true, "a vector that does not exist")
      active?[index] = QueueGeometry(
        index: index, size: queue.size, descriptors: queue.descriptors, driver: queue.driver, device: queue.device, vector: vector)
    case .barMoved(let from, let to):
      demand(from == mapped && from != to, "the BAR moves from elsewhere")
      demand((to ?? 0) % VirtioPCILayout.barByteCount == 0, "the BAR is not aligned")
      mapped = to
    case .vectorChanged(let index, _, let isMasked): masks[index] = isMasked
    case .configurationWritten(let offset, let bytes):
      demand(offset == 32 && bytes.count == 1, "configuration that is read-only is written")
    case .notify(let queue): demand(active?[queue] != nil && !isResetting && !resetting.contains(queue), "a dead queue is kicked")
    case .signal(let vector): demand((0..<3).contains(vector), "a signal on no vector")
    }
  }

  private mutating func add(_ queue: QueueGeometry) {
    demand(queueSizes.indices.contains(queue.index), "queue \(queue.index) does not exist")
    demand(queue.size > 0 && queue.size <= queueSizes[queue.index], "a queue of \(queue.size) entries")
    let packed = features.contains(.packedRing)
    demand(packed || queue.size & (queue.size - 1) == 0, "a split queue of \(queue.size) entries")
    demand(queue.descriptors % 16 == 0 && queue.device % 4 == 0 && queue.driver % (packed ? 4 : 2) == 0, "a queue is not aligned")
    active?[queue.index] = queue
  }

  /// What the registers say must be what was told.
  func compare(_ function: VirtioPCIFunction) {
    let state = function.state
    if let active {
      demand(state.activation.features == features, "features changed while active")
      let queues = state.activation.queues
      demand(queues.count == active.count && queues.allSatisfy { active[$0.index] == $0 }, "geometry changed while active")
      demand(!state.status.isEmpty, "status is zero before the reset is done")
    } else {
      demand(!state.status.contains(.driverOK), "DRIVER_OK without an activation")
    }
    demand(function.decodedAddress == mapped, "the BAR is elsewhere than was said")
    for index in 0..<3 { demand(function.msix.vector(index).isMasked == masks[index], "the mask of vector \(index) was not told") }
  }
}

private func accessRegisters(_ script: inout Script) {
  let offered: FeatureSet = [.version1, .eventIndex, .indirectDescriptors, .packedRing, .ringReset, .blockFlush]
  var function = sure {
    try VirtioPCIFunction(
      .init(
        device: .block, offeredFeatures: offered, queueSizes: queueSizes, configuration: Array(0..<96), writableConfiguration: [32..<33],
        baseAddress: 0xC000_0000))
  }
  let all = function.state.offered
  var witness = Witness()
  while !script.isOver {
    var effects: [TransportEffect] = []
    let kind = script.byte() % 10
    switch kind {
    case 0, 1:
      // The common structure and what lies around it.
      let offset = UInt64(script.byte() & 63)
      let width = 1 << Int(script.byte() & 3)
      if kind == 0 {
        _ = function.readBAR(offset: offset, width: width)
      } else {
        effects = function.writeBAR(offset: offset, width: width, value: script.number())
      }
    case 2, 3:
      let bases: [UInt64] = [0, 0x1000, 0x2000, 0x4000, 0x8000, 0xC000, 0xFFF8, .max - 8]
      let offset = bases[script.below(bases.count)] &+ UInt64(script.byte())
      let width = Int(script.byte() % 10)
      if kind == 2 {
        let value = function.readBAR(offset: offset, width: width, isSignalled: { $0 & 1 == 0 })
        let bits = UInt64(min(max(width, 1), 8) * 8)
        demand(bits == 64 || value >> bits == 0, "a read of \(width) bytes brings more")
      } else {
        effects = function.writeBAR(offset: offset, width: width, value: script.number())
      }
    case 4: _ = function.readConfigurationSpace(offset: Int(script.u16() & 0xFFF), width: Int(script.byte() % 10))
    case 5:
      // The window, the BAR and MSI-X control live here.
      let offset = script.bool() ? Int(script.byte()) : Int(script.u16() & 0xFFF)
      effects = function.writeConfigurationSpace(offset: offset, width: Int(script.byte() % 10), value: script.number())
    case 6: effects = start(&function, script.byte())
    case 7:
      let which = script.byte()
      if which & 1 == 0 {
        function.resetCompleted()
        if witness.isResetting {
          witness.active = nil
          witness.isResetting = false
          witness.resetting = []
        }
      } else {
        let index = Int(which >> 1 & 3)
        function.queueResetCompleted(index)
        if witness.resetting.remove(index) != nil { witness.active?[index] = nil }
      }
    case 8:
      effects = function.updateConfiguration(
        from: Int(script.byte()) - 4, with: script.take(Int(script.byte() & 15)), isAnnounced: script.bool())
    default: effects = script.bool() ? function.setNeedsReset() : function.powerOnReset()
    }
    for effect in effects { witness.hear(effect, offered: all) }
    witness.compare(function)
  }
}

/// The steps of a driver from reset to DRIVER_OK.
private func start(_ function: inout VirtioPCIFunction, _ how: UInt8) -> [TransportEffect] {
  var effects: [TransportEffect] = []
  func write(_ offset: Int, _ value: UInt64, _ width: Int = 4) {
    effects += function.writeBAR(offset: UInt64(offset), width: width, value: value)
  }
  write(VirtioPCI.Common.deviceStatus, 3, 1)
  var features: FeatureSet = [.version1, .ringReset]
  if how & 1 != 0 { features.insert(.packedRing) }
  if how & 2 != 0 { features.insert(.eventIndex) }
  for half in 0..<2 {
    write(VirtioPCI.Common.driverFeatureSelect, UInt64(half))
    write(VirtioPCI.Common.driverFeature, features.rawValue >> UInt64(32 * half) & 0xFFFF_FFFF)
  }
  write(VirtioPCI.Common.deviceStatus, 11, 1)
  for queue in 0..<Int(how >> 2 & 1) + 1 {
    write(VirtioPCI.Common.queueSelect, UInt64(queue), 2)
    write(VirtioPCI.Common.queueSize, how & 8 == 0 ? 64 : 100, 2)
    write(VirtioPCI.Common.queueVector, UInt64(queue), 2)
    write(VirtioPCI.Common.queueDescriptors, 0x10_0000, 8)
    write(VirtioPCI.Common.queueDriver, 0x10_4000, 8)
    write(VirtioPCI.Common.queueDevice, 0x10_8000, 8)
    write(VirtioPCI.Common.queueEnable, 1, 2)
  }
  write(VirtioPCI.Common.deviceStatus, 15, 1)
  return effects
}
