import ControlProtocol
import FrontEnd
import HostSystem

/// Another back end in place of one that serves (protocol/recovery.md).
extension Core {
  func examine(_ id: String, _ sequence: UInt32, _ descriptors: inout ReceivedDescriptors) {
    guard let device = devices.first(where: { $0.assignment.id == id }), let socket = descriptors.takeFirst() else {
      return refuse("There is no device \(id)", sequence)
    }
    guard state == .running || state == .paused, pendingStart == nil, device.exchangeSequence == nil, device.reattachSequence == nil else {
      return refuse("The device \(id) cannot be given another back end now", sequence)
    }
    do {
      device.exchangeSequence = sequence
      guard try device.frontEnd.examine(socket, now: .now) else {
        device.exchangeSequence = nil
        return refuse("The device \(id) is \(device.frontEnd.state.rawValue) and cannot be given another back end now", sequence)
      }
      try watchCandidate(device)
    } catch {
      device.exchangeSequence = nil
      device.frontEnd.forget(now: .now)
      refuse("Device \(id): \(error)", sequence)
    }
  }

  private func watchCandidate(_ device: CoreDevice) throws(SystemError) {
    // It may be gone already, which `examined` says.
    guard let number = device.frontEnd.candidateNumber else { return }
    try loop.add(number: number, for: .readable, token: .device(device.key))
    device.watchedCandidate = number
  }

  func exchange(_ id: String, _ drain: UInt32, _ sequence: UInt32) {
    guard let device = devices.first(where: { $0.assignment.id == id }) else { return refuse("There is no device \(id)", sequence) }
    guard device.exchangeSequence == nil else { return refuse("The device \(id) is being given another back end already", sequence) }
    device.exchangeSequence = sequence
    if !device.frontEnd.exchange(drain: .milliseconds(Int64(drain)), now: .now) {
      device.exchangeSequence = nil
      refuse("The back end that was to take over \(id) is gone", sequence)
    }
  }

  func forget(_ id: String, _ sequence: UInt32) {
    guard let device = devices.first(where: { $0.assignment.id == id }) else { return refuse("There is no device \(id)", sequence) }
    stopWatchingCandidate(device)
    device.frontEnd.forget(now: .now)
    answer(.done, sequence)
  }

  private func stopWatchingCandidate(_ device: CoreDevice) {
    if let number = device.watchedCandidate { loop.remove(number: number) }
    device.watchedCandidate = nil
  }

  /// Takes what a front end says of an exchange.
  func take(_ event: DeviceFrontEnd.Event, ofExchange device: CoreDevice) {
    switch event {
    case .examined(let findings):
      if device.frontEnd.candidateNumber == nil { closeCandidate(device) }
      guard let sequence = device.exchangeSequence.take() else { break }
      answer(.examined(findings), sequence)
    case .exchangeFailed(let sentence):
      closeCandidate(device)
      Log.info("Device \(device.assignment.id): another back end did not take over: \(sentence)")
      if let sequence = device.exchangeSequence.take() { refuse(sentence, sequence) }
    case .exchanged:
      if let number = device.watchedSocket { loop.remove(number: number) }
      stopWatchingChannel(device)
      device.watchedSocket = device.watchedCandidate
      device.watchedCandidate = nil
      device.reason = ""
      watchChannel(device)
      if let sequence = device.exchangeSequence.take() { answer(.done, sequence) }
    default: break
    }
  }

  /// Its descriptor is closed already, and its number may be another's by now: the kernel has taken it out of the event loop.
  private func closeCandidate(_ device: CoreDevice) { device.watchedCandidate = nil }
}
