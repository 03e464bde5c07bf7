/// The guest's physical address map: where RAM lies for a given size, and the fixed windows beside it.
///
/// RAM is `[0, min(size, 3 GiB))` and, for the rest, from 4 GiB up. Between the two are the 32-bit PCI window, the ECAM
/// bus and the interrupt controllers. Above RAM is a 64-bit PCI window up to the processor's address limit.
package struct PhysicalMap: Equatable, Sendable {
  /// First address past low RAM when there is more RAM than that; start of the 32-bit PCI window.
  package static let lowMemoryLimit: UInt64 = 0xC000_0000
  /// First address of high RAM.
  package static let highMemoryBase: UInt64 = 0x1_0000_0000
  /// 32-bit PCI window, up to the ECAM bus.
  package static let pciWindow32 = 0xC000_0000 as UInt64..<0xE800_0000
  /// Enhanced configuration access of PCI bus 0: 1 MiB.
  package static let ecam = 0xE800_0000 as UInt64..<0xE810_0000
  /// Registers of the I/O APIC, one page.
  package static let ioapic = 0xFEC0_0000 as UInt64..<0xFEC0_1000
  /// Local APIC page (handled by KVM).
  package static let localAPIC = 0xFEE0_0000 as UInt64..<0xFEE0_1000
  /// Three pages KVM needs on Intel processors (KVM_SET_TSS_ADDR).
  package static let kvmTSS: UInt64 = 0xFFFB_D000
  /// One page KVM needs on Intel processors (KVM_SET_IDENTITY_MAP_ADDR).
  package static let kvmIdentityMap: UInt64 = 0xFFFB_C000
  /// Smallest RAM that the boot structures and any kernel fit in.
  package static let minimumMemory: UInt64 = 4 << 20

  /// Bytes of guest RAM, a multiple of the page size.
  package let memoryByteCount: UInt64
  /// Guest physical address bits, from CPUID 0x8000_0008.
  package let addressBits: UInt8

  /// Throws unless the size is a multiple of 4 KiB, at least 4 MiB, and ends below the processor's address limit.
  package init(memoryByteCount: UInt64, addressBits: UInt8) throws(BootError) {
    let bits = min(max(addressBits, 36), 52)
    let maximum = (UInt64(1) << UInt64(bits)) - Self.highMemoryBase
    guard memoryByteCount % 4096 == 0, memoryByteCount >= Self.minimumMemory, memoryByteCount <= maximum else {
      throw .memorySize(byteCount: memoryByteCount, minimum: Self.minimumMemory, maximum: maximum)
    }
    self.memoryByteCount = memoryByteCount
    self.addressBits = bits
  }

  /// RAM below 4 GiB, from address 0.
  package var lowMemory: Range<UInt64> { 0..<min(memoryByteCount, Self.lowMemoryLimit) }

  /// RAM from 4 GiB up, or nil when all fits below the hole.
  package var highMemory: Range<UInt64>? {
    guard memoryByteCount > Self.lowMemoryLimit else { return nil }
    return Self.highMemoryBase..<Self.highMemoryBase + (memoryByteCount - Self.lowMemoryLimit)
  }

  /// 64-bit PCI window: from the first 4 GiB boundary above RAM to the address limit (at most 46 bits, which every
  /// kernel can map directly), or nil when RAM leaves no room.
  package var pciWindow64: Range<UInt64>? {
    let memoryEnd = highMemory?.upperBound ?? Self.highMemoryBase
    let start = (memoryEnd + 0xFFFF_FFFF) & ~0xFFFF_FFFF
    let end = UInt64(1) << UInt64(min(addressBits, 46))
    return start < end ? start..<end : nil
  }
}

/// I/O ports of the platform that both the ACPI tables and the device models name.
package enum PlatformPort {
  /// ACPI sleep control, sleep status and reset register (8 bit).
  package static let sleepAndReset: UInt16 = 0x600
  /// Value that the reset register takes for a reset.
  package static let resetValue: UInt8 = 1
  /// Sleep control value for power-off: SLP_TYP 5 << 2 | SLP_EN.
  package static let powerOffValue: UInt8 = 0x34
  /// Generic event register (8 bit): pending events, cleared by reading.
  package static let genericEvent: UInt16 = 0x604
  /// ACPI power management timer, 32 bit at 3.579545 MHz.
  package static let powerManagementTimer: UInt16 = 0x608
  /// Three 32-bit registers of PCI hot plug, one bit for each device number of bus 0. Slots whose devices have come: cleared by
  /// reading.
  package static let pluggedSlots: UInt16 = 0x610
  /// Slots whose devices the guest is asked to let go of: cleared by reading.
  package static let unplugRequests: UInt16 = 0x614
  /// Written by the guest: it has let go of the devices in these slots.
  package static let ejectedSlots: UInt16 = 0x618
  /// First port of COM1.
  package static let serial: UInt16 = 0x3F8
}

/// Pins of the I/O APIC, which are also the ACPI global system interrupts.
package enum PlatformInterrupt {
  package static let serial: UInt32 = 4
  package static let genericEvent: UInt32 = 16
  package static let pinCount: UInt32 = 24
}

/// Bits of the generic event register.
package enum GenericEvent {
  package static let powerButton: UInt8 = 1
  /// `PlatformPort.pluggedSlots` or `unplugRequests` has something new.
  package static let hotPlug: UInt8 = 2
}
