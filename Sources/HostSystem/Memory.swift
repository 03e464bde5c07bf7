import CLinux
import Glibc

/// A piece of this process's address space made by `mmap`, unmapped when the last reference ends.
///
/// A class, because memory tables that are replaced at run time share the mappings they keep.
@safe
public final class MemoryMapping: @unchecked Sendable {
  // @unchecked: base and size never change; what lies behind them is shared memory that every user treats as changing.
  public let baseAddress: UnsafeMutableRawPointer
  public let byteCount: Int

  private init(baseAddress: UnsafeMutableRawPointer, byteCount: Int) {
    unsafe self.baseAddress = baseAddress
    self.byteCount = byteCount
  }

  deinit { _ = unsafe munmap(baseAddress, byteCount) }

  /// Maps `byteCount` bytes of a file from `offset` (a multiple of the page size), shared.
  public static func shared(
    _ fd: borrowing OwnedFD, offset: UInt64 = 0, byteCount: Int, writable: Bool = true, reserve: Bool = false
  ) throws(SystemError) -> MemoryMapping {
    guard byteCount > 0, let fileOffset = Int(exactly: offset) else { throw SystemError("map memory", .invalid) }
    let protection = writable ? PROT_READ | PROT_WRITE : PROT_READ
    let flags = MAP_SHARED | (reserve ? 0 : MAP_NORESERVE)
    // SAFETY: a new mapping at an address of the kernel's choice; nothing of ours is replaced.
    let address = unsafe mmap(nil, byteCount, protection, flags, fd.rawValue, fileOffset)
    guard let base = unsafe address, unsafe base != MAP_FAILED else { throw SystemError("map memory", Errno.current) }
    return unsafe MemoryMapping(baseAddress: base, byteCount: byteCount)
  }

  /// Private zero pages.
  public static func anonymous(byteCount: Int) throws(SystemError) -> MemoryMapping {
    guard byteCount > 0 else { throw SystemError("map memory", .invalid) }
    // SAFETY: as above.
    let address = unsafe mmap(nil, byteCount, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0)
    guard let base = unsafe address, unsafe base != MAP_FAILED else { throw SystemError("map memory", Errno.current) }
    return unsafe MemoryMapping(baseAddress: base, byteCount: byteCount)
  }

  /// `madvise(2)` on the whole mapping; advice the kernel does not know is ignored.
  public func advise(_ advice: CInt) { _ = unsafe madvise(baseAddress, byteCount, advice) }
}

/// Anonymous shareable memory with a descriptor (`memfd_create(2)`).
public enum SharedMemory {
  /// Seals a peer may rely on: the file can be neither shortened nor lengthened, and no seal can be added.
  public static let sizeSeals: CInt = 0x0001 | 0x0002 | 0x0004  // F_SEAL_SEAL | F_SEAL_SHRINK | F_SEAL_GROW

  /// A memfd of exactly `byteCount` bytes, sealed so that no holder can change its size (linux/memfd.h, linux/fcntl.h).
  public static func sealed(name: String, byteCount: UInt64, extraFlags: UInt32 = 0) throws(SystemError) -> OwnedFD {
    guard let size = Int(exactly: byteCount) else { throw SystemError("make memory of \(byteCount) bytes", .tooBig) }
    let flags = UInt32(MFD_CLOEXEC) | UInt32(MFD_ALLOW_SEALING) | extraFlags
    let noExecuteSeal: UInt32 = 0x0008  // MFD_NOEXEC_SEAL, Linux 6.3
    // SAFETY: the name is a NUL-terminated copy that lives for the call.
    var result = unsafe clinux_memfd_create(name, flags | noExecuteSeal)
    if result == -EINVAL { result = unsafe clinux_memfd_create(name, flags) }
    let fd = OwnedFD(owning: try checked(result, "create shared memory"))
    if ftruncate(fd.rawValue, size) < 0 { throw SystemError("size shared memory to \(byteCount) bytes", Errno.current) }
    _ = try checked(clinux_fcntl(fd.rawValue, 1033, CLong(sizeSeals)), "seal shared memory")  // F_ADD_SEALS
    return fd
  }

  /// A memfd without size, which grows as it is written and can be sealed.
  public static func growing(name: String) throws(SystemError) -> OwnedFD {
    let flags = UInt32(MFD_CLOEXEC) | UInt32(MFD_ALLOW_SEALING)
    let noExecuteSeal: UInt32 = 0x0008  // MFD_NOEXEC_SEAL, Linux 6.3
    // SAFETY: the name is a NUL-terminated copy that lives for the call.
    var result = unsafe clinux_memfd_create(name, flags | noExecuteSeal)
    if result == -EINVAL { result = unsafe clinux_memfd_create(name, flags) }
    return OwnedFD(owning: try checked(result, "create shared memory"))
  }

  /// Its bytes are what they are from here on: no size, no byte and no seal changes any more.
  public static func seal(_ number: CInt) throws(SystemError) {
    _ = try checked(clinux_fcntl(number, 1033, CLong(sizeSeals | 0x0008)), "seal shared memory")  // F_ADD_SEALS, F_SEAL_WRITE
  }

  /// The seals of a received descriptor, or nil when it is of a kind that has none.
  public static func seals(of fd: borrowing OwnedFD) -> CInt? {
    let result = clinux_fcntl(fd.rawValue, 1034, 0)  // F_GET_SEALS
    return result < 0 ? nil : result
  }

  /// Gives the pages of a range back to the host; they read as zero afterwards (`FALLOC_FL_PUNCH_HOLE`).
  public static func punchHole(_ fd: borrowing OwnedFD, offset: UInt64, byteCount: UInt64) throws(SystemError) {
    guard let start = Int(exactly: offset), let length = Int(exactly: byteCount) else {
      throw SystemError("release memory", .invalid)
    }
    _ = try checked(clinux_punch_hole(fd.rawValue, start, length), "release memory")
  }
}
