import HostSystem

/// What was asked of KVM when it refused.
package enum KVMOperation: String, Sendable {
  case readVersion = "read the API version"
  case createVM = "create a virtual machine"
  case createVCPU = "create a processor"
  case mapRun = "map a processor's run area"
  case readCPUID = "read the supported CPUID"
  case setCPUID = "set a processor's CPUID"
  case setTSS = "place its task state pages"
  case setIdentityMap = "place its identity map page"
  case enableCapability = "enable a capability"
  case setMemory = "set a memory slot"
  case ioeventfd = "register a doorbell (ioeventfd)"
  case irqfd = "register an interrupt (irqfd)"
  case routing = "set the interrupt routing"
  case signalMSI = "send an interrupt"
  case clock = "read or set the clock"
  case registers = "read or set a processor's registers"
  case msrs = "read or set model-specific registers"
  case lapic = "read or set a local APIC"
  case run = "run a processor"
  case signal = "install the kick handler"
}

/// Why the host's KVM cannot do what the machine needs.
package enum KVMError: Error, Equatable, CustomStringConvertible {
  /// The device is not KVM, or speaks another API version than 12.
  case wrongVersion(CInt)
  /// KVM lacks capabilities without which no guest can be run.
  case missingCapabilities([Capability])
  /// KVM refused a call.
  case failed(KVMOperation, Errno)
  /// The model-specific register cannot be read or written.
  case refusedMSR(UInt32)

  package var description: String {
    switch self {
    case .wrongVersion(let version):
      "KVM speaks API version \(version), 12 is needed; give the kernel's /dev/kvm."
    case .missingCapabilities(let missing):
      "KVM lacks \(missing.map(\.name).joined(separator: ", ")); use a host kernel 5.10 or newer."
    case .failed(let operation, let errno):
      "KVM cannot \(operation.rawValue): \(errno.explanation)."
    case .refusedMSR(let index):
      "KVM refused model-specific register 0x\(String(index, radix: 16))."
    }
  }
}
