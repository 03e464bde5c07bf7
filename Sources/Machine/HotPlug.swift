import Boot
import HostSystem
import VirtioTransport

// Devices that come and go while the guest runs. Three registers (`PlatformPort.pluggedSlots` and on) and an event carry it; the
// methods of the ACPI tables read them, and tell the operating system, whose `_EJ0` writes the third.

extension Devices {
  func readHotPlug(_ offset: UInt64, width: Int) -> UInt32 {
    guard width == 4 else { return .max }
    switch offset {
    case 0: return pci.takePlugged()
    case UInt64(PlatformPort.unplugRequests - PlatformPort.pluggedSlots): return pci.takeRequested()
    // Nothing is read where the guest writes.
    default: return 0
    }
  }

  /// The guest has let go of the devices in these slots, asked or not: they are off the bus at once, and those outside are told.
  func eject(_ slots: UInt32, _ machine: Machine) {
    dropWithdrawn { slots >> UInt32($0) & 1 != 0 }
    for index in pci.eject(slots) {
      guard let slot = virtio[index] else { continue }
      detach(slot, isEjected: true, machine)
      machine.post(.ejected(index))
    }
  }

  /// What reads as zero for a guest that has not let go of it does so no more.
  func dropWithdrawn(of isMeant: (UInt8) -> Bool) {
    for device in withdrawn.keys.filter(isMeant) {
      for address in withdrawn.removeValue(forKey: device) ?? [] { addresses.remove(startingAt: address) }
    }
  }

  /// The same for whatever is in the way of a function that the guest has put there.
  func dropWithdrawn(in range: Range<UInt64>) {
    dropWithdrawn { device in
      withdrawn[device]?.contains { range.overlaps($0..<$0 + VirtioPCILayout.barByteCount) } ?? false
    }
  }

  /// Takes a function off the bus: its addresses answer no more, its doorbells and vectors are out of KVM, its interrupt numbers
  /// free. What its back end still does goes to events that nobody hears.
  func detach(_ slot: VirtioSlot, isEjected: Bool, _ machine: Machine) {
    guard slot.isOnBus else { return }
    slot.isOnBus = false
    pci.clear(slot.position, isEjected: isEjected)
    let address = slot.mappedAt
    leave(slot, machine)
    if !isEjected, let address, addresses.insert(address..<address + VirtioPCILayout.barByteCount, .withdrawn) {
      withdrawn[slot.pciDevice, default: []].append(address)
    }
    var hadRoutes = false
    for vector in slot.vectors.indices {
      mask(slot, vector, machine)
      guard let interrupt = slot.vectors[vector].interrupt else { continue }
      slot.vectors[vector].interrupt = nil
      hadRoutes = vectorRoutes.removeValue(forKey: interrupt) != nil || hadRoutes
      freeInterrupts.append(interrupt)
    }
    if hadRoutes { setRoutes(machine) }
  }
}

extension Machine {
  /// The first free slot of the bus; nil when all 31 are taken.
  package var freePCIDevice: UInt8? { deviceLock.withLock { devices.pci.freeDevice } }

  /// Tells the guest of a device that has been added while it runs.
  package func announceDevice(_ index: Int) {
    deviceLock.withLock {
      guard let slot = devices.slot(index), slot.isOnBus else { return }
      devices.pci.announce(slot.pciDevice)
      devices.raise(GenericEvent.hotPlug, self)
    }
  }

  /// Asks the guest to let go of a device; `.ejected` follows when it has.
  package func requestEjection(ofDevice index: Int) {
    deviceLock.withLock {
      guard let slot = devices.slot(index), slot.isOnBus else { return }
      devices.pci.requestEjection(slot.pciDevice)
      devices.raise(GenericEvent.hotPlug, self)
    }
  }

  /// Takes a device off the bus without asking; the guest is told to let go of it. Its slot stays empty until it has.
  package func withdrawDevice(_ index: Int) {
    deviceLock.withLock {
      guard let slot = devices.slot(index), slot.isOnBus else { return }
      devices.detach(slot, isEjected: false, self)
      devices.pci.requestEjection(slot.pciDevice)
      devices.raise(GenericEvent.hotPlug, self)
    }
  }

  /// Takes a device off the bus of a guest that knows nothing of it any more, as after a reset.
  package func removeFromBus(_ index: Int) {
    deviceLock.withLock { if let slot = devices.slot(index) { devices.detach(slot, isEjected: true, self) } }
  }

  /// Whether a device is on the bus.
  package func isOnBus(device index: Int) -> Bool { deviceLock.withLock { devices.slot(index)?.isOnBus ?? false } }

  /// Forgets a device that is off the bus and has nobody behind it any more. Its index may come again.
  package func removeDevice(_ index: Int) {
    deviceLock.withLock {
      guard let slot = devices.slot(index) else { return }
      devices.detach(slot, isEjected: true, self)
      devices.virtio[index] = nil
    }
    dropEvents(ofDevice: index)
  }
}
