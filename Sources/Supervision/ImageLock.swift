import CLinux
import Glibc
import HostSystem

/// The locks on a disk's image (`F_OFD_SETLK`), in two parts, so that one process can take over from another while nobody else
/// can come between them:
///
/// - **The owner's byte**, far behind any data: write-locked by the VM as long as it has the disk, through an open file that
///   nothing is read or written through. Another VM's disk, read-only or not, wants to lock everything and is refused.
/// - **All before it**: read-locked by the open file of each process that may have writes under way, and released by the kernel
///   when the last of them has ended. Two processes of a VM can have it at once; whoever wants to know that none is left (the
///   fence) asks for it alone. QEMU's own locks lie in there, and refuse both directions.
package enum ImageLock {
  private static let ownerByte: Int64 = 1 << 62

  package enum Outcome {
    case had
    /// Somebody else has a lock.
    case refused
    case failed(Errno)
  }

  /// Everything, for a first user.
  static func takeAll(_ fd: CInt) -> Outcome { outcome(LockHolder.lock(fd, toRead: false)) }

  /// Everything, for one of many who only read.
  static func takeToRead(_ fd: CInt) -> Outcome { outcome(LockHolder.lock(fd, toRead: true)) }

  /// The owner's byte alone.
  static func own(_ fd: CInt) -> Outcome { outcome(clinux_ofd_lock_range(fd, CInt(F_WRLCK), ownerByte, 0)) }

  /// For a process that may write, beside others of this VM.
  package static func share(_ fd: CInt) -> Outcome { outcome(clinux_ofd_lock_range(fd, CInt(F_RDLCK), 0, ownerByte)) }

  /// As `share`, once nothing of any other process is under way.
  package static func shareAlone(_ fd: CInt) -> Outcome {
    let alone = outcome(clinux_ofd_lock_range(fd, CInt(F_WRLCK), 0, ownerByte))
    guard case .had = alone else { return alone }
    return share(fd)
  }

  /// Nothing is locked by this open file any more; left as it is where transfers go past the page cache, which may outlast who asked
  /// for them.
  package static func giveUp(_ fd: CInt) {
    let flags = clinux_fcntl(fd, F_GETFL, 0)
    // O_DIRECT on x86-64 (asm-generic/fcntl.h).
    guard flags >= 0, flags & 0o40000 == 0 else { return }
    _ = clinux_ofd_lock(fd, CInt(F_UNLCK))
  }

  /// What `takeAll` took becomes the owner's byte here and the process's part at `process`; nobody gets between.
  static func divide(_ owner: CInt, _ process: CInt) -> Outcome {
    for step in [{ share(owner) }, { share(process) }, { outcome(clinux_ofd_lock_range(owner, CInt(F_UNLCK), 0, ownerByte)) }] {
      let result = step()
      guard case .had = result else { return result }
    }
    return .had
  }

  private static func outcome(_ result: CInt) -> Outcome {
    switch -result {
    case 0: .had
    case EAGAIN, EACCES: .refused
    default: .failed(Errno(-result))
    }
  }
}

/// The open files by which this VM owns its images, by disk. Nothing is read or written through them.
final class ImageClaims {
  private struct Claim {
    let file: FDBox
    let status: FileStatus?
  }

  private var held: [String: Claim] = [:]

  func take(_ disk: String, _ file: consuming OwnedFD) {
    let status = try? file.status()
    held[disk] = Claim(file: FDBox(file), status: status)
  }

  /// What an earlier program of this process took. Behind the supervisor's walls nobody can ask what file it is, nor has to.
  func adopt(_ disk: String, _ file: consuming OwnedFD) { held[disk] = Claim(file: FDBox(file), status: nil) }

  func has(_ disk: String) -> Bool { held[disk] != nil }

  /// What file the VM owns for the disk, whoever serves it; nil where it owns none.
  func status(_ disk: String) -> FileStatus? { held[disk]?.status }

  /// The disk has another image, or is gone.
  func release(_ disk: String) { held[disk] = nil }

  func move(_ disk: String, to other: String) { held[other] = held.removeValue(forKey: disk) }

  /// By disk, for a state; -1 for what another process has.
  var numbers: [(disk: String, number: CInt)] { held.sorted { $0.key < $1.key }.map { ($0.key, $0.value.file.number) } }

  /// Another process has it.
  func know(_ disk: String, _ status: FileStatus?) { held[disk] = Claim(file: FDBox(), status: status) }

  /// In a fork, which knows of them and does not have them: the numbers are others' there.
  func abandon() { for claim in held.values { _ = claim.file.take()?.release() } }
}
