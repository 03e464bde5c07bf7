/// One line of the memory map that the guest's kernel receives.
package struct E820Entry: Equatable, Sendable {
  package enum Kind: UInt32, Sendable {
    case ram = 1
    case reserved = 2
  }

  package var range: Range<UInt64>
  package var kind: Kind
}

extension PhysicalMap {
  /// The E820 map: RAM without the legacy video and firmware area, the ACPI tables and the ECAM bus reserved.
  package var e820: [E820Entry] {
    var entries = [
      E820Entry(range: 0..<LowMemory.legacyHole.lowerBound, kind: .ram),
      E820Entry(range: LowMemory.acpi, kind: .reserved),
      E820Entry(range: LowMemory.legacyHole.upperBound..<lowMemory.upperBound, kind: .ram),
      // Linux trusts an MCFG range only if the map (or a motherboard device) says that it is reserved.
      E820Entry(range: Self.ecam, kind: .reserved),
    ]
    if let high = highMemory {
      entries.append(E820Entry(range: high, kind: .ram))
    }
    return entries
  }
}

/// Where the boot structures lie below 1 MiB.
package enum LowMemory {
  package static let globalDescriptorTable: UInt64 = 0x500
  package static let interruptDescriptorTable: UInt64 = 0x540
  package static let startInfo: UInt64 = 0x6000
  package static let moduleList: UInt64 = 0x6040
  package static let memoryMap: UInt64 = 0x6080
  package static let zeroPage: UInt64 = 0x7000
  package static let stackTop: UInt64 = 0x8FF0
  package static let pageTables: UInt64 = 0x9000
  package static let commandLine: UInt64 = 0x20000
  /// Bytes set aside for the command line with its NUL.
  package static let commandLineCapacity = 0x10000
  /// Legacy video memory and firmware: never reported as RAM.
  package static let legacyHole = 0xA0000 as UInt64..<0x10_0000
  /// ACPI tables; the root pointer is at the start, where a legacy scan finds it.
  package static let acpi = 0xE0000 as UInt64..<0x10_0000
  /// Kernels are loaded from here up.
  package static let kernelBase: UInt64 = 0x10_0000
}
