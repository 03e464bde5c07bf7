import CLinux
import Glibc

/// Locks of whole files, and who holds them.
package enum LockHolder {
  /// `process 123 (qemu-system-x86)`, or nil when /proc does not tell us. Only asked when a lock was refused, so it may be slow.
  /// - Parameter own: what the process itself is called.
  package static func describe(of file: FileStatus, own: String = "this process itself") -> String? {
    guard let pid = find(file) else { return nil }
    if pid == getpid() { return own }
    guard let bytes = try? OwnedFD.open("/proc/\(pid)/comm", O_RDONLY).readToEnd(limit: 64) else { return "process \(pid)" }
    return "process \(pid) (\(String(decoding: bytes.prefix { $0 != 10 }, as: UTF8.self)))"
  }

  /// Locks the whole file (`F_OFD_SETLK`): for one who writes, or for one of many who read, and then only if QEMU does not write.
  /// - Returns: zero, or a negated errno; `EAGAIN` or `EACCES` where somebody else has it.
  package static func lock(_ file: CInt, toRead: Bool) -> CInt {
    let result = clinux_ofd_lock(file, CInt(toRead ? F_RDLCK : F_WRLCK))
    guard result == 0, toRead, isWrittenByQEMU(file) else { return result }
    _ = clinux_ofd_lock(file, CInt(F_UNLCK))
    return -EAGAIN
  }

  /// Whether QEMU writes the file: it says so by a lock for reading on one byte (100 for the permissions, and its bit of them: 1 for
  /// writing, docs/system/images.rst and block/file-posix.c), which readers of ours would not meet. Locks of ours begin elsewhere.
  private static func isWrittenByQEMU(_ file: CInt) -> Bool {
    (100...103).contains(clinux_ofd_lock_find(file, CInt(F_WRLCK), 101, 1))
  }

  /// Open-file-description locks show no pid in /proc/locks; they do show in the fdinfo of their descriptors. The
  /// process's own descriptor whose lock was refused shows none, so it is not mistaken for the holder.
  private static func find(_ file: FileStatus) -> Int32? {
    let major = (file.device >> 8) & 0xFFF
    let minor = (file.device & 0xFF) | ((file.device >> 12) & 0xFFF00)
    let key = " \(hex(major)):\(hex(minor)):\(file.inode) "
    for process in entries(of: "/proc") {
      guard let pid = Int32(process) else { continue }
      for number in entries(of: "/proc/\(process)/fdinfo") {
        guard let fd = try? OwnedFD.open("/proc/\(process)/fdinfo/\(number)", O_RDONLY),
          let bytes = try? fd.readToEnd(limit: 4096)
        else { continue }
        for line in String(decoding: bytes, as: UTF8.self).split(separator: "\n")
        where line.hasPrefix("lock:") && line.contains(key) {
          return pid
        }
      }
    }
    return nil
  }

  private static func hex(_ number: UInt64) -> String {
    let digits = String(number, radix: 16)
    return digits.utf8.count < 2 ? "0" + digits : digits
  }

  private static func entries(of path: String) -> [String] {
    // SAFETY: the directory stream is opened, read and closed here; `d_name` is NUL-terminated inside the entry, which
    // lives until the next readdir.
    guard let directory = unsafe opendir(path) else { return [] }
    defer { unsafe closedir(directory) }
    var names: [String] = []
    while let entry = unsafe readdir(directory) {
      let name = unsafe withUnsafePointer(to: &entry.pointee.d_name) { pointer in
        unsafe pointer.withMemoryRebound(to: CChar.self, capacity: 256) { unsafe String(cString: $0) }
      }
      if name.utf8.first != UInt8(ascii: ".") { names.append(name) }
    }
    return names
  }
}
