import CLinux
import HostSystem
import KVM

/// Instructions that every stock kernel executes at its highest privilege level. A KVM that emulates the processor in
/// software accepts guests and then stops at some of these, whatever its CPUID says; so they are tried.
struct InstructionCheck: Sendable {
  let name: String
  /// 64-bit code at privilege level 0, ending in `out 0xF4, al`.
  let code: [UInt8]
  /// Leaf, register and bit of CPUID without which the instruction need not work.
  var feature: (leaf: UInt32, register: Register, bit: UInt32)?

  enum Register: Sendable { case ecx, edx }

  private static let done: [UInt8] = [0xE6, 0xF4]
  /// mov esi, 0x6000
  private static let dataInSI: [UInt8] = [0xBE, 0x00, 0x60, 0x00, 0x00]
  /// mov eax, 0x6000
  private static let dataInAX: [UInt8] = [0xB8, 0x00, 0x60, 0x00, 0x00]

  static let all: [InstructionCheck] = [
    InstructionCheck(name: "cpuid", code: [0xB8, 1, 0, 0, 0, 0x31, 0xC9, 0x0F, 0xA2] + done),
    InstructionCheck(
      name: "wrmsr",
      code: [0xB9, 0x82, 0x00, 0x00, 0xC0, 0xB8, 0x00, 0x10, 0x00, 0x00, 0x31, 0xD2, 0x0F, 0x30, 0x0F, 0x32] + done),
    InstructionCheck(
      name: "mov cr", code: [0x0F, 0x20, 0xD8, 0x0F, 0x22, 0xD8, 0x0F, 0x20, 0xE0, 0x0F, 0x22, 0xE0] + done),
    InstructionCheck(name: "invlpg", code: dataInAX + [0x0F, 0x01, 0x38] + done),
    InstructionCheck(name: "lgdt", code: dataInAX + [0x0F, 0x01, 0x00, 0x0F, 0x01, 0x10] + done),
    InstructionCheck(name: "swapgs", code: [0x0F, 0x01, 0xF8, 0x0F, 0x01, 0xF8] + done),
    InstructionCheck(name: "int3/iretq", code: [0xCC] + done),
    InstructionCheck(
      name: "cmpxchg16b",
      code: dataInSI + [0x31, 0xC0, 0x31, 0xD2, 0x31, 0xDB, 0x31, 0xC9, 0xF0, 0x48, 0x0F, 0xC7, 0x0E] + done,
      feature: (1, .ecx, 13)),
    InstructionCheck(
      name: "popcnt", code: [0xB8, 7, 0, 0, 0, 0xF3, 0x0F, 0xB8, 0xC8] + done, feature: (1, .ecx, 23)),
    InstructionCheck(name: "fninit", code: dataInSI + [0xDB, 0xE3, 0xD9, 0xEE, 0xDD, 0x1E] + done),
    InstructionCheck(
      name: "movups", code: dataInSI + [0x0F, 0x10, 0x06, 0x0F, 0x58, 0xC0, 0x0F, 0x11, 0x06] + done,
      feature: (1, .edx, 25)),
    InstructionCheck(name: "xgetbv", code: [0x31, 0xC9, 0x0F, 0x01, 0xD0] + done, feature: (1, .ecx, 26)),
    InstructionCheck(
      name: "xsave",
      code: dataInSI + [0xB8, 3, 0, 0, 0, 0x31, 0xD2, 0x0F, 0xAE, 0x26, 0x0F, 0xAE, 0x2E] + done, feature: (1, .ecx, 26)),
  ]

  func applies(to table: CPUIDTable) -> Bool {
    guard let feature else { return true }
    guard let entry = table.entry(feature.leaf) else { return false }
    let value = feature.register == .ecx ? entry.ecx : entry.edx
    return value >> feature.bit & 1 == 1
  }

  enum Outcome: Equatable { case works, fails(String) }

