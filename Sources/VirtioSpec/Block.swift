// Block device (virtio 1.4, section 5.2; linux/virtio_blk.h).

/// Configuration space of a block device, `struct virtio_blk_config`.
///
/// A field is meaningful only with its feature; without it, leave it zero.
public struct BlockConfiguration: Hashable, Sendable {
  /// Bytes of the whole structure.
  @inlinable public static var byteCount: Int { 96 }
  /// Bytes that every device may have: to the end of the fields for write-zeroes.
  @inlinable public static var commonByteCount: Int { 60 }
  /// Features whose fields lie behind those, and where these fields end.
  public static var growth: [(feature: FeatureSet, byteCount: Int)] { [(.blockSecureErase, 72), (.blockZoned, 96)] }

  /// Byte offsets of the fields.
  public enum Offset {
    @inlinable public static var capacity: Int { 0 }
    @inlinable public static var sizeMax: Int { 8 }
    @inlinable public static var segmentMax: Int { 12 }
    @inlinable public static var cylinders: Int { 16 }
    @inlinable public static var heads: Int { 18 }
    @inlinable public static var sectors: Int { 19 }
    @inlinable public static var blockSize: Int { 20 }
    @inlinable public static var physicalBlockExponent: Int { 24 }
    @inlinable public static var alignmentOffset: Int { 25 }
    @inlinable public static var minimumIOSize: Int { 26 }
    @inlinable public static var optimalIOSize: Int { 28 }
    @inlinable public static var writeback: Int { 32 }
    @inlinable public static var queueCount: Int { 34 }
    @inlinable public static var maxDiscardSectors: Int { 36 }
    @inlinable public static var maxDiscardSegments: Int { 40 }
    @inlinable public static var discardSectorAlignment: Int { 44 }
    @inlinable public static var maxWriteZeroesSectors: Int { 48 }
    @inlinable public static var maxWriteZeroesSegments: Int { 52 }
    @inlinable public static var writeZeroesMayUnmap: Int { 56 }
    @inlinable public static var maxSecureEraseSectors: Int { 60 }
    @inlinable public static var maxSecureEraseSegments: Int { 64 }
    @inlinable public static var secureEraseSectorAlignment: Int { 68 }
    @inlinable public static var zoneSectors: Int { 72 }
    @inlinable public static var maxOpenZones: Int { 76 }
    @inlinable public static var maxActiveZones: Int { 80 }
    @inlinable public static var maxAppendSectors: Int { 84 }
    @inlinable public static var zoneWriteGranularity: Int { 88 }
    @inlinable public static var zoneModel: Int { 92 }
  }

