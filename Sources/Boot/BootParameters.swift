// The structures a kernel finds in low memory, as bytes.

enum BootParameters {
  /// Identity map of the first 4 GiB in 2 MiB pages: one PML4, one PDPT and four page directories, in this order.
  static var pageTables: [UInt8] {
    var bytes: [UInt8] = []
    bytes.reserveCapacity(6 * 4096)
    func pad() { bytes += [UInt8](repeating: 0, count: (4096 - bytes.count % 4096) % 4096) }
    let present: UInt64 = 0x03
    bytes.append(u64: LowMemory.pageTables + 4096 | present)
    pad()
    for index in 0..<4 as Range<UInt64> { bytes.append(u64: LowMemory.pageTables + (2 + index) * 4096 | present) }
    pad()
    let largePage: UInt64 = 0x83
    for index in 0..<2048 as Range<UInt64> { bytes.append(u64: index << 21 | largePage) }
    return bytes
  }

  static func words(_ values: [UInt64]) -> [UInt8] {
    var bytes: [UInt8] = []
    for value in values { bytes.append(u64: value) }
    return bytes
  }

  /// `struct boot_params` (Linux Documentation/arch/x86/zero-page.rst), 4096 bytes.
  static func zeroPage(
    setupHeader: [UInt8], e820: [E820Entry], rootPointer: UInt64, initramfs: Range<UInt64>?
  ) -> [UInt8] {
    var page = [UInt8](repeating: 0, count: 4096)
    page.replaceSubrange(BzImage.headerStart..<BzImage.headerStart + setupHeader.count, with: setupHeader)
    page.store(u64: rootPointer, at: 0x070)
    page.store(u32: UInt32(LowMemory.commandLine), at: BzImage.commandLinePointer)
    if let initramfs {
      page.store(u32: UInt32(initramfs.lowerBound), at: BzImage.ramdiskImage)
      page.store(u32: UInt32(initramfs.upperBound - initramfs.lowerBound), at: BzImage.ramdiskSize)
    }
    page[0x1E8] = UInt8(e820.count)
    for (index, entry) in e820.enumerated() {
      let at = 0x2D0 + index * 20
      page.store(u64: entry.range.lowerBound, at: at)
      page.store(u64: entry.range.upperBound - entry.range.lowerBound, at: at + 8)
      page.store(u32: entry.kind.rawValue, at: at + 16)
    }
    return page
  }

  /// `hvm_start_info` version 1 (Xen public/arch-x86/hvm/start_info.h), module list and memory map, one after another
  /// at `LowMemory.startInfo`, `moduleList` and `memoryMap`.
  static func startInfo(e820: [E820Entry], rootPointer: UInt64, initramfs: Range<UInt64>?) -> [UInt8] {
    var bytes = [UInt8](repeating: 0, count: Int(LowMemory.memoryMap - LowMemory.startInfo))
    bytes.store(u32: 0x336E_C578, at: 0)
    bytes.store(u32: 1, at: 4)
    bytes.store(u64: LowMemory.commandLine, at: 24)
    bytes.store(u64: rootPointer, at: 32)
    bytes.store(u64: LowMemory.memoryMap, at: 40)
    bytes.store(u32: UInt32(e820.count), at: 48)
    if let initramfs {
      let module = Int(LowMemory.moduleList - LowMemory.startInfo)
      bytes.store(u32: 1, at: 12)
      bytes.store(u64: LowMemory.moduleList, at: 16)
      bytes.store(u64: initramfs.lowerBound, at: module)
      bytes.store(u64: initramfs.upperBound - initramfs.lowerBound, at: module + 8)
    }
    for entry in e820 {
      bytes.append(u64: entry.range.lowerBound)
      bytes.append(u64: entry.range.upperBound - entry.range.lowerBound)
      bytes.append(u32: entry.kind.rawValue)
      bytes.append(u32: 0)
    }
    return bytes
  }
}
