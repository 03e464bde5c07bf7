import ControlProtocol
import FrontEnd
import HostSystem
import Machine
import VirtioTransport

extension Core {
  // MARK: start

  /// Starts the guest when it has been asked for, and opens its PCI bus when every device has made first contact: a kernel
  /// has much to do before it looks there. A device that fails until then ends the VM.
  func tryStart() {
    guard let sequence = pendingStart, let guest, state != .stopped else { return }
    do throws(CoreError) {
      if state == .created { try start(guest) }
      if let device = devices.first(where: { !$0.reason.isEmpty }) {
        throw CoreError.device("Device \(device.assignment.id): \(device.reason)")
      }
      guard devices.count == deviceCount, devices.allSatisfy({ $0.frontEnd.state != .negotiating }) else { return }
      for device in devices { try device.plug(into: guest.machine, guest.memory) }
    } catch {
      return fail(error, sequence: sequence)
    }
    pendingStart = nil
    for device in devices { device.frontEnd.awaitsSuccessor = device.assignment.isReplaceable }
    guest.machine.openBus()
    answer(.started, sequence)
  }

  private func start(_ guest: GuestMachine) throws(CoreError) {
    guest.machine.shutBus()
    try guest.enterPayload()
    startTime = .now
    state = .running
    guest.machine.resume()
  }

  // MARK: events

  func takeMachineEvents() {
    guard let machine = guest?.machine else { return }
    for event in machine.takeEvents() {
      switch event {
      case .device(let index, let effect):
        if let device = devices.first(where: { $0.index == index }) { device.frontEnd.handle(effect, now: .now) }
      case .ejected(let index): if let device = devices.first(where: { $0.index == index }) { leave(device) }
      case .kicks(let index): machine.passKicksOn(index)
      case .warning(let text): Log.warning(text)
      case .resetRequested:
        // One processor asked; what others asked in the same moment is the same reset.
        guard state == .running else { break }
        if configuration?.restartsOnReset == true {
          beginReset()
        } else {
          end(.resetEnded)
        }
      case .powerOff: if state == .running { end(.poweredOff) }
      case .crashed(let reason):
        guard state == .running else { break }
        Log.error(reason)
        end(.crashed)
      }
    }
  }

  func takeDeviceEvents() {
    for device in devices {
      while let event = device.frontEnd.nextEvent() {
        switch event {
        case .ready: watchChannel(device)
        case .channelClosed: stopWatchingChannel(device)
        case .lost(let error), .detached(let error):
          let text = device.frontEnd.conversation
          if !text.isEmpty { channel.send(.conversation(id: device.assignment.id, text: text)) }
          // The supervisor tells the person, from the report or the failure that follows.
          device.reason = "\(error)"
          Log.info("Device \(device.assignment.id): \(error)")
          if let number = device.watchedSocket { loop.remove(number: number) }
          device.watchedSocket = nil
          stopWatchingChannel(device)
          device.frontEnd.closeLost()
          if let sequence = device.reattachSequence.take() { refuse("\(error)", sequence) }
        case .restored:
          device.reason = ""
          let unrecorded = device.frontEnd.unrecorded
          if unrecorded > 0, device.assignment.deviceType != .net {
            Log.warning(
              "Device \(device.assignment.id): \(unrecorded) requests were in flight when its back end ended, which keeps no record of them; "
                + "where it answers out of order, some may be lost and others done twice")
          }
          if let sequence = device.reattachSequence.take() { answer(.done, sequence) }
        case .examined, .exchanged, .exchangeFailed: take(event, ofExchange: device)
        case .paused, .resumed: break
        }
      }
    }
  }

  func watchChannel(_ device: CoreDevice) {
    guard let number = device.frontEnd.channelNumber else { return }
    do {
      try loop.add(number: number, for: .readable, token: .deviceChannel(device.key))
      device.watchedChannel = number
    } catch {
      Log.warning("Device \(device.assignment.id): \(error.description)")
    }
  }

  func stopWatchingChannel(_ device: CoreDevice) {
    if let number = device.watchedChannel { loop.remove(number: number) }
    device.watchedChannel = nil
  }

  /// Tells the supervisor of every device that is not what it was.
  func reportDevices() {
    for device in devices where !device.isLeaving {
      let report = device.report(guest?.machine)
      guard report != device.lastReport else { continue }
      device.lastReport = report
      channel.send(.device(report))
    }
  }

  private static let lookInterval = Duration.seconds(1)

  /// Sees where the rings stand. As long as something waits in one it is looked again every second, else only when asked: a
  /// guest that sleeps shall not wake this thread.
  func lookAtQueues(_ now: MonotonicTime) {
    var waits = false
    for device in devices where device.frontEnd.look(now: now) { waits = true }
    nextLook = waits ? now.advanced(by: Self.lookInterval) : nil
  }

  // MARK: reset in place

  /// Stops the guest and puts its devices back; `tryFinishReset` goes on when the back ends have stopped.
  func beginReset() {
    guard let machine = guest?.machine, state == .running || state == .paused else { return }
    machine.pause()
    state = .resetting
    pausedClock = nil
    machine.resetDevices()
    takeMachineEvents()
  }

  /// Starts the guest again once no back end works on a ring.
  func tryFinishReset() {
    guard state == .resetting, let guest, !devices.contains(where: { !$0.isLeaving && $0.isResetting(in: guest.machine) }) else { return }
    // Resets asked for by other processors before they stopped are this one.
    takeMachineEvents()
    letGoByReset(guest.machine)
    do {
      try guest.startOver()
    } catch {
      return fail(error)
    }
    resetCount += 1
    state = .running
    guest.machine.resume()
    channel.send(.guest(.reset))
    for sequence in pendingReboots { answer(.done, sequence) }
    pendingReboots = []
  }

  // MARK: end

  /// The guest has ended: reports it and takes the rings back.
  private func end(_ event: CoreMessage.GuestEvent) {
    guest?.machine.pause()
    // The last words of the guest.
    flushSerial()
    channel.send(.guest(event))
    beginEnd(answering: nil)
  }

  /// Stops processors and rings; ends when all back ends have stopped, or after two seconds without them.
  func beginEnd(answering sequence: UInt32?) {
    if let sequence { endSequence = sequence }
    guard endDeadline == nil else { return }
    guest?.machine.pause()
    // Until all devices are plugged in, none has a ring.
    if state == .created || devices.allSatisfy({ $0.index == nil }) {
      state = .stopped
      endDeadline = .now
      return
    }
    state = .stopped
    let now = MonotonicTime.now
    endDeadline = now.advanced(by: .seconds(2))
    for device in devices { device.frontEnd.pause(now: now) }
  }

  func finishEnd() {
    if let sequence = endSequence {
      answer(.done, sequence)
      channel.send(.guest(.shutDown))
    }
    exitCode = 0
  }

  private func flushSerial() {
    guard let machine = guest?.machine else { return }
    serial.finish(from: machine)
  }
}
