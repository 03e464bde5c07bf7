import Boot
import Testing

@Suite("Kernel files become boot plans")
struct KernelImageTests {
  func error(_ kernel: [UInt8], initramfs: [UInt8]? = nil, memory: UInt64 = 64 << 20) -> BootError? {
    do {
      _ = try KernelFiles.plan(kernel, initramfs: initramfs, memory: memory)
      return nil
    } catch {
      return error as? BootError
    }
  }

  @Test("A bzImage starts 0x200 bytes into its code, at its preferred address")
  func bzImageEntry() throws {
    let plan = try KernelFiles.plan(KernelFiles.bzImage())
    #expect(plan.entry.instructionPointer == 0x100_0200)
    #expect(plan.entry.rsi == 0x7000)
    #expect(plan.entry.efer == 0x500)
    #expect(plan.copies == [.init(file: .kernel, fileOffset: 1024, byteCount: 4096, address: 0x100_0000)])
  }

  @Test("The zero page holds header, command line, memory map and root pointer")
  func zeroPage() throws {
    let plan = try KernelFiles.plan(KernelFiles.bzImage(), initramfs: [1, 2, 3], memory: 5 << 30)
    let page = try #require(plan.writes.first { $0.address == 0x7000 }).bytes
    #expect(page.count == 4096)
    #expect(KernelFiles.load(page, at: 0x202, 4) == 0x5372_6448)
    #expect(page[0x210] == 0xFF)
    #expect(KernelFiles.load(page, at: 0x228, 4) == 0x20000)
    #expect(KernelFiles.load(page, at: 0x070, 8) == 0xE0000)
    #expect(KernelFiles.load(page, at: 0x21C, 4) == 3)
    #expect(KernelFiles.load(page, at: 0x218, 4) == 0x7FFF_F000)
    #expect(page[0x1EF] == 0)
    let count = Int(page[0x1E8])
    #expect(count == 5)
    let last = 0x2D0 + (count - 1) * 20
    #expect(KernelFiles.load(page, at: last, 8) == 0x1_0000_0000)
    #expect(KernelFiles.load(page, at: last + 8, 8) == 2 << 30)
    let command = try #require(plan.writes.first { $0.address == 0x20000 }).bytes
    #expect(command == Array("console=ttyS0".utf8) + [0])
  }

  @Test("The boot page tables map the first 4 GiB to themselves")
  func pageTables() throws {
    let tables = try #require(KernelFiles.plan(KernelFiles.bzImage()).writes.first { $0.address == 0x9000 }).bytes
    #expect(tables.count == 6 * 4096)
    for address in [0, 0x20_0000, 0x1234_5678, 0xFFFF_FFFF] as [UInt64] {
      let pdpt = KernelFiles.load(tables, at: 0, 8) & ~0xFFF
      let directory = KernelFiles.load(tables, at: Int(pdpt - 0x9000) + Int(address >> 30) * 8, 8) & ~0xFFF
      let entry = KernelFiles.load(tables, at: Int(directory - 0x9000) + Int(address >> 21 & 511) * 8, 8)
      #expect(entry & 0x83 == 0x83)
      #expect(entry & ~0x1F_FFFF == address & ~0x1F_FFFF)
    }
  }

  @Test("An ELF program starts at its PVH note in flat 32-bit mode")
  func pvhEntry() throws {
    let plan = try KernelFiles.plan(KernelFiles.elf(), initramfs: [7])
    #expect(plan.entry.instructionPointer == 0x10_0010)
    #expect(plan.entry.rbx == 0x6000)
    #expect(plan.entry.cr0 & 0x8000_0001 == 1)
    #expect(plan.entry.efer == 0)
    let info = try #require(plan.writes.first { $0.address == 0x6000 }).bytes
    #expect(KernelFiles.load(info, at: 0, 4) == 0x336E_C578)
    #expect(KernelFiles.load(info, at: 4, 4) == 1)
    #expect(KernelFiles.load(info, at: 12, 4) == 1)
    #expect(KernelFiles.load(info, at: 32, 8) == 0xE0000)
    #expect(KernelFiles.load(info, at: 0x40 + 8, 8) == 1)
    let entries = Int(KernelFiles.load(info, at: 48, 4))
    #expect(info.count == 0x80 + entries * 24)
  }

