import DiskImage
import VirtioQueue
import VirtioSpec

/// What a request has to be measured against.
struct BlockLimits: Sendable {
  /// Sectors of 512 bytes.
  var capacity: UInt64
  var isReadOnly: Bool
  /// Whether the driver may use the request at all; else it is unsupported.
  var allowsDiscard = false
  var allowsWriteZeroes = false
  var allowsSecureErase = false
  var allowsLifetime = false

  /// Most sectors of one range: 2 GiB, so that one request cannot keep the storage busy for ever.
  static let greatestRange: UInt32 = 1 << 22
  /// Most ranges of one request.
  static let greatestRangeCount = 16

  /// Whether `sectorCount` sectors from `sector` on lie inside the disk.
  @inline(__always)
  func contains(_ sector: UInt64, _ sectorCount: UInt64) -> Bool {
    sectorCount <= capacity && sector <= capacity - sectorCount
  }
}

/// A request as the driver meant it: its chain read once, its numbers checked against the disk. What is left of the chain
/// is the data: `chain.writable` of a read, `chain.readable` of a write or a list of ranges.
enum BlockRequest: Equatable {
  /// From `sector` on, as many bytes as there is room in the chain (a multiple of 512).
  case read(sector: UInt64)
  case write(sector: UInt64)
  case flush
  case getID
  case getLifetime
  /// So many ranges follow in the chain.
  case ranges(RangeKind, count: Int)
  /// To be answered at once, because something is wrong with it.
  case refused(BlockStatus)

  /// Data of the disk travels with it.
  @inline(__always)
  var hasData: Bool {
    switch self {
    case .read, .write: true
    default: false
    }
  }

  /// Takes the header off the chain. The status byte was taken off before.
  @inline(__always)
  static func take(from chain: inout DescriptorChain, _ limits: BlockLimits) -> BlockRequest {
    guard let header = chain.takeReadable(BlockRequestHeader.self) else { return .refused(.ioError) }
    switch header.type {
    case .read:
      guard isInside(header.sector, chain.writableByteCount, limits) else { return .refused(.ioError) }
      return .read(sector: header.sector)
    case .write:
      guard !limits.isReadOnly, isInside(header.sector, chain.readableByteCount, limits) else { return .refused(.ioError) }
      return .write(sector: header.sector)
    case .flush: return .flush
    case .getID: return .getID
    case .getLifetime:
      guard limits.allowsLifetime else { return .refused(.unsupported) }
      return chain.writableByteCount >= BlockSpec.lifetimeByteCount ? .getLifetime : .refused(.ioError)
    case .discard: return ranges(.discard, limits.allowsDiscard, chain.readableByteCount, limits)
    case .writeZeroes: return ranges(.zero, limits.allowsWriteZeroes, chain.readableByteCount, limits)
    case .secureErase: return ranges(.secureErase, limits.allowsSecureErase, chain.readableByteCount, limits)
    default: return .refused(.unsupported)
    }
  }

  @inline(__always)
  private static func isInside(_ sector: UInt64, _ byteCount: Int, _ limits: BlockLimits) -> Bool {
    byteCount & 511 == 0 && limits.contains(sector, UInt64(byteCount) >> 9)
  }

  private static func ranges(_ kind: RangeKind, _ isAllowed: Bool, _ byteCount: Int, _ limits: BlockLimits) -> BlockRequest {
    guard isAllowed else { return .refused(.unsupported) }
    let (count, rest) = byteCount.quotientAndRemainder(dividingBy: BlockRangeSegment.byteCount)
    guard !limits.isReadOnly, rest == 0, (1...BlockLimits.greatestRangeCount).contains(count) else { return .refused(.ioError) }
    return .ranges(kind, count: count)
  }
}

/// What is done with a list of ranges.
enum RangeKind: UInt8, Sendable {
  case discard, zero, secureErase
}

extension BlockRangeSegment {
  /// What the range asks for, in bytes, or the status that refuses it.
  func checked(_ kind: RangeKind, _ limits: BlockLimits) -> Result<StorageRequest, RangeRefusal> {
    // A write of zeroes has one flag, the others none; what we do not know we do not do.
    guard flags & ~(kind == .zero ? Self.unmap : 0) == 0 else { return .failure(RangeRefusal(status: .unsupported)) }
    guard sectorCount <= BlockLimits.greatestRange, limits.contains(sector, UInt64(sectorCount)) else {
      return .failure(RangeRefusal(status: .ioError))
    }
    let operation: StorageOperation =
      switch kind {
      case .discard: .discard
      case .zero: flags & Self.unmap != 0 ? .zeroAndUnmap : .zero
      case .secureErase: .secureErase
      }
    // Inside the disk, whose size in bytes fits 63 bits: the products cannot overflow.
    return .success(StorageRequest(operation, offset: sector * 512, byteCount: UInt64(sectorCount) * 512))
  }
}

struct RangeRefusal: Error, Equatable {
  let status: BlockStatus
}
