import HostSystem
import VMMemory
import VhostUser

/// Pages of I/O addresses as the front end told them, as memory that rings and buffers are looked up in.
struct Translation {
  static let pageSize: UInt64 = 4096

  private struct Entry {
    var iova: UInt64
    var region: MemoryRegion
  }

  private var entries: [Entry] = []
  private var asked: Set<UInt64> = []
  private(set) var memory: GuestMemory?

  /// - Parameter offset: of the pages in the file.
  mutating func add(_ entry: IOTLBMessage, _ file: borrowing OwnedFD, offset: UInt64) throws {
    try remove(entry)
    let region = try MemoryRegion.mapping(
      file, guestAddress: GuestAddress(entry.iova), byteCount: entry.size, frontEndAddress: entry.iova, fileOffset: offset,
      allowUnsealed: true)
    entries.append(Entry(iova: entry.iova, region: region))
    asked.remove(entry.iova)
    try rebuild()
  }

  mutating func remove(_ entry: IOTLBMessage) throws {
    entries.removeAll { $0.iova &- entry.iova < max(entry.size, 1) || entry.iova &- $0.iova < $0.region.byteCount }
    try rebuild()
  }

  private mutating func rebuild() throws {
    memory = entries.isEmpty ? nil : try GuestMemory(regions: entries.sorted { $0.iova < $1.iova }.map(\.region))
  }

  /// Whether the page still has to be asked for.
  mutating func asks(_ page: UInt64) -> Bool { asked.insert(page).inserted }

  private func missing(_ address: UInt64, _ count: UInt64) -> [UInt64] {
    stride(from: address & ~(Self.pageSize - 1), to: address + max(count, 1), by: Int(Self.pageSize)).filter { page in
      memory?.bytes(at: GuestAddress(page), count: 1) == nil
    }
  }

  /// Pages of a ring's own place.
  func missing(ring: VringAddress, size: UInt32) -> [UInt64] {
    let size = UInt64(size)
    return missing(ring.descriptorTable, 16 * size) + missing(ring.availableRing, 6 + 2 * size) + missing(ring.usedRing, 6 + 8 * size)
  }

  /// Pages of the buffers of the next available chain of a split ring; none when there is no chain.
  func missing(next index: UInt16, of ring: VringAddress, size: UInt16) -> [UInt64] {
    guard let memory, size > 0, let available = memory.load(UInt16.self, at: GuestAddress(ring.availableRing + 2)), available != index,
      var head = memory.load(UInt16.self, at: GuestAddress(ring.availableRing + 4 + 2 * UInt64(index % size)))
    else { return [] }
    var pages: [UInt64] = []
    for _ in 0..<size {
      let place = ring.descriptorTable + 16 * UInt64(head % size)
      guard let address = memory.load(UInt64.self, at: GuestAddress(place)),
        let count = memory.load(UInt32.self, at: GuestAddress(place + 8)),
        let flags = memory.load(UInt16.self, at: GuestAddress(place + 12)),
        let next = memory.load(UInt16.self, at: GuestAddress(place + 14))
      else { return pages }
      pages += missing(address, UInt64(count))
      guard flags & 1 != 0 else { break }
      head = next
    }
    return pages
  }
}
