import CLinux
import Glibc
import HostSystem
import KVM
import Testing

/// Opens /dev/kvm, or says why the test is skipped.
func openKVM() throws -> System? {
  guard access("/dev/kvm", R_OK | W_OK) == 0 else {
    print("skipped: /dev/kvm is missing or not accessible")
    return nil
  }
  return try System(adopting: OwnedFD.open("/dev/kvm", O_RDWR))
}

@Suite("KVM")
struct KVMTests {
  @Test("Another device is refused by its answer to the version question")
  func wrongDevice() throws {
    #expect(throws: KVMError.self) { _ = try System(adopting: OwnedFD.open("/dev/null", O_RDWR)) }
  }

  @Test("Required capabilities are there")
  func capabilities() throws {
    guard let system = try openKVM() else { return }
    #expect(system.missingCapabilities() == [])
    #expect(system.value(of: .maximumVCPUs) >= 64)
  }

  @Test("Real-mode code writes a port and halts; the exits say what it did")
  func runsCode() throws {
    guard let system = try openKVM() else { return }
    let machine = try system.createVirtualMachine()
    try machine.reservePages(tss: 0xFFFB_D000, identityMap: 0xFFFB_C000)
    try machine.enableSplitInterruptController(pinCount: 24)
    let memory = try MemoryMapping.anonymous(byteCount: 4096)
    // mov dx, 0x3f8; mov al, 'K'; out dx, al; in al, dx; mov [0x1000 - 0x100], al; mov byte [0x5000], 7; hlt
    let code: [UInt8] = [
      0xBA, 0xF8, 0x03, 0xB0, 0x4B, 0xEE, 0xEC, 0xA2, 0x00, 0x0F, 0xC6, 0x06, 0x00, 0x50, 0x07, 0xF4,
    ]
    code.withUnsafeBytes { memory.baseAddress.copyMemory(from: $0.baseAddress!, byteCount: $0.count) }
    try machine.setMemory(slot: 0, guestAddress: 0, host: memory.baseAddress, byteCount: 4096)
    let processor = try machine.createVCPU(id: 0, runByteCount: system.runByteCount)
    try processor.setCPUID(system.supportedCPUID())
    var special = try processor.specialRegisters()
    special.cs.base = 0
    special.cs.selector = 0
    try processor.setSpecialRegisters(special)
    var registers = try processor.registers()
    registers.rip = 0
    registers.rflags = 2
    try processor.setRegisters(registers)

    guard case .port(let write) = processor.run() else {
      Issue.record("the first exit is not a port write")
      return
    }
    #expect(write.isWrite && write.port == 0x3F8 && write.width == 1 && write.count == 1)
    #expect(processor.portData(write, 0) == 0x4B)
    guard case .port(let read) = processor.run() else {
      Issue.record("the second exit is not a port read")
      return
    }
    #expect(!read.isWrite)
    processor.setPortData(read, 0, 0x5A)
    // Before completion the instruction has not finished; afterwards it has, without the guest having run on.
    processor.completePendingAccess()
    #expect(try processor.registers().rip == 7)
    #expect(try processor.registers().rax & 0xFF == 0x5A)
    guard case .memory(let store) = processor.run() else {
      Issue.record("the third exit is not a memory write")
      return
    }
    #expect(store.isWrite && store.address == 0x5000 && store.byteCount == 1 && store.value & 0xFF == 7)
    #expect(memory.baseAddress.load(fromByteOffset: 0xF00, as: UInt8.self) == 0x5A)
  }

  @Test("A captured state restores a processor that has run")
  func stateRoundTrip() throws {
    guard let system = try openKVM() else { return }
    let machine = try system.createVirtualMachine()
    try machine.reservePages(tss: 0xFFFB_D000, identityMap: 0xFFFB_C000)
    try machine.enableSplitInterruptController(pinCount: 24)
    let processor = try machine.createVCPU(id: 0, runByteCount: system.runByteCount)
    try processor.setCPUID(
      system.supportedCPUID().prepared(
        for: ProcessorTopology(count: 1, hasTSCDeadline: true, tscFrequency: nil, hasExtendedDestinations: false)
      ).forProcessor(id: 0))
    let indices = try system.msrIndexList()
    #expect(indices.contains(0x174) && indices.count > 10)
    try processor.setMSRs(MSRValue.boot)
    try processor.setLocalInterruptLines()
    let xsave = machine.value(of: .xsave2)
    let before = try processor.captureState(msrIndices: indices, xsaveByteCount: xsave)
    var registers = try processor.registers()
    registers.rip = 0x1234
    registers.r15 = 99
    try processor.setRegisters(registers)
    try processor.setMSRs([MSRValue(index: 0x175, value: 0x77)])
    try processor.restoreState(before)
    let after = try processor.captureState(msrIndices: indices, xsaveByteCount: xsave)
    #expect(after.registers.rip == before.registers.rip && after.registers.r15 == before.registers.r15)
    #expect(try processor.msrs([0x175]) == [MSRValue(index: 0x175, value: 0)])
    #expect(after.lapic == before.lapic)
  }