  /// Size in sectors of 512 bytes, whatever `blk_size` says.
  public var capacity: UInt64 = 0
  /// `size_max`: most bytes of one segment (`blockSizeMax`).
  public var sizeMax: UInt32 = 0
  /// `seg_max`: most data segments of one request (`blockSegMax`).
  public var segmentMax: UInt32 = 0
  /// Geometry (`blockGeometry`).
  public var cylinders: UInt16 = 0
  /// Geometry.
  public var heads: UInt8 = 0
  /// Geometry: sectors per track.
  public var sectors: UInt8 = 0
  /// `blk_size`: logical block in bytes (`blockBlockSize`).
  public var blockSize: UInt32 = 0
  /// Logical blocks per physical block, log2 (`blockTopology`).
  public var physicalBlockExponent: UInt8 = 0
  /// Offset of the first aligned logical block.
  public var alignmentOffset: UInt8 = 0
  /// `min_io_size` in logical blocks.
  public var minimumIOSize: UInt16 = 0
  /// `opt_io_size` in logical blocks.
  public var optimalIOSize: UInt32 = 0
  /// 1 write-back, 0 write-through (`blockConfigWriteCache`); the one field a driver may write.
  public var writeback: UInt8 = 0
  /// `num_queues` (`blockMultipleQueues`).
  public var queueCount: UInt16 = 0
  /// Most sectors of one discard segment (`blockDiscard`).
  public var maxDiscardSectors: UInt32 = 0
  /// `max_discard_seg`
  public var maxDiscardSegments: UInt32 = 0
  /// In sectors of 512 bytes.
  public var discardSectorAlignment: UInt32 = 0
  /// Most sectors of one write-zeroes segment (`blockWriteZeroes`).
  public var maxWriteZeroesSectors: UInt32 = 0
  /// `max_write_zeroes_seg`
  public var maxWriteZeroesSegments: UInt32 = 0
  /// 1 if write-zeroes may give storage back.
  public var writeZeroesMayUnmap: UInt8 = 0
  /// (`blockSecureErase`)
  public var maxSecureEraseSectors: UInt32 = 0
  /// `max_secure_erase_seg`
  public var maxSecureEraseSegments: UInt32 = 0
  /// In sectors of 512 bytes.
  public var secureEraseSectorAlignment: UInt32 = 0
  /// (`blockZoned`)
  public var zoneSectors: UInt32 = 0
  /// `max_open_zones`
  public var maxOpenZones: UInt32 = 0
  /// `max_active_zones`
  public var maxActiveZones: UInt32 = 0
  /// `max_append_sectors`
  public var maxAppendSectors: UInt32 = 0
  /// `write_granularity` in bytes.
  public var zoneWriteGranularity: UInt32 = 0
  /// 0 none, 1 host-managed, 2 host-aware.
  public var zoneModel: UInt8 = 0

  public init() {}

  /// The fields from the start of `bytes`. A field that does not fit is zero: a peer may know a shorter structure.
  public init(decoding bytes: [UInt8]) {
    var whole = Array(bytes.prefix(Self.byteCount))
    whole.append(contentsOf: repeatElement(0, count: Self.byteCount - whole.count))
    capacity = LittleEndian.load(from: whole, at: Offset.capacity)
    sizeMax = LittleEndian.load(from: whole, at: Offset.sizeMax)
    segmentMax = LittleEndian.load(from: whole, at: Offset.segmentMax)
    cylinders = LittleEndian.load(from: whole, at: Offset.cylinders)
    heads = LittleEndian.load(from: whole, at: Offset.heads)
    sectors = LittleEndian.load(from: whole, at: Offset.sectors)
    blockSize = LittleEndian.load(from: whole, at: Offset.blockSize)
    physicalBlockExponent = LittleEndian.load(from: whole, at: Offset.physicalBlockExponent)
    alignmentOffset = LittleEndian.load(from: whole, at: Offset.alignmentOffset)
    minimumIOSize = LittleEndian.load(from: whole, at: Offset.minimumIOSize)
    optimalIOSize = LittleEndian.load(from: whole, at: Offset.optimalIOSize)
    writeback = LittleEndian.load(from: whole, at: Offset.writeback)
    queueCount = LittleEndian.load(from: whole, at: Offset.queueCount)
    maxDiscardSectors = LittleEndian.load(from: whole, at: Offset.maxDiscardSectors)
    maxDiscardSegments = LittleEndian.load(from: whole, at: Offset.maxDiscardSegments)
    discardSectorAlignment = LittleEndian.load(from: whole, at: Offset.discardSectorAlignment)
    maxWriteZeroesSectors = LittleEndian.load(from: whole, at: Offset.maxWriteZeroesSectors)
    maxWriteZeroesSegments = LittleEndian.load(from: whole, at: Offset.maxWriteZeroesSegments)
    writeZeroesMayUnmap = LittleEndian.load(from: whole, at: Offset.writeZeroesMayUnmap)
    maxSecureEraseSectors = LittleEndian.load(from: whole, at: Offset.maxSecureEraseSectors)
    maxSecureEraseSegments = LittleEndian.load(from: whole, at: Offset.maxSecureEraseSegments)
    secureEraseSectorAlignment = LittleEndian.load(from: whole, at: Offset.secureEraseSectorAlignment)
    zoneSectors = LittleEndian.load(from: whole, at: Offset.zoneSectors)
    maxOpenZones = LittleEndian.load(from: whole, at: Offset.maxOpenZones)
    maxActiveZones = LittleEndian.load(from: whole, at: Offset.maxActiveZones)
    maxAppendSectors = LittleEndian.load(from: whole, at: Offset.maxAppendSectors)
    zoneWriteGranularity = LittleEndian.load(from: whole, at: Offset.zoneWriteGranularity)
    zoneModel = LittleEndian.load(from: whole, at: Offset.zoneModel)
  }

