/// Sizes, offsets and flags of the split virtqueue (virtio 1.4, section 2.7; linux/virtio_ring.h). All in bytes.
public enum SplitRing {
  @inlinable public static var descriptorByteCount: Int { 16 }
  /// `VIRTQ_DESC_F_NEXT`: the chain goes on in `next`.
  @inlinable public static var next: UInt16 { 1 }
  /// `VIRTQ_DESC_F_WRITE`: the device writes this buffer (else it reads it).
  @inlinable public static var write: UInt16 { 2 }
  /// `VIRTQ_DESC_F_INDIRECT`: the buffer holds a table of descriptors.
  @inlinable public static var indirect: UInt16 { 4 }
  /// `VIRTQ_AVAIL_F_NO_INTERRUPT`, in `avail.flags`.
  @inlinable public static var noInterrupt: UInt16 { 1 }
  /// `VIRTQ_USED_F_NO_NOTIFY`, in `used.flags`.
  @inlinable public static var noNotify: UInt16 { 1 }

  /// `avail.flags`, `avail.idx` and the first slot of `avail.ring`, from the start of the available ring.
  @inlinable public static var availableFlagsOffset: Int { 0 }
  @inlinable public static var availableIndexOffset: Int { 2 }
  @inlinable public static var availableSlotsOffset: Int { 4 }
  /// `used.flags`, `used.idx` and the first element of `used.ring`, from the start of the used ring.
  @inlinable public static var usedFlagsOffset: Int { 0 }
  @inlinable public static var usedIndexOffset: Int { 2 }
  @inlinable public static var usedElementsOffset: Int { 4 }
  @inlinable public static var usedElementByteCount: Int { 8 }

  @inlinable public static var descriptorTableAlignment: UInt64 { 16 }
  @inlinable public static var availableRingAlignment: UInt64 { 2 }
  @inlinable public static var usedRingAlignment: UInt64 { 4 }

  @inlinable public static func descriptorTableByteCount(queueSize: UInt16) -> Int { 16 * Int(queueSize) }
  /// With the two bytes of `used_event`, which exist in the layout whether negotiated or not.
  @inlinable public static func availableRingByteCount(queueSize: UInt16) -> Int { 6 + 2 * Int(queueSize) }
  /// With the two bytes of `avail_event`.
  @inlinable public static func usedRingByteCount(queueSize: UInt16) -> Int { 6 + 8 * Int(queueSize) }
  /// `used_event`, from the start of the available ring.
  @inlinable public static func usedEventOffset(queueSize: UInt16) -> Int { 4 + 2 * Int(queueSize) }
  /// `avail_event`, from the start of the used ring.
  @inlinable public static func availableEventOffset(queueSize: UInt16) -> Int { 4 + 8 * Int(queueSize) }

  /// A power of two, 1 to 32768.
  @inlinable public static func isValid(queueSize: UInt16) -> Bool {
    queueSize != 0 && queueSize <= VirtioQueueLimits.greatestSize && queueSize & (queueSize - 1) == 0
  }
}

/// Sizes, offsets and flags of the packed virtqueue (virtio 1.4, section 2.8; linux/virtio_ring.h). All in bytes.
public enum PackedRing {
  @inlinable public static var descriptorByteCount: Int { 16 }
  @inlinable public static var next: UInt16 { 1 }
  @inlinable public static var write: UInt16 { 2 }
  @inlinable public static var indirect: UInt16 { 4 }
  /// `VRING_PACKED_DESC_F_AVAIL`
  @inlinable public static var available: UInt16 { 1 << 7 }
  /// `VRING_PACKED_DESC_F_USED`
  @inlinable public static var used: UInt16 { 1 << 15 }
  /// Bit of the wrap counter in event offsets and in ring states.
  @inlinable public static var wrapBit: UInt16 { 1 << 15 }

  /// Offsets inside a descriptor.
  @inlinable public static var addressOffset: Int { 0 }
  @inlinable public static var lengthOffset: Int { 8 }
  @inlinable public static var idOffset: Int { 12 }
  @inlinable public static var flagsOffset: Int { 14 }

  /// Event suppression structure: 4 bytes.
  @inlinable public static var eventByteCount: Int { 4 }
  @inlinable public static var eventDescriptorOffset: Int { 0 }
  @inlinable public static var eventFlagsOffset: Int { 2 }
  /// `RING_EVENT_FLAGS_ENABLE`, `_DISABLE`, `_DESC`
  @inlinable public static var eventEnable: UInt16 { 0 }
  @inlinable public static var eventDisable: UInt16 { 1 }
  @inlinable public static var eventDescriptor: UInt16 { 2 }

  @inlinable public static var descriptorRingAlignment: UInt64 { 16 }
  @inlinable public static var eventAlignment: UInt64 { 4 }
  @inlinable public static func descriptorRingByteCount(queueSize: UInt16) -> Int { 16 * Int(queueSize) }

  /// 1 to 32768, any number.
  @inlinable public static func isValid(queueSize: UInt16) -> Bool {
    queueSize != 0 && queueSize <= VirtioQueueLimits.greatestSize
  }
}

/// Limits that hold for both layouts.
public enum VirtioQueueLimits {
  /// Most descriptors of a ring.
  @inlinable public static var greatestSize: UInt16 { 32768 }
}
