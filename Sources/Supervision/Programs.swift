import CLinux
import Glibc
import HostSystem

/// The programs of Martlet, found beside the one that is running.
package struct Programs: ~Copyable {
  package let directory: String
  /// The directory's descriptor.
  var number: CInt { fd.rawValue }
  private let fd: OwnedFD

  package init() throws(SupervisionError) {
    let path = try attempt { () throws(SystemError) in
      try OwnProgram.directory()
    } or: {
      .system($0)
    }
    fd = try attempt { () throws(SystemError) in
      try OwnedFD.open(path, O_DIRECTORY | pathOnly)
    } or: {
      .program(name: "martlet-core", directory: path, $0.errno)
    }
    directory = path
  }

  /// The directory that a process before us had open.
  init(adopting fd: consuming OwnedFD, directory: String) {
    self.fd = fd
    self.directory = directory
  }

  /// Opened for execution by descriptor.
  package borrowing func open(_ name: String) throws(SupervisionError) -> OwnedFD {
    // SAFETY: the name is a NUL-terminated copy that lives for the call.
    let result = unsafe clinux_openat(fd.rawValue, name, O_CLOEXEC | pathOnly, 0)
    guard result >= 0 else { throw .program(name: name, directory: directory, Errno(-result)) }
    return OwnedFD(owning: result)
  }
}
