import CLinux
import Glibc
import HostSystem

/// Characters across and lines down.
package struct WindowSize: Equatable, Sendable {
  package var columns: UInt16
  package var rows: UInt16
  package init(columns: UInt16, rows: UInt16) {
    self.columns = columns
    self.rows = rows
  }

  /// The size of a terminal (`TIOCGWINSZ`), or nil when the descriptor is none or does not know.
  package init?(of fd: borrowing OwnedFD) {
    var raw = winsize()
    // SAFETY: `raw` is ours and of the size the kernel writes.
    let result = unsafe withUnsafeMutablePointer(to: &raw) { pointer in
      unsafe clinux_ioctl_pointer(fd.rawValue, UInt(TIOCGWINSZ), UnsafeMutableRawPointer(pointer))
    }
    guard result >= 0, raw.ws_col > 0, raw.ws_row > 0 else { return nil }
    self.init(columns: raw.ws_col, rows: raw.ws_row)
  }
}

/// A terminal in raw mode: every key goes to the guest, nothing is echoed or translated here. The former mode is put back
/// when the owner ends.
@safe
package struct RawTerminal: ~Copyable {
  private let fd: OwnedFD
  private let former: termios

  /// Nil when the descriptor is no terminal.
  package init?(_ terminal: borrowing OwnedFD) {
    var mode = termios()
    // SAFETY: `mode` is ours and alive for the call.
    guard unsafe tcgetattr(terminal.rawValue, &mode) == 0, let fd = try? terminal.duplicate() else { return nil }
    former = mode
    Self.makeRaw(&mode)
    // SAFETY: as above.
    _ = unsafe tcsetattr(fd.rawValue, TCSANOW, &mode)
    self.fd = fd
  }

  /// Sets raw mode for good, for a terminal that is ours.
  package static func setRaw(_ terminal: borrowing OwnedFD) {
    var mode = termios()
    // SAFETY: `mode` is ours and alive for both calls.
    guard unsafe tcgetattr(terminal.rawValue, &mode) == 0 else { return }
    makeRaw(&mode)
    _ = unsafe tcsetattr(terminal.rawValue, TCSANOW, &mode)
  }

  private static func makeRaw(_ mode: inout termios) {
    // SAFETY: changes the structure only.
    unsafe cfmakeraw(&mode)
  }

  deinit {
    var mode = former
    // TCSANOW: whoever stopped the output (Ctrl-S) must not hold up the end.
    // SAFETY: `mode` is ours and alive for the call.
    _ = unsafe tcsetattr(fd.rawValue, TCSANOW, &mode)
  }
}

/// A pseudo-terminal made here.
package struct PseudoTerminal: ~Copyable {
  package let master: OwnedFD
  /// Path of the other side, for people.
  package let path: String

  package static func make() throws(SystemError) -> PseudoTerminal {
    let master = try OwnedFD.open("/dev/ptmx", O_RDWR | O_NOCTTY)
    var locked: CInt = 0
    // TIOCSPTLCK
    // SAFETY: four bytes of ours.
    let result = unsafe withUnsafeMutablePointer(to: &locked) { pointer in
      unsafe clinux_ioctl_pointer(master.rawValue, 0x4004_5431, UnsafeMutableRawPointer(pointer))
    }
    _ = try checked(result, "unlock a pseudo-terminal")
    return PseudoTerminal(path: try path(of: master), master: master)
  }

  private init(path: String, master: consuming OwnedFD) {
    self.path = path
    self.master = master
  }

  consuming func takeMaster() -> OwnedFD { master }

  /// The path of the other side of a master.
  package static func path(of master: borrowing OwnedFD) throws(SystemError) -> String {
    var number: UInt32 = 0
    // TIOCGPTN (asm-generic/ioctls.h)
    // SAFETY: four bytes of ours.
    let result = unsafe withUnsafeMutablePointer(to: &number) { pointer in
      unsafe clinux_ioctl_pointer(master.rawValue, 0x8004_5430, UnsafeMutableRawPointer(pointer))
    }
    _ = try checked(result, "find the other side of a pseudo-terminal")
    return "/dev/pts/\(number)"
  }

  /// Opens the other side without a path (`TIOCGPTPEER`).
  package static func openPeer(of master: borrowing OwnedFD) throws(SystemError) -> OwnedFD {
    let result = clinux_ioctl(master.rawValue, 0x5441, UInt(UInt32(O_RDWR | O_NOCTTY | O_CLOEXEC)))
    return OwnedFD(owning: try checked(result, "open the other side of a pseudo-terminal"))
  }
}