  /// `byteCount` bytes, little-endian, padding zero.
  public func encoded() -> [UInt8] {
    var bytes = [UInt8](repeating: 0, count: Self.byteCount)
    LittleEndian.store(capacity, to: &bytes, at: Offset.capacity)
    LittleEndian.store(sizeMax, to: &bytes, at: Offset.sizeMax)
    LittleEndian.store(segmentMax, to: &bytes, at: Offset.segmentMax)
    LittleEndian.store(cylinders, to: &bytes, at: Offset.cylinders)
    LittleEndian.store(heads, to: &bytes, at: Offset.heads)
    LittleEndian.store(sectors, to: &bytes, at: Offset.sectors)
    LittleEndian.store(blockSize, to: &bytes, at: Offset.blockSize)
    LittleEndian.store(physicalBlockExponent, to: &bytes, at: Offset.physicalBlockExponent)
    LittleEndian.store(alignmentOffset, to: &bytes, at: Offset.alignmentOffset)
    LittleEndian.store(minimumIOSize, to: &bytes, at: Offset.minimumIOSize)
    LittleEndian.store(optimalIOSize, to: &bytes, at: Offset.optimalIOSize)
    LittleEndian.store(writeback, to: &bytes, at: Offset.writeback)
    LittleEndian.store(queueCount, to: &bytes, at: Offset.queueCount)
    LittleEndian.store(maxDiscardSectors, to: &bytes, at: Offset.maxDiscardSectors)
    LittleEndian.store(maxDiscardSegments, to: &bytes, at: Offset.maxDiscardSegments)
    LittleEndian.store(discardSectorAlignment, to: &bytes, at: Offset.discardSectorAlignment)
    LittleEndian.store(maxWriteZeroesSectors, to: &bytes, at: Offset.maxWriteZeroesSectors)
    LittleEndian.store(maxWriteZeroesSegments, to: &bytes, at: Offset.maxWriteZeroesSegments)
    LittleEndian.store(writeZeroesMayUnmap, to: &bytes, at: Offset.writeZeroesMayUnmap)
    LittleEndian.store(maxSecureEraseSectors, to: &bytes, at: Offset.maxSecureEraseSectors)
    LittleEndian.store(maxSecureEraseSegments, to: &bytes, at: Offset.maxSecureEraseSegments)
    LittleEndian.store(secureEraseSectorAlignment, to: &bytes, at: Offset.secureEraseSectorAlignment)
    LittleEndian.store(zoneSectors, to: &bytes, at: Offset.zoneSectors)
    LittleEndian.store(maxOpenZones, to: &bytes, at: Offset.maxOpenZones)
    LittleEndian.store(maxActiveZones, to: &bytes, at: Offset.maxActiveZones)
    LittleEndian.store(maxAppendSectors, to: &bytes, at: Offset.maxAppendSectors)
    LittleEndian.store(zoneWriteGranularity, to: &bytes, at: Offset.zoneWriteGranularity)
    LittleEndian.store(zoneModel, to: &bytes, at: Offset.zoneModel)
    return bytes
  }
}

/// The readable start of every block request, `struct virtio_blk_outhdr`. Memory layout is that of the specification.
public struct BlockRequestHeader: Hashable, Sendable {
  @inlinable public static var byteCount: Int { 16 }

