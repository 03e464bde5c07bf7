import HostSystem

/// One contiguous range of guest physical memory and where it is mapped in this process.
public struct MemoryRegion: Sendable {
  public let guestAddress: GuestAddress
  /// Bytes; never zero, and `guestAddress + byteCount` does not wrap.
  public let byteCount: UInt64
  /// Where the front end has this region in its own address space: ring addresses on the wire are of this space.
  public let frontEndAddress: UInt64
  /// Offset of the region's first byte in the memory object it was mapped from.
  public let fileOffset: UInt64
  let mapping: MemoryMapping
  let mappingOffset: Int

  /// Describes `byteCount` bytes at `mappingOffset` of a mapping as guest memory.
  public init(
    guestAddress: GuestAddress, byteCount: UInt64, frontEndAddress: UInt64, fileOffset: UInt64, mapping: MemoryMapping,
    mappingOffset: Int = 0
  ) throws(MemoryError) {
    let (guestEnd, guestOverflow) = guestAddress.rawValue.addingReportingOverflow(byteCount)
    let (_, frontEndOverflow) = frontEndAddress.addingReportingOverflow(byteCount)
    let (_, fileOverflow) = fileOffset.addingReportingOverflow(byteCount)
    guard byteCount > 0, !guestOverflow, guestEnd > 0, !frontEndOverflow, !fileOverflow else {
      throw .badRegion(guestAddress: guestAddress, byteCount: byteCount)
    }
    guard let size = Int(exactly: byteCount), mappingOffset >= 0, mappingOffset <= mapping.byteCount,
      size <= mapping.byteCount - mappingOffset
    else { throw .regionLargerThanMapping(guestAddress: guestAddress, byteCount: byteCount, mapped: mapping.byteCount) }
    self.guestAddress = guestAddress
    self.byteCount = byteCount
    self.frontEndAddress = frontEndAddress
    self.fileOffset = fileOffset
    self.mapping = mapping
    self.mappingOffset = mappingOffset
  }

  /// Maps a region received from a front end: the object must be sealed against shrinking (or be allowed not to be) and
  /// large enough, so that no access can end in SIGBUS (security rule for every memory object).
  public static func mapping(
    _ fd: borrowing OwnedFD, guestAddress: GuestAddress, byteCount: UInt64, frontEndAddress: UInt64, fileOffset: UInt64,
    allowUnsealed: Bool
  ) throws(MemoryError) -> MemoryRegion {
    let (fileEnd, overflow) = fileOffset.addingReportingOverflow(byteCount)
    guard !overflow, byteCount > 0 else { throw .badRegion(guestAddress: guestAddress, byteCount: byteCount) }
    let status: FileStatus
    do { status = try fd.status() } catch { throw .system(error) }
    guard status.byteCount >= fileEnd else { throw .objectTooSmall(needed: fileEnd, actual: status.byteCount) }
    if !allowUnsealed {
      guard let seals = SharedMemory.seals(of: fd), seals & 0x0002 != 0 else { throw .notSealed }
    }
    // The map starts at a page of the backing object: 4 KiB, or the huge page size on hugetlbfs.
    let page = UInt64(max(4096, status.kind == .regular ? hugePageSize(status) : 4096))
    let slack = fileOffset % page
    let (padded, overflow2) = (byteCount + slack).addingReportingOverflow(page - 1)
    guard !overflow2, let length = Int(exactly: page == 4096 ? byteCount + slack : padded / page * page) else {
      throw .badRegion(guestAddress: guestAddress, byteCount: byteCount)
    }
    let mapping: MemoryMapping
    do { mapping = try MemoryMapping.shared(fd, offset: fileOffset - slack, byteCount: length) } catch { throw .system(error) }
    return try MemoryRegion(
      guestAddress: guestAddress, byteCount: byteCount, frontEndAddress: frontEndAddress, fileOffset: fileOffset, mapping: mapping,
      mappingOffset: Int(slack))
  }

  private static func hugePageSize(_ status: FileStatus) -> Int {
    // tmpfs and ordinary files report 4 KiB (or an I/O size that is no mapping unit); hugetlbfs reports its page size.
    let size = status.blockSize
    return size >= 2 << 20 && size & (size - 1) == 0 ? size : 4096
  }
}

/// Why guest memory cannot be used.
public enum MemoryError: Error, Sendable, CustomStringConvertible {
  /// A region is empty or its end lies beyond the address space.
  case badRegion(guestAddress: GuestAddress, byteCount: UInt64)
  /// A region is larger than what was mapped for it.
  case regionLargerThanMapping(guestAddress: GuestAddress, byteCount: UInt64, mapped: Int)
  /// Two regions overlap, as guest addresses or as front-end addresses.
  case overlappingRegions(GuestAddress, GuestAddress)
  /// The memory object ends before the region does.
  case objectTooSmall(needed: UInt64, actual: UInt64)
  /// The memory object could be truncated by its other holders (`F_SEAL_SHRINK` is missing).
  case notSealed
  /// The range is not guest memory, wholly or in part.
  case notMemory(GuestAddress, byteCount: UInt64)
  case system(SystemError)

  public var description: String {
    switch self {
    case .badRegion(let address, let count): "Memory region at \(address) of \(count) bytes is empty or wraps around"
    case .regionLargerThanMapping(let address, let count, let mapped):
      "Memory region at \(address) has \(count) bytes, but only \(mapped) are mapped"
    case .overlappingRegions(let a, let b): "Memory regions at \(a) and \(b) overlap"
    case .objectTooSmall(let needed, let actual): "Memory object has \(actual) bytes, \(needed) are needed"
    case .notSealed: "Memory object is not sealed against shrinking; make it with memfd_create and F_SEAL_SHRINK"
    case .notMemory(let address, let count): "Guest range at \(address) of \(count) bytes is not memory"
    case .system(let error): error.description
    }
  }
}
