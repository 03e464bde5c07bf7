// ELF vmlinux with a PVH entry note: ELF-64 for x86-64, or ELF-32 for i386 (the note's entry is 32-bit code either way).

extension KernelImage {
  private enum ELF {
    static let loadSegment: UInt32 = 1
    static let noteSegment: UInt32 = 4
    /// `XEN_ELFNOTE_PHYS32_ENTRY`
    static let physical32Entry: UInt32 = 18
    static let maximumProgramHeaders = 128
    static let maximumNoteBytes: UInt64 = 65536
  }

  private struct ProgramHeader {
    var type: UInt32
    var offset: UInt64
    var physicalAddress: UInt64
    var fileSize: UInt64
    var memorySize: UInt64
  }

  static func elf(_ file: some PayloadReader, head: [UInt8], lowMemoryEnd: UInt64) throws(BootError) -> KernelImage {
    let headers = try programHeaders(file, head: head)
    var segments: [Segment] = []
    for header in headers where header.type == ELF.loadSegment && header.memorySize > 0 {
      guard header.fileSize <= header.memorySize else {
        throw .malformedKernel("a segment is larger in the file than in memory")
      }
      try file.require(header.fileSize, at: header.offset, of: .kernel, "A segment")
      let (end, overflow) = header.physicalAddress.addingReportingOverflow(header.memorySize)
      guard !overflow, header.physicalAddress >= LowMemory.kernelBase, end <= lowMemoryEnd else {
        throw .kernelOutsideMemory(
          start: header.physicalAddress, end: overflow ? .max : end, memoryEnd: lowMemoryEnd)
      }
      let range = header.physicalAddress..<end
      // At most 128 segments, checked in `programHeaders`.
      if let other = segments.first(where: { $0.range.overlaps(range) }) {
        throw .overlappingSegments(first: other.range.lowerBound, second: range.lowerBound)
      }
      segments.append(Segment(fileOffset: header.offset, byteCount: header.fileSize, range: range))
    }
    guard let lowest = segments.map(\.range.lowerBound).min(), let highest = segments.map(\.range.upperBound).max()
    else {
      throw .malformedKernel("it has no loadable segment")
    }
    let start = try pvhEntry(file, headers)
    guard segments.contains(where: { $0.range.contains(UInt64(start)) }) else {
      throw .malformedKernel("its entry point \(hexadecimal(UInt64(start))) lies in no segment")
    }
    return KernelImage(
      segments: segments, reserved: lowest..<highest, entry: .pvh(start: start),
      commandLineLimit: 2047, initramfsLimit: 0xFFFF_FFFF)
  }

  private static func programHeaders(_ file: some PayloadReader, head: [UInt8]) throws(BootError) -> [ProgramHeader] {
    guard head.count >= 64 else {
      throw .truncated(file: .kernel, what: "The ELF header", offset: 0, byteCount: 64)
    }
    let wide: Bool
    switch (head[4], head[5], head.u16(at: 18)) {
    case (2, 1, 62): wide = true
    case (1, 1, 3): wide = false
    case (let elfClass, let order, let machine):
      throw .foreignProgram("ELF class \(elfClass), byte order \(order), machine \(machine)")
    }
    let tableOffset = wide ? head.u64(at: 32) : UInt64(head.u32(at: 28))
    let entrySize = Int(head.u16(at: wide ? 54 : 42))
    let count = Int(head.u16(at: wide ? 56 : 44))
    guard entrySize == (wide ? 56 : 32), count >= 1, count <= ELF.maximumProgramHeaders else {
      throw .malformedKernel("it has \(count) program headers of \(entrySize) bytes")
    }
    let table = try file.exactly(count * entrySize, at: tableOffset, of: .kernel, "The program header table")
    return (0..<count).map { index in
      let at = index * entrySize
      if wide {
        return ProgramHeader(
          type: table.u32(at: at), offset: table.u64(at: at + 8), physicalAddress: table.u64(at: at + 24),
          fileSize: table.u64(at: at + 32), memorySize: table.u64(at: at + 40))
      }
      return ProgramHeader(
        type: table.u32(at: at), offset: UInt64(table.u32(at: at + 4)),
        physicalAddress: UInt64(table.u32(at: at + 12)), fileSize: UInt64(table.u32(at: at + 16)),
        memorySize: UInt64(table.u32(at: at + 20)))
    }
  }

  /// Looks through the note segments for name "Xen", type 18.
  private static func pvhEntry(_ file: some PayloadReader, _ headers: [ProgramHeader]) throws(BootError) -> UInt32 {
    for header in headers where header.type == ELF.noteSegment {
      let count = min(header.fileSize, ELF.maximumNoteBytes)
      try file.require(count, at: header.offset, of: .kernel, "A note segment")
      let notes = try file.exactly(Int(count), at: header.offset, of: .kernel, "A note segment")
      var at = 0
      // Each turn advances by at least the 12 bytes of a note header.
      while notes.count - at >= 12 {
        let nameSize = Int(notes.u32(at: at))
        let descriptionSize = Int(notes.u32(at: at + 4))
        let type = notes.u32(at: at + 8)
        let name = at + 12
        guard nameSize <= notes.count, descriptionSize <= notes.count else { break }
        let description = name + (nameSize + 3) & ~3
        guard description + descriptionSize <= notes.count else { break }
        if type == ELF.physical32Entry, nameSize == 4, descriptionSize >= 4,
          notes[name..<name + 4].elementsEqual([0x58, 0x65, 0x6E, 0x00])
        {
          return notes.u32(at: description)
        }
        at = description + (descriptionSize + 3) & ~3
      }
    }
    throw .noPVHNote
  }
}
