import CLinux
import HostSystem

/// All of a processor's state that KVM holds, apart from its CPUID.
package struct VCPUState: Sendable {
  package var mpState: UInt32
  package var registers: kvm_regs
  package var specialRegisters: kvm_sregs
  /// `struct kvm_xsave` in 64-bit words; longer than 4096 bytes where KVM says so.
  package var xsave: [UInt64]
  package var extendedControlRegisters: kvm_xcrs
  package var debugRegisters: kvm_debugregs
  /// Local APIC registers in 64-bit words.
  package var lapic: [UInt64]
  package var msrs: [MSRValue]
  package var events: kvm_vcpu_events
}

extension VCPUState {
  /// Offset of the id register in the local APIC page.
  private static let apicIDOffset = 0x20

  /// The state of another processor that has not run either: only the local APIC id differs.
  package func asProcessor(id: UInt32) -> VCPUState {
    var copy = self
    let isX2APIC = specialRegisters.apic_base & 1 << 10 != 0
    let word = Self.apicIDOffset / 8
    copy.lapic[word] = lapic[word] & ~0xFFFF_FFFF | UInt64(isX2APIC ? id : id << 24)
    return copy
  }
}

extension VCPU {
  /// Reads everything, in the order KVM wants: MP state first (it may act on pending INITs), events last. Only while this
  /// processor is stopped and its last access has been completed.
  /// - Parameters:
  ///   - msrIndices: from `System.msrIndexList()`.
  ///   - xsaveByteCount: value of `Capability.xsave2` on the virtual machine, or 0.
  package borrowing func captureState(msrIndices: [UInt32], xsaveByteCount: Int) throws(KVMError) -> VCPUState {
    let mpState = try mpState()
    let registers = try registers()
    let specialRegisters = try specialRegisters()
    var xsave = [UInt64](repeating: 0, count: max(4096, xsaveByteCount) / 8)
    try require(
      call(fd.rawValue, xsaveByteCount > 4096 ? .getXSAVE2 : .getXSAVE, words: &xsave), .registers)
    var extended = kvm_xcrs()
    // Absent on processors without XSAVE; then there is nothing to restore either.
    _ = call(fd.rawValue, .getXCRs, &extended)
    var debug = kvm_debugregs()
    try require(call(fd.rawValue, .getDebugRegisters, &debug), .registers)
    let lapic = try lapic()
    let msrs = try msrs(msrIndices)
    var events = kvm_vcpu_events()
    try require(call(fd.rawValue, .getEvents, &events), .registers)
    return VCPUState(
      mpState: mpState, registers: registers, specialRegisters: specialRegisters, xsave: xsave,
      extendedControlRegisters: extended, debugRegisters: debug, lapic: lapic, msrs: msrs, events: events)
  }

  /// Writes everything back; the same rules as for `captureState`. Returns model-specific registers that KVM refused.
  @discardableResult
  package borrowing func restoreState(_ state: VCPUState) throws(KVMError) -> [UInt32] {
    try setMPState(state.mpState)
    try setRegisters(state.registers)
    try setSpecialRegisters(state.specialRegisters)
    var xsave = state.xsave
    try require(call(fd.rawValue, .setXSAVE, words: &xsave), .registers)
    if state.extendedControlRegisters.nr_xcrs > 0 {
      var extended = state.extendedControlRegisters
      try require(call(fd.rawValue, .setXCRs, &extended), .registers)
    }
    var debug = state.debugRegisters
    try require(call(fd.rawValue, .setDebugRegisters, &debug), .registers)
    // Before the MSRs: a TSC deadline is only kept while the timer is in deadline mode.
    try setLAPIC(state.lapic)
    let refused = try setMSRs(state.msrs)
    var events = state.events
    try require(call(fd.rawValue, .setEvents, &events), .registers)
    return refused
  }

  /// Writes the time stamp counter's own value back, from which KVM keeps the offset it has. After a triple fault on AMD
  /// processors that offset is no longer in force, though KVM goes on reckoning with it (seen with Linux 6.1, which clears
  /// the processor's control block): the guest's timers would be late by the age of the host.
  package borrowing func renewTimeStampCounter() throws(KVMError) {
    let counter: UInt32 = 0x10
    _ = try setMSRs(msrs([counter]))
  }

  /// Local APIC registers, 1024 bytes as 64-bit words.
  package borrowing func lapic() throws(KVMError) -> [UInt64] {
    var words = [UInt64](repeating: 0, count: 128)
    try require(call(fd.rawValue, .getLAPIC, words: &words), .lapic)
    return words
  }

  package borrowing func setLAPIC(_ state: [UInt64]) throws(KVMError) {
    precondition(state.count == 128, "A local APIC has 1024 bytes of state")
    var words = state
    try require(call(fd.rawValue, .setLAPIC, words: &words), .lapic)
  }

  /// LINT0 takes external interrupts, LINT1 non-maskable ones, as firmware leaves them.
  package borrowing func setLocalInterruptLines() throws(KVMError) {
    var state = try lapic()
    func setDeliveryMode(_ mode: UInt64, at offset: Int) {
      state[offset / 8] = state[offset / 8] & ~0x700 | mode << 8
    }
    setDeliveryMode(7, at: 0x350)
    setDeliveryMode(4, at: 0x360)
    try setLAPIC(state)
  }
}
