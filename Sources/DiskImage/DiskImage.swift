// DiskImage: bytes of a disk behind one storage protocol, knowing no virtio. `DiskImage` is an opened image (raw files and
// block devices today), shared by all threads that serve it; a `StorageEngine` is one thread's way to read and write it:
// `RingEngine` by io_uring, `ThreadEngine` by ordinary calls in threads where io_uring is missing. `CachedReader` is the way past both for
// data that the host has cached.
//
//     let image = try DiskImage.open("/srv/disk.raw", .init(isReadOnly: false))
//     var engine = try RingEngine(image, depth: 256)          // in the thread that will use it
//     engine.begin(slot, StorageRequest(.read, offset: 0, vectors, count: 1, byteCount: 4096))
//     engine.turn(waiting: true)
//     while let event = engine.nextEvent() { ... }

import CLinux
import Glibc
import HostSystem
import Synchronization

/// An opened image: its file, its size, and what can be done with it.
package final class DiskImage: Sendable {
  package struct Options: Sendable {
    package var isReadOnly = false
    /// Bypass the host's page cache (`O_DIRECT`).
    package var isDirect = false
    /// Others may write the image while it is read here, and nothing is locked. Only with `isReadOnly`.
    package var isShared = false
    /// Data that the host has cached is copied from a mapping of the file, where that is safe.
    package var mapsCache = true
    /// Rings register the image's file: requests cost less, and a dead process's lock stays until its rings have been taken apart.
    package var isRegistered = false
    /// Whoever opened the image has seen to it that nobody else uses it, and that it is meant as it is.
    package var isLocked = false
    /// The image is meant as it is, even if it begins like one in another format.
    package var isRaw = false

    /// The image is still another process's: it is locked by `claim`, before the first request.
    package var isLockedLater: Bool
    /// The disk is a whole number of so many bytes: the block that the guest is to see, a power of two from 512 on.
    package var unit = 512

    package init(
      isReadOnly: Bool = false, isDirect: Bool = false, isShared: Bool = false, mapsCache: Bool = true, isLockedLater: Bool = false
    ) {
      self.isLockedLater = isLockedLater
      self.isReadOnly = isReadOnly
      self.isDirect = isDirect
      self.isShared = isShared
      self.mapsCache = mapsCache
    }
  }

  package let file: OwnedFD
  /// What the image is called in messages.
  package let name: String
  private let size: Atomic<UInt64>
  /// Bytes a guest can address: a multiple of `unit`. Changes only in `lookAgain`.
  package var byteCount: UInt64 { size.load(ordering: .relaxed) }
  private let unit: Int
  private let isDevice: Bool
  /// The file system is a process (FUSE). It may answer with less than there is, of which io_uring makes wrong bytes (Linux 6.18), and
  /// it takes its time in the place of whoever asks it not to: nothing for a ring.
  package let isServedByProcess: Bool
  /// The image's file mapped for reading; nil where that cannot be or is not wanted.
  let cachedWindows: CachedWindows?
  /// Smallest unit the storage transfers, 512 to 65536 bytes. With `isDirect` a request must be a multiple of it.
  package let logicalBlockSize: Int
  /// Unit the storage works in best, at least `logicalBlockSize`.
  package let physicalBlockSize: Int
  package let isReadOnly: Bool
  package let isDirect: Bool
  package let isRegistered: Bool
  /// Ranges can be given back to the host (`FALLOC_FL_PUNCH_HOLE`); those of a file read as zeros afterwards.
  package let canPunchHoles: Bool
  /// The device destroys ranges with all copies it keeps of them (`BLKSECDISCARD`).
  package let canSecureErase: Bool
  /// Ranges can be made zero without transferring zeros.
  package var canWriteZeroes: Bool { isDevice || canPunchHoles }
  /// What the file system said when it was first asked for: nothing tells without changing the file.
  private let hasNoZeroing: Atomic<Bool>
  private let hasNoAllocation = Atomic(false)
  /// As far as is known ranges can be zeroed keeping their storage (`FALLOC_FL_ZERO_RANGE`).
  var zeroesRanges: Bool { !hasNoZeroing.load(ordering: .relaxed) }
  /// As far as is known ranges can be given storage (`fallocate` as such).
  var allocatesRanges: Bool { !hasNoAllocation.load(ordering: .relaxed) }

  /// Some requests are orders to the device that neither io_uring nor `fallocate` gives.
  package var takesControl: Bool { isDevice && (canPunchHoles || canSecureErase) }

  /// How else to do what a hole was to do, on a device that refuses to make one.
  func insteadOfHole(_ operation: StorageOperation) -> TransferState.Step? {
    switch operation {
    case .discard where isDevice: .control(DeviceControl.discard)
    case .zeroAndUnmap where isDevice: .allocate(mode: FallocateMode.zeroRange)
    default: nil
    }
  }

  /// How else to keep the storage of a range that reads as zeros, where the file system has just refused `step`.
  func insteadOfZeroing(_ step: TransferState.Step) -> TransferState.Step? {
    guard step == .allocate(mode: FallocateMode.zeroRange), canPunchHoles, !isDevice else { return nil }
    hasNoZeroing.store(true, ordering: .relaxed)
    return .allocate(mode: FallocateMode.punchHole)
  }

  /// The file system cannot give a range storage that it has just taken from it.
  func noteNoAllocation() { hasNoAllocation.store(true, ordering: .relaxed) }

  /// No storage at all: every request is done at once, reads bring nothing. For measuring what lies around the storage.
  package let isNull: Bool

  private let hasLock: Atomic<Bool>
  /// Every sync of the file goes through it.
  let gate = SyncGate()
  let end = FileEnd()
  private let failedSync = Atomic<Bool>(false)
  /// Which file it is, among all of the host; nil without storage.
  private let identity: FileStatus?
  /// Where a failed sync is noted for processes to come.
  private let failureNotes = Mutex<[QueueCounters]>([])

  /// The kernel reports a lost write once. From then on nothing can be promised to be stable, so every later flush fails
  /// until the image is opened again.
  package var hasFailedSync: Bool { failedSync.load(ordering: .relaxed) }
  package func noteFailedSync(_ error: Errno) {
    failureNotes.withLock { notes in
      if let identity { for note in notes { note.noteFailed(identity) } }
    }
    if !failedSync.exchange(true, ordering: .relaxed) {
      Log.error("Writing disk image \(name) to stable storage failed: \(error.explanation); all flushes fail from now on")
    }
  }

  /// What is noted there of this image's file by a process before is true of this one too: its new open file hears nothing of
  /// what the kernel has told another. From now on it is noted there.
  package func keepFailures(in counters: QueueCounters) {
    guard let identity else { return }
    failureNotes.withLock { notes in
      if !notes.contains(where: { $0 === counters }) { notes.append(counters) }
      if hasFailedSync { for note in notes { note.noteFailed(identity) } }
    }
    guard counters.saysFailed(identity), !failedSync.exchange(true, ordering: .relaxed) else { return }
    Log.error(
      "Writing disk image \(name) to stable storage failed before this process began; all flushes fail until the disk has another image")
  }

  /// Opens an image by path.
  package static func open(_ path: String, _ options: Options) throws(DiskImageError) -> DiskImage {
    let flags = options.isReadOnly ? O_RDONLY : O_RDWR
    let exclusive = options.isReadOnly ? 0 : exclusiveFlag(path)
    for attempt in 0...lockAttempts {
      let fd: OwnedFD
      do {
        // Not blocking, so that a named pipe in the place of an image cannot hold us; regular files and disks ignore it.
        fd = try OwnedFD.open(path, flags | O_NONBLOCK | exclusive)
      } catch {
        guard error.errno == .busy, exclusive != 0 else { throw .cannotOpen(path, error.errno) }
        // As for a lock: requests of a process that was killed hold its open file until they have come back.
        if let status = try? OwnedFD.open(path, O_RDONLY | O_NONBLOCK).status(), let holder = LockHolder.describe(of: status) {
          throw .inUse(path, holder: holder)
        }
        if attempt < lockAttempts { _ = poll(nil, 0, 20) }
        continue
      }
      return try DiskImage(fd, name: path, options)
    }
    throw .inUse(path, holder: "the host (as a mounted file system?) or by another program")
  }

  /// A block device has as many files as there are nodes for it, and locks belong to files: a writer keeps others out by the device's own
  /// means (open(2) on `O_EXCL`), mounts too.
  private static func exclusiveFlag(_ path: String) -> CInt {
    var status = stat()
    // SAFETY: the call fills the structure.
    return unsafe stat(path, &status) == 0 && status.st_mode & S_IFMT == S_IFBLK ? O_EXCL : 0
  }

  /// Takes an opened image. The access mode of the descriptor must allow what is asked for.
  package init(_ fd: consuming OwnedFD, name: String, _ options: Options) throws(DiskImageError) {
    let facts = try Self.examine(fd, name, options)
    file = fd
    self.name = name
    size = Atomic(facts.byteCount)
    unit = max(options.unit, facts.logicalBlockSize)
    isDevice = facts.isDevice
    isServedByProcess = facts.isServedByProcess
    cachedWindows = facts.isMappable && options.mapsCache && !options.isDirect && !options.isShared ? CachedWindows() : nil
    logicalBlockSize = facts.logicalBlockSize
    physicalBlockSize = facts.physicalBlockSize
    isReadOnly = options.isReadOnly
    isDirect = options.isDirect
    isRegistered = options.isRegistered
    canPunchHoles = facts.canPunchHoles
    canSecureErase = facts.canSecureErase
    hasNoZeroing = Atomic(false)
    isNull = false
    identity = facts.identity
    hasLock = Atomic(!options.isLockedLater || options.isShared || options.isLocked)
  }

  /// Before the first request to an image that was opened while it was another's: it must be ours alone now. Whoever started
  /// this process has taken the lock on the open file that we share with it; then this is a look, else it is refused.
  package func claim() throws(DiskImageError) {
    guard !hasLock.load(ordering: .relaxed) else { return }
    let result = LockHolder.lock(file.rawValue, toRead: isReadOnly)
    if result == -EAGAIN || result == -EACCES { throw .inUse(name, holder: nil) }
    if result < 0 { throw .cannotOpen(name, Errno(-result)) }
    hasLock.store(true, ordering: .relaxed)
  }

  /// A disk without storage, of so many bytes (a multiple of 512, at least one sector).
  package init(nullOf byteCount: UInt64) throws(DiskImageError) {
    let name = "without storage"
    guard byteCount >= 512 else { throw .tooSmall(name, byteCount: byteCount, unit: 512) }
    guard byteCount <= UInt64(Int64.max) else { throw .tooLarge(name, byteCount: byteCount) }
    do { file = try OwnedFD.open("/dev/null", O_RDWR) } catch { throw .cannotOpen("/dev/null", error.errno) }
    self.name = name
    size = Atomic(byteCount - byteCount % 512)
    unit = 512
    isDevice = false
    isServedByProcess = false
    cachedWindows = nil
    logicalBlockSize = 512
    physicalBlockSize = 4096
    isReadOnly = false
    isDirect = false
    isRegistered = false
    canPunchHoles = true
    canSecureErase = false
    hasNoZeroing = Atomic(false)
    isNull = true
    identity = nil
    hasLock = Atomic(true)
  }

  /// `O_DIRECT` on x86-64 (asm-generic/fcntl.h).
  private static let directFlag: CInt = 0o40000

  private struct Facts {
    var byteCount: UInt64 = 0
    var logicalBlockSize = 512
    var physicalBlockSize = 512
    var canPunchHoles = false
    var canSecureErase = false
    var isDevice = false
    var isMappable = false
    var isServedByProcess = false
    var identity: FileStatus?
  }

  /// Takes the image's size anew, after somebody has made it longer or shorter; true if it has changed.
  package func lookAgain() throws(DiskImageError) -> Bool {
    if isNull { return false }
    return try end.reset { () throws(DiskImageError) in
      var byteCount: UInt64 = 0
      if isDevice {
        // SAFETY: the call writes one 64-bit number.
        let result = unsafe clinux_ioctl_pointer(file.rawValue, 0x8008_1272, &byteCount)  // BLKGETSIZE64
        if result < 0 { throw .cannotOpen(name, Errno(-result)) }
      } else {
        do throws(SystemError) { byteCount = try file.status().byteCount } catch { throw .cannotOpen(name, error.errno) }
      }
      guard byteCount >= UInt64(unit) else { throw .tooSmall(name, byteCount: byteCount, unit: unit) }
      guard byteCount <= UInt64(Int64.max) else { throw .tooLarge(name, byteCount: byteCount) }
      let visible = byteCount - byteCount % UInt64(unit)
      return size.exchange(visible, ordering: .relaxed) != visible
    }
  }

  /// Whether the image can be cut off without its device saying so.
  var canLoseItsEnd: Bool { !isDevice && !isNull }

  /// Looks how long the file is. Where it is shorter than the disk, `end` allows no more than there is from now on.
  func lookAtEnd() {
    guard canLoseItsEnd else { return }
    let found = clinux_file_size(file.rawValue)
    // An error will be the request's too.
    guard found >= 0, UInt64(found) < byteCount else { return }
    guard end.isShort(UInt64(found), { byteCount }) else { return }
    Log.error(
      "Disk image \(name) has been cut off: it has \(found) bytes, and the disk has \(byteCount); requests behind its end fail. If that "
        + "was meant, make the disk look again (SIGHUP, or martlet ctl resize-disk)")
  }

  /// Bytes of the disk that are in the file now, at least; 0 where that cannot be told.
  var wholeByteCount: UInt64 {
    lookAtEnd()
    return end.allowed
  }

  /// Local file systems whose mappings and writes share one cache: ext2/3/4, xfs, btrfs, f2fs (linux/magic.h). Not tmpfs, where
  /// reading a hole through a mapping fills it.
  private static let mappableFileSystems: Set<Int> = [0xEF53, 0x5846_5342, 0x9123_683E, 0xF2F5_2010]

  private static func examine(_ fd: borrowing OwnedFD, _ name: String, _ options: Options) throws(DiskImageError) -> Facts {
    let flags = clinux_fcntl(fd.rawValue, F_GETFL, 0)
    guard flags >= 0 else { throw .cannotOpen(name, Errno(-flags)) }
    let mode = flags & O_ACCMODE
    guard mode == O_RDWR || (options.isReadOnly && mode == O_RDONLY) else { throw .wrongAccessMode(name, writable: !options.isReadOnly) }
    if options.isDirect, flags & directFlag == 0 {
      let result = clinux_fcntl(fd.rawValue, F_SETFL, CLong(flags | directFlag))
      guard result >= 0 else { throw .noDirectAccess(name, Errno(-result)) }
    }
    // A left-over O_NONBLOCK would make transfers fail that have to wait.
    do { try fd.setNonBlocking(false) } catch { throw .cannotOpen(name, error.errno) }
    var facts = Facts()
    let status: FileStatus
    do { status = try fd.status() } catch { throw .cannotOpen(name, error.errno) }
    facts.identity = status
    switch status.kind {
    case .regular:
      facts.byteCount = status.byteCount
      facts.physicalBlockSize = status.blockSize >= 512 && status.blockSize <= 65536 ? status.blockSize : 4096
      let fileSystem = clinux_file_system(fd.rawValue)
      facts.isMappable = mappableFileSystems.contains(fileSystem)
      facts.isServedByProcess = fileSystem == 0x6573_5546  // FUSE_SUPER_MAGIC
    case .blockDevice:
      try examineDevice(fd, name, &facts)
      facts.isDevice = true
    default:
      throw .wrongKind(name)
    }
    // Before anything is asked that could touch what the lock's holder does.
    if !options.isShared, !options.isLocked, !options.isLockedLater { try lock(fd, name, options) }
    // Behind the lock of whoever serves it a guest may write what it likes: only who opens the image for the first time asks.
    if !options.isRaw, !options.isLocked, !options.isLockedLater, let format = ImageFormat.told(by: fd) {
      throw .otherFormat(name, format)
    }
    if options.isDirect, !facts.isDevice { facts.logicalBlockSize = try directUnit(fd, name) }
    facts.physicalBlockSize = max(facts.physicalBlockSize, facts.logicalBlockSize)
    let unit = UInt64(max(options.unit, facts.logicalBlockSize))
    guard facts.byteCount >= unit else { throw .tooSmall(name, byteCount: facts.byteCount, unit: Int(unit)) }
    // off_t is signed, and sectors are counted in 64 bits: nothing above can be addressed.
    guard facts.byteCount <= UInt64(Int64.max) else { throw .tooLarge(name, byteCount: facts.byteCount) }
    if facts.byteCount % unit != 0 {
      Log.warning(
        "Disk image \(name) has \(facts.byteCount) bytes, not a multiple of \(unit): the last \(facts.byteCount % unit) are not visible "
          + "to the guest")
      facts.byteCount -= facts.byteCount % unit
    }
    if !options.isReadOnly {
      facts.canPunchHoles = facts.isDevice ? DeviceControl.takes(DeviceControl.discard, fd) : takesHoles(fd, status.byteCount)
      facts.canSecureErase = facts.isDevice && DeviceControl.takes(DeviceControl.secureErase, fd)
    }
    return facts
  }

  /// The least that the storage of a file transfers past the page cache, as it says, or else by what it lets us read.
  private static func directUnit(_ fd: borrowing OwnedFD, _ name: String) throws(DiskImageError) -> Int {
    let told = Int(clinux_direct_unit(fd.rawValue))
    if (1...65536).contains(told), told & (told - 1) == 0 { return max(512, told) }
    var memory: UnsafeMutableRawPointer?
    // SAFETY: `memory` is ours, and has room for the greatest unit.
    guard unsafe posix_memalign(&memory, 65536, 65536) == 0, let buffer = unsafe memory else { throw .cannotOpen(name, .noMemory) }
    defer { unsafe free(buffer) }
    var unit = 512
    while unit <= 65536 {
      // SAFETY: as above.
      if unsafe pread(fd.rawValue, buffer, unit, 0) >= 0 { return unit }
      guard Errno.current == .invalid else { break }
      unit *= 2
    }
    // Whatever is wrong is for the requests to say.
    return 512
  }

  private static func examineDevice(_ fd: borrowing OwnedFD, _ name: String, _ facts: inout Facts) throws(DiskImageError) {
    var size: UInt64 = 0
    var logical: CInt = 0
    var physical: CUnsignedInt = 0
    // SAFETY: each call writes one number of the size its definition in linux/fs.h names.
    let results = unsafe [
      clinux_ioctl_pointer(fd.rawValue, 0x8008_1272, &size),  // BLKGETSIZE64
      clinux_ioctl_pointer(fd.rawValue, 0x1268, &logical),  // BLKSSZGET
      clinux_ioctl_pointer(fd.rawValue, 0x127B, &physical),  // BLKPBSZGET
    ]
    if let failed = results.first(where: { $0 < 0 }) { throw .cannotOpen(name, Errno(-failed)) }
    guard (512...65536).contains(logical), logical & (logical - 1) == 0 else { throw .oddBlockSize(name, Int(logical)) }
    facts.byteCount = size - size % UInt64(logical)
    facts.logicalBlockSize = Int(logical)
    facts.physicalBlockSize = max(Int(logical), Int(clamping: physical))
  }

  /// Asks the file system without changing anything: a hole where there is nothing is none. So far behind the end that nobody writes
  /// there meanwhile, a copy that is still under way included; nearer only where the file system ends before.
  private static func takesHoles(_ fd: borrowing OwnedFD, _ byteCount: UInt64) -> Bool {
    for distance in [1 << 30, 1 << 24] {
      let (place, overflows) = Int(clamping: byteCount / 4096 * 4096).addingReportingOverflow(distance)
      guard !overflows else { continue }
      let result = clinux_fallocate(fd.rawValue, FallocateMode.punchHole, place, 4096)
      if result != -EFBIG, result != -EINVAL { return result == 0 }
    }
    return false
  }

  /// For two seconds, 20 ms apart.
  private static let lockAttempts = 100

  /// One writer, or many readers (`F_OFD_SETLK` over the whole file): the lock belongs to the open file, so it is released
  /// exactly when nobody can write any more, in-flight operations included.
  private static func lock(_ fd: borrowing OwnedFD, _ name: String, _ options: Options) throws(DiskImageError) {
    var result = LockHolder.lock(fd.rawValue, toRead: options.isReadOnly)
    // A process that was killed is gone before the kernel has finished what it had begun, and the lock stays until then,
    // with nobody who has it.
    for _ in 0..<lockAttempts where result == -EAGAIN || result == -EACCES {
      if let status = try? fd.status(), let holder = LockHolder.describe(of: status) { throw .inUse(name, holder: holder) }
      _ = poll(nil, 0, 20)
      result = LockHolder.lock(fd.rawValue, toRead: options.isReadOnly)
    }
    if result == -EAGAIN || result == -EACCES { throw .inUse(name, holder: nil) }
    if result < 0 { Log.warning("Disk image \(name) cannot be locked (\(Errno(-result).explanation)): a second user will not be noticed") }
  }
}

