import CLinux
import HostSystem

/// The memory of one guest as mapped here: an immutable table of regions. A changed memory table is a new `GuestMemory`
/// that shares the mappings both have.
@safe
public final class GuestMemory: @unchecked Sendable {
  // @unchecked: table and mappings never change after init; the bytes behind them are only reached through copies and
  // single loads that tolerate concurrent change.

  /// What the hot path needs of a region.
  @safe @usableFromInline
  struct Entry {
    @usableFromInline let guestStart: UInt64
    @usableFromInline let byteCount: UInt64
    @usableFromInline let frontEndStart: UInt64
    @usableFromInline let base: UnsafeMutableRawPointer
  }

  /// Sorted by guest address.
  public let regions: [MemoryRegion]
  @usableFromInline let table: UnsafeMutablePointer<Entry>
  @usableFromInline let count: Int

  /// - Throws: `overlappingRegions` when two regions overlap as guest or as front-end addresses.
  public init(regions unsorted: [MemoryRegion]) throws(MemoryError) {
    let sorted = unsorted.sorted { $0.guestAddress < $1.guestAddress }
    for (a, b) in zip(sorted, sorted.dropFirst()) where b.guestAddress.rawValue - a.guestAddress.rawValue < a.byteCount {
      throw .overlappingRegions(a.guestAddress, b.guestAddress)
    }
    let byFrontEnd = sorted.sorted { $0.frontEndAddress < $1.frontEndAddress }
    for (a, b) in zip(byFrontEnd, byFrontEnd.dropFirst()) where b.frontEndAddress - a.frontEndAddress < a.byteCount {
      throw .overlappingRegions(a.guestAddress, b.guestAddress)
    }
    regions = sorted
    count = sorted.count
    unsafe table = .allocate(capacity: max(1, sorted.count))
    for (index, region) in sorted.enumerated() {
      // SAFETY: index < capacity; the mapping covers mappingOffset + byteCount (checked by MemoryRegion).
      unsafe (table + index).initialize(
        to: Entry(
          guestStart: region.guestAddress.rawValue, byteCount: region.byteCount, frontEndStart: region.frontEndAddress,
          base: region.mapping.baseAddress + region.mappingOffset))
    }
  }

  deinit { unsafe table.deallocate() }

  /// Bytes in all regions.
  public var byteCount: UInt64 { regions.reduce(0) { $0 &+ $1.byteCount } }

  /// The host address of a whole guest range, or nil when any byte of it is not memory or it crosses a region's end.
  /// The pointer is lent: valid while this object lives, for memory that may change at any time.
  @unsafe @inlinable @inline(__always)
  public func translate(_ address: GuestAddress, byteCount length: UInt64) -> UnsafeMutableRawPointer? {
    for index in 0..<count {
      // SAFETY: index < count entries, initialised in init and never changed.
      let entry = unsafe table[index]
      // Below the region the difference wraps to a huge number and fails the first comparison.
      let offset = address.rawValue &- entry.guestStart
      if offset < entry.byteCount {
        // In this region: whole, or not at all (ranges that cross into a neighbour are split by the caller).
        return unsafe length <= entry.byteCount &- offset ? entry.base + Int(offset) : nil
      }
    }
    return nil
  }

  /// The table alone, for loops that translate many addresses: two words that stay in registers. It owns nothing: whoever
  /// uses it holds the memory meanwhile.
  @unsafe
  public struct Table {
    @usableFromInline let first: UnsafeMutablePointer<Entry>
    @usableFromInline let end: UnsafeMutablePointer<Entry>

    @inlinable
    init(first: UnsafeMutablePointer<Entry>, count: Int) {
      unsafe self.first = first
      unsafe end = first + count
    }

    /// As `GuestMemory.translate`.
    @unsafe @inlinable @inline(__always)
    public func translate(_ address: UInt64, byteCount length: UInt64) -> UnsafeMutableRawPointer? {
      var entry = unsafe first
      while unsafe entry != end {
        // SAFETY: entry is below `end`; as in `GuestMemory.translate`.
        let offset = unsafe address &- entry.pointee.guestStart
        if unsafe offset < entry.pointee.byteCount {
          guard unsafe length <= entry.pointee.byteCount &- offset else { return nil }
          return unsafe entry.pointee.base + Int(bitPattern: UInt(truncatingIfNeeded: offset))
        }
        unsafe entry += 1
      }
      return nil
    }
  }

  @unsafe @inlinable @inline(__always)
  public var tableAlone: Table { unsafe Table(first: table, count: count) }

