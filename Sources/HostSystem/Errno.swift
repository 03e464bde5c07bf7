// HostSystem: Linux as Martlet uses it. Owned descriptors, event loop, memory, sockets with descriptor passing, timers,
// processes and log lines: the thinnest wrapper that gives every kernel object one owner and every failure a value.
// It decides nothing; policy lives above.
//
//     let pair = try UnixSocket.pair(.stream)
//     let loop = try EventLoop<Token>()
//     try loop.add(pair.0, for: .readable, token: .control)

import CLinux

/// A kernel error number (`errno(3)`), as a value.
public struct Errno: Error, Hashable, Sendable, CustomStringConvertible {
  public let rawValue: CInt

  @inlinable public init(_ rawValue: CInt) { self.rawValue = rawValue }

  public static let again = Errno(EAGAIN)
  public static let interrupted = Errno(EINTR)
  public static let brokenPipe = Errno(EPIPE)
  public static let connectionReset = Errno(ECONNRESET)
  public static let connectionRefused = Errno(ECONNREFUSED)
  public static let noEntry = Errno(ENOENT)
  public static let exists = Errno(EEXIST)
  public static let busy = Errno(EBUSY)
  public static let notPermitted = Errno(EPERM)
  public static let accessDenied = Errno(EACCES)
  public static let invalid = Errno(EINVAL)
  public static let tooBig = Errno(E2BIG)
  public static let noMemory = Errno(ENOMEM)
  public static let noSpace = Errno(ENOSPC)
  public static let inputOutput = Errno(EIO)
  public static let noDevice = Errno(ENODEV)
  public static let noSuchProcess = Errno(ESRCH)
  public static let notSupported = Errno(EOPNOTSUPP)
  public static let noSuchSystemCall = Errno(ENOSYS)
  public static let nameTooLong = Errno(ENAMETOOLONG)
  public static let timedOut = Errno(ETIMEDOUT)
  public static let notADirectory = Errno(ENOTDIR)
  public static let stale = Errno(ESTALE)
  /// Of `OwnedFD.openNamed`.
  package static let foreignLink = Errno(EXDEV)

  /// The symbol, for example `ENOENT`.
  public var name: String {
    // SAFETY: strerrorname_np returns a static string or null.
    guard let text = unsafe clinux_errno_name(rawValue) else { return "errno \(rawValue)" }
    return unsafe String(cString: text)
  }

  public var description: String { name }
}

/// A failed kernel call: what we were doing, and the kernel's answer.
public struct SystemError: Error, Sendable, CustomStringConvertible {
  /// What was attempted, as a verb phrase: "open /dev/kvm", "map guest memory".
  public let operation: String
  public let errno: Errno

  public init(_ operation: String, _ errno: Errno) {
    self.operation = operation
    self.errno = errno
  }

  public var description: String { "Cannot \(operation): \(errno.explanation)" }
}

extension Errno {
  /// A short English explanation with the symbol, made without locale files.
  public var explanation: String {
    switch self {
    case .noEntry: "no such file or directory (ENOENT)"
    case .accessDenied: "permission denied (EACCES)"
    case .notPermitted: "operation not permitted (EPERM)"
    case .busy: "busy (EBUSY)"
    case .exists: "exists already (EEXIST)"
    case .noDevice: "no such device (ENODEV)"
    case .noMemory: "not enough memory (ENOMEM)"
    case .noSpace: "no space left (ENOSPC)"
    case .connectionRefused: "connection refused (ECONNREFUSED)"
    case .inputOutput: "input/output error (EIO)"
    case .invalid: "invalid argument (EINVAL)"
    case .nameTooLong: "name too long (ENAMETOOLONG)"
    case .timedOut: "timed out (ETIMEDOUT)"
    case .foreignLink: "a symbolic link on the way belongs to another user, who could make it lead anywhere; name the path without it"
    default: name
    }
  }
}

/// Turns a shim's result (negative = -errno) into a value or a typed error.
@inline(__always)
package func checked(_ result: CInt, _ operation: @autoclosure () -> String) throws(SystemError) -> CInt {
  if result < 0 { throw SystemError(operation(), Errno(-result)) }
  return result
}

/// Repeats a call while it is interrupted by a signal.
@inline(__always)
package func retrying(_ call: () -> CInt) -> CInt {
  while true {
    let result = call()
    if result != -EINTR { return result }
  }
}
