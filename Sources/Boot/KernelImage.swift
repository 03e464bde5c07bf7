/// A kernel file, looked at once: where its parts go, where it starts, and what it accepts.
struct KernelImage: Equatable {
  /// A part of the file that is copied to a guest address.
  struct Segment: Equatable {
    var fileOffset: UInt64
    var byteCount: UInt64
    /// Guest range, which may be longer than the bytes in the file; the rest stays zero.
    var range: Range<UInt64>
  }

  enum Entry: Equatable {
    /// 64-bit boot protocol: start address, and the setup header that goes into the zero page at 0x1F1.
    case linux64(start: UInt64, setupHeader: [UInt8])
    /// PVH: 32-bit physical start address.
    case pvh(start: UInt32)
  }

  var segments: [Segment]
  /// Guest range that must stay free of other things, segments included.
  var reserved: Range<UInt64>
  var entry: Entry
  /// Longest command line without its NUL.
  var commandLineLimit: Int
  /// Highest address that an initramfs byte may have.
  var initramfsLimit: UInt64

  /// Recognizes the format by its magic numbers.
  init(_ file: some PayloadReader, lowMemoryEnd: UInt64) throws(BootError) {
    let head: [UInt8]
    do {
      head = try file.read(at: 0, count: 4096)
    } catch {
      throw .read(file: .kernel, errno: error.errno)
    }
    if head.starts(with: [0x7F, 0x45, 0x4C, 0x46]) {
      self = try Self.elf(file, head: head, lowMemoryEnd: lowMemoryEnd)
    } else if head.count >= 0x206, head.u32(at: 0x202) == BzImage.magic {
      self = try Self.bzImage(file, head: head, lowMemoryEnd: lowMemoryEnd)
    } else if head.count >= 2, head.count < 0x206, head.starts(with: [0x4D, 0x5A]) {
      throw .truncated(file: .kernel, what: "The setup header", offset: 0x1F1, byteCount: 0x77)
    } else {
      throw .unknownKernelFormat
    }
  }

  init(
    segments: [Segment], reserved: Range<UInt64>, entry: Entry, commandLineLimit: Int, initramfsLimit: UInt64
  ) {
    self.segments = segments
    self.reserved = reserved
    self.entry = entry
    self.commandLineLimit = commandLineLimit
    self.initramfsLimit = initramfsLimit
  }
}
