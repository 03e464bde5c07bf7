import Glibc
import HostSystem

/// A descriptor that waits in a list until it is given away; lists cannot hold it directly.
final class FDBox {
  private var fd: OwnedFD?

  init(_ fd: consuming OwnedFD) { self.fd = consume fd }

  /// Stands for one that another process has.
  init() {}

  /// The number, to be lent to a call; -1 when it has been taken.
  var number: CInt {
    // Borrowing an optional owner is done by a switch.
    switch fd {
    case .some(let fd): fd.rawValue
    case .none: -1
    }
  }

  /// Gives it away.
  func take() -> OwnedFD? { fd.take() }

  /// What one read gives, at most so many bytes; empty at the end. Nil when there is nothing to read yet.
  func readOnce(limit: Int) -> [UInt8]? {
    var buffer = [UInt8](repeating: 0, count: limit)
    // SAFETY: the buffer is lent for the call.
    let transfer =
      switch fd {
      case .some(let fd): unsafe buffer.withUnsafeMutableBytes { bytes in unsafe fd.read(into: bytes) }
      case .none: Transfer.end
      }
    switch transfer {
    case .bytes(let count): return Array(buffer[..<count])
    case .wouldBlock: return nil
    case .end, .failed: return []
    }
  }

  /// Writes all of it; false when that fails.
  func write(_ bytes: [UInt8]) -> Bool {
    switch fd {
    case .some(let fd): (try? fd.writeAll(bytes)) != nil
    case .none: false
    }
  }

  /// Writes all, waiting as long as it takes.
  func writeAll(_ bytes: [UInt8]) throws(SystemError) {
    switch fd {
    case .some(let fd): try fd.writeAll(bytes)
    case .none: throw SystemError("write", Errno(EBADF))
    }
  }

  /// Waits until there is something to read, or the end; false when the time passed first.
  func waitUntilReadable(_ timeout: Duration) -> Bool {
    switch fd {
    case .some(let fd): (try? fd.waitUntil(.readable, timeout: timeout)) == true
    case .none: false
    }
  }

  /// Closes it.
  func close() { _ = fd.take() }
}

/// Runs `body` and turns its failure into ours.
func attempt<Result: ~Copyable>(
  _ body: () throws(SystemError) -> Result, or failure: (SystemError) -> SupervisionError
) throws(SupervisionError) -> Result {
  do { return try body() } catch { throw failure(error) }
}

/// `O_PATH` and `O_NOFOLLOW`, which libc's headers show to GNU sources only (asm-generic/fcntl.h).
let pathOnly: CInt = 0o10000000
let noFollow: CInt = 0o400000
