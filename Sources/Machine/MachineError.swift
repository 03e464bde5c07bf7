import HostSystem
import KVM
import VirtioTransport

/// Why a machine cannot be built or go on.
package enum MachineError: Error, CustomStringConvertible {
  /// The host allows another number of processors.
  case processorCount(Int, maximum: Int)
  /// Guest memory is not mapped at this guest address.
  case memory(UInt64)
  /// All function numbers of the PCI bus are taken.
  case tooManyDevices(Int)
  /// All interrupt numbers are taken.
  case tooManyInterrupts(Int)
  case kvm(KVMError)
  case system(SystemError)
  case transport(TransportError)

  package var description: String {
    switch self {
    case .processorCount(let count, let maximum):
      "\(count) processors are not possible; this host allows 1 to \(maximum)."
    case .memory(let address):
      "Guest memory at 0x\(String(address, radix: 16)) is not mapped."
    case .tooManyDevices(let maximum):
      "The machine has more devices than its PCI bus takes (\(maximum)); remove some."
    case .tooManyInterrupts(let maximum):
      "The machine's devices have more interrupt vectors than KVM routes (\(maximum)); use fewer queues."
    case .kvm(let error): error.description
    case .system(let error): error.description
    case .transport(let error): error.description
    }
  }
}