  @Test("A 32-bit ELF program with a PVH note is accepted too")
  func elf32() throws {
    var bytes = [UInt8](repeating: 0, count: 0x400)
    bytes.replaceSubrange(0..<6, with: [0x7F, 0x45, 0x4C, 0x46, 1, 1])
    KernelFiles.store(3, 2, at: 18, in: &bytes)
    KernelFiles.store(52, 4, at: 28, in: &bytes)
    KernelFiles.store(32, 2, at: 42, in: &bytes)
    KernelFiles.store(2, 2, at: 44, in: &bytes)
    for (index, fields) in [[1, 0x200, 0, 0x20_0000, 0x100, 0x1000], [4, 0x300, 0, 0, 20, 20]].enumerated() {
      for (field, value) in fields.enumerated() {
        KernelFiles.store(UInt64(value), 4, at: 52 + index * 32 + field * 4, in: &bytes)
      }
    }
    bytes.replaceSubrange(0x300..<0x318, with: KernelFiles.elf()[0x300..<0x318])
    KernelFiles.store(0x20_0010, 4, at: 0x310, in: &bytes)
    #expect(try KernelFiles.plan(bytes).entry.instructionPointer == 0x20_0010)
  }

  @Test("Other files are refused by name of what they are not")
  func unknownFormats() {
    #expect(error([]) == .unknownKernelFormat)
    #expect(error(Array("#!/bin/sh\n".utf8)) == .unknownKernelFormat)
    #expect(error([UInt8](repeating: 0xFF, count: 8192)) == .unknownKernelFormat)
  }

  @Test("Every truncation of a kernel is an error, never a crash")
  func truncations() {
    for whole in [KernelFiles.bzImage(), KernelFiles.elf { $0.removeLast(0x400 - 0x314) }] {
      // A bzImage counts its size in units of 16 bytes.
      for count in stride(from: 0, through: whole.count - 16, by: 7) {
        #expect(error(Array(whole[..<count])) != nil, "cut to \(count) of \(whole.count)")
      }
    }
  }

