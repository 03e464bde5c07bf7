import CLinux
import ControlProtocol
import Glibc
import HostSystem

/// Opens what the command line names. Each failure says which option and file it concerns.
enum HostFiles {
  static func kvm() throws(SupervisionError) -> OwnedFD {
    do { return try OwnedFD.open("/dev/kvm", O_RDWR) } catch {
      throw error.errno == .noEntry ? .noKVM : .kvmDenied(error.errno)
    }
  }

  /// A kernel or initramfs: a regular file with something in it.
  static func payload(_ path: String, what: String, memory: UInt64) throws(SupervisionError) -> OwnedFD {
    // Non-blocking, so that a named pipe does not hold us up before it is refused.
    let fd = try open(path, O_RDONLY | O_NONBLOCK, what: what)
    let status = try examine(fd)
    guard status.kind == .regular else { throw .wrongKind(what: what, path: path, wants: "a regular file") }
    guard status.byteCount > 0 else { throw .empty(what: what, path: path) }
    guard status.byteCount < memory else {
      throw .tooLarge(what: what, path: path, byteCount: status.byteCount, memory: memory)
    }
    try clearNonBlocking(fd)
    return fd
  }

  /// A disk image or block device, locked against other users (`ImageLock`): what its process gets. The VM's own part goes to
  /// `claims`.
  /// - Parameters:
  ///   - isShared: no lock; others may write.
  ///   - isRaw: its bytes are the disk, whatever they look like.
  static func image(
    _ path: String, readOnly: Bool, isShared: Bool = false, isRaw: Bool, disk: String, claimedAs name: String? = nil,
    _ claims: ImageClaims
  ) throws(SupervisionError) -> OwnedFD {
    let what = "image of disk \(disk)"
    // O_EXCL without O_CREAT claims a block device that is not mounted, and means nothing for a regular file.
    let fd = try open(path, (readOnly ? O_RDONLY : O_RDWR | O_EXCL) | O_NONBLOCK, what: what)
    try checkImage(fd, path, what)
    if !isRaw, let format = ImageFormat.told(by: fd) { throw .otherFormat(disk: disk, path: path, format) }
    guard !isShared, try lock(fd, path, readOnly: readOnly, disk: disk), !readOnly else { return fd }
    let image = try imageAgain(path, readOnly: false, disk: disk, sameAs: try examine(fd))
    guard case .had = ImageLock.divide(fd.rawValue, image.rawValue) else { throw .imageInUse(disk: disk, path: path, holder: nil) }
    claims.take(name ?? disk, fd)
    return image
  }

  /// The image for a process that is to take over from one that lives: the same file, or another one, which becomes the VM's
  /// beside it.
  /// - Parameters:
  ///   - candidate: under which name the VM's own part is kept until then.
  ///   - present: what the disk has now, and what the VM owns for it.
  static func imageBeside(
    _ path: String, readOnly: Bool, isShared: Bool, isRaw: Bool, disk: String, candidate: String, present: [FileStatus],
    _ claims: ImageClaims
  ) throws(SupervisionError) -> OwnedFD {
    let what = "image of disk \(disk)"
    let fd = try open(path, (readOnly ? O_RDONLY : O_RDWR) | O_NONBLOCK, what: what)
    try checkImage(fd, path, what)
    let status = try examine(fd)
    guard present.contains(where: { $0.isSameFile(as: status) }) else {
      return try image(path, readOnly: readOnly, isShared: isShared, isRaw: isRaw, disk: disk, claimedAs: candidate, claims)
    }
    if isShared { return fd }
    if readOnly {
      guard case .refused = ImageLock.takeToRead(fd.rawValue) else { return fd }
      throw .imageInUse(disk: disk, path: path, holder: LockHolder.describe(of: status))
    }
    if case .refused = ImageLock.share(fd.rawValue) { throw .imageInUse(disk: disk, path: path, holder: LockHolder.describe(of: status)) }
    // Somebody else's program has had it until now, without the VM or beside another image that the VM owns.
    if claims.status(disk)?.isSameFile(as: status) != true {
      let owner = try imageAgain(path, readOnly: false, disk: disk, sameAs: status)
      if case .refused = ImageLock.own(owner.rawValue) {
        throw .imageInUse(disk: disk, path: path, holder: LockHolder.describe(of: status))
      }
      claims.take(candidate, owner)
    }
    return fd
  }

