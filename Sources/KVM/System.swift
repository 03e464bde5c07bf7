import CLinux
import HostSystem

/// `/dev/kvm`.
package struct System: ~Copyable {
  package let fd: OwnedFD
  /// Bytes of a processor's run area.
  package let runByteCount: Int

  /// Adopts an open `/dev/kvm` and checks that it speaks API version 12.
  package init(adopting fd: consuming OwnedFD) throws(KVMError) {
    let version = call(fd.rawValue, .getAPIVersion)
    guard version == 12 else { throw .wrongVersion(version) }
    runByteCount = Int(try require(call(fd.rawValue, .getVCPUMapSize), .readVersion))
    self.fd = fd
  }

  /// The value of a capability; 0 means absent. Ask the virtual machine instead where there is one.
  package borrowing func value(of capability: Capability) -> Int {
    Int(max(0, call(fd.rawValue, .checkExtension, capability.rawValue)))
  }

  /// Required capabilities that are absent.
  package borrowing func missingCapabilities() -> [Capability] {
    Capability.required.filter { call(fd.rawValue, .checkExtension, $0.rawValue) <= 0 }
  }

  /// Creates a VM. Its descriptor keeps guest memory alive and must not leave this process.
  package borrowing func createVirtualMachine() throws(KVMError) -> VirtualMachine {
    let result = retrying { call(fd.rawValue, .createVM, 0) }
    return VirtualMachine(adopting: OwnedFD(owning: try require(result, .createVM)))
  }

  /// What KVM can show a guest of the processor.
  package borrowing func supportedCPUID() throws(KVMError) -> CPUIDTable {
    // E2BIG means that more entries exist than there was room for; the kernel's own bound is 256.
    for capacity in [128, 256, 512] {
      var words = [UInt64](repeating: 0, count: 1 + capacity * 5)
      words[0] = UInt64(capacity)
      let result = call(fd.rawValue, .getSupportedCPUID, words: &words)
      if result == -Errno.tooBig.rawValue { continue }
      try require(result, .readCPUID)
      return CPUIDTable(words: words)
    }
    throw .failed(.readCPUID, .tooBig)
  }

  /// Model-specific registers whose values make up a processor's state.
  package borrowing func msrIndexList() throws(KVMError) -> [UInt32] {
    for capacity in [512, 4096] {
      var words = [UInt64](repeating: 0, count: 1 + capacity / 2)
      words[0] = UInt64(capacity)
      let result = call(fd.rawValue, .getMSRIndexList, words: &words)
      if result == -Errno.tooBig.rawValue { continue }
      try require(result, .msrs)
      let count = min(Int(UInt32(truncatingIfNeeded: words[0])), capacity)
      return (0..<count).map { index in
        // The list starts right after the 32-bit count.
        let at = index + 1
        return UInt32(truncatingIfNeeded: words[at / 2] >> UInt64(at % 2 * 32))
      }
    }
    throw .failed(.msrs, .tooBig)
  }
}
