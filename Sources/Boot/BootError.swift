/// Why a guest cannot be started from the given files and configuration.
package enum BootError: Error, Equatable, CustomStringConvertible {
  /// The file holds neither a bzImage nor an ELF program.
  case unknownKernelFormat
  /// The file ends before `what`, which should be at `offset`.
  case truncated(file: BootFile, what: String, offset: UInt64, byteCount: UInt64)
  /// Reading the file failed with this errno.
  case read(file: BootFile, errno: CInt)
  /// The bzImage speaks a boot protocol too old for the 64-bit entry.
  case bootProtocolTooOld(major: UInt8, minor: UInt8)
  /// The bzImage has no 64-bit entry point.
  case no64BitEntry
  /// A header field has a value that no valid file has.
  case malformedKernel(String)
  /// The ELF program is for another machine or class.
  case foreignProgram(String)
  /// The ELF program has no PVH entry note.
  case noPVHNote
  /// A part of the kernel does not fit the guest's memory.
  case kernelOutsideMemory(start: UInt64, end: UInt64, memoryEnd: UInt64)
  /// Two loadable segments of the kernel claim the same memory.
  case overlappingSegments(first: UInt64, second: UInt64)
  /// The initramfs does not fit between the kernel and the end of usable low memory.
  case initramfsTooLarge(byteCount: UInt64, available: UInt64)
  /// The initramfs is an empty file.
  case initramfsEmpty
  /// The command line is longer than the kernel accepts.
  case commandLineTooLong(byteCount: Int, maximum: Int)
  /// The command line holds a NUL byte, which would cut it.
  case commandLineHasNUL
  /// The memory size is outside what the layout allows.
  case memorySize(byteCount: UInt64, minimum: UInt64, maximum: UInt64)
  /// The processor ids are none, too many, or not ascending.
  case processors(String)
  /// A write into guest memory was refused; our own plan was wrong about the layout.
  case guestMemory(address: UInt64, byteCount: UInt64)

  package var description: String {
    switch self {
    case .unknownKernelFormat:
      "Kernel file is neither a bzImage nor an ELF vmlinux; give one of these."
    case .truncated(let file, let what, let offset, let byteCount):
      "\(file.title) is cut short: \(what) should be \(byteCount) bytes at offset \(offset); copy the file again."
    case .read(let file, let errno):
      "\(file.title) cannot be read (errno \(errno)); check the file and its disk."
    case .bootProtocolTooOld(let major, let minor):
      "Kernel speaks boot protocol \(major).\(minor), at least 2.12 is needed; use a 64-bit Linux kernel 3.8 or newer."
    case .no64BitEntry:
      "Kernel has no 64-bit entry point; use an x86-64 kernel."
    case .malformedKernel(let what):
      "Kernel file is damaged: \(what)."
    case .foreignProgram(let what):
      "Kernel is an ELF program for another machine (\(what)); use an x86-64 vmlinux."
    case .noPVHNote:
      "Kernel is an ELF program without a PVH entry note; use a kernel built with CONFIG_PVH, or its bzImage."
    case .kernelOutsideMemory(let start, let end, let memoryEnd):
      "Kernel needs memory from \(hexadecimal(start)) to \(hexadecimal(end)), the guest's low memory ends at "
        + "\(hexadecimal(memoryEnd)); give the guest more memory."
    case .overlappingSegments(let first, let second):
      "Kernel file is damaged: its segments at \(hexadecimal(first)) and \(hexadecimal(second)) overlap."
    case .initramfsTooLarge(let byteCount, let available):
      "Initramfs of \(byteCount) bytes does not fit in the guest's memory (\(available) bytes are free for it); give the "
        + "guest more memory."
    case .initramfsEmpty:
      "Initramfs is an empty file; leave the option out or give a cpio archive."
    case .commandLineTooLong(let byteCount, let maximum):
      "Command line has \(byteCount) bytes, the kernel takes at most \(maximum); shorten it."
    case .commandLineHasNUL:
      "Command line holds a NUL byte; remove it."
    case .memorySize(let byteCount, let minimum, let maximum):
      "Memory size of \(byteCount) bytes is not possible; it must be a multiple of 4096 from \(minimum) to \(maximum)."
    case .processors(let what):
      "Processors cannot be described to the guest: \(what)."
    case .guestMemory(let address, let byteCount):
      "Guest memory refused \(byteCount) bytes at \(hexadecimal(address)); the boot layout does not fit the memory."
    }
  }
}

/// Which of the two files an error is about.
package enum BootFile: Equatable, Sendable {
  case kernel
  case initramfs

  var title: String {
    switch self {
    case .kernel: "Kernel file"
    case .initramfs: "Initramfs file"
    }
  }
}

/// `0x` and lower-case digits.
func hexadecimal(_ value: UInt64) -> String {
  "0x" + String(value, radix: 16)
}