  /// Runs the code in a VM of its own, so that nothing is left over from the one before.
  func perform(_ system: borrowing System, _ table: CPUIDTable) throws(KVMError) -> Outcome {
    let machine = try system.createVirtualMachine()
    try machine.reservePages(tss: 0xFFFB_D000, identityMap: 0xFFFB_C000)
    let memory: MemoryMapping
    do { memory = try .anonymous(byteCount: TinyGuest.byteCount) } catch { throw .failed(.setMemory, error.errno) }
    TinyGuest.fill(memory, code: code)
    // SAFETY: the mapping lives longer than the machine's use of it: both end with this function, the machine first
    // stops running when `run` returns.
    unsafe try machine.setMemory(
      slot: 0, guestAddress: 0, host: memory.baseAddress, byteCount: UInt64(memory.byteCount))
    let vcpu = try machine.createVCPU(id: 0, runByteCount: system.runByteCount)
    try vcpu.setCPUID(table)
    try TinyGuest.enterLongMode(vcpu, hasXSAVE: table.entry(1).map { $0.ecx >> 26 & 1 == 1 } ?? false)
    // Every exit but the expected one ends the test; interruptions are bounded.
    for _ in 0..<1000 {
      switch vcpu.run() {
      case .interrupted, .again: continue
      case .port(let access) where access.isWrite && access.port == 0xF4: return .works
      case .internalError(let suberror, _): return .fails("internal error \(suberror)")
      case .tripleFault: return .fails("fault")
      case .failed(let errno): return .fails(errno.name)
      case .failedEntry: return .fails("entry refused")
      case let exit: return .fails("\(exit)")
      }
    }
    return .fails("no end")
  }
}

/// Two mebibytes that a guest runs in, mapped one to one.
private enum TinyGuest {
  static let byteCount = 2 << 20
  private static let tables: UInt64 = 0x1000
  private static let interruptTable: UInt64 = 0x5000
  private static let stackTop: UInt64 = 0x7F00
  private static let code: UInt64 = 0x8000
  private static let handler: UInt64 = 0x9000

  static func fill(_ memory: MemoryMapping, code program: [UInt8]) {
    func store(_ value: UInt64, _ address: UInt64) {
      precondition(address + 8 <= byteCount, "Inside the guest's memory")
      // SAFETY: inside the mapping; the guest does not run yet.
      unsafe memory.baseAddress.storeBytes(of: value, toByteOffset: Int(address), as: UInt64.self)
    }
    store(0x2003, tables)
    store(0x3003, tables + 0x1000)
    store(0x83, tables + 0x2000)  // one page of two mebibytes
    // Vector 3: a 64-bit interrupt gate to code that returns at once.
    store(handler & 0xFFFF | 0x10 << 16 | 0x8E00 << 32 | (handler >> 16 & 0xFFFF) << 48, interruptTable + 48)
    store(0x9B << 40 | 0x20 << 48, 0x4010)  // code segment 0x10, for the return
    store(0x93 << 40 | 0x40 << 48, 0x4018)
    for (index, byte) in program.enumerated() {
      // SAFETY: as above.
      unsafe memory.baseAddress.storeBytes(of: byte, toByteOffset: Int(code) + index, as: UInt8.self)
    }
    store(0xCF48, handler)  // iretq
  }

  static func enterLongMode(_ vcpu: borrowing VCPU, hasXSAVE: Bool) throws(KVMError) {
    var special = try vcpu.specialRegisters()
    special.cr0 = 0x8000_0033  // PG, NE, ET, MP, PE
    special.cr3 = tables
    special.cr4 = 0x620 | (hasXSAVE ? 1 << 18 : 0)  // PAE, OSFXSR, OSXMMEXCPT, OSXSAVE
    special.efer = 0x501  // LMA, LME, SCE
    special.cs = kvm_segment()
    special.cs.limit = .max
    special.cs.selector = 0x10
    special.cs.type = 11
    special.cs.present = 1
    special.cs.s = 1
    special.cs.l = 1
    special.cs.g = 1
    var data = special.cs
    data.selector = 0x18
    data.type = 3
    data.l = 0
    data.db = 1
    special.ds = data
    special.es = data
    special.ss = data
    special.fs = data
    special.gs = data
    special.gdt.base = 0x4000
    special.gdt.limit = 0x1F
    special.idt.base = interruptTable
    special.idt.limit = 0xFFF
    try vcpu.setSpecialRegisters(special)
    var registers = kvm_regs()
    registers.rip = code
    registers.rsp = stackTop
    registers.rflags = 2
    try vcpu.setRegisters(registers)
  }
}
