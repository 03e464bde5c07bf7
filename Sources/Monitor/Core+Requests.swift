import ControlProtocol
import HostSystem
import Machine
import Sandbox

extension Core {
  func handle(_ message: SupervisorMessage, _ sequence: UInt32, _ descriptors: inout ReceivedDescriptors) {
    // The decoder has checked that as many descriptors came as the message needs.
    switch message {
    case .configure(let configuration): configure(configuration, sequence, &descriptors)
    case .device(let assignment): addDevice(assignment, sequence, &descriptors)
    case .stream(.serial):
      if let fd = descriptors.takeFirst() { serial.open(fd) }
    case .start(let deviceCount):
      guard guest != nil, state == .created, pendingStart == nil, devices.count <= deviceCount else {
        return refuse("The VM cannot be started now", sequence)
      }
      pendingStart = sequence
      self.deviceCount = Int(deviceCount)
    case .pause: pause(sequence)
    case .resume: resume(sequence)
    case .powerButton:
      guard let machine = guest?.machine, state == .running || state == .paused else {
        return refuse("The VM is not running", sequence)
      }
      machine.pressPowerButton()
      answer(.done, sequence)
    case .reboot:
      guard guest != nil, state == .running || state == .paused || state == .resetting else {
        return refuse("The VM is not running", sequence)
      }
      pendingReboots.append(sequence)
      beginReset()
    case .shutdown: beginEnd(answering: sequence)
    case .information: answer(.information(information), sequence)
    case .unplug(let id, let isForced): unplug(id, isForced, sequence)
    case .reattach(let id): reattach(id, sequence, &descriptors)
    case .look:
      lookAtQueues(.now)
      reportDevices()
      answer(.done, sequence)
    case .conversation(let id):
      guard let device = devices.first(where: { $0.assignment.id == id }) else { return refuse("There is no device \(id)", sequence) }
      let text = device.frontEnd.conversation
      guard !text.isEmpty else { return refuse("Device \(id) has no back end now", sequence) }
      answer(.conversation(id: id, text: text), sequence)
    case .giveUp(let id):
      guard let device = devices.first(where: { $0.assignment.id == id }) else { return refuse("There is no device \(id)", sequence) }
      device.frontEnd.giveUp()
      answer(.done, sequence)
    case .examine(let id): examine(id, sequence, &descriptors)
    case .exchange(let id, let drain): exchange(id, drain, sequence)
    case .forget(let id): forget(id, sequence)
    }
  }

  func refuse(_ sentence: String, _ sequence: UInt32) {
    answer(.refused(sentence), sequence)
  }

  private func configure(
    _ configuration: CoreConfiguration, _ sequence: UInt32, _ descriptors: inout ReceivedDescriptors
  ) {
    guard guest == nil else { return refuse("The VM is configured already", sequence) }
    guard let kvm = descriptors.takeFirst(), let kernel = descriptors.takeFirst() else {
      return refuse("Descriptors are missing", sequence)
    }
    do {
      let guest = try GuestMachine(
        configuration, kvm: kvm, kernel: kernel, initramfs: descriptors.takeFirst(), walls: walls)
      try watch(guest.machine)
      self.guest = guest
      self.configuration = configuration
      try closeCalls()
      answer(.ready, sequence)
    } catch {
      fail(error, sequence: sequence)
    }
  }

  /// The last wall of the main thread. Every other thread has closed itself in and waits; what comes from here on (sockets of
  /// back ends, streams) comes as descriptors, and no word of a back end has been read yet.
  private func closeCalls() throws(CoreError) {
    do { try ProcessWalls.closeCallsOfThread([.base, .core], walls) } catch { throw .host(error.message) }
  }

  private func watch(_ machine: Machine) throws(CoreError) {
    do {
      try loop.add(machine.wakeUp.fd, for: .readable, token: .machine)
    } catch {
      throw .host(error.description)
    }
  }

