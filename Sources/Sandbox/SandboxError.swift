import HostSystem

/// Why a process could not be started or walled in.
package enum SandboxError: Error, Sendable {
  /// A step failed. `program` is the name of the program concerned.
  case step(Stage, program: String, Errno)

  /// For callers whose errors are the kernel's.
  package var systemError: SystemError {
    switch self {
    case .step(let stage, _, let errno): SystemError(stage.action, errno)
    }
  }

  package var message: String {
    switch self {
    case .step(let stage, let program, let errno): "Cannot \(stage.action) of \(program): \(errno.explanation)"
    }
  }
}
