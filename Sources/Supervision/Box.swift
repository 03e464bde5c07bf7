import HostSystem

/// A descriptor that waits in a list until it is given away; lists cannot hold it directly.
final class FDBox {
  private var fd: OwnedFD?

  init(_ fd: consuming OwnedFD) { self.fd = consume fd }

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
