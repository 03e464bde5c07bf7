import HostSystem
import VirtioQueue

/// A ready queue: a mapped and validated ring with its notification descriptors. Owned by the device from `start` to
/// `stop`, by the kit otherwise.
///
///     queue.ring.disableKicks()
///     while case .chain = queue.ring.next(&chain) { ... queue.ring.complete(chain.token, written: count) }
///     if queue.ring.publish() { queue.call() }
@frozen public struct DeviceQueue: ~Copyable, Sendable {
  /// The queue's number, as the driver counts.
  public let index: Int
  public var ring: Virtqueue
  /// Call, error notice and counters.
  public let ports: QueuePorts
  /// Readable when the driver kicked; valid from `start` to `stop`. Only devices with `KickWaiter.device` wait for it; its
  /// counter need not be read. For a ring without a kick of the front end's it is readable whenever it is time to look.
  public let kickFD: CInt

  init(index: Int, ring: consuming Virtqueue, ports: QueuePorts, kickFD: CInt) {
    self.index = index
    self.ring = ring
    self.ports = ports
    self.kickFD = kickFD
  }

  /// The same queue with another kick descriptor.
  init(index: Int, _ other: consuming DeviceQueue, kickFD: CInt) {
    self.index = index
    self.kickFD = kickFD
    ports = other.ports
    ring = other.ring
  }

  @inlinable public var counters: QueueCounters { ports.counters }

  /// Notifies the driver; when `ring.publish()` says so.
  @inlinable @inline(__always)
  public borrowing func call() { ports.call() }

  /// The ring is broken (`ring.next` said so): the front end is told, which will mark the device as in need of a reset. Nothing
  /// more comes from the ring until it is stopped and started again.
  public borrowing func markBroken(_ why: BrokenRing) {
    if ports.signalError() { Log.warning("Queue \(index) is broken: \(why)") }
  }
}
