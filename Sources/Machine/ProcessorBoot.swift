import Boot
import CLinux
import HostSystem
import KVM

/// What all processors are set up with, computed once.
struct ProcessorBoot: Sendable {
  let cpuid: CPUIDTable
  let msrIndices: [UInt32]
  let xsaveByteCount: Int
  let usesX2APIC: Bool
  let topology: ProcessorTopology

  /// Time stamp counter: keeps running over a reset, as on a real machine.
  private static let timeStampCounter: UInt32 = 0x10

  init(
    kvm: borrowing System, machine: borrowing VirtualMachine, cpuid: CPUIDTable, processorCount: Int, usesX2APIC: Bool
  ) throws(KVMError) {
    self.cpuid = cpuid
    msrIndices = try kvm.msrIndexList().filter { $0 != Self.timeStampCounter }
    xsaveByteCount = machine.value(of: .xsave2)
    self.usesX2APIC = usesX2APIC
    topology = ProcessorTopology(
      count: processorCount, hasTSCDeadline: machine.value(of: .tscDeadlineTimer) > 0, tscFrequency: nil,
      hasExtendedDestinations: usesX2APIC)
  }

  /// The CPUID common to all processors; the frequency comes from the first one.
  func preparedCPUID(tscFrequency: UInt32?) -> CPUIDTable {
    var topology = topology
    topology.tscFrequency = tscFrequency
    return cpuid.prepared(for: topology)
  }
}

extension kvm_segment {
  /// The cached part of a segment register, as loaded from a descriptor.
  init(_ segment: EntryState.Segment) {
    let descriptor = segment.descriptor
    func bits(_ shift: UInt64, _ count: UInt64) -> UInt8 { UInt8(descriptor >> shift & ((1 << count) - 1)) }
    self.init()
    base = (descriptor >> 16 & 0xFF_FFFF) | (descriptor >> 56 & 0xFF) << 24
    let granular = descriptor >> 55 & 1 != 0
    let limitField = UInt32(descriptor & 0xFFFF) | UInt32(descriptor >> 48 & 0xF) << 16
    limit = granular ? limitField << 12 | 0xFFF : limitField
    selector = segment.selector
    type = bits(40, 4)
    s = bits(44, 1)
    dpl = bits(45, 2)
    present = bits(47, 1)
    avl = bits(52, 1)
    l = bits(53, 1)
    db = bits(54, 1)
    g = bits(55, 1)
  }
}

extension VCPU {
  /// Puts the boot processor at the kernel's entry point.
  borrowing func enter(_ entry: EntryState) throws(KVMError) {
    var special = try specialRegisters()
    special.cs = kvm_segment(entry.code)
    let data = kvm_segment(entry.data)
    special.ds = data
    special.es = data
    special.fs = data
    special.gs = data
    special.ss = data
    special.tr = kvm_segment(entry.task)
    var none = kvm_segment()
    none.unusable = 1
    special.ldt = none
    special.gdt.base = entry.globalDescriptorTable.base
    special.gdt.limit = entry.globalDescriptorTable.limit
    special.idt.base = entry.interruptDescriptorTable.base
    special.idt.limit = entry.interruptDescriptorTable.limit
    special.cr0 = entry.cr0
    special.cr3 = entry.cr3
    special.cr4 = entry.cr4
    special.efer = entry.efer
    try setSpecialRegisters(special)
    var registers = kvm_regs()
    registers.rip = entry.instructionPointer
    registers.rsp = entry.stackPointer
    registers.rbp = entry.stackPointer
    registers.rbx = entry.rbx
    registers.rsi = entry.rsi
    registers.rflags = entry.rflags
    try setRegisters(registers)
  }
}