  @Test("A refused register is named and does not keep the others from being set")
  func refusedRegister() throws {
    guard let system = try openKVM() else { return }
    let machine = try system.createVirtualMachine()
    try machine.enableSplitInterruptController(pinCount: 24)
    let processor = try machine.createVCPU(id: 0, runByteCount: system.runByteCount)
    let refused = try processor.setMSRs([
      MSRValue(index: 0x174, value: 5), MSRValue(index: 0xDEAD_0000, value: 1), MSRValue(index: 0x175, value: 6),
    ])
    #expect(refused == [0xDEAD_0000])
    #expect(try processor.msrs([0x174, 0xDEAD_0000, 0x175]).map(\.value) == [5, 6])
  }

  @Test("Doorbells and interrupts can be registered, and taken back only with the same arguments")
  func registrations() throws {
    guard let system = try openKVM() else { return }
    let machine = try system.createVirtualMachine()
    try machine.enableSplitInterruptController(pinCount: 24)
    let event = try EventFD()
    try machine.registerDoorbell(at: 0xC000_0000, length: 0, eventFD: event.fd.rawValue)
    #expect(throws: KVMError.failed(.ioeventfd, .noEntry)) {
      try machine.removeDoorbell(at: 0xC000_0004, length: 0, eventFD: event.fd.rawValue)
    }
    try machine.removeDoorbell(at: 0xC000_0000, length: 0, eventFD: event.fd.rawValue)
    try machine.setRouting([MSIRoute(gsi: 30, message: MSIMessage(address: 0xFEE0_0000, data: 0x30))])
    try machine.assignInterrupt(eventFD: event.fd.rawValue, gsi: 30)
    try machine.deassignInterrupt(eventFD: event.fd.rawValue, gsi: 30)
  }
}

@Suite("CPUID")
struct CPUIDTests {
  let host = CPUIDTable(entries: [
    .init(function: 0, eax: 0xD, ebx: 0x6874_7541), .init(function: 1, ebx: 0xAB_CD_08_00, ecx: 1 << 5),
    .init(function: 0xB, index: 0, flags: 1, ebx: 8), .init(function: 0x4000_0000, eax: 0x4000_0001),
    .init(function: 0x8000_0007, edx: 1 << 8), .init(function: 0x8000_0008, eax: 0x30_28),
    .init(function: 0x8000_001D, index: 3, flags: 1, eax: 0x163),
  ])

  func table(count: Int) -> CPUIDTable {
    host.prepared(
      for: ProcessorTopology(count: count, hasTSCDeadline: true, tscFrequency: 2_000_000, hasExtendedDestinations: true))
  }

  @Test("Ids and counts agree in every leaf", arguments: [1, 2, 64, 300, 1024])
  func topology(count: Int) throws {
    let last = UInt32(count - 1)
    let table = table(count: count).forProcessor(id: last)
    #expect(table.entry(1)?.ebx == (last & 0xFF) << 24 | UInt32(min(count, 255)) << 16 | 0x0800)
    let core = try #require(table.entry(0xB, index: 1))
    #expect(core.ebx == UInt32(count) && core.edx == last)
    // All ids of the package fit in the shift.
    #expect(last >> core.eax == 0 && (count == 1 || last >> (core.eax - 1) != 0))
    #expect(table.entry(0x8000_0008)?.ecx == UInt32(min(count - 1, 255)) | core.eax << 12)
  }

  @Test("Hypervisor features are set, nested virtualization is not offered")
  func features() {
    let table = table(count: 2)
    #expect(table.entry(1)?.ecx == 1 << 31 | 1 << 24 | 1 << 21)
    #expect(table.entry(0x4000_0010)?.eax == 2_000_000)
    #expect(table.entry(0x4000_0000)?.eax == 0x4000_0010)
    #expect(table.physicalAddressBits == 0x28)
  }

  @Test("An extended destination moves to the upper half of the address")
  func extendedDestination() {
    // Destination 300 = 0x12C: low 8 bits 0x2C in bits 19:12, bit 8 in bit 5.
    #expect(MSIMessage(guestAddress: 0xFEE2_C020, data: 1).address == 0x100_FEE2_C000)
    #expect(MSIMessage(guestAddress: 0xFEE0_3000, data: 1).address == 0xFEE0_3000)
    // Remappable format is left alone.
    #expect(MSIMessage(guestAddress: 0xFEE0_0030, data: 1).address == 0xFEE0_0030)
  }
}
