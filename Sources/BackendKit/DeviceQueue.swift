import HostSystem

/// A ready queue: a mapped and validated ring with its notification descriptors. Owned by the device from `start` to
/// `stop`, by the kit otherwise.
public struct DeviceQueue: ~Copyable {
  /// The queue's number, as the driver counts.
  public let index: Int
  /// Call, error notice and counters.
  public let ports: QueuePorts
  /// Readable when the driver kicked; valid from `start` to `stop`. Only devices with `KickWaiter.device` wait for it.
  public let kickFD: CInt

  init(index: Int, ports: QueuePorts, kickFD: CInt) {
    self.index = index
    self.ports = ports
    self.kickFD = kickFD
  }

  public var counters: QueueCounters { ports.counters }

  /// The ring is broken beyond repair: the front end is told (it will set `DEVICE_NEEDS_RESET`), and the device stops
  /// looking at the ring until it is stopped. Called once per ring.
  public borrowing func markBroken(_ why: String) {
    Log.warning("Queue \(index) is broken: \(why)")
    ports.signalError()
  }
}
