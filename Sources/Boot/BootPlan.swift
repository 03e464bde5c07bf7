/// What a guest is started with, apart from its files.
package struct BootConfiguration: Equatable, Sendable {
  package var map: PhysicalMap
  /// APIC ids, ascending; the first is the boot processor.
  package var processorIDs: [UInt32]
  /// Without a NUL.
  package var commandLine: [UInt8]
  /// Whether the tables describe COM1.
  package var hasSerialPort: Bool

  package init(map: PhysicalMap, processorIDs: [UInt32], commandLine: [UInt8], hasSerialPort: Bool = true) {
    self.hasSerialPort = hasSerialPort
    self.map = map
    self.processorIDs = processorIDs
    self.commandLine = commandLine
  }
}

/// Everything that must be in memory and in the first processor before the first instruction. Computing it touches no
/// guest memory; it may be applied again for every restart, to memory that is all zeros.
package struct BootPlan: Equatable, Sendable {
  /// A copy of a part of a file to a guest address.
  package struct Copy: Equatable, Sendable {
    package var file: BootFile
    package var fileOffset: UInt64
    package var byteCount: UInt64
    package var address: UInt64

    package init(file: BootFile, fileOffset: UInt64, byteCount: UInt64, address: UInt64) {
      self.file = file
      self.fileOffset = fileOffset
      self.byteCount = byteCount
      self.address = address
    }
  }

  /// Bytes of ours and where they go.
  package struct Write: Equatable, Sendable {
    package var address: UInt64
    package var bytes: [UInt8]
  }

  package let writes: [Write]
  package let copies: [Copy]
  package let entry: EntryState
  package let initramfs: Range<UInt64>?

  /// Reads headers only.
  package init(
    configuration: BootConfiguration, kernel: some PayloadReader, initramfs: (some PayloadReader)?
  ) throws(BootError) {
    let map = configuration.map
    let low = map.lowMemory
    let image = try KernelImage(kernel, lowMemoryEnd: low.upperBound)

    let limit = min(image.commandLineLimit, LowMemory.commandLineCapacity - 1)
    guard configuration.commandLine.count <= limit else {
      throw .commandLineTooLong(byteCount: configuration.commandLine.count, maximum: limit)
    }
    guard !configuration.commandLine.contains(0) else { throw .commandLineHasNUL }

    let ramdisk = try initramfs.map { file throws(BootError) in
      try Self.place(initramfs: file.byteCount, image: image, lowMemoryEnd: low.upperBound)
    }
    let tables = try ACPITables(
      map: map, processorIDs: configuration.processorIDs, hasSerialPort: configuration.hasSerialPort)
    var writes = [
      Write(address: tables.rootPointer, bytes: tables.bytes),
      Write(address: LowMemory.commandLine, bytes: configuration.commandLine + [0]),
    ]
    switch image.entry {
    case .linux64(let start, let setupHeader):
      entry = .linux64(start: start)
      writes += [
        Write(address: LowMemory.globalDescriptorTable, bytes: BootParameters.words(DescriptorTable.linux64)),
        Write(address: LowMemory.pageTables, bytes: BootParameters.pageTables),
        Write(
          address: LowMemory.zeroPage,
          bytes: BootParameters.zeroPage(
            setupHeader: setupHeader, e820: map.e820, rootPointer: tables.rootPointer, initramfs: ramdisk)),
      ]
    case .pvh(let start):
      entry = .pvh(start: start)
      writes += [
        Write(address: LowMemory.globalDescriptorTable, bytes: BootParameters.words(DescriptorTable.pvh)),
        Write(
          address: LowMemory.startInfo,
          bytes: BootParameters.startInfo(e820: map.e820, rootPointer: tables.rootPointer, initramfs: ramdisk)),
      ]
    }
    var copies = image.segments.filter { $0.byteCount > 0 }.map {
      Copy(file: .kernel, fileOffset: $0.fileOffset, byteCount: $0.byteCount, address: $0.range.lowerBound)
    }
    if let ramdisk {
      copies.append(
        Copy(
          file: .initramfs, fileOffset: 0, byteCount: ramdisk.upperBound - ramdisk.lowerBound,
          address: ramdisk.lowerBound))
    }
    self.writes = writes
    self.copies = copies
    self.initramfs = ramdisk
  }

  /// As high as possible in low memory, page aligned, above the kernel (or below it where there is more room).
  private static func place(
    initramfs byteCount: UInt64, image: KernelImage, lowMemoryEnd: UInt64
  ) throws(BootError) -> Range<UInt64> {
    guard byteCount > 0 else { throw .initramfsEmpty }
    let ceiling = min(lowMemoryEnd, image.initramfsLimit == .max ? .max : image.initramfsLimit + 1) & ~4095
    let floor = (image.reserved.upperBound + 4095) & ~4095
    let above = ceiling > floor ? ceiling - floor : 0
    let below = min(ceiling, image.reserved.lowerBound & ~4095)
    let belowRoom = below > LowMemory.kernelBase ? below - LowMemory.kernelBase : 0
    // Rounding up cannot overflow once the size is known to fit.
    if byteCount <= above {
      let start = ceiling - ((byteCount + 4095) & ~4095)
      return start..<start + byteCount
    }
    if byteCount <= belowRoom {
      let start = below - ((byteCount + 4095) & ~4095)
      return start..<start + byteCount
    }
    throw .initramfsTooLarge(byteCount: byteCount, available: max(above, belowRoom))
  }
}
