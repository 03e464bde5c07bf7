/// One region of guest memory as the front end describes it: where it is for the guest, where for the front end, and
/// where in the file that is attached.
public struct RegionDescription: Equatable, Sendable {
  /// Bytes of a region on the wire; with `XEN_MMAP` eight more.
  public static let byteCount = 32
  public static let xenByteCount = 40

  public var guestAddress: UInt64
  /// Bytes; never zero.
  public var size: UInt64
  /// The front end's own virtual address of the region; ring addresses are given in this space.
  public var userAddress: UInt64
  /// Where the region begins in the attached file, bytes.
  public var mapOffset: UInt64
  /// Only with `XEN_MMAP`.
  public var xen: XenMapping?

  public struct XenMapping: Equatable, Sendable {
    /// Bit 0 foreign, bit 1 grant, bit 8 no advance map.
    public var flags: UInt32
    public var domain: UInt32

    public init(flags: UInt32, domain: UInt32) {
      self.flags = flags
      self.domain = domain
    }
  }

  public init(guestAddress: UInt64, size: UInt64, userAddress: UInt64, mapOffset: UInt64, xen: XenMapping? = nil) {
    self.guestAddress = guestAddress
    self.size = size
    self.userAddress = userAddress
    self.mapOffset = mapOffset
    self.xen = xen
  }

  init(_ reader: inout WireReader, xen: Bool) throws(VhostUserError) {
    guestAddress = reader.u64()
    size = reader.u64()
    userAddress = reader.u64()
    mapOffset = reader.u64()
    self.xen = xen ? XenMapping(flags: reader.u32(), domain: reader.u32()) : nil
    guard size != 0 else { throw .invalidValue(field: "region size", value: 0) }
    try WireRange.check(guestAddress, size, "region guest address")
    try WireRange.check(userAddress, size, "region user address")
    try WireRange.checkFile(mapOffset, size, "region map offset")
    if let mapping = self.xen, mapping.flags & ~0x103 != 0 {
      throw .invalidValue(field: "region Xen flags", value: UInt64(mapping.flags))
    }
  }

  func write(to writer: inout WireWriter) {
    writer.u64(guestAddress)
    writer.u64(size)
    writer.u64(userAddress)
    writer.u64(mapOffset)
    if let xen {
      writer.u32(xen.flags)
      writer.u32(xen.domain)
    }
  }

  /// Whether `REM_MEM_REG` with `other` means this region: the map offset is not looked at.
  public func isSameRegion(as other: RegionDescription) -> Bool {
    guestAddress == other.guestAddress && userAddress == other.userAddress && size == other.size
  }

  /// Whether the two share a guest address or a user address.
  ///
  /// Precondition: both were decoded or checked, so that the sums do not overflow.
  public func overlaps(_ other: RegionDescription) -> Bool {
    let inGuest = guestAddress < other.guestAddress + other.size && other.guestAddress < guestAddress + size
    let inUser = userAddress < other.userAddress + other.size && other.userAddress < userAddress + size
    return inGuest || inUser
  }
}

/// The whole memory table (`SET_MEM_TABLE`); one descriptor per region, in the same order. It may be empty.
public struct RegionTable: Equatable, Sendable {
  /// What the specification allows, and what our front end sends.
  public static let baselineCount = 8
  /// What our back end accepts; some front ends send more than eight.
  public static let maximumCount = 32

  public var regions: [RegionDescription]

  public init(regions: [RegionDescription]) { self.regions = regions }

  public init(decoding bytes: some Collection<UInt8>, xen: Bool = false) throws(VhostUserError) {
    guard bytes.count >= 8 else { throw .wrongSize(of: "memory table", expected: 8, actual: bytes.count) }
    var head = try WireReader(bytes.prefix(8), of: "memory table", exactly: 8)
    let count = head.u32()
    let padding = head.u32()
    guard count <= UInt32(Self.maximumCount) else {
      throw .invalidValue(field: "region count", value: UInt64(count))
    }
    guard padding == 0 else { throw .invalidValue(field: "memory table padding", value: UInt64(padding)) }
    let size = Int(count) * (xen ? RegionDescription.xenByteCount : RegionDescription.byteCount)
    guard bytes.count == 8 + size else { throw .wrongSize(of: "memory table", expected: 8 + size, actual: bytes.count) }
    var reader = try WireReader(bytes.dropFirst(8), of: "memory table", exactly: size)
    regions = []
    for _ in 0..<count {
      let region = try RegionDescription(&reader, xen: xen)
      guard !regions.contains(where: { $0.overlaps(region) }) else {
        throw .overlappingRegions(at: region.guestAddress)
      }
      regions.append(region)
    }
  }

  public var encoded: [UInt8] {
    var writer = WireWriter()
    writer.u32(UInt32(regions.count))
    writer.u32(0)
    for region in regions { region.write(to: &writer) }
    return writer.bytes
  }
}

/// One region (`ADD_MEM_REG`, `REM_MEM_REG`): eight bytes of padding, then the region. The padding is not looked at.
public struct SingleRegion: Equatable, Sendable {
  public var region: RegionDescription

