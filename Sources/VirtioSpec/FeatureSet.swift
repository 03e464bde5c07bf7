/// A set of virtio feature bits 0 to 63, as negotiated between driver and device and over vhost-user.
///
/// Bits of one device kind mean nothing for another (bit 5 is "read-only" to a disk and "has a MAC" to a network card),
/// so their constants carry the device in their name and `names(for:)` wants to know the device.
public struct FeatureSet: OptionSet, Hashable, Sendable {
  public let rawValue: UInt64

  @inlinable
  public init(rawValue: UInt64) { self.rawValue = rawValue }

  /// The set with one bit; `bit` is 0 to 63.
  @inlinable
  public init(bit: Int) { self.rawValue = 1 << UInt64(bit & 63) }

  /// The bits of the set in rising order.
  public var bits: [Int] { (0..<64).filter { rawValue >> UInt64($0) & 1 == 1 } }
}

// MARK: Bits of the transport and the rings (virtio 1.4, section 6)

extension FeatureSet {
  /// `VIRTIO_F_NOTIFY_ON_EMPTY`, legacy only; never offered to a guest.
  @inlinable public static var notifyOnEmpty: FeatureSet { FeatureSet(bit: 24) }
  /// `VIRTIO_F_ANY_LAYOUT`, legacy only.
  @inlinable public static var anyLayout: FeatureSet { FeatureSet(bit: 27) }
  /// `VIRTIO_F_INDIRECT_DESC`: the driver may use indirect tables.
  @inlinable public static var indirectDescriptors: FeatureSet { FeatureSet(bit: 28) }
  /// `VIRTIO_F_EVENT_IDX`: `used_event` and `avail_event`.
  @inlinable public static var eventIndex: FeatureSet { FeatureSet(bit: 29) }
  /// `VHOST_USER_F_PROTOCOL_FEATURES`: belongs to vhost-user and must never reach a guest.
  @inlinable public static var vhostUserProtocolFeatures: FeatureSet { FeatureSet(bit: 30) }
  /// `VIRTIO_F_VERSION_1`.
  @inlinable public static var version1: FeatureSet { FeatureSet(bit: 32) }
  /// `VIRTIO_F_ACCESS_PLATFORM`: addresses may be translated or limited.
  @inlinable public static var accessPlatform: FeatureSet { FeatureSet(bit: 33) }
  /// `VIRTIO_F_RING_PACKED`.
  @inlinable public static var packedRing: FeatureSet { FeatureSet(bit: 34) }
  /// `VIRTIO_F_IN_ORDER`: buffers are used in the order they were made available.
  @inlinable public static var inOrder: FeatureSet { FeatureSet(bit: 35) }
  /// `VIRTIO_F_ORDER_PLATFORM`.
  @inlinable public static var orderPlatform: FeatureSet { FeatureSet(bit: 36) }
  /// `VIRTIO_F_SR_IOV`.
  @inlinable public static var singleRootIO: FeatureSet { FeatureSet(bit: 37) }
  /// `VIRTIO_F_NOTIFICATION_DATA`: the driver writes more than a queue index into the notify register.
  @inlinable public static var notificationData: FeatureSet { FeatureSet(bit: 38) }
  /// `VIRTIO_F_NOTIF_CONFIG_DATA`.
  @inlinable public static var notificationConfigData: FeatureSet { FeatureSet(bit: 39) }
  /// `VIRTIO_F_RING_RESET`: single queues can be reset.
  @inlinable public static var ringReset: FeatureSet { FeatureSet(bit: 40) }
  /// `VIRTIO_F_ADMIN_VQ`.
  @inlinable public static var adminQueue: FeatureSet { FeatureSet(bit: 41) }
  /// `VIRTIO_F_SUSPEND`.
  @inlinable public static var suspend: FeatureSet { FeatureSet(bit: 43) }
  /// `VHOST_F_LOG_ALL` (26): dirty logging, between front end and back end only.
  @inlinable public static var vhostLogAll: FeatureSet { FeatureSet(bit: 26) }

  /// Bits that belong to rings and transport rather than to one device kind: 24 to 40 and 43.
  @inlinable public static var transportMask: FeatureSet {
    FeatureSet(rawValue: (1 << 41) - (1 << 24) | 1 << 43)
  }

  /// Bits between front end and back end that a guest must never see: dirty log and protocol features.
  @inlinable public static var vhostOnlyMask: FeatureSet { [.vhostLogAll, .vhostUserProtocolFeatures] }
}
