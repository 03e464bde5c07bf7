/// A piece of the device's configuration space (`GET_CONFIG`, `SET_CONFIG`): 12 bytes, then the piece.
public struct ConfigMessage: Equatable, Sendable {
  public static let headByteCount = 12
  /// The configuration space we speak of; QEMU, libvhost-user and DPDK have the same limit.
  public static let maximumSpace = 256

  public var offset: UInt32
  /// In `SET_CONFIG`: 0 a guest's write, 1 a migration's; see "config flags" in `protocol/vhost-user.md`.
  public var flags: UInt32
  public var bytes: [UInt8]

  public init(offset: UInt32, flags: UInt32 = 0, bytes: [UInt8]) {
    self.offset = offset
    self.flags = flags
    self.bytes = bytes
  }

  /// Fails unless the size field equals the bytes that follow and the piece lies within `maximumSpace`. A piece of no
  /// bytes is well formed: as an answer it means failure.
  public init(decoding payload: some Collection<UInt8>) throws(VhostUserError) {
    guard payload.count >= Self.headByteCount else {
      throw .wrongSize(of: "config message", expected: Self.headByteCount, actual: payload.count)
    }
    var reader = try WireReader(payload.prefix(Self.headByteCount), of: "config message", exactly: Self.headByteCount)
    offset = reader.u32()
    let size = reader.u32()
    flags = reader.u32()
    let (end, overflow) = offset.addingReportingOverflow(size)
    guard !overflow, end <= UInt32(Self.maximumSpace) else { throw .invalidValue(field: "config range", value: UInt64(offset)) }
    guard payload.count == Self.headByteCount + Int(size) else {
      throw .wrongSize(of: "config message", expected: Self.headByteCount + Int(size), actual: payload.count)
    }
    guard flags <= 3 else { throw .invalidValue(field: "config flags", value: UInt64(flags)) }
    bytes = Array(payload.dropFirst(Self.headByteCount))
  }

  public var encoded: [UInt8] {
    var writer = WireWriter()
    writer.u32(offset)
    writer.u32(UInt32(bytes.count))
    writer.u32(flags)
    writer.bytes += bytes
    return writer.bytes
  }
}

/// The area in which a back end records requests in flight (`GET_INFLIGHT_FD`, `SET_INFLIGHT_FD`). 24 bytes on the wire,
/// the last four of them padding.
public struct InflightDescription: FixedPayload {
  public static let byteCount = 24

  /// Bytes of the area. In a request for one: 0. In the answer, 0 means there is none.
  public var size: UInt64
  public var mapOffset: UInt64
  public var queueCount: UInt16
  public var queueSize: UInt16

  public init(size: UInt64 = 0, mapOffset: UInt64 = 0, queueCount: UInt16, queueSize: UInt16) {
    self.size = size
    self.mapOffset = mapOffset
    self.queueCount = queueCount
    self.queueSize = queueSize
  }

  public init(decoding bytes: some Collection<UInt8>) throws(VhostUserError) {
    var reader = try WireReader(bytes, of: "inflight description", exactly: Self.byteCount)
    size = reader.u64()
    mapOffset = reader.u64()
    queueCount = reader.u16()
    queueSize = reader.u16()
    try WireRange.checkFile(mapOffset, size, "inflight map offset")
  }

  public var encoded: [UInt8] {
    var writer = WireWriter()
    writer.u64(size)
    writer.u64(mapOffset)
    writer.u16(queueCount)
    writer.u16(queueSize)
    writer.zeros(4)
    return writer.bytes
  }
}

/// The name of a shared object: a UUID, sent as its 16 bytes with the first three fields big-endian.
public struct SharedObjectName: FixedPayload {
  public static let byteCount = 16

  public var bytes: [UInt8]

  /// Precondition: 16 bytes.
  public init(_ bytes: [UInt8]) {
    precondition(bytes.count == Self.byteCount, "A UUID has 16 bytes")
    self.bytes = bytes
  }

  public init(decoding bytes: some Collection<UInt8>) throws(VhostUserError) {
    var reader = try WireReader(bytes, of: "shared object name", exactly: Self.byteCount)
    self.bytes = reader.bytes(Self.byteCount)
    guard self.bytes.contains(where: { $0 != 0 }) else { throw .invalidValue(field: "shared object name", value: 0) }
    guard self.bytes.contains(where: { $0 != 0xFF }) else { throw .invalidValue(field: "shared object name", value: .max) }
  }

  public var encoded: [UInt8] { bytes }
}

/// Which way the device's state goes, and in which phase (`SET_DEVICE_STATE_FD`).
public struct DeviceStateTransfer: FixedPayload {
  public static let byteCount = 8

  public enum Direction: UInt32, Sendable { case save = 0, load }

  public var direction: Direction
  /// Only phase 0, device stopped, exists.
  public init(direction: Direction) { self.direction = direction }

  public init(decoding bytes: some Collection<UInt8>) throws(VhostUserError) {
    var reader = try WireReader(bytes, of: "device state transfer", exactly: Self.byteCount)
    let number = reader.u32()
    let phase = reader.u32()
    guard let direction = Direction(rawValue: number) else {
      throw .invalidValue(field: "device state direction", value: UInt64(number))
    }
    guard phase == 0 else { throw .invalidValue(field: "device state phase", value: UInt64(phase)) }
    self.direction = direction
  }

  public var encoded: [UInt8] {
    var writer = WireWriter()
    writer.u32(direction.rawValue)
    writer.u32(0)
    return writer.bytes
  }
}

/// The shared memory regions of a device (`GET_SHMEM_CONFIG`): 256 sizes by region id, 0 for an id that is not used.
public struct SharedMemoryConfiguration: FixedPayload {
  public static let byteCount = 2056

  /// Bytes by region id; always 256 entries.
  public let sizes: [UInt64]

  /// Precondition: at most 256 sizes; the rest is zero.
  public init(sizes: [UInt64]) {
    precondition(sizes.count <= 256, "There are at most 256 shared memory regions")
    self.sizes = sizes + Array(repeating: 0, count: 256 - sizes.count)
  }

  /// Fails when the count on the wire is not the number of sizes that are not zero.
  public init(decoding bytes: some Collection<UInt8>) throws(VhostUserError) {
    var reader = try WireReader(bytes, of: "shared memory configuration", exactly: Self.byteCount)
    let count = reader.u32()
    reader.skip(4)
    var sizes: [UInt64] = []
    for _ in 0..<256 { sizes.append(reader.u64()) }
    self.sizes = sizes
    guard sizes.count(where: { $0 != 0 }) == Int(count) else {
      throw .invalidValue(field: "shared memory region count", value: UInt64(count))
    }
  }

  public var encoded: [UInt8] {
    var writer = WireWriter()
    writer.u32(UInt32(sizes.count(where: { $0 != 0 })))
    writer.zeros(4)
    for size in sizes { writer.u64(size) }
    return writer.bytes
  }
}

/// A payload that is one 64-bit number.
enum NumberPayload {
  static func decode(_ bytes: some Collection<UInt8>, of what: String) throws(VhostUserError) -> UInt64 {
    var reader = try WireReader(bytes, of: what, exactly: 8)
    return reader.u64()
  }

  static func encode(_ value: UInt64) -> [UInt8] {
    var writer = WireWriter()
    writer.u64(value)
    return writer.bytes
  }
}