  public init(_ region: RegionDescription) { self.region = region }

  public init(decoding bytes: some Collection<UInt8>, xen: Bool = false) throws(VhostUserError) {
    let size = 8 + (xen ? RegionDescription.xenByteCount : RegionDescription.byteCount)
    var reader = try WireReader(bytes, of: "memory region", exactly: size)
    reader.skip(8)
    region = try RegionDescription(&reader, xen: xen)
  }

  public var encoded: [UInt8] {
    var writer = WireWriter()
    writer.u64(0)
    region.write(to: &writer)
    return writer.bytes
  }
}

/// The dirty log in the attached file (`SET_LOG_BASE` with `LOG_SHMFD`).
public struct LogDescription: FixedPayload {
  public static let byteCount = 16
  /// Bytes; never zero.
  public var size: UInt64
  public var mapOffset: UInt64

  public init(size: UInt64, mapOffset: UInt64) {
    self.size = size
    self.mapOffset = mapOffset
  }

  public init(decoding bytes: some Collection<UInt8>) throws(VhostUserError) {
    var reader = try WireReader(bytes, of: "log description", exactly: Self.byteCount)
    size = reader.u64()
    mapOffset = reader.u64()
    guard size != 0 else { throw .invalidValue(field: "log size", value: 0) }
    try WireRange.checkFile(mapOffset, size, "log map offset")
  }

  public var encoded: [UInt8] {
    var writer = WireWriter()
    writer.u64(size)
    writer.u64(mapOffset)
    return writer.bytes
  }
}

/// An IOTLB entry or a question about one. 32 bytes on the wire: the six after `kind` are padding that is sent.
public struct IOTLBMessage: FixedPayload {
  public static let byteCount = 32

  public enum Kind: UInt8, Sendable { case miss = 1, update, invalidate, accessFail }

  public var iova: UInt64
  public var size: UInt64
  /// A user address of the front end.
  public var userAddress: UInt64
  /// Bit 0 read, bit 1 write.
  public var permission: UInt8
  public var kind: Kind

  public init(iova: UInt64, size: UInt64, userAddress: UInt64, permission: UInt8, kind: Kind) {
    self.iova = iova
    self.size = size
    self.userAddress = userAddress
    self.permission = permission
    self.kind = kind
  }

  public init(decoding bytes: some Collection<UInt8>) throws(VhostUserError) {
    var reader = try WireReader(bytes, of: "IOTLB message", exactly: Self.byteCount)
    iova = reader.u64()
    size = reader.u64()
    userAddress = reader.u64()
    permission = reader.u8()
    let type = reader.u8()
    guard permission <= 3 else { throw .invalidValue(field: "IOTLB permission", value: UInt64(permission)) }
    guard let kind = Kind(rawValue: type) else { throw .invalidValue(field: "IOTLB type", value: UInt64(type)) }
    self.kind = kind
    // A range may end exactly at the top of the address space, so the last byte counts, not the one after it.
    if size > 0 { try WireRange.check(iova, size - 1, "IOTLB address") }
  }

  public var encoded: [UInt8] {
    var writer = WireWriter()
    writer.u64(iova)
    writer.u64(size)
    writer.u64(userAddress)
    writer.u8(permission)
    writer.u8(kind.rawValue)
    writer.zeros(6)
    return writer.bytes
  }
}

/// A range of a shared memory region of the device (`SHMEM_MAP`, `SHMEM_UNMAP`).
public struct SharedMemoryRange: FixedPayload {
  public static let byteCount = 40

  /// Which region of `SharedMemoryConfiguration`.
  public var id: UInt8
  public var fileOffset: UInt64
  /// Offset in the region, bytes.
  public var offset: UInt64
  /// Bytes; never zero.
  public var length: UInt64
  public var writable: Bool

  public init(id: UInt8, fileOffset: UInt64, offset: UInt64, length: UInt64, writable: Bool) {
    self.id = id
    self.fileOffset = fileOffset
    self.offset = offset
    self.length = length
    self.writable = writable
  }

  public init(decoding bytes: some Collection<UInt8>) throws(VhostUserError) {
    var reader = try WireReader(bytes, of: "shared memory range", exactly: Self.byteCount)
    id = reader.u8()
    reader.skip(7)
    fileOffset = reader.u64()
    offset = reader.u64()
    length = reader.u64()
    let flags = reader.u64()
    writable = flags & 1 == 1
    guard flags <= 1 else { throw .invalidValue(field: "shared memory flags", value: flags) }
    guard length != 0 else { throw .invalidValue(field: "shared memory length", value: 0) }
    try WireRange.check(offset, length, "shared memory offset")
    try WireRange.check(fileOffset, length, "shared memory file offset")
  }

  public var encoded: [UInt8] {
    var writer = WireWriter()
    writer.u8(id)
    writer.zeros(7)
    writer.u64(fileOffset)
    writer.u64(offset)
    writer.u64(length)
    writer.u64(writable ? 1 : 0)
    return writer.bytes
  }
}
