import Boot
import HostSystem
import VirtioTransport

extension Machine {
  /// Puts a virtio device on the bus. A guest that has looked there already hears of it by `announceDevice`. Returns its index, by which events name it.
  /// - Parameter pciDevice: device number 1 to 31; nil for the first free place.
  package func addVirtioDevice(
    _ description: VirtioPCIFunction.Description, pciDevice: UInt8? = nil
  ) throws(MachineError) -> Int {
    try deviceLock.withLock { () throws(MachineError) -> Int in
      let index = devices.virtio.firstIndex { $0 == nil } ?? devices.virtio.count
      guard let position = devices.pci.place(index, device: pciDevice) else {
        throw .tooManyDevices(PCIBus.capacity)
      }
      var placed = description
      // Where firmware would have put it: a kernel keeps addresses that lie in a window.
      placed.baseAddress = PhysicalMap.pciWindow32.lowerBound + UInt64(index) * VirtioPCILayout.barByteCount
      // A position without a device is nobody's.
      defer { if devices.slot(index)?.position != position { devices.pci.clear(position, isEjected: true) } }
      do {
        let function = try VirtioPCIFunction(placed)
        let slot = try VirtioSlot(
          index: index, position: position, function: function, queueCount: placed.queueSizes.count, vectorCount: placed.vectorCount)
        if index < devices.virtio.count { devices.virtio[index] = slot } else { devices.virtio.append(slot) }
      } catch let error as TransportError {
        throw .transport(error)
      } catch let error as SystemError {
        throw .system(error)
      } catch {
        throw .tooManyDevices(index)
      }
      return index
    }
  }

  /// The doorbell of a queue: signalled by KVM when the guest notifies.
  package func kick(ofDevice index: Int, queue: Int) -> SharedEvent? {
    deviceLock.withLock {
      guard let slot = devices.slot(index), slot.kicks.indices.contains(queue) else { return nil }
      return slot.kicks[queue]
    }
  }

  /// The event of a vector: signalling it interrupts the guest, or stays pending while the vector is masked.
  package func call(ofDevice index: Int, vector: Int) -> SharedEvent? {
    deviceLock.withLock {
      guard let slot = devices.slot(index), slot.vectors.indices.contains(vector) else { return nil }
      return slot.vectors[vector].shared
    }
  }

  /// Lets the device side change a function's state (a finished reset, new configuration, needs-reset) and carries out
  /// what follows from it.
  package func updateDevice(_ index: Int, _ change: (inout VirtioPCIFunction) -> [TransportEffect]) {
    deviceLock.withLock {
      guard let slot = devices.slot(index) else { return }
      devices.apply(change(&slot.function), to: slot, self)
    }
  }

  /// A copy of a function's registers, for reports.
  package func function(ofDevice index: Int) -> VirtioPCIFunction? {
    deviceLock.withLock { devices.slot(index)?.function }
  }

  // MARK: serial port

  /// Bytes that the guest has sent and nobody has taken. `body` says how many of them it took.
  package func drainSerial(_ body: ([UInt8]) -> Int) {
    // Written outside the lock: only this thread consumes, so the prefix stays what it was.
    let waiting = deviceLock.withLock { devices.serial.output }
    guard !waiting.isEmpty else { return }
    let taken = body(waiting)
    guard taken > 0 else { return }
    deviceLock.withLock {
      devices.serial.consumeOutput(taken)
      devices.updateSerialLine(self)
      // The guest signals only when it writes into an empty buffer: what came meanwhile is for the next turn.
      if taken == waiting.count, !devices.serial.output.isEmpty { wakeUp.signal() }
    }
  }

  /// Whether the guest has sent bytes that nobody has taken.
  package var hasSerialOutput: Bool { deviceLock.withLock { !devices.serial.output.isEmpty } }

  /// Bytes of input that the port has room for now.
  package var serialInputRoom: Int { deviceLock.withLock { devices.serial.inputRoom } }

  /// Types bytes at the serial port.
  package func receiveSerial(_ bytes: ArraySlice<UInt8>) {
    deviceLock.withLock {
      devices.serial.receive(bytes)
      devices.updateSerialLine(self)
    }
  }

  // MARK: doorbells

  /// Kicks the back end of a device for the doorbells that were rung past KVM. On the thread that takes events.
  package func passKicksOn(_ index: Int) {
    var events: [SharedEvent] = []
    deviceLock.withLock {
      guard let slot = devices.slot(index) else { return }
      events = slot.dueKicks.map { slot.kicks[$0] }
      slot.dueKicks.removeAll()
    }
    // Without the lock: the back end can make this take some milliseconds.
    for event in events { event.event.signalDistrusted() }
  }

  // MARK: reset

  /// Puts the platform and all functions back to the state after power-on. Functions with active queues post `.reset` and
  /// are finished by `updateDevice` with `resetCompleted()`. Only while all processors are paused.
  package func resetDevices() {
    deviceLock.withLock {
      devices.ioapic = IOAPIC()
      devices.platform = Platform()
      devices.serial.reset()
      devices.pci.address = 0
      devices.pci.hostBridge = PCIBus.makeHostBridge()
      devices.pci.resetHotPlug()
      devices.dropWithdrawn { _ in true }
      for slot in devices.virtio.compactMap({ $0 }) where slot.isOnBus {
        devices.apply(slot.function.powerOnReset(), to: slot, self)
        // What was pending belongs to the previous guest.
        for index in slot.vectors.indices {
          slot.vectors[index].shared.event.drain()
          slot.vectors[index].ownIsPending = false
        }
      }
      devices.vectorRoutes.removeAll()
      devices.setRoutes(self)
    }
  }

  /// A warning that a guest may cause at will: rate-limited, and written by the thread that takes events, for a log may
  /// block. Under the device lock.
  func warn(_ what: String, _ error: some Error & CustomStringConvertible) {
    guard devices.warningLimit.allows() else { return }
    post(.warning("\(what): \(error.description)"))
  }
}