  @Test("Old, 32-bit and damaged bzImages are told apart")
  func badHeaders() {
    #expect(
      error(KernelFiles.bzImage { KernelFiles.store(0x0209, 2, at: 0x206, in: &$0) })
        == .bootProtocolTooOld(major: 2, minor: 9))
    #expect(error(KernelFiles.bzImage { $0[0x236] = 0 }) == .no64BitEntry)
    #expect(error(KernelFiles.bzImage { $0[0x1FE] = 0 }) == .malformedKernel("the boot flag is missing"))
    #expect(error(KernelFiles.bzImage { $0[0x201] = 0x10 }) != nil)
    #expect(error(KernelFiles.bzImage { $0[0x201] = 0xFF }) != nil)
  }

  @Test("Kernels that need more memory than there is are refused with the numbers")
  func outsideMemory() {
    #expect(
      error(KernelFiles.bzImage(), memory: 16 << 20)
        == .kernelOutsideMemory(start: 0x100_0000, end: 0x110_0000, memoryEnd: 16 << 20))
    for address in [.max, .max - 4095, 1 << 40, 0xBFFF_F000] as [UInt64] {
      let bent = KernelFiles.bzImage { KernelFiles.store(address, 8, at: 0x258, in: &$0) }
      #expect(error(bent, memory: 8 << 30) != nil)
      let elf = KernelFiles.elf { KernelFiles.store(address, 8, at: 64 + 24, in: &$0) }
      #expect(error(elf, memory: 8 << 30) != nil)
    }
    // Below 1 MiB are our own tables.
    #expect(error(KernelFiles.elf { KernelFiles.store(0x9000, 8, at: 64 + 24, in: &$0) }) != nil)
  }

  @Test("Hostile ELF headers are refused")
  func hostileELF() {
    for (offset, width) in [(32, 8), (54, 2), (56, 2), (64 + 8, 8), (64 + 32, 8), (64 + 40, 8)] {
      let bent = KernelFiles.elf { KernelFiles.store(.max, width, at: offset, in: &$0) }
      #expect(error(bent) != nil, "all ones at \(offset)")
    }
    #expect(error(KernelFiles.elf { KernelFiles.store(0, 4, at: 0x308, in: &$0) }) == .noPVHNote)
    #expect(error(KernelFiles.elf { KernelFiles.store(0xFFFF_FFFF, 4, at: 0x300, in: &$0) }) == .noPVHNote)
    #expect(error(KernelFiles.elf { KernelFiles.store(0xFFFF_FFFF, 4, at: 0x304, in: &$0) }) == .noPVHNote)
    #expect(error(KernelFiles.elf { KernelFiles.store(0x5000_0000, 4, at: 0x310, in: &$0) }) != nil)
    #expect(error(KernelFiles.elf { KernelFiles.store(183, 2, at: 18, in: &$0) }) != nil)
    let overlapping = KernelFiles.elf { bytes in
      // The note header becomes a second load segment over the first.
      bytes.replaceSubrange(120..<176, with: bytes[64..<120])
    }
    #expect(error(overlapping) == .overlappingSegments(first: 0x10_0000, second: 0x10_0000))
  }

  @Test("An initramfs lies page aligned at the top of low memory, clear of the kernel")
  func initramfsPlacement() throws {
    let plan = try KernelFiles.plan(KernelFiles.bzImage(), initramfs: [UInt8](repeating: 1, count: 5000))
    #expect(plan.initramfs == (0x3FF_E000..<0x3FF_F388 as Range<UInt64>))
  }

  @Test("An initramfs that does not fit is refused with the space there is")
  func initramfsTooLarge() throws {
    let large = [UInt8](repeating: 1, count: 20 << 20)
    #expect(
      error(KernelFiles.bzImage(), initramfs: large, memory: 18 << 20)
        == .initramfsTooLarge(byteCount: 20 << 20, available: 15 << 20))
    #expect(error(KernelFiles.bzImage(), initramfs: []) == .initramfsEmpty)
  }

  @Test("The command line is bounded by the kernel's own limit and has no NUL")
  func commandLine() throws {
    _ = try KernelFiles.plan(KernelFiles.bzImage(), commandLine: String(repeating: "a", count: 2047))
    #expect(throws: BootError.commandLineTooLong(byteCount: 2048, maximum: 2047)) {
      try KernelFiles.plan(KernelFiles.bzImage(), commandLine: String(repeating: "a", count: 2048))
    }
    #expect(throws: BootError.commandLineHasNUL) {
      try KernelFiles.plan(KernelFiles.bzImage(), commandLine: "a\0b")
    }
  }

  @Test("Memory sizes are checked against page size, minimum and address width")
  func memorySizes() throws {
    for size in [0, 4096, (4 << 20) - 4096, (64 << 20) + 1, 1 << 40, .max, .max - 4095] as [UInt64] {
      #expect(throws: BootError.self) { try PhysicalMap(memoryByteCount: size, addressBits: 40) }
    }
    let map = try PhysicalMap(memoryByteCount: 1 << 39, addressBits: 40)
    let high = try #require(map.highMemory)
    #expect(high.upperBound == (1 << 39) + (1 << 30))
    let window = try #require(map.pciWindow64)
    #expect(window.lowerBound >= high.upperBound && window.upperBound == 1 << 40)
    #expect(try PhysicalMap(memoryByteCount: 3 << 30, addressBits: 40).highMemory == nil)
  }
}
