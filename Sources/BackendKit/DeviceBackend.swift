import HostSystem
import VirtioSpec

/// What a device is: fixed while a connection lasts, asked once at its start.
public struct DeviceProfile: Sendable {
  /// Who waits for the kicks of a running queue.
  public enum KickWaiter: Sendable {
    /// The kit's event loop, which then calls `kicked(queue:)`.
    case loop
    /// The device itself, from `start` on: it watches `DeviceQueue.kick`.
    case device
  }

  public var device: DeviceID
  /// Virtqueues the device can serve, 1 to 256.
  public var queueCount: Int
  /// Most descriptors of one ring.
  public var greatestQueueSize: UInt16
  /// Virtio features offered to the driver; the bits between front end and back end are added by the kit.
  public var features: FeatureSet
  public var kickWaiter: KickWaiter
  /// The device takes started queues also while they are disabled, and is told by `enabled(queue:_:_:)`: a network card
  /// has to consume what is transmitted then. Otherwise it never sees a disabled queue.
  public var servesDisabledQueues = false
  /// What is in flight is recorded in memory that outlives this process, where the front end asks for it, and chains that a
  /// killed process left come again (`Virtqueue.next`) to the next one. Off for a device whose requests must not be done twice.
  public var recordsInflight = true

  /// What the kit's rings can do, for every device: packed rings, indirect descriptors, event indices. A device with bits of
  /// its own offers `DeviceProfile.ringFeatures.union(...)`.
  public static let ringFeatures: FeatureSet = [.version1, .indirectDescriptors, .eventIndex, .packedRing]

  public init(
    device: DeviceID, queueCount: Int = 1, greatestQueueSize: UInt16 = 1024, features: FeatureSet = DeviceProfile.ringFeatures,
    kickWaiter: KickWaiter = .loop
  ) {
    precondition((1...256).contains(queueCount), "A vhost-user device has 1 to 256 queues.")
    self.device = device
    self.queueCount = queueCount
    self.greatestQueueSize = greatestQueueSize
    self.features = features
    self.kickWaiter = kickWaiter
  }
}

/// What every device behind vhost-user says and hears, besides its queues: those come by `ChainDevice`, one chain at a time,
/// or by `DeviceBackend`, which leaves everything to the device. All functions are called on the kit's thread; all but
/// `profile` have a default.
public protocol VirtioDevice: ~Copyable {
  var profile: DeviceProfile { get }

  /// The device's configuration space as it is now, at most 256 bytes; reads beyond its end answer zeros.
  var configuration: [UInt8] { get }

  /// Before system calls are restricted and before READY: make threads and rings, watch descriptors of the device's own.
  /// Every thread must have said that it runs when this returns. Nothing can be opened by a path any more.
  mutating func prepare(_ context: inout BackendContext) throws(BackendError)

  /// What the device, now prepared, will still ask of the kernel. Asked once, after `prepare`.
  var systemCalls: SystemCallNeeds { get }

  /// The features the driver accepted (a subset of `profile.features`); no queue runs now.
  mutating func negotiated(_ features: FeatureSet, _ context: inout BackendContext)

  /// The driver wrote into the configuration space. False when a byte of it is not writable; nothing has changed then.
  mutating func writeConfiguration(_ bytes: [UInt8], at offset: Int, _ context: inout BackendContext) -> Bool

  /// A descriptor that the device watches is ready.
  mutating func ready(_ token: Int, _ readiness: Readiness, _ context: inout BackendContext)

  /// Somebody has changed what the device stands on (an image's size, say) and sent SIGHUP to say so.
  mutating func lookAgain(_ context: inout BackendContext)

  /// The driver reset the device (`RESET_DEVICE`, status 0); no queue runs now.
  mutating func reset(_ context: inout BackendContext)

  /// The front end is gone. With a listening socket another one may come and starts afresh.
  mutating func disconnected(_ context: inout BackendContext)
}

extension VirtioDevice where Self: ~Copyable {
  public var configuration: [UInt8] { [] }
  public var systemCalls: SystemCallNeeds { .none }
  public mutating func prepare(_ context: inout BackendContext) throws(BackendError) {}
  public mutating func negotiated(_ features: FeatureSet, _ context: inout BackendContext) {}
  public mutating func writeConfiguration(_ bytes: [UInt8], at offset: Int, _ context: inout BackendContext) -> Bool { false }
  public mutating func ready(_ token: Int, _ readiness: Readiness, _ context: inout BackendContext) {}
  public mutating func lookAgain(_ context: inout BackendContext) {}
  public mutating func reset(_ context: inout BackendContext) {}
  public mutating func disconnected(_ context: inout BackendContext) {}
}

/// A device that has its queues in its own hands: many chains at a time, threads, any order of answers.
///
/// Order: `prepare` once; then per connection `negotiated`, `start` and `stop` any number of times, queue by queue, and
/// at its end `disconnected`. Every queue that was started is stopped before `disconnected`, before the memory table changes,
/// and before features change.
public protocol DeviceBackend: VirtioDevice, ~Copyable {
  /// A ready queue, the device's own from here until `stop`. The device looks at the ring once by itself: buffers may
  /// have been made available before the first kick. With `.loop` the kit calls `kicked` for that.
  mutating func start(_ queue: consuming DeviceQueue, _ context: inout BackendContext) throws(BackendError)

  /// Only with `servesDisabledQueues`: whether the front end has enabled a queue; called after every `start`, and on changes.
  mutating func enabled(queue index: Int, _ isEnabled: Bool, _ context: inout BackendContext)

  /// Finishes what was taken from the ring, publishes it, and gives the queue back. Nil only for a queue that was
  /// never started.
  mutating func stop(queue index: Int, _ context: inout BackendContext) throws(BackendError) -> DeviceQueue?

  /// The driver kicked (`.loop` only; the kick is already acknowledged), or `BackendContext.serveAgain` asked for it. Kicks may
  /// be spurious.
  mutating func kicked(queue index: Int, _ context: inout BackendContext)
}

extension DeviceBackend where Self: ~Copyable {
  public mutating func enabled(queue index: Int, _ isEnabled: Bool, _ context: inout BackendContext) {}
  public mutating func kicked(queue index: Int, _ context: inout BackendContext) {}
}
