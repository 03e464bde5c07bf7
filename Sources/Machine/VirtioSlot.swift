import Boot
import HostSystem
import KVM
import VirtioTransport

/// An event counter that several owners refer to: a doorbell or an interrupt of a virtio device.
package final class SharedEvent: Sendable {
  package let event: EventFD

  init() throws(SystemError) {
    event = try EventFD()
  }
}

/// A virtio function on the bus, with the events that tie it to KVM and to its back end. Behind the device lock.
final class VirtioSlot {
  /// An MSI-X vector: its event, and what KVM does with it.
  struct Vector {
    let shared: SharedEvent
    /// Interrupt number, taken at the first unmasking.
    var interrupt: UInt32?
    /// KVM injects when the event is signalled.
    var isAssigned = false
    /// An interrupt of the core's own (configuration change) that came while masked. The core never writes the event
    /// itself: a back end shares it, and could have made it full and blocking.
    var ownIsPending = false
  }

  let index: Int
  /// Position on the bus; see `PCIBus`.
  let position: Int
  var function: VirtioPCIFunction
  /// One per queue.
  let kicks: [SharedEvent]
  var vectors: [Vector]
  /// Where BAR 0 is in the address table and its doorbells are registered.
  var mappedAt: UInt64?
  var isOnBus = true
  var registeredDoorbells: [Bool]
  /// Queues whose doorbells the guest has rung past KVM; the thread that takes events passes it on.
  var dueKicks: Set<Int> = []

  /// Device number on the bus.
  var pciDevice: UInt8 { UInt8(position % 31 + 1) }

  init(
    index: Int, position: Int, function: VirtioPCIFunction, queueCount: Int, vectorCount: Int
  ) throws(SystemError) {
    self.index = index
    self.position = position
    self.function = function
    var kicks: [SharedEvent] = []
    for _ in 0..<queueCount { kicks.append(try SharedEvent()) }
    var vectors: [Vector] = []
    for _ in 0..<vectorCount { vectors.append(Vector(shared: try SharedEvent())) }
    self.kicks = kicks
    self.vectors = vectors
    registeredDoorbells = Array(repeating: false, count: queueCount)
  }

  /// Whether a masked vector has an event waiting.
  func isSignalled(_ vector: Int) -> Bool {
    vector < vectors.count && (vectors[vector].ownIsPending || vectors[vector].shared.event.isSignalledNow())
  }
}

extension Devices {
  func slot(_ index: Int) -> VirtioSlot? { virtio.indices.contains(index) ? virtio[index] : nil }

  /// Carries out what a register access of a function entails. Interrupts and addresses are ours; the rest is posted.
  func apply(_ effects: [TransportEffect], to slot: VirtioSlot, _ machine: Machine) {
    // What the device side still says of a function that is gone concerns nobody.
    guard slot.isOnBus else { return }
    var routesChanged = false
    var unmasked: [Int] = []
    for effect in effects {
      switch effect {
      case .barMoved(_, let address): move(slot, to: address, machine)
      case .vectorChanged(let vector, let message, let isMasked):
        guard vector < slot.vectors.count else { break }
        if isMasked {
          mask(slot, vector, machine)
        } else {
          routesChanged = route(slot, vector, message, machine) || routesChanged
          unmasked.append(vector)
        }
      case .notify(let queue):
        // A doorbell that KVM does not watch, or one whose registration the guest made impossible. No processor writes to what
        // a back end shares.
        guard queue < slot.kicks.count else { break }
        let isFirst = slot.dueKicks.isEmpty
        slot.dueKicks.insert(queue)
        if isFirst { machine.post(.kicks(slot.index)) }
      case .signal(let vector): interrupt(slot, vector, machine)
      case .activate, .reset, .queueReset, .queueEnabled, .queueVectorChanged, .configurationWritten:
        machine.post(.device(slot.index, effect))
      }
    }
    // Route first, then let KVM listen; one table for all vectors of the access.
    if routesChanged { setRoutes(machine) }
    for vector in unmasked { unmask(slot, vector, machine) }
  }

  // MARK: addresses