  private static func checkImage(_ fd: borrowing OwnedFD, _ path: String, _ what: String) throws(SupervisionError) {
    let kind = try examine(fd).kind
    guard kind == .regular || kind == .blockDevice else {
      throw .wrongKind(what: what, path: path, wants: "a regular file or block device")
    }
    try clearNonBlocking(fd)
  }

  /// The image of a disk opened anew for its next process, which may not use it before `claim` has succeeded.
  static func imageAgain(_ path: String, readOnly: Bool, disk: String, sameAs known: FileStatus?) throws(SupervisionError) -> OwnedFD {
    let what = "image of disk \(disk)"
    let fd: OwnedFD
    do { fd = try OwnedFD.openNamed(path, (readOnly ? O_RDONLY : O_RDWR) | O_NONBLOCK | O_NOCTTY) } catch {
      throw .file(what: what, path: path, error.errno)
    }
    let status = try examine(fd)
    guard let known, status.isSameFile(as: known) else {
      throw .wrongKind(what: what, path: path, wants: "the file it was when the VM started")
    }
    try clearNonBlocking(fd)
    return fd
  }

  /// The fence: takes the lock on an image that was opened by `imageAgain`, for everybody who has this open file. It can be
  /// had once nothing of the process before is under way any more: its requests hold its own open file, and with it the lock,
  /// until the last one has ended. False: not yet.
  static func claim(_ image: CInt, _ path: String, readOnly: Bool, disk: String) throws(SupervisionError) -> Bool {
    switch readOnly ? ImageLock.takeToRead(image) : ImageLock.shareAlone(image) {
    case .had: return true
    case .refused: return false
    // A file system without locks: there is no fence to be had. The disk is not used again.
    case .failed(let error): throw .file(what: "image of disk \(disk)", path: path, error)
    }
  }

  /// Block devices, and ext2/3/4, xfs, btrfs and f2fs (linux/magic.h): without O_DIRECT a write is a copy into the page cache, made by
  /// the caller's thread or by one that the kernel adds to its process. Others may have requests of their own under way for it.
  static func isSynchronous(_ number: CInt) -> Bool {
    guard let status = try? status(number) else { return false }
    return status.kind == .blockDevice || [0xEF53, 0x5846_5342, 0x9123_683E, 0xF2F5_2010].contains(clinux_file_system(number))
  }

  static func status(_ number: CInt) throws(SupervisionError) -> FileStatus {
    let lent = OwnedFD(owning: number)
    let result: Result<FileStatus, SupervisionError>
    do throws(SupervisionError) { result = .success(try examine(lent)) } catch { result = .failure(error) }
    _ = lent.release()
    return try result.get()
  }

  /// How long a lock without a living holder is waited for.
  private static let drainTime = Duration.seconds(3)

  /// A block process that has ended can leave its lock behind for a moment: the kernel keeps the file open until its
  /// ring's last request has come back. Such a lock has no holder in /proc and is waited for; taking the lock then also
  /// proves that no write of the dead process is still under way. A lock with a holder is refused at once.
  /// - Returns: false on a file system without locks.
  private static func lock(
    _ fd: borrowing OwnedFD, _ path: String, readOnly: Bool, disk: String
  ) throws(SupervisionError) -> Bool {
    let end = MonotonicTime.now.advanced(by: drainTime)
    while true {
      switch readOnly ? ImageLock.takeToRead(fd.rawValue) : ImageLock.takeAll(fd.rawValue) {
      case .had: return true
      case .refused:
        let holder = LockHolder.describe(of: try examine(fd), own: "another disk of this VM")
        if holder != nil || .now >= end { throw .imageInUse(disk: disk, path: path, holder: holder) }
        _ = usleep(5000)
      case .failed(let error):
        Log.warning("Image '\(path)' of disk \(disk) cannot be locked (\(error.explanation)); do not use it twice")
        return false
      }
    }
  }

