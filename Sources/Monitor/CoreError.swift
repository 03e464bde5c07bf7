import Boot
import ControlProtocol
import KVM
import Machine

/// Why the VM cannot be built; becomes the `failed` message. Each case is a finished sentence.
enum CoreError: Error {
  /// Kernel, initramfs or sizes given by the user.
  case input(String)
  /// This host's KVM or memory.
  case host(String)
  /// A back end.
  case device(String)

  var kind: CoreMessage.FailureKind {
    switch self {
    case .input: .input
    case .host: .host
    case .device: .device
    }
  }

  var sentence: String {
    switch self {
    case .input(let text), .host(let text), .device(let text): text
    }
  }

  init(_ error: BootError) {
    self = .input(error.description)
  }

  init(_ error: MachineError) {
    switch error {
    case .processorCount: self = .input(error.description)
    default: self = .host(error.description)
    }
  }

  init(_ error: KVMError) {
    self = .host(error.description)
  }
}
