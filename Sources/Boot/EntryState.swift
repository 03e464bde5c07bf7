/// Registers of the first processor at the kernel's entry point; what is not here is zero.
package struct EntryState: Equatable, Sendable {
  /// A segment register as its selector and the 8-byte descriptor it was loaded from.
  package struct Segment: Equatable, Sendable {
    package var selector: UInt16
    package var descriptor: UInt64
  }

  package var instructionPointer: UInt64
  package var stackPointer: UInt64
  package var rbx: UInt64
  package var rsi: UInt64
  package var rflags: UInt64
  package var cr0: UInt64
  package var cr3: UInt64
  package var cr4: UInt64
  package var efer: UInt64
  package var code: Segment
  package var data: Segment
  package var task: Segment
  /// Base and limit.
  package var globalDescriptorTable: (base: UInt64, limit: UInt16)
  package var interruptDescriptorTable: (base: UInt64, limit: UInt16)

  package static func == (a: EntryState, b: EntryState) -> Bool {
    a.instructionPointer == b.instructionPointer && a.stackPointer == b.stackPointer && a.rbx == b.rbx
      && a.rsi == b.rsi && a.rflags == b.rflags && a.cr0 == b.cr0 && a.cr3 == b.cr3 && a.cr4 == b.cr4
      && a.efer == b.efer && a.code == b.code && a.data == b.data && a.task == b.task
      && a.globalDescriptorTable == b.globalDescriptorTable
      && a.interruptDescriptorTable == b.interruptDescriptorTable
  }

  /// Linux 64-bit boot protocol: long mode, paging on, RSI = zero page.
  static func linux64(start: UInt64) -> EntryState {
    EntryState(
      instructionPointer: start, stackPointer: LowMemory.stackTop, rbx: 0, rsi: LowMemory.zeroPage, rflags: 2,
      cr0: 0x8000_0011, cr3: LowMemory.pageTables, cr4: 0x20, efer: 0x500,
      code: Segment(selector: 0x10, descriptor: DescriptorTable.code64),
      data: Segment(selector: 0x18, descriptor: DescriptorTable.flatData),
      task: Segment(selector: 0x20, descriptor: DescriptorTable.busyTask64),
      globalDescriptorTable: (LowMemory.globalDescriptorTable, UInt16(DescriptorTable.linux64.count * 8 - 1)),
      interruptDescriptorTable: (LowMemory.interruptDescriptorTable, 7))
  }

  /// PVH: 32-bit protected mode, paging off, RBX = start info.
  static func pvh(start: UInt32) -> EntryState {
    EntryState(
      instructionPointer: UInt64(start), stackPointer: LowMemory.stackTop, rbx: LowMemory.startInfo, rsi: 0, rflags: 2,
      cr0: 0x11, cr3: 0, cr4: 0, efer: 0,
      code: Segment(selector: 0x08, descriptor: DescriptorTable.code32),
      data: Segment(selector: 0x10, descriptor: DescriptorTable.flatData),
      task: Segment(selector: 0x18, descriptor: DescriptorTable.busyTask32),
      globalDescriptorTable: (LowMemory.globalDescriptorTable, UInt16(DescriptorTable.pvh.count * 8 - 1)),
      interruptDescriptorTable: (LowMemory.interruptDescriptorTable, 7))
  }
}

/// The global descriptor tables that the entry states' selectors point into.
enum DescriptorTable {
  static let code64: UInt64 = 0x00AF_9B00_0000_FFFF
  static let code32: UInt64 = 0x00CF_9B00_0000_FFFF
  static let flatData: UInt64 = 0x00CF_9300_0000_FFFF
  static let busyTask64: UInt64 = 0x008F_8B00_0000_FFFF
  static let busyTask32: UInt64 = 0x0000_8B00_0000_0067

  /// Null, unused, code at 0x10, data at 0x18, task (16 bytes) at 0x20.
  static let linux64: [UInt64] = [0, 0, code64, flatData, busyTask64, 0]
  /// Null, code at 0x08, data at 0x10, task at 0x18.
  static let pvh: [UInt64] = [0, code32, flatData, busyTask32]
}
