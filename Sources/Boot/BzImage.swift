/// Offsets in the setup header of a bzImage, which are also offsets in the zero page
/// (Linux Documentation/arch/x86/boot.rst).
enum BzImage {
  static let magic: UInt32 = 0x5372_6448  // "HdrS"
  static let headerStart = 0x1F1
  static let setupSectors = 0x1F1
  static let bootFlag = 0x1FE
  static let jumpDistance = 0x201
  static let version = 0x206
  static let typeOfLoader = 0x210
  static let loadFlags = 0x211
  static let code32Start = 0x214
  static let ramdiskImage = 0x218
  static let ramdiskSize = 0x21C
  static let commandLinePointer = 0x228
  static let initrdAddressMaximum = 0x22C
  static let kernelAlignment = 0x230
  static let relocatable = 0x234
  static let extendedLoadFlags = 0x236
  static let commandLineSize = 0x238
  static let setupData = 0x250
  static let preferredAddress = 0x258
  static let initSize = 0x260
  /// End of the fields of protocol 2.12.
  static let minimumHeaderEnd = 0x268
  /// The zero page has room for the header up to here (the E820 table follows at 0x2D0, with a reserved part before).
  static let maximumHeaderEnd = 0x290
}

extension KernelImage {
  static func bzImage(
    _ file: some PayloadReader, head: [UInt8], lowMemoryEnd: UInt64
  ) throws(BootError) -> KernelImage {
    guard head.u16(at: BzImage.bootFlag) == 0xAA55 else {
      throw .malformedKernel("the boot flag is missing")
    }
    let headerEnd = 0x202 + Int(head[BzImage.jumpDistance])
    guard head.count >= BzImage.minimumHeaderEnd else {
      throw .truncated(
        file: .kernel, what: "The setup header", offset: UInt64(BzImage.headerStart),
        byteCount: UInt64(BzImage.minimumHeaderEnd - BzImage.headerStart))
    }
    let version = head.u16(at: BzImage.version)
    guard version >= 0x020C else {
      throw .bootProtocolTooOld(major: UInt8(version >> 8), minor: UInt8(version & 0xFF))
    }
    guard headerEnd >= BzImage.minimumHeaderEnd, headerEnd <= BzImage.maximumHeaderEnd else {
      throw .malformedKernel("the setup header ends at \(headerEnd)")
    }
    // Bit 0: entry at +0x200. LOADED_HIGH tells a bzImage from a zImage, which lives below 1 MiB.
    guard head.u16(at: BzImage.extendedLoadFlags) & 1 != 0, head[BzImage.loadFlags] & 1 != 0 else {
      throw .no64BitEntry
    }
    let sectors = head[BzImage.setupSectors] == 0 ? 4 : UInt64(head[BzImage.setupSectors])
    let codeOffset = (sectors + 1) * 512
    // The size field is in 16-byte units; files built with a signature are longer, so the file decides.
    guard file.byteCount > codeOffset + 0x200 else {
      throw .truncated(file: .kernel, what: "The protected-mode kernel", offset: codeOffset, byteCount: 0x200)
    }
    let declared = UInt64(head.u32(at: 0x1F4)) * 16
    // Rounded up to a unit; the file need not be.
    try file.require(declared > 15 ? declared - 15 : 0, at: codeOffset, of: .kernel, "The protected-mode kernel")
    let codeCount = file.byteCount - codeOffset

    let preferred = head.u64(at: BzImage.preferredAddress)
    let start = max(preferred, LowMemory.kernelBase)
    let needed = max(codeCount, UInt64(head.u32(at: BzImage.initSize)))
    let (end, overflow) = start.addingReportingOverflow(needed)
    guard !overflow, end <= lowMemoryEnd else {
      throw .kernelOutsideMemory(start: start, end: overflow ? .max : end, memoryEnd: lowMemoryEnd)
    }
    // The decompressor runs at the preferred address unless it was loaded above it, so loading it there saves a move.
    guard preferred == start || head[BzImage.relocatable] != 0 else {
      throw .malformedKernel("it wants to be loaded at \(hexadecimal(preferred)) and cannot be moved")
    }
    var header = Array(head[BzImage.headerStart..<headerEnd])
    func field(_ offset: Int) -> Int { offset - BzImage.headerStart }
    header[field(BzImage.typeOfLoader)] = 0xFF
    header.store(u32: UInt32(start), at: field(BzImage.code32Start))
    return KernelImage(
      segments: [Segment(fileOffset: codeOffset, byteCount: codeCount, range: start..<start + codeCount)],
      reserved: start..<end,
      entry: .linux64(start: start + 0x200, setupHeader: header),
      commandLineLimit: Int(clamping: head.u32(at: BzImage.commandLineSize)),
      initramfsLimit: UInt64(head.u32(at: BzImage.initrdAddressMaximum)))
  }
}
