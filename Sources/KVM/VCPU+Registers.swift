import CLinux
import HostSystem

extension VCPU {
  package borrowing func setCPUID(_ table: CPUIDTable) throws(KVMError) {
    var words = table.words
    try require(call(fd.rawValue, .setCPUID, words: &words), .setCPUID)
  }

  package borrowing func registers() throws(KVMError) -> kvm_regs {
    var registers = kvm_regs()
    try require(call(fd.rawValue, .getRegisters, &registers), .registers)
    return registers
  }

  package borrowing func setRegisters(_ registers: kvm_regs) throws(KVMError) {
    var copy = registers
    try require(call(fd.rawValue, .setRegisters, &copy), .registers)
  }

  package borrowing func specialRegisters() throws(KVMError) -> kvm_sregs {
    var registers = kvm_sregs()
    try require(call(fd.rawValue, .getSpecialRegisters, &registers), .registers)
    return registers
  }

  package borrowing func setSpecialRegisters(_ registers: kvm_sregs) throws(KVMError) {
    var copy = registers
    try require(call(fd.rawValue, .setSpecialRegisters, &copy), .registers)
  }

  /// 0 runnable, 1 waiting for INIT, 2 INIT received, 3 halted, 4 start-up received.
  package borrowing func mpState() throws(KVMError) -> UInt32 {
    var state = kvm_mp_state()
    try require(call(fd.rawValue, .getMPState, &state), .registers)
    return state.mp_state
  }

  package borrowing func setMPState(_ value: UInt32) throws(KVMError) {
    var state = kvm_mp_state()
    state.mp_state = value
    try require(call(fd.rawValue, .setMPState, &state), .registers)
  }

  /// Guest TSC frequency in kHz, or nil when KVM does not know it.
  package borrowing func tscFrequency() -> UInt32? {
    let result = call(fd.rawValue, .getTSCFrequency)
    return result > 0 ? UInt32(result) : nil
  }

  /// Tells the guest's watchdogs that it was stopped; only guests that use kvmclock take it.
  package borrowing func announcePause() {
    _ = call(fd.rawValue, .kvmclockControl)
  }

  /// Sends a non-maskable interrupt.
  package borrowing func injectNMI() throws(KVMError) {
    try require(call(fd.rawValue, .nmi), .registers)
  }

  // MARK: model-specific registers

  /// Values of those of `indices` that KVM lets be read.
  package borrowing func msrs(_ indices: [UInt32]) throws(KVMError) -> [MSRValue] {
    var values: [MSRValue] = []
    values.reserveCapacity(indices.count)
    var rest = indices[...]
    // KVM stops at the first index it refuses and says how many it did; every turn drops at least one.
    while !rest.isEmpty {
      var words = [UInt64](repeating: 0, count: 1 + rest.count * 2)
      words[0] = UInt64(rest.count)
      for (at, index) in rest.enumerated() { words[1 + at * 2] = UInt64(index) }
      let done = Int(try require(call(fd.rawValue, .getMSRs, words: &words), .msrs))
      for (at, index) in rest.prefix(done).enumerated() {
        values.append(MSRValue(index: index, value: words[2 + at * 2]))
      }
      rest = rest.dropFirst(done + 1)
    }
    return values
  }

  /// Sets registers; returns the indices that KVM refused.
  @discardableResult
  package borrowing func setMSRs(_ values: [MSRValue]) throws(KVMError) -> [UInt32] {
    var refused: [UInt32] = []
    var rest = values[...]
    while !rest.isEmpty {
      var words = [UInt64](repeating: 0, count: 1 + rest.count * 2)
      words[0] = UInt64(rest.count)
      for (at, value) in rest.enumerated() {
        words[1 + at * 2] = UInt64(value.index)
        words[2 + at * 2] = value.value
      }
      let done = Int(try require(call(fd.rawValue, .setMSRs, words: &words), .msrs))
      rest = rest.dropFirst(done)
      if let first = rest.first {
        refused.append(first.index)
        rest = rest.dropFirst()
      }
    }
    return refused
  }
}

/// A model-specific register and its value.
package struct MSRValue: Equatable, Sendable {
  package var index: UInt32
  package var value: UInt64

  package init(index: UInt32, value: UInt64) {
    self.index = index
    self.value = value
  }

  /// What firmware would have set: fast string operations, and write-back memory with MTRRs enabled.
  package static let boot = [
    MSRValue(index: 0x1A0, value: 1),
    MSRValue(index: 0x2FF, value: 0x806),
  ]
}
