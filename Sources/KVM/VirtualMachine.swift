import CLinux
import HostSystem

/// A KVM virtual machine: memory slots, interrupts, doorbells.
package struct VirtualMachine: ~Copyable, Sendable {
  package let fd: OwnedFD

  init(adopting fd: consuming OwnedFD) {
    self.fd = fd
  }

  package borrowing func value(of capability: Capability) -> Int {
    Int(max(0, call(fd.rawValue, .checkExtension, capability.rawValue)))
  }

  // MARK: set-up, before any processor exists

  /// Places the three task-state pages and the identity-map page that Intel processors need.
  package borrowing func reservePages(tss: UInt64, identityMap: UInt64) throws(KVMError) {
    var address = identityMap
    try require(call(fd.rawValue, .setIdentityMapAddress, &address), .setIdentityMap)
    try require(call(fd.rawValue, .setTSSAddress, UInt(tss)), .setTSS)
  }

  /// Local APICs in the kernel, the I/O APIC with `pinCount` pins in user space.
  package borrowing func enableSplitInterruptController(pinCount: UInt32) throws(KVMError) {
    try enable(.splitInterruptController, UInt64(pinCount))
  }

  /// 32-bit APIC ids in messages and local APIC state, and no broadcast meaning of id 255.
  package borrowing func enableX2APIC() throws(KVMError) {
    try enable(.x2APIC, 1 | 2)
  }

  private borrowing func enable(_ capability: Capability, _ argument: UInt64) throws(KVMError) {
    var request = kvm_enable_cap()
    request.cap = UInt32(capability.rawValue)
    request.args.0 = argument
    try require(call(fd.rawValue, .enableCapability, &request), .enableCapability)
  }

  /// Creates a processor; `id` is its APIC id.
  package borrowing func createVCPU(id: UInt32, runByteCount: Int) throws(KVMError) -> VCPU {
    let result = retrying { call(fd.rawValue, .createVCPU, UInt(id)) }
    return try VCPU(adopting: OwnedFD(owning: try require(result, .createVCPU)), runByteCount: runByteCount)
  }

  // MARK: memory

  /// Makes host memory appear at a guest address. The memory must stay mapped while the slot exists.
  /// - Parameter host: page aligned, `byteCount` bytes long.
  @unsafe
  package borrowing func setMemory(
    slot: UInt32, guestAddress: UInt64, host: UnsafeMutableRawPointer, byteCount: UInt64, flags: UInt32 = 0
  ) throws(KVMError) {
    var region = kvm_userspace_memory_region()
    region.slot = slot
    region.flags = flags
    region.guest_phys_addr = guestAddress
    region.memory_size = byteCount
    region.userspace_addr = UInt64(UInt(bitPattern: host))
    try require(call(fd.rawValue, .setUserMemoryRegion, &region), .setMemory)
  }

  // MARK: doorbells

  /// A write of `length` bytes (0 = any) to the guest address signals the eventfd without leaving the kernel.
  package borrowing func registerDoorbell(at address: UInt64, length: UInt32, eventFD: CInt) throws(KVMError) {
    try doorbell(address, length, eventFD, flags: 0)
  }

  /// Takes back a doorbell; the arguments must be those of its registration.
  package borrowing func removeDoorbell(at address: UInt64, length: UInt32, eventFD: CInt) throws(KVMError) {
    try doorbell(address, length, eventFD, flags: 4)
  }

  private borrowing func doorbell(_ address: UInt64, _ length: UInt32, _ eventFD: CInt, flags: UInt32) throws(KVMError) {
    var request = kvm_ioeventfd()
    request.addr = address
    request.len = length
    request.fd = eventFD
    request.flags = flags
    try require(call(fd.rawValue, .ioeventfd, &request), .ioeventfd)
  }

  // MARK: interrupts

  /// Signalling the eventfd injects what the routing table holds for `gsi`.
  package borrowing func assignInterrupt(eventFD: CInt, gsi: UInt32) throws(KVMError) {
    try interrupt(eventFD, gsi, flags: 0)
  }

  package borrowing func deassignInterrupt(eventFD: CInt, gsi: UInt32) throws(KVMError) {
    try interrupt(eventFD, gsi, flags: 1)
  }

  private borrowing func interrupt(_ eventFD: CInt, _ gsi: UInt32, flags: UInt32) throws(KVMError) {
    var request = kvm_irqfd()
    request.fd = UInt32(bitPattern: eventFD)
    request.gsi = gsi
    request.flags = flags
    try require(call(fd.rawValue, .irqfd, &request), .irqfd)
  }

  /// Replaces the whole routing table.
  package borrowing func setRouting(_ routes: [MSIRoute]) throws(KVMError) {
    // struct kvm_irq_routing: count, flags, then entries of 48 bytes.
    var words = [UInt64](repeating: 0, count: 1 + routes.count * 6)
    words[0] = UInt64(routes.count)
    for (index, route) in routes.enumerated() {
      let at = 1 + index * 6
      words[at] = UInt64(route.gsi) | 2 << 32
      // flags and padding 0; then address low, address high, data, device id.
      words[at + 2] = route.message.address
      words[at + 3] = UInt64(route.message.data)
    }
    try require(call(fd.rawValue, .setGSIRouting, words: &words), .routing)
  }

  /// Injects one message; false when no local APIC took it.
  @discardableResult
  package borrowing func signal(_ message: MSIMessage) throws(KVMError) -> Bool {
    var request = kvm_msi()
    request.address_lo = UInt32(truncatingIfNeeded: message.address)
    request.address_hi = UInt32(truncatingIfNeeded: message.address >> 32)
    request.data = message.data
    return try require(call(fd.rawValue, .signalMSI, &request), .signalMSI) > 0
  }

  // MARK: clock

  /// The guest's paravirtual clock in nanoseconds. Set it only while all processors are stopped.
  package borrowing func clock() throws(KVMError) -> UInt64 {
    var data = kvm_clock_data()
    try require(call(fd.rawValue, .getClock, &data), .clock)
    return data.clock
  }

  /// Continues the paravirtual clock exactly at `nanoseconds`.
  package borrowing func setClock(_ nanoseconds: UInt64) throws(KVMError) {
    var data = kvm_clock_data()
    data.clock = nanoseconds
    try require(call(fd.rawValue, .setClock, &data), .clock)
  }
}

/// A message-signalled interrupt as KVM takes it.
package struct MSIMessage: Equatable, Sendable {
  /// Low half: 0xFEE, destination bits 7:0, modes. High half: destination bits 31:8 in its upper three bytes.
  package var address: UInt64
  package var data: UInt32

  package init(address: UInt64, data: UInt32) {
    self.address = address
    self.data = data
  }

  /// The message a guest programmed, with an extended destination (address bits 11:5 = destination bits 14:8) moved to
  /// where KVM's 32-bit ids expect it.
  package init(guestAddress: UInt64, data: UInt32) {
    let low = guestAddress & 0xFFFF_FFFF
    if guestAddress >> 32 == 0, low & 1 << 4 == 0 {
      address = low & ~0xFE0 | (low & 0xFE0) << 35
    } else {
      address = guestAddress
    }
    self.data = data
  }
}

/// One line of the routing table.
package struct MSIRoute: Equatable, Sendable {
  package var gsi: UInt32
  package var message: MSIMessage

  package init(gsi: UInt32, message: MSIMessage) {
    self.gsi = gsi
    self.message = message
  }
}
