import ControlProtocol
import FrontEnd
import HostSystem
import Machine

/// Devices that come and go while the guest runs.
extension Core {
  /// Whether the guest runs with all the devices it was started with.
  var isComplete: Bool { state != .created && state != .stopped && pendingStart == nil }

  // MARK: coming

  /// First contact with the back end of one more device; `tryPlug` goes on.
  func plug(_ assignment: DeviceAssignment, _ sequence: UInt32, _ descriptors: inout ReceivedDescriptors) {
    guard let guest, let configuration, let socket = descriptors.takeFirst() else { return refuse("There is no VM", sequence) }
    guard !devices.contains(where: { $0.assignment.id == assignment.id }) else {
      return refuse("There is a device \(assignment.id) already", sequence)
    }
    do {
      try begin(assignment, socket, guest, configuration).plugSequence = sequence
    } catch {
      // It stands at the end of the list if it came so far.
      if let device = devices.last, device.assignment.id == assignment.id { drop(device) }
      refuse("Device \(assignment.id): \(error)", sequence)
    }
  }

  /// Shows new devices to the guest as their back ends answer. One that does not come up is refused, and nothing has happened.
  func tryPlug() {
    guard let guest else { return }
    for device in devices where device.plugSequence != nil && device.frontEnd.state != .negotiating {
      guard let sequence = device.plugSequence.take() else { continue }
      do throws(CoreError) {
        guard isComplete else { throw .device("The VM is \(state.name)") }
        guard device.reason.isEmpty else { throw .device("Device \(device.assignment.id): \(device.reason)") }
        let wish = device.assignment.pciSlot
        guard let slot = wish == DeviceAssignment.anySlot ? guest.machine.freePCIDevice : wish else {
          throw .device("All 31 slots of the PCI bus are in use, or the guest has not let go of them; remove a device first")
        }
        try device.plug(into: guest.machine, guest.memory, slot: slot)
        device.frontEnd.awaitsSuccessor = device.assignment.isReplaceable
        if let index = device.index { guest.machine.announceDevice(index) }
        answer(.plugged(slot: slot), sequence)
      } catch {
        drop(device)
        refuse(error.sentence, sequence)
      }
    }
  }

  // MARK: going

  func unplug(_ id: String, _ isForced: Bool, _ sequence: UInt32) {
    guard let device = devices.first(where: { $0.assignment.id == id }) else { return refuse("There is no device \(id)", sequence) }
    guard isComplete, let machine = guest?.machine else { return refuse("The VM is still starting, or ends", sequence) }
    if isForced, let plugSequence = device.plugSequence.take() {
      drop(device)
      refuse("Device \(id) is removed", plugSequence)
      return answer(.done, sequence)
    }
    guard device.plugSequence == nil, let index = device.index else { return refuse("Device \(id) is still being added", sequence) }
    guard isForced || device.isLeaving || state != .paused else {
      return refuse("The VM is paused, and its guest cannot let go of \(id); resume it, or remove by force", sequence)
    }
    device.unplugSequences.append(sequence)
    guard !device.isLeaving else { return }
    if isForced {
      machine.withdrawDevice(index)
      leave(device)
    } else {
      machine.requestEjection(ofDevice: index)
    }
  }

  /// A reset is an answer too: the guest has let go of everything.
  func letGoByReset(_ machine: Machine) {
    for device in devices where !device.unplugSequences.isEmpty && !device.isLeaving {
      if let index = device.index { machine.removeFromBus(index) }
      leave(device)
    }
  }

  /// The device is off the bus: its rings are stopped, then it goes.
  func leave(_ device: CoreDevice) {
    guard !device.isLeaving else { return }
    device.isLeaving = true
    device.frontEnd.awaitsSuccessor = false
    device.frontEnd.pause(now: .now)
  }

  /// What has stopped is given up: connection, events, the place in the machine.
  func finishLeaving() {
    for device in devices where device.isLeaving && [.paused, .lost].contains(device.frontEnd.state) {
      drop(device)
      channel.send(.unplugged(id: device.assignment.id))
      for sequence in device.unplugSequences { answer(.done, sequence) }
    }
  }

  private func drop(_ device: CoreDevice) {
    if let number = device.watchedSocket { loop.remove(number: number) }
    device.watchedSocket = nil
    stopWatchingChannel(device)
    if let index = device.index { guest?.machine.removeDevice(index) }
    if let sequence = device.reattachSequence.take() { refuse("Device \(device.assignment.id) is removed", sequence) }
    devices.removeAll { $0 === device }
  }
}
