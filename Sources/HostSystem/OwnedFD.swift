import Glibc
import CLinux

/// A file descriptor with exactly one owner; closed when the owner ends. Lend it by borrowing, give it by consuming.
@safe
public struct OwnedFD: ~Copyable, Sendable {
  /// The number, for a call to the kernel. Never store it: the owner decides how long it is valid.
  public let rawValue: CInt

  /// Takes ownership of an open descriptor.
  public init(owning rawValue: CInt) {
    precondition(rawValue >= 0, "An owned descriptor is open.")
    self.rawValue = rawValue
  }

  deinit {
    // SAFETY: nobody changes it while there is more than one thread.
    if let putOff = unsafe Self.putOffClosing, putOff(rawValue) { return }
    _ = close(rawValue)
  }

  /// Takes a descriptor over that is to be closed, and says true, or leaves it alone. Set once, before there are threads, by a program
  /// whose successor may still need the number.
  package nonisolated(unsafe) static var putOffClosing: (@Sendable (CInt) -> Bool)?

  /// Ends ownership without closing; the caller owns the number from here.
  public consuming func release() -> CInt {
    let value = rawValue
    discard self
    return value
  }

  /// A second descriptor of the same open file description (`F_DUPFD_CLOEXEC`).
  public borrowing func duplicate() throws(SystemError) -> OwnedFD {
    OwnedFD(owning: try checked(clinux_fcntl(rawValue, F_DUPFD_CLOEXEC, 3), "duplicate descriptor \(rawValue)"))
  }
}

extension OwnedFD {
  /// Opens a path; `O_CLOEXEC` is always added.
  public static func open(_ path: String, _ flags: CInt, mode: UInt32 = 0o600) throws(SystemError) -> OwnedFD {
    // SAFETY: the path is a NUL-terminated copy that lives for the call.
    let result = retrying { unsafe clinux_open(path, flags | O_CLOEXEC, mode) }
    return OwnedFD(owning: try checked(result, "open \(path)"))
  }

  /// As `open`, for a path that a person has named: a symbolic link that belongs neither to root nor to us is not followed, because its
  /// owner could lead us anywhere by it. `.foreignLink` says so.
  package static func openNamed(_ path: String, _ flags: CInt, mode: UInt32 = 0o600) throws(SystemError) -> OwnedFD {
    // SAFETY: the path is a NUL-terminated copy that lives for the call.
    let result = retrying { unsafe clinux_open_named(path, flags | O_CLOEXEC, mode) }
    return OwnedFD(owning: try checked(result, "open \(path)"))
  }

  /// Adopts a descriptor inherited at start (launch contract), checking that it is open and making it close-on-exec.
  public static func inherited(_ number: CInt) throws(SystemError) -> OwnedFD {
    guard number >= 0 else { throw SystemError("use descriptor \(number)", Errno(EBADF)) }
    let flags = try checked(clinux_fcntl(number, F_GETFD, 0), "use inherited descriptor \(number)")
    _ = clinux_fcntl(number, F_SETFD, CLong(flags | FD_CLOEXEC))
    return OwnedFD(owning: number)
  }

  public borrowing func setNonBlocking(_ on: Bool) throws(SystemError) {
    let flags = try checked(clinux_fcntl(rawValue, F_GETFL, 0), "read descriptor flags")
    let wanted = on ? flags | O_NONBLOCK : flags & ~O_NONBLOCK
    if wanted != flags { _ = try checked(clinux_fcntl(rawValue, F_SETFL, CLong(wanted)), "set descriptor flags") }
  }
}

/// What a read or write on a descriptor came to.
public enum Transfer: Equatable, Sendable {
  /// So many bytes were moved (at least one, unless none were asked for).
  case bytes(Int)
  /// The other side is gone or the file ends here.
  case end
  /// Nothing can be moved now; wait for readiness.
  case wouldBlock
  case failed(Errno)
}

extension OwnedFD {
  private static func transfer(_ result: Int, _ asked: Int) -> Transfer {
    if result > 0 || (result == 0 && asked == 0) { return .bytes(result) }
    if result == 0 { return .end }
    let error = Errno(unsafe __errno_location().pointee)
    return error == .again ? .wouldBlock : .failed(error)
  }

  /// `read(2)`, repeated when interrupted.
  public borrowing func read(into buffer: UnsafeMutableRawBufferPointer) -> Transfer {
    while true {
      // SAFETY: the buffer is the caller's, writable for its whole count.
      let result = unsafe Glibc.read(rawValue, buffer.baseAddress, buffer.count)
      let outcome = Self.transfer(result, buffer.count)
      if outcome != .failed(.interrupted) { return outcome }
    }
  }

  /// `write(2)`, repeated when interrupted.
  public borrowing func write(_ buffer: UnsafeRawBufferPointer) -> Transfer {
    while true {
      // SAFETY: the buffer is the caller's, readable for its whole count.
      let result = unsafe Glibc.write(rawValue, buffer.baseAddress, buffer.count)
      let outcome = Self.transfer(result, buffer.count)
      if outcome != .failed(.interrupted) { return outcome }
    }
  }

