import VirtioTransport

/// Events on their way to the core's main loop. A guest can cause some of them faster than the loop takes them, so those
/// that replace one another are merged: what waits is bounded by what the devices have, not by how often the guest writes.
package struct MachineEventQueue {
  private var events: [MachineEvent] = []
  /// Warnings that may wait at one time; more say nothing new.
  private static let warningLimit = 64
  private var warningCount = 0

  package init() {}

  package mutating func append(_ event: MachineEvent) {
    switch event {
    case .device(let device, .configurationWritten(let offset, let bytes)):
      var merged = bytes
      if let place = lastIndex(of: device, where: { if case .configurationWritten(offset, _) = $0 { true } else { false } }),
        case .device(_, .configurationWritten(_, let before)) = events[place]
      {
        // A shorter write leaves the bytes behind it as they were.
        merged += before.dropFirst(bytes.count)
        events.remove(at: place)
      }
      events.append(.device(device, .configurationWritten(offset: offset, bytes: merged)))
    case .device(let device, .queueVectorChanged(let queue, _)):
      if let place = lastIndex(of: device, where: { if case .queueVectorChanged(queue, _) = $0 { true } else { false } }) {
        events.remove(at: place)
      }
      events.append(event)
    case .warning:
      guard warningCount < Self.warningLimit else { return }
      warningCount += 1
      events.append(event)
    default: events.append(event)
    }
  }

  /// The device is gone, and its index may come again.
  package mutating func drop(device index: Int) {
    events.removeAll { event in
      switch event {
      case .device(index, _), .ejected(index): true
      default: false
      }
    }
  }

  package mutating func takeAll() -> [MachineEvent] {
    warningCount = 0
    defer { events.removeAll(keepingCapacity: true) }
    return events
  }

  /// The last waiting effect of a device that matches, unless the device was started, stopped or reset since.
  private func lastIndex(of device: Int, where matches: (TransportEffect) -> Bool) -> Int? {
    for index in events.indices.reversed() {
      guard case .device(device, let effect) = events[index] else { continue }
      if matches(effect) { return index }
      switch effect {
      case .activate, .reset, .queueReset, .queueEnabled: return nil
      default: continue
      }
    }
    return nil
  }
}
