import Boot

/// Kernel files made by hand, each field where the formats want it, for tests to bend.
enum KernelFiles {
  static func store(_ value: UInt64, _ count: Int, at offset: Int, in bytes: inout [UInt8]) {
    for index in 0..<count { bytes[offset + index] = UInt8(truncatingIfNeeded: value >> (8 * UInt64(index))) }
  }

  static func load(_ bytes: [UInt8], at offset: Int, _ count: Int) -> UInt64 {
    (0..<count).reduce(0) { $0 | UInt64(bytes[offset + $1]) << (8 * UInt64($1)) }
  }

  /// A bzImage with one setup sector and 4096 bytes of code, preferring 16 MiB.
  static func bzImage(_ change: (inout [UInt8]) -> Void = { _ in }) -> [UInt8] {
    var bytes = [UInt8](repeating: 0, count: 1024)
    bytes += (0..<4096).map { UInt8(truncatingIfNeeded: $0) }
    bytes[0x1F1] = 1
    store(4096 / 16, 4, at: 0x1F4, in: &bytes)
    store(0xAA55, 2, at: 0x1FE, in: &bytes)
    bytes[0x201] = 0x6A
    store(0x5372_6448, 4, at: 0x202, in: &bytes)
    store(0x020F, 2, at: 0x206, in: &bytes)
    bytes[0x211] = 1
    store(0x7FFF_FFFF, 4, at: 0x22C, in: &bytes)
    store(0x20_0000, 4, at: 0x230, in: &bytes)
    bytes[0x234] = 1
    store(3, 2, at: 0x236, in: &bytes)
    store(2047, 4, at: 0x238, in: &bytes)
    store(0x100_0000, 8, at: 0x258, in: &bytes)
    store(0x10_0000, 4, at: 0x260, in: &bytes)
    change(&bytes)
    return bytes
  }

  /// An ELF-64 program: one segment of 256 bytes (512 in memory) at 1 MiB, and a Xen note with entry 1 MiB + 16.
  static func elf(_ change: (inout [UInt8]) -> Void = { _ in }) -> [UInt8] {
    var bytes = [UInt8](repeating: 0, count: 0x400)
    bytes.replaceSubrange(0..<6, with: [0x7F, 0x45, 0x4C, 0x46, 2, 1])
    store(62, 2, at: 18, in: &bytes)
    store(64, 8, at: 32, in: &bytes)
    store(56, 2, at: 54, in: &bytes)
    store(2, 2, at: 56, in: &bytes)
    func header(_ index: Int, type: UInt64, offset: UInt64, address: UInt64, file: UInt64, memory: UInt64) {
      let at = 64 + index * 56
      store(type, 4, at: at, in: &bytes)
      store(offset, 8, at: at + 8, in: &bytes)
      store(address, 8, at: at + 24, in: &bytes)
      store(file, 8, at: at + 32, in: &bytes)
      store(memory, 8, at: at + 40, in: &bytes)
    }
    header(0, type: 1, offset: 0x200, address: 0x10_0000, file: 0x100, memory: 0x200)
    header(1, type: 4, offset: 0x300, address: 0, file: 20, memory: 20)
    store(4, 4, at: 0x300, in: &bytes)
    store(4, 4, at: 0x304, in: &bytes)
    store(18, 4, at: 0x308, in: &bytes)
    bytes.replaceSubrange(0x30C..<0x310, with: [0x58, 0x65, 0x6E, 0])
    store(0x10_0010, 4, at: 0x310, in: &bytes)
    change(&bytes)
    return bytes
  }

  static func plan(
    _ kernel: [UInt8], initramfs: [UInt8]? = nil, memory: UInt64 = 64 << 20, processors: Int = 1,
    commandLine: String = "console=ttyS0"
  ) throws -> BootPlan {
    try BootPlan(
      configuration: BootConfiguration(
        map: PhysicalMap(memoryByteCount: memory, addressBits: 40), processorIDs: (0..<processors).map(UInt32.init),
        commandLine: Array(commandLine.utf8)),
      kernel: PayloadBytes(kernel), initramfs: initramfs.map { PayloadBytes($0) })
  }
}
