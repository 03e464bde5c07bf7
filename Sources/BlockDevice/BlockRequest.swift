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
  /// So many ranges follow in the chain.
  case discard(rangeCount: Int)
  case writeZeroes(rangeCount: Int)
  /// To be answered at once, because something is wrong with it.
  case refused(BlockStatus)

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
    case .discard:
      guard limits.allowsDiscard else { return .refused(.unsupported) }
      return ranges(chain.readableByteCount, limits).map { .discard(rangeCount: $0) } ?? .refused(.ioError)
    case .writeZeroes:
      guard limits.allowsWriteZeroes else { return .refused(.unsupported) }
      return ranges(chain.readableByteCount, limits).map { .writeZeroes(rangeCount: $0) } ?? .refused(.ioError)
    default: return .refused(.unsupported)
    }
  }

  @inline(__always)
  private static func isInside(_ sector: UInt64, _ byteCount: Int, _ limits: BlockLimits) -> Bool {
    byteCount & 511 == 0 && limits.contains(sector, UInt64(byteCount) >> 9)
  }

  private static func ranges(_ byteCount: Int, _ limits: BlockLimits) -> Int? {
    let (count, rest) = byteCount.quotientAndRemainder(dividingBy: BlockRangeSegment.byteCount)
    guard !limits.isReadOnly, rest == 0, (1...BlockLimits.greatestRangeCount).contains(count) else { return nil }
    return count
  }
}

extension BlockRangeSegment {
  /// What the range asks for, in bytes, or the status that refuses it.
  func checked(zeroing: Bool, _ limits: BlockLimits) -> Result<StorageRequest, RangeRefusal> {
    // A discard has no flags, a write of zeroes has one; what we do not know we do not do.
    guard flags & ~(zeroing ? Self.unmap : 0) == 0 else { return .failure(RangeRefusal(status: .unsupported)) }
    guard sectorCount <= BlockLimits.greatestRange, limits.contains(sector, UInt64(sectorCount)) else {
      return .failure(RangeRefusal(status: .ioError))
    }
    let operation: StorageOperation = !zeroing ? .discard : flags & Self.unmap != 0 ? .zeroAndUnmap : .zero
    // Inside the disk, whose size in bytes fits 63 bits: the products cannot overflow.
    return .success(StorageRequest(operation, offset: sector * 512, byteCount: UInt64(sectorCount) * 512))
  }
}

struct RangeRefusal: Error, Equatable {
  let status: BlockStatus
}