  private func move(_ slot: VirtioSlot, to address: UInt64?, _ machine: Machine) {
    leave(slot, machine)
    // Anywhere but in the windows (or on another function) the BAR answers nowhere: guests probe sizes with absurd
    // addresses.
    guard let address, address <= UInt64.max - VirtioPCILayout.barByteCount else { return }
    let range = address..<address + VirtioPCILayout.barByteCount
    let isInWindow =
      PhysicalMap.pciWindow32.contains(range) || (map.pciWindow64.map { $0.contains(range) } ?? false)
    guard isInWindow else { return }
    dropWithdrawn(in: range)
    guard addresses.insert(range, .virtio(slot.index)) else { return }
    slot.mappedAt = address
    for queue in slot.kicks.indices {
      do {
        try machine.virtualMachine.registerDoorbell(
          at: address + VirtioPCILayout.notifyOffset(ofQueue: queue), length: doorbellLength,
          eventFD: slot.kicks[queue].event.fd.rawValue)
        slot.registeredDoorbells[queue] = true
      } catch {
        // The write then leaves the kernel and is signalled from here: slower, not wrong.
        machine.warn("Doorbell of device \(slot.index)", error)
      }
    }
  }

  /// The function answers nowhere any more.
  func leave(_ slot: VirtioSlot, _ machine: Machine) {
    guard let old = slot.mappedAt else { return }
    addresses.remove(startingAt: old)
    for queue in slot.kicks.indices where slot.registeredDoorbells[queue] {
      try? machine.virtualMachine.removeDoorbell(
        at: old + VirtioPCILayout.notifyOffset(ofQueue: queue), length: doorbellLength,
        eventFD: slot.kicks[queue].event.fd.rawValue)
      slot.registeredDoorbells[queue] = false
    }
    slot.mappedAt = nil
  }

  // MARK: vectors

  /// An interrupt of the core's own: sent now, or remembered while the vector is masked.
  private func interrupt(_ slot: VirtioSlot, _ vector: Int, _ machine: Machine) {
    guard vector < slot.vectors.count else { return }
    guard slot.vectors[vector].isAssigned, let number = slot.vectors[vector].interrupt, let message = vectorRoutes[number] else {
      slot.vectors[vector].ownIsPending = true
      return
    }
    _ = try? machine.virtualMachine.signal(message)
  }

  /// Puts the vector's message into the routes; true when the table changed.
  private func route(_ slot: VirtioSlot, _ vector: Int, _ message: InterruptMessage, _ machine: Machine) -> Bool {
    let interrupt: UInt32
    if let known = slot.vectors[vector].interrupt {
      interrupt = known
    } else {
      if let free = freeInterrupts.popLast() {
        interrupt = free
      } else {
        guard nextInterrupt < Self.interruptLimit else {
          machine.warn("Interrupt vector", MachineError.tooManyInterrupts(Int(Self.interruptLimit)))
          return false
        }
        interrupt = nextInterrupt
        nextInterrupt += 1
      }
      slot.vectors[vector].interrupt = interrupt
    }
    let converted = MSIMessage(guestAddress: message.address, data: message.data)
    guard vectorRoutes[interrupt] != converted else { return false }
    vectorRoutes[interrupt] = converted
    return true
  }

  /// Interrupt numbers that KVM routes.
  static let interruptLimit: UInt32 = 4096

  private func unmask(_ slot: VirtioSlot, _ vector: Int, _ machine: Machine) {
    guard !slot.vectors[vector].isAssigned, let interrupt = slot.vectors[vector].interrupt else { return }
    do {
      // KVM looks at the counter while assigning: an event that came while masked is injected now.
      try machine.virtualMachine.assignInterrupt(
        eventFD: slot.vectors[vector].shared.event.fd.rawValue, gsi: interrupt)
      slot.vectors[vector].isAssigned = true
    } catch {
      machine.warn("Interrupt of device \(slot.index)", error)
    }
    if slot.vectors[vector].ownIsPending {
      slot.vectors[vector].ownIsPending = false
      self.interrupt(slot, vector, machine)
    }
  }

  /// The event keeps its count from here on. The route stays: unmasking with the same message then costs no new table.
  func mask(_ slot: VirtioSlot, _ vector: Int, _ machine: Machine) {
    guard slot.vectors[vector].isAssigned, let interrupt = slot.vectors[vector].interrupt else { return }
    try? machine.virtualMachine.deassignInterrupt(
      eventFD: slot.vectors[vector].shared.event.fd.rawValue, gsi: interrupt)
    slot.vectors[vector].isAssigned = false
  }
}

extension Range<UInt64> {
  fileprivate func contains(_ other: Range<UInt64>) -> Bool {
    lowerBound <= other.lowerBound && other.upperBound <= upperBound
  }
}
