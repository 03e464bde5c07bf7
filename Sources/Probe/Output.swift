import Glibc
import HostSystem

/// What the program says, and to whom.
enum Output {
  /// Standard output, whole; a reader that left is no error of ours.
  static func write(_ text: String) { write(Array(text.utf8), to: 1) }

  static func line(_ text: String = "") { write(text + "\n") }

  /// A line on standard error.
  static func error(_ text: String) {
    Progress.clear()
    write(Array((text + "\n").utf8), to: 2)
  }

  static func write(_ bytes: [UInt8], to number: CInt) {
    var done = 0
    while done < bytes.count {
      // SAFETY: the range done..<count lies inside the array, which is not changed meanwhile.
      let count = unsafe bytes.withUnsafeBytes { unsafe Glibc.write(number, $0.baseAddress.map { unsafe $0 + done }, $0.count - done) }
      if count < 0, Errno.current == .interrupted { continue }
      guard count > 0 else { return }
      done += count
    }
  }

  /// Fails when what will be saved there cannot be: told before a long run, not after it. Leaves everything as it was.
  static func expect(_ path: String?) throws(ProbeError) {
    guard let path else { return }
    try wrapping { () throws(SystemError) in
      do throws(SystemError) {
        _ = try OwnedFD.open(path, O_WRONLY)
      } catch {
        guard error.errno == .noEntry else { throw error }
        _ = try OwnedFD.open(path, O_WRONLY | O_CREAT | O_EXCL, mode: 0o644)
        _ = unsafe unlink(path)
      }
    }
  }

  /// A file with this content, replaced.
  static func save(_ bytes: [UInt8], to path: String) throws(ProbeError) {
    try wrapping { () throws(SystemError) in
      let file = try OwnedFD.open(path, O_WRONLY | O_CREAT | O_TRUNC, mode: 0o644)
      try file.writeAll(bytes)
    }
  }
}

/// A line that is rewritten in place, on terminals only.
enum Progress {
  private static let isTerminal = isatty(2) == 1

  static func show(_ text: String) {
    guard isTerminal else { return }
    Output.write(Array(("\r\u{1B}[K" + text.prefix(110)).utf8), to: 2)
  }

  static func clear() {
    guard isTerminal else { return }
    Output.write(Array("\r\u{1B}[K".utf8), to: 2)
  }
}

/// Ctrl-C and SIGTERM as something that is asked for between steps, so that results so far are told.
@safe
final class Interruption {
  private let fd: OwnedFD
  private(set) var happened = false

  init() throws(ProbeError) { fd = try wrapping { () throws(SystemError) in try Signals.descriptor(for: [SIGINT, SIGTERM]) } }

  var descriptor: CInt { fd.rawValue }

  /// Waits so long; true when it was interrupted, now or before.
  func wait(_ duration: Duration) -> Bool {
    if happened { return true }
    let end = MonotonicTime.now.advanced(by: duration)
    while true {
      let left = end.since(.now)
      _ = try? fd.waitUntil(.readable, timeout: left)
      if Signals.next(from: fd) != nil {
        happened = true
        return true
      }
      if MonotonicTime.now >= end { return false }
    }
  }

  var isRequested: Bool { wait(.zero) }
}

/// An open file that may or may not be there.
final class OutputFile {
  private let fd: OwnedFD

  /// Created or replaced, beginning with these bytes.
  init(_ path: String, _ first: [UInt8]) throws(ProbeError) {
    fd = try wrapping { () throws(SystemError) in
      let file = try OwnedFD.open(path, O_WRONLY | O_CREAT | O_TRUNC, mode: 0o644)
      try file.writeAll(first)
      return file
    }
  }

  func write(_ bytes: [UInt8]) { try? fd.writeAll(bytes) }
}
