import HostSystem
import Glibc
import Testing
import VMMemory

private let page: UInt64 = 4096

/// Two regions that touch, and one after a hole.
private func sample() throws -> GuestMemory {
  let fd = try SharedMemory.sealed(name: "guest", byteCount: 4 * page)
  func region(_ guest: UInt64, _ count: UInt64, _ offset: UInt64) throws -> MemoryRegion {
    try MemoryRegion.mapping(
      fd, guestAddress: GuestAddress(guest), byteCount: count, frontEndAddress: 0x7000_0000 + guest, fileOffset: offset,
      allowUnsealed: false)
  }
  return try GuestMemory(regions: [region(0x100_0000, page, 3 * page), region(0, 2 * page, 0), region(2 * page, page, 2 * page)])
}

@Suite struct GuestMemoryTests {
  @Test func copiesCrossTouchingRegionsAndStopAtHoles() throws {
    let memory = try sample()
    let bytes = (0..<16).map { UInt8($0) }
    #expect(memory.copyIn(bytes, at: GuestAddress(2 * page - 8)))
    #expect(memory.bytes(at: GuestAddress(2 * page - 8), count: 16) == bytes)
    #expect(!memory.copyIn(bytes, at: GuestAddress(3 * page - 8)))
    #expect(memory.bytes(at: GuestAddress(3 * page), count: 1) == nil)
  }

  @Test(arguments: [
    (0, 8192, true), (8191, 1, true), (8191, 2, false), (0, 8193, false), (8192, 4096, true), (12288, 0, false),
    (0x100_0000, 4096, true), (0xFF_FFFF, 2, false), (UInt64.max, 1, false), (UInt64.max - 1, 4, false), (0, UInt64.max, false),
  ])
  func translationCoversTheWholeRangeOrNothing(address: UInt64, length: UInt64, isInside: Bool) throws {
    let memory = try sample()
    let pointer = memory.translate(GuestAddress(address), byteCount: length)
    #expect((pointer != nil) == isInside)
  }

  @Test func integersAreLittleEndianAndBoundedByMemory() throws {
    let memory = try sample()
    #expect(memory.store(UInt32(0x1122_3344), at: GuestAddress(100)))
    #expect(memory.bytes(at: GuestAddress(100), count: 4) == [0x44, 0x33, 0x22, 0x11])
    #expect(memory.load(UInt32.self, at: GuestAddress(100)) == 0x1122_3344)
    #expect(memory.load(UInt64.self, at: GuestAddress(3 * page - 4)) == nil)
  }

  @Test func frontEndAddressesTranslateBothWays() throws {
    let memory = try sample()
    #expect(memory.guestAddress(ofFrontEnd: 0x7000_0010, byteCount: 16) == GuestAddress(0x10))
    #expect(memory.frontEndAddress(of: GuestAddress(0x100_0004), byteCount: 4) == 0x7100_0004)
    #expect(memory.guestAddress(ofFrontEnd: 0x7000_0000 + 2 * page - 1, byteCount: 2) == nil)
    #expect(memory.guestAddress(ofFrontEnd: 0x10, byteCount: 1) == nil)
  }

  @Test func overlappingRegionsAreRefused() throws {
    let fd = try SharedMemory.sealed(name: "guest", byteCount: 4 * page)
    let map = try MemoryMapping.shared(fd, byteCount: Int(4 * page))
    func region(_ guest: UInt64, frontEnd: UInt64) throws -> MemoryRegion {
      try MemoryRegion(guestAddress: GuestAddress(guest), byteCount: 2 * page, frontEndAddress: frontEnd, fileOffset: 0, mapping: map)
    }
    #expect(throws: MemoryError.self) { _ = try GuestMemory(regions: [region(0, frontEnd: 0), region(page, frontEnd: 0x10_0000)]) }
    #expect(throws: MemoryError.self) { _ = try GuestMemory(regions: [region(0, frontEnd: 0), region(0x10_0000, frontEnd: page)]) }
  }

  @Test func regionThatWrapsOrExceedsItsObjectIsRefused() throws {
    let fd = try SharedMemory.sealed(name: "guest", byteCount: 2 * page)
    func map(_ guest: UInt64, _ count: UInt64, _ offset: UInt64) throws {
      _ = try MemoryRegion.mapping(
        fd, guestAddress: GuestAddress(guest), byteCount: count, frontEndAddress: 0, fileOffset: offset, allowUnsealed: false)
    }
    #expect(throws: MemoryError.self) { try map(.max - 10, page, 0) }
    #expect(throws: MemoryError.self) { try map(0, 3 * page, 0) }
    #expect(throws: MemoryError.self) { try map(0, page, .max - 100) }
    #expect(throws: MemoryError.self) { try map(0, 0, 0) }
    #expect(throws: MemoryError.self) { try map(0, page, 2 * page) }
    try map(0, 100, page + 12)
  }

  @Test func memoryThatItsHolderCouldTruncateIsRefusedUnlessAllowed() throws {
    let path = "/tmp/martlet-unsealed-\(UInt64.random(in: 0 ... .max))"
    // O_RDWR and O_CREAT.
    let fd = try OwnedFD.open(path, 0o102)
    try fd.writeAll([UInt8](repeating: 1, count: 8192))
    unlink(path)
    #expect(throws: MemoryError.self) {
      _ = try MemoryRegion.mapping(
        fd, guestAddress: GuestAddress(0), byteCount: page, frontEndAddress: 0, fileOffset: 0, allowUnsealed: false)
    }
    let region = try MemoryRegion.mapping(
      fd, guestAddress: GuestAddress(0), byteCount: page, frontEndAddress: 0, fileOffset: 100, allowUnsealed: true)
    #expect(try GuestMemory(regions: [region]).load(UInt8.self, at: GuestAddress(4000)) == 1)
  }
}