  public var type: BlockRequestType
  /// Priority in legacy devices; ignored.
  public var reserved: UInt32
  /// First sector of 512 bytes; 0 for requests that have none.
  public var sector: UInt64

  @inlinable
  public init(type: BlockRequestType = .read, sector: UInt64 = 0) {
    self.type = type
    self.reserved = 0
    self.sector = sector
  }
}

/// What a block request asks for, `VIRTIO_BLK_T_*`. Any 32-bit value may arrive.
public struct BlockRequestType: RawRepresentable, Hashable, Sendable {
  public var rawValue: UInt32
  @inlinable
  public init(rawValue: UInt32) { self.rawValue = rawValue }

  /// `VIRTIO_BLK_T_IN`: data is writable by the device, a multiple of 512 bytes.
  @inlinable public static var read: BlockRequestType { BlockRequestType(rawValue: 0) }
  /// `VIRTIO_BLK_T_OUT`
  @inlinable public static var write: BlockRequestType { BlockRequestType(rawValue: 1) }
  @inlinable public static var flush: BlockRequestType { BlockRequestType(rawValue: 4) }
  /// `VIRTIO_BLK_T_GET_ID`: `BlockSpec.idByteCount` writable bytes.
  @inlinable public static var getID: BlockRequestType { BlockRequestType(rawValue: 8) }
  @inlinable public static var getLifetime: BlockRequestType { BlockRequestType(rawValue: 10) }
  @inlinable public static var discard: BlockRequestType { BlockRequestType(rawValue: 11) }
  @inlinable public static var writeZeroes: BlockRequestType { BlockRequestType(rawValue: 13) }
  @inlinable public static var secureErase: BlockRequestType { BlockRequestType(rawValue: 14) }
  @inlinable public static var zoneAppend: BlockRequestType { BlockRequestType(rawValue: 15) }
  @inlinable public static var zoneReport: BlockRequestType { BlockRequestType(rawValue: 16) }
  @inlinable public static var zoneOpen: BlockRequestType { BlockRequestType(rawValue: 18) }
  @inlinable public static var zoneClose: BlockRequestType { BlockRequestType(rawValue: 20) }
  @inlinable public static var zoneFinish: BlockRequestType { BlockRequestType(rawValue: 22) }
  @inlinable public static var zoneReset: BlockRequestType { BlockRequestType(rawValue: 24) }
  @inlinable public static var zoneResetAll: BlockRequestType { BlockRequestType(rawValue: 26) }
}

/// The last writable byte of a block request, `VIRTIO_BLK_S_*`.
public enum BlockStatus: UInt8, Sendable {
  case ok = 0
  case ioError = 1
  case unsupported = 2
  case zoneInvalidCommand = 3
  case zoneUnalignedWritePointer = 4
  case zoneOpenResource = 5
  case zoneActiveResource = 6
}

/// One range of a discard, write-zeroes or secure-erase request, `struct virtio_blk_discard_write_zeroes`. Memory
/// layout is that of the specification.
public struct BlockRangeSegment: Hashable, Sendable {
  @inlinable public static var byteCount: Int { 16 }
  /// Bit 0 of `flags`: storage may be given back.
  @inlinable public static var unmap: UInt32 { 1 }

  public var sector: UInt64
  public var sectorCount: UInt32
  public var flags: UInt32

  @inlinable
  public init(sector: UInt64 = 0, sectorCount: UInt32 = 0, flags: UInt32 = 0) {
    self.sector = sector
    self.sectorCount = sectorCount
    self.flags = flags
  }
}

/// Fixed sizes of the block device.
public enum BlockSpec {
  /// The unit of `capacity` and of every sector number.
  @inlinable public static var sectorByteCount: Int { 512 }
  /// Bytes of a GET_ID answer: ASCII, padded with NUL, without terminator when full.
  @inlinable public static var idByteCount: Int { 20 }
  /// Bytes of a GET_LIFETIME answer: three 16-bit numbers.
  @inlinable public static var lifetimeByteCount: Int { 6 }
}