  private func addDevice(
    _ assignment: DeviceAssignment, _ sequence: UInt32, _ descriptors: inout ReceivedDescriptors
  ) {
    // A guest that has ended needs no devices any more.
    guard state != .stopped else { return }
    guard !isComplete else { return plug(assignment, sequence, &descriptors) }
    guard let guest, let configuration, devices.count < deviceCount ?? .max,
      assignment.pciSlot != DeviceAssignment.anySlot, !devices.contains(where: { $0.assignment.id == assignment.id }),
      let socket = descriptors.takeFirst()
    else {
      return fail(.device("Device \(assignment.id) came at a wrong time or twice"))
    }
    do {
      try begin(assignment, socket, guest, configuration)
    } catch {
      fail(.device("Device \(assignment.id): \(error)"))
    }
  }

  /// First contact with a device's back end.
  @discardableResult
  func begin(
    _ assignment: DeviceAssignment, _ socket: consuming OwnedFD, _ guest: GuestMachine, _ configuration: CoreConfiguration
  ) throws -> CoreDevice {
    let device = try CoreDevice(
      assignment, socket, key: nextKey, memory: guest.sharedMemory,
      replyDeadline: .milliseconds(Int64(configuration.replyDeadline)))
    nextKey += 1
    if let number = device.frontEnd.socketNumber {
      try loop.add(number: number, for: .readable, token: .device(device.key))
      device.watchedSocket = number
    }
    devices.append(device)
    device.frontEnd.start(now: .now)
    return device
  }

  /// A new back end for a device whose old one is gone.
  private func reattach(_ id: String, _ sequence: UInt32, _ descriptors: inout ReceivedDescriptors) {
    guard let device = devices.first(where: { $0.assignment.id == id }), let socket = descriptors.takeFirst() else {
      return refuse("There is no device \(id)", sequence)
    }
    guard !device.isLeaving else { return refuse("Device \(id) is being removed", sequence) }
    // The end of the old one may not have been noticed yet.
    device.frontEnd.receive(now: .now)
    takeDeviceEvents()
    guard device.reattachSequence == nil else { return refuse("Device \(id) is being given a back end already", sequence) }
    do {
      guard try device.frontEnd.reattach(socket, now: .now) else {
        return refuse("Device \(id) has a back end, or cannot be given another", sequence)
      }
      device.reattachSequence = sequence
      if let number = device.frontEnd.socketNumber {
        try loop.add(number: number, for: .readable, token: .device(device.key))
        device.watchedSocket = number
      }
    } catch {
      device.reattachSequence = nil
      refuse("Device \(id): \(error)", sequence)
    }
  }

  // MARK: pause and resume

  private func pause(_ sequence: UInt32) {
    switch state {
    case .paused: answer(.done, sequence)
    // A processor may wait for the bus, in the middle of an access that cannot be put off.
    case .running where pendingStart != nil: refuse("The VM is still starting", sequence)
    case .running:
      guard let machine = guest?.machine else { return }
      machine.pause()
      pausedClock = try? machine.clock()
      state = .paused
      answer(.done, sequence)
    default: refuse("The VM is \(state.name)", sequence)
    }
  }

  private func resume(_ sequence: UInt32) {
    switch state {
    case .running: answer(.done, sequence)
    case .paused:
      guard let machine = guest?.machine else { return }
      // The guest's clock has not gone on meanwhile, and its watchdogs are told.
      if let clock = pausedClock { try? machine.setClock(clock) }
      pausedClock = nil
      machine.announcePause()
      machine.resume()
      state = .running
      answer(.done, sequence)
    default: refuse("The VM is \(state.name)", sequence)
    }
  }

  private var information: VMInformation {
    let uptime = startTime.map { UInt64(clamping: MonotonicTime.now.since($0).nanoseconds) } ?? 0
    let counts = guest?.machine.accessCounts ?? (ports: 0, memory: 0)
    return VMInformation(
      state: state, resetCount: resetCount, uptime: uptime,
      counters: [
        .init(name: "port_exits", value: counts.ports), .init(name: "memory_exits", value: counts.memory),
      ])
  }
}
