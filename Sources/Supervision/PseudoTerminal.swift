import CLinux
import Glibc
import HostSystem

/// A new pseudo-terminal (`pts(4)`).
struct PseudoTerminal: ~Copyable {
  let master: OwnedFD
  /// Path of the other side.
  let path: String

  init(option: String) throws(SupervisionError) {
    let master = try attempt { () throws(SystemError) in
      try OwnedFD.open("/dev/ptmx", O_RDWR | O_NOCTTY)
    } or: {
      .pseudoTerminal(option: option, $0.errno)
    }
    var unlocked: CInt = 0
    var number: CUnsignedInt = 0
    // SAFETY: TIOCSPTLCK reads an int and TIOCGPTN writes one; both are ours.
    let lock = unsafe clinux_ioctl_pointer(master.rawValue, 0x4004_5431, &unlocked)
    let name = unsafe clinux_ioctl_pointer(master.rawValue, 0x8004_5430, &number)
    guard lock >= 0, name >= 0 else { throw .pseudoTerminal(option: option, Errno(-min(lock, name))) }
    path = "/dev/pts/\(number)"
    self.master = master
  }
}