/// Mode bits of `fallocate(2)` (linux/falloc.h); the size is always kept.
package enum FallocateMode {
  package static let keepSize: CInt = 0x01
  package static let punchHole: CInt = 0x01 | 0x02
  package static let zeroRange: CInt = 0x01 | 0x10
}

/// Orders to a block device for a range of it (linux/fs.h).
enum DeviceControl {
  /// `BLKDISCARD`
  static let discard: UInt = 0x1277
  /// `BLKSECDISCARD`
  static let secureErase: UInt = 0x127D

  /// Whether the device takes the order: it is given for a range that is none, and the device is asked about before the range is.
  static func takes(_ order: UInt, _ fd: borrowing OwnedFD) -> Bool { give(order, fd, offset: 1, byteCount: 1) == -Int(EINVAL) }

  /// Zero, or a negated errno.
  static func give(_ order: UInt, _ fd: borrowing OwnedFD, offset: UInt64, byteCount: UInt64) -> Int {
    var range = (offset, byteCount)
    // SAFETY: both orders read two 64-bit numbers.
    return unsafe Int(clinux_ioctl_pointer(fd.rawValue, order, &range))
  }
}

/// Why an image cannot be used.
package enum DiskImageError: Error, Sendable, CustomStringConvertible {
  case cannotOpen(String, Errno)
  /// Neither a regular file nor a block device.
  case wrongKind(String)
  /// The descriptor was opened for less than is asked for.
  case wrongAccessMode(String, writable: Bool)
  /// Less than one block.
  case tooSmall(String, byteCount: UInt64, unit: Int)
  /// More than a file offset can say.
  case tooLarge(String, byteCount: UInt64)
  case oddBlockSize(String, Int)
  /// The file system has no `O_DIRECT`.
  case noDirectAccess(String, Errno)
  /// It begins like an image that is more than a disk's bytes.
  case otherFormat(String, ImageFormat)
  /// Another process has it open for writing, or we want to write and another one reads; that process, if /proc tells.
  case inUse(String, holder: String?)

  package var description: String {
    switch self {
    case .cannotOpen(let name, let errno): "Cannot open disk image \(name): \(errno.explanation)"
    case .wrongKind(let name): "Disk image \(name) is neither a regular file nor a block device"
    case .wrongAccessMode(let name, let writable):
      "The descriptor of disk image \(name) is not open for \(writable ? "reading and writing; open it so, or use --read-only" : "reading")"
    case .tooSmall(let name, let count, let unit): "Disk image \(name) has \(count) bytes; a disk has at least one block of \(unit)"
    case .tooLarge(let name, let count): "Disk image \(name) has \(count) bytes, more than can be addressed"
    case .oddBlockSize(let name, let size): "Disk \(name) has the impossible block size \(size)"
    case .noDirectAccess(let name, let errno):
      "Disk image \(name) cannot be used without the page cache on its file system: \(errno.explanation); leave out --direct"
    case .otherFormat(let name, let format):
      "Disk image \(name) is in the format \(format.rawValue), and only raw images are served; convert it (qemu-img convert -O raw), or add "
        + "--blk-format=raw if its bytes are the disk"
    case .inUse(let name, let holder):
      "Disk image \(name) is in use by \(holder ?? "another process"); stop that one, or use --read-only in both"
    }
  }
}