  /// How many bytes from `address` on lie in one region (0 = not memory): to split a range at region borders.
  @inlinable
  public func contiguousByteCount(from address: GuestAddress) -> UInt64 {
    for index in 0..<count {
      // SAFETY: as in `translate`.
      let entry = unsafe table[index]
      let offset = address.rawValue &- entry.guestStart
      if offset < entry.byteCount { return entry.byteCount &- offset }
    }
    return 0
  }

  /// The guest address of a front-end address (`VhostUser` ring addresses), when the whole range lies in one region.
  public func guestAddress(ofFrontEnd address: UInt64, byteCount length: UInt64) -> GuestAddress? {
    for region in regions {
      let offset = address &- region.frontEndAddress
      if offset < region.byteCount {
        guard length <= region.byteCount - offset else { return nil }
        return GuestAddress(region.guestAddress.rawValue + offset)
      }
    }
    return nil
  }

  /// The front-end address of a guest range that lies in one region.
  public func frontEndAddress(of address: GuestAddress, byteCount length: UInt64) -> UInt64? {
    for region in regions {
      let offset = address.rawValue &- region.guestAddress.rawValue
      if offset < region.byteCount {
        guard length <= region.byteCount - offset else { return nil }
        return region.frontEndAddress + offset
      }
    }
    return nil
  }
}

// MARK: - Copies

extension GuestMemory {
  /// Copies guest bytes out, across region borders; false (and `buffer` in an unspecified state) when a byte is not memory.
  public func copyOut(_ address: GuestAddress, into buffer: UnsafeMutableRawBufferPointer) -> Bool {
    unsafe forEachPiece(address, UInt64(buffer.count)) { host, offset, length in
      // SAFETY: `forEachPiece` stays inside the buffer's count and inside one region.
      unsafe buffer.baseAddress.map { unsafe ($0 + offset).copyMemory(from: host, byteCount: length) }
    }
  }

  /// Copies bytes into guest memory, across region borders; false when a byte is not memory (nothing before it is undone).
  public func copyIn(_ bytes: UnsafeRawBufferPointer, at address: GuestAddress) -> Bool {
    unsafe forEachPiece(address, UInt64(bytes.count)) { host, offset, length in
      // SAFETY: as above.
      unsafe bytes.baseAddress.map { unsafe host.copyMemory(from: $0 + offset, byteCount: length) }
    }
  }

  public func copyIn(_ bytes: [UInt8], at address: GuestAddress) -> Bool {
    unsafe bytes.withUnsafeBytes { unsafe copyIn($0, at: address) }
  }

  /// A copy of `count` guest bytes, or nil when not all of them are memory.
  public func bytes(at address: GuestAddress, count: Int) -> [UInt8]? {
    guard count >= 0, isMemory(address, byteCount: UInt64(count)) else { return nil }
    var copy = [UInt8](repeating: 0, count: count)
    return unsafe copy.withUnsafeMutableBytes { unsafe copyOut(address, into: $0) } ? copy : nil
  }

  /// Reads a little-endian integer by one copy.
  public func load<T: FixedWidthInteger & BitwiseCopyable>(_ type: T.Type, at address: GuestAddress) -> T? {
    var value = T.zero
    let done = unsafe withUnsafeMutableBytes(of: &value) { unsafe copyOut(address, into: $0) }
    return done ? T(littleEndian: value) : nil
  }

  /// Writes a little-endian integer by one copy.
  public func store<T: FixedWidthInteger & BitwiseCopyable>(_ value: T, at address: GuestAddress) -> Bool {
    unsafe withUnsafeBytes(of: value.littleEndian) { unsafe copyIn($0, at: address) }
  }

  /// Whether every byte of the range is memory.
  public func isMemory(_ address: GuestAddress, byteCount: UInt64) -> Bool {
    unsafe forEachPiece(address, byteCount) { _, _, _ in }
  }

  /// Walks a range region by region; false at the first byte that is not memory. Bounded by the number of regions.
  private func forEachPiece(_ address: GuestAddress, _ byteCount: UInt64, _ body: (UnsafeMutableRawPointer, Int, Int) -> Void) -> Bool {
    var done: UInt64 = 0
    while done < byteCount {
      guard let here = address.advanced(by: done) else { return false }
      let length = min(contiguousByteCount(from: here), byteCount - done)
      guard length > 0, let host = unsafe translate(here, byteCount: length) else { return false }
      unsafe body(host, Int(done), Int(length))
      done += length
    }
    return true
  }
}