  /// Writes all bytes, waiting as long as it takes (set-up and tools only, never on an event loop).
  public borrowing func writeAll(_ bytes: [UInt8]) throws(SystemError) {
    var done = 0
    while done < bytes.count {
      // SAFETY: the range done..<count lies inside the array, which is not changed meanwhile.
      let outcome = unsafe bytes.withUnsafeBytes { all in unsafe write(UnsafeRawBufferPointer(rebasing: all[done...])) }
      switch outcome {
      case .bytes(let count): done += count
      case .end: throw SystemError("write", .brokenPipe)
      case .wouldBlock: try waitUntil(.writable)
      case .failed(let error): throw SystemError("write", error)
      }
    }
  }

  /// Waits until the descriptor is ready, at most `timeout`; false when the time passed first.
  @discardableResult
  public borrowing func waitUntil(_ readiness: Readiness, timeout: Duration? = nil) throws(SystemError) -> Bool {
    var entry = pollfd(fd: rawValue, events: Int16(truncatingIfNeeded: readiness.rawValue), revents: 0)
    let milliseconds = timeout.map { CInt(clamping: ($0.nanoseconds + 999_999) / 1_000_000) } ?? -1
    // SAFETY: one pollfd, alive for the call.
    let result = unsafe poll(&entry, 1, milliseconds)
    if result < 0 {
      let error = Errno(unsafe __errno_location().pointee)
      if error == .interrupted { return false }
      throw SystemError("poll descriptor \(rawValue)", error)
    }
    return result > 0
  }

  /// Reads the whole of a small regular or virtual file (`/proc`, `/sys`), up to `limit` bytes.
  public borrowing func readToEnd(limit: Int) throws(SystemError) -> [UInt8] {
    var bytes: [UInt8] = []
    var chunk = [UInt8](repeating: 0, count: 4096)
    while bytes.count < limit {
      switch unsafe chunk.withUnsafeMutableBytes({ buffer in unsafe read(into: buffer) }) {
      case .bytes(let count): bytes.append(contentsOf: chunk[..<min(count, limit - bytes.count)])
      case .end: return bytes
      case .wouldBlock: return bytes
      case .failed(let error): throw SystemError("read", error)
      }
    }
    return bytes
  }

  /// The kind and size of the open file (`fstat`).
  public borrowing func status() throws(SystemError) -> FileStatus {
    var raw = stat()
    // SAFETY: `raw` is ours and alive for the call.
    // The call itself: glibc makes a path-taking one of it, which no sandboxed process may make.
    _ = try checked(unsafe clinux_fstat(rawValue, &raw), "stat")
    return FileStatus(raw)
  }
}

/// The part of `struct stat` that Martlet looks at.
public struct FileStatus: Sendable {
  public enum Kind: Sendable { case regular, directory, blockDevice, characterDevice, socket, pipe, other }
  public let kind: Kind
  /// Bytes; 0 for devices.
  public let byteCount: UInt64
  public let mode: UInt32
  public let device: UInt64
  /// Of a device file, the device it stands for.
  public let specialDevice: UInt64
  public let inode: UInt64
  /// Of a device node, the device that it stands for; 0 for everything else.
  public let representedDevice: UInt64
  /// Preferred I/O size in bytes (`st_blksize`); the huge page size on hugetlbfs.
  public let blockSize: Int

  /// Whether both are of one file, whatever its names.
  public func isSameFile(as other: FileStatus) -> Bool { device == other.device && inode == other.inode }

  /// Of a file that is only to be recognised.
  package init(device: UInt64, inode: UInt64) {
    self.device = device
    self.inode = inode
    kind = .other
    byteCount = 0
    mode = 0
    specialDevice = 0
    representedDevice = 0
    blockSize = 0
  }

  init(_ raw: stat) {
    switch raw.st_mode & 0o170000 {
    case 0o100000: kind = .regular
    case 0o040000: kind = .directory
    case 0o060000: kind = .blockDevice
    case 0o020000: kind = .characterDevice
    case 0o140000: kind = .socket
    case 0o010000: kind = .pipe
    default: kind = .other
    }
    byteCount = UInt64(clamping: raw.st_size)
    mode = raw.st_mode
    device = UInt64(raw.st_dev)
    specialDevice = UInt64(raw.st_rdev)
    inode = UInt64(raw.st_ino)
    representedDevice = UInt64(raw.st_rdev)
    blockSize = Int(raw.st_blksize)
  }
}

extension Duration {
  /// Whole nanoseconds, saturating.
  @inlinable public var nanoseconds: Int64 {
    let (seconds, attoseconds) = components
    let (product, overflow) = seconds.multipliedReportingOverflow(by: 1_000_000_000)
    if overflow { return seconds < 0 ? .min : .max }
    let (sum, overflow2) = product.addingReportingOverflow(attoseconds / 1_000_000_000)
    return overflow2 ? .max : sum
  }
}
