import HostSystem

/// Why a process could not be started or walled in.
package enum SandboxError: Error, Sendable {
  /// A step failed. `program` is the name of the program concerned.
  case step(Stage, program: String, Errno)

  package var message: String {
    switch self {
    case .step(let stage, let program, let errno): "Cannot \(stage.action) of \(program): \(errno.explanation)"
    }
  }
}
