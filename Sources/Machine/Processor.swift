import HostSystem
import KVM
import Synchronization

/// One processor: its KVM side and its thread.
final class Processor: @unchecked Sendable {
  // @unchecked: `thread` and `initialState` are written before the thread runs the guest (under the start barrier) and
  // only read afterwards; `vcpu` follows the rules of its type.
  let id: UInt32
  let vcpu: VCPU
  var thread: HostThread?
  /// State before the first run; kept by the first two processors, from which the others' is derived.
  var initialState: VCPUState?

  init(id: UInt32, vcpu: consuming VCPU) {
    self.id = id
    self.vcpu = vcpu
  }

  /// Makes the processor leave the guest, or not enter it.
  func kick() {
    vcpu.requestExit()
    thread?.signal(Kick.signal)
  }

  /// CPUID first: which registers exist depends on it.
  func setUp(_ boot: ProcessorBoot, _ cpuid: CPUIDTable) throws(KVMError) {
    try vcpu.setCPUID(cpuid.forProcessor(id: id))
    try vcpu.setMSRs(MSRValue.boot)
    if boot.usesX2APIC {
      var special = try vcpu.specialRegisters()
      special.apic_base |= 1 << 10
      try vcpu.setSpecialRegisters(special)
    }
    try vcpu.setLocalInterruptLines()
    if id < 2 {
      initialState = try vcpu.captureState(msrIndices: boot.msrIndices, xsaveByteCount: boot.xsaveByteCount)
    }
  }
}
