/// A ring index and a number whose meaning depends on the request: ring size, base, enable flag.
public struct VringState: FixedPayload {
  public static let byteCount = 8
  /// Compared with the queue count as the 32-bit number it is, before it is used for anything.
  public var index: UInt32
  public var number: UInt32

  public init(index: UInt32, number: UInt32) {
    self.index = index
    self.number = number
  }

  public init(decoding bytes: some Collection<UInt8>) throws(VhostUserError) {
    var reader = try WireReader(bytes, of: "vring state", exactly: Self.byteCount)
    index = reader.u32()
    number = reader.u32()
  }

  public var encoded: [UInt8] {
    var writer = WireWriter()
    writer.u32(index)
    writer.u32(number)
    return writer.bytes
  }
}

/// Where a ring lies. The three addresses are user addresses of the front end (IOVAs with `accessPlatform`).
public struct VringAddress: FixedPayload {
  public static let byteCount = 40
  /// `VHOST_VRING_F_LOG`: writes to the used ring are logged.
  public static let logFlag: UInt32 = 1

  public var index: UInt32
  public var flags: UInt32
  public var descriptorTable: UInt64
  /// The device area of a packed ring. On the wire it stands before the available ring.
  public var usedRing: UInt64
  /// The driver area of a packed ring.
  public var availableRing: UInt64
  /// Guest address under which used-ring writes are logged; looked at with `logFlag` only.
  public var log: UInt64

  public init(
    index: UInt32, flags: UInt32 = 0, descriptorTable: UInt64, availableRing: UInt64, usedRing: UInt64, log: UInt64 = 0
  ) {
    self.index = index
    self.flags = flags
    self.descriptorTable = descriptorTable
    self.usedRing = usedRing
    self.availableRing = availableRing
    self.log = log
  }

  public init(decoding bytes: some Collection<UInt8>) throws(VhostUserError) {
    var reader = try WireReader(bytes, of: "vring address", exactly: Self.byteCount)
    index = reader.u32()
    flags = reader.u32()
    descriptorTable = reader.u64()
    usedRing = reader.u64()
    availableRing = reader.u64()
    log = reader.u64()
    guard flags & ~Self.logFlag == 0 else { throw .invalidValue(field: "vring address flags", value: UInt64(flags)) }
  }

  public var encoded: [UInt8] {
    var writer = WireWriter()
    writer.u32(index)
    writer.u32(flags)
    writer.u64(descriptorTable)
    writer.u64(usedRing)
    writer.u64(availableRing)
    writer.u64(log)
    return writer.bytes
  }
}

/// Which ring a kick, call or err descriptor is for, and whether one is attached: bits 0 to 7 and bit 8 of a `U64`.
public struct VringEvent: FixedPayload {
  public static let byteCount = 8
  /// `VHOST_USER_VRING_NOFD_MASK`
  static let noDescriptorBit: UInt64 = 1 << 8

  public var index: UInt8
  /// False: the ring is polled, or the descriptor taken away.
  public var carriesDescriptor: Bool

  public init(index: UInt8, carriesDescriptor: Bool) {
    self.index = index
    self.carriesDescriptor = carriesDescriptor
  }

  public init(decoding bytes: some Collection<UInt8>) throws(VhostUserError) {
    var reader = try WireReader(bytes, of: "vring event", exactly: Self.byteCount)
    let value = reader.u64()
    guard value & ~(0xFF | Self.noDescriptorBit) == 0 else { throw .invalidValue(field: "vring event", value: value) }
    index = UInt8(truncatingIfNeeded: value)
    carriesDescriptor = value & Self.noDescriptorBit == 0
  }

  public var encoded: [UInt8] {
    var writer = WireWriter()
    writer.u64(UInt64(index) | (carriesDescriptor ? 0 : Self.noDescriptorBit))
    return writer.bytes
  }
}

/// A part of a ring's doorbell page that the front end may map (`VRING_HOST_NOTIFIER_MSG`).
public struct VringArea: FixedPayload {
  public static let byteCount = 24

  public var event: VringEvent
  /// Bytes.
  public var size: UInt64
  /// Offset into the attached file, bytes.
  public var offset: UInt64

  public init(event: VringEvent, size: UInt64, offset: UInt64) {
    self.event = event
    self.size = size
    self.offset = offset
  }

  public init(decoding bytes: some Collection<UInt8>) throws(VhostUserError) {
    var reader = try WireReader(bytes, of: "vring area", exactly: Self.byteCount)
    event = try VringEvent(decoding: reader.bytes(VringEvent.byteCount))
    size = reader.u64()
    offset = reader.u64()
    try WireRange.check(offset, size, "vring area offset")
  }

  public var encoded: [UInt8] {
    var writer = WireWriter()
    writer.bytes = event.encoded
    writer.u64(size)
    writer.u64(offset)
    return writer.bytes
  }
}