  /// Where a guest's random bytes come from. A regular file is refused: it would give every VM the same ones, and end.
  static func randomSource(_ path: String) throws(SupervisionError) -> OwnedFD {
    let what = "source of --rng"
    // Non-blocking, so that a named pipe does not hold us up before it is refused.
    let fd = try open(path, O_RDONLY | O_NONBLOCK, what: what)
    guard try examine(fd).kind == .characterDevice else {
      throw .wrongKind(what: what, path: path, wants: "a character device such as /dev/urandom")
    }
    try clearNonBlocking(fd)
    return fd
  }

  /// Gives a disk's image a new length, if it is still the file that the VM has and is a regular one.
  static func resize(_ path: String, to byteCount: UInt64, disk: String, sameAs known: FileStatus?) throws(SupervisionError) {
    let what = "image of disk \(disk)"
    let fd = try open(path, O_RDWR | O_NONBLOCK, what: what)
    let status = try examine(fd)
    guard let known, status.isSameFile(as: known) else {
      throw .wrongKind(what: what, path: path, wants: "the file it was when the VM started")
    }
    guard status.kind == .regular else {
      throw .wrongKind(what: what, path: path, wants: "a regular file to give it a size; without a size a disk is looked at again")
    }
    guard let length = Int(exactly: byteCount), ftruncate(fd.rawValue, length) == 0 else {
      throw .file(what: what, path: path, Errno.current)
    }
  }

  /// A directory in which files can be made.
  static func checkDirectory(_ path: String, what: String) throws(SupervisionError) {
    guard try examine(try open(path, pathOnly, what: what)).kind == .directory else {
      throw .wrongKind(what: what, path: path, wants: "a directory")
    }
    // SAFETY: a NUL-terminated copy that lives for the call.
    guard unsafe access(path, W_OK | X_OK) == 0 else { throw .file(what: what, path: path, Errno.current) }
  }

  /// The output of a console: appended to, made if missing.
  static func consoleFile(_ path: String, option: String) throws(SupervisionError) -> OwnedFD {
    do {
      let fd = try OwnedFD.openNamed(path, O_WRONLY | O_CREAT | O_APPEND | O_NOCTTY | O_NONBLOCK, mode: 0o600)
      try fd.setNonBlocking(false)
      return fd
    } catch { throw .file(what: "file of \(option)", path: path, error.errno) }
  }

  /// The host's memory in bytes, by /proc/meminfo; nil when that cannot be read.
  static func totalMemory() -> UInt64? {
    guard let fd = try? OwnedFD.open("/proc/meminfo", O_RDONLY), let bytes = try? fd.readToEnd(limit: 256) else { return nil }
    let words = String(decoding: bytes.prefix { $0 != 10 }, as: UTF8.self).split(separator: " ")
    return words.count == 3 ? UInt64(words[1]).map { $0 << 10 } : nil
  }

  static func null() throws(SupervisionError) -> OwnedFD {
    do { return try OwnedFD.open("/dev/null", O_RDWR) } catch { throw .system(error) }
  }

  private static func open(_ path: String, _ flags: CInt, what: String) throws(SupervisionError) -> OwnedFD {
    do { return try OwnedFD.openNamed(path, flags | O_NOCTTY) } catch {
      if error.errno == Errno(EISDIR) { throw .wrongKind(what: what, path: path, wants: "a file") }
      // A named pipe without a reader, a socket.
      if error.errno == Errno(ENXIO) { throw .wrongKind(what: what, path: path, wants: "a file") }
      throw .file(what: what, path: path, error.errno)
    }
  }

  private static func examine(_ fd: borrowing OwnedFD) throws(SupervisionError) -> FileStatus {
    do { return try fd.status() } catch { throw .system(error) }
  }

  private static func clearNonBlocking(_ fd: borrowing OwnedFD) throws(SupervisionError) {
    do { try fd.setNonBlocking(false) } catch { throw .system(error) }
  }
}
