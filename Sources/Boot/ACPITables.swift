/// The ACPI tables of one guest, laid out at fixed guest addresses.
package struct ACPITables: Equatable, Sendable {
  /// Guest address of the root pointer (RSDP) and of `bytes`.
  package let rootPointer: UInt64
  /// Root pointer and all tables, to be written at `rootPointer`.
  package let bytes: [UInt8]
  /// Signature and bytes of each table, for inspection.
  package let tables: [(signature: String, range: Range<Int>)]

  package static func == (a: ACPITables, b: ACPITables) -> Bool {
    a.rootPointer == b.rootPointer && a.bytes == b.bytes
  }

  /// `processorIDs` are the APIC ids, ascending; the processor's unique id in ACPI is its index.
  package init(map: PhysicalMap, processorIDs: [UInt32], hasSerialPort: Bool = true) throws(BootError) {
    guard !processorIDs.isEmpty, processorIDs.count <= 4096 else {
      throw .processors("\(processorIDs.count) processors asked for, from 1 to 4096 are possible")
    }
    guard zip(processorIDs, processorIDs.dropFirst()).allSatisfy({ $0 < $1 }) else {
      throw .processors("their ids are not ascending")
    }
    let base = LowMemory.acpi.lowerBound
    var bytes = [UInt8](repeating: 0, count: 64)  // Root pointer, 36 bytes, filled in last.
    bytes.reserveCapacity(8192 + processorIDs.count * 64)
    var tables: [(signature: String, range: Range<Int>)] = []

    func place(_ table: [UInt8], _ signature: String) -> UInt64 {
      let address = base + UInt64(bytes.count)
      tables.append((signature, bytes.count..<bytes.count + table.count))
      bytes += table
      bytes += [UInt8](repeating: 0, count: (16 - bytes.count % 16) % 16)
      return address
    }

    let dsdt = place(
      Self.table(
        "DSDT", revision: 6,
        DSDT.body(map: map, processorCount: processorIDs.count, hasSerialPort: hasSerialPort)),
      "DSDT")
    var pointers: [UInt8] = []
    pointers.append(u64: place(Self.fixedDescription(dsdt: dsdt), "FACP"))
    pointers.append(u64: place(Self.interruptControllers(processorIDs, hasSerialPort: hasSerialPort), "APIC"))
    pointers.append(u64: place(Self.configurationSpace, "MCFG"))
    let xsdt = place(Self.table("XSDT", revision: 1, pointers), "XSDT")
    let root = Self.rootPointer(xsdt: xsdt)
    bytes.replaceSubrange(0..<root.count, with: root)

    guard UInt64(bytes.count) <= LowMemory.acpi.upperBound - base else {
      throw .processors("\(processorIDs.count) processors need \(bytes.count) bytes of ACPI tables")
    }
    self.rootPointer = base
    self.bytes = bytes
    self.tables = tables
  }

  // MARK: tables

  private static let oemID = AML.ascii("MARTLT")
  private static let oemTableID = AML.ascii("MARTLET ")

  /// Header (36 bytes), body, and the checksum that makes all bytes add up to 0.
  private static func table(_ signature: StaticString, revision: UInt8, _ body: [UInt8]) -> [UInt8] {
    var bytes = AML.ascii(signature)
    bytes.append(u32: UInt32(36 + body.count))
    bytes += [revision, 0]
    bytes += oemID
    bytes += oemTableID
    bytes.append(u32: 1)
    bytes += AML.ascii("MTLT")
    bytes.append(u32: 1)
    bytes += body
    bytes[9] = checksum(bytes[...])
    return bytes
  }

  private static func checksum(_ bytes: ArraySlice<UInt8>) -> UInt8 {
    0 &- bytes.reduce(0, &+)
  }

  private static func rootPointer(xsdt: UInt64) -> [UInt8] {
    var bytes = AML.ascii("RSD PTR ") + [0] + oemID + [2]
    bytes.append(u32: 0)
    bytes.append(u32: 36)
    bytes.append(u64: xsdt)
    bytes += [0, 0, 0, 0]
    bytes[8] = checksum(bytes[0..<20])
    bytes[32] = checksum(bytes[...])
    return bytes
  }

  /// FADT of a hardware-reduced platform, revision 6.3, 276 bytes. Offsets are the specification's.
  private static func fixedDescription(dsdt: UInt64) -> [UInt8] {
    var body = [UInt8](repeating: 0, count: 276 - 36)
    func at(_ offset: Int) -> Int { offset - 36 }
    func setPort(_ offset: Int, _ port: UInt16, bits: UInt8, access: UInt8) {
      body[at(offset)] = 1
      body[at(offset) + 1] = bits
      body[at(offset) + 3] = access
      body.store(u64: UInt64(port), at: at(offset) + 4)
    }
    // IAPC_BOOT_ARCH: bit 2 no VGA, bit 5 no CMOS clock (kvmclock gives the time of day), bit 1 clear: no keyboard
    // controller to probe.
    body.store(u16: 1 << 2 | 1 << 5, at: at(109))
    // Flags: WBINVD works, power and sleep buttons are control methods or absent, 32-bit timer, reset register,
    // hardware-reduced.
    body.store(u32: 1 << 0 | 1 << 4 | 1 << 5 | 1 << 8 | 1 << 10 | 1 << 20, at: at(112))
    setPort(116, PlatformPort.sleepAndReset, bits: 8, access: 1)
    body[at(128)] = PlatformPort.resetValue
    body[at(131)] = 3
    body.store(u64: dsdt, at: at(140))
    setPort(208, PlatformPort.powerManagementTimer, bits: 32, access: 3)
    setPort(244, PlatformPort.sleepAndReset, bits: 8, access: 1)
    setPort(256, PlatformPort.sleepAndReset, bits: 8, access: 1)
    body.replaceSubrange(at(268)..<at(276), with: AML.ascii("MARTLET "))
    return table("FACP", revision: 6, body)
  }

  /// MADT: one entry per processor (a local APIC entry up to id 254, an x2APIC entry above, as the specification asks),
  /// the I/O APIC, and the serial port's interrupt, which a hardware-reduced kernel does not map by itself.
  private static func interruptControllers(_ processorIDs: [UInt32], hasSerialPort: Bool) -> [UInt8] {
    var body: [UInt8] = []
    body.append(u32: UInt32(PhysicalMap.localAPIC.lowerBound))
    body.append(u32: 0)
    for (uid, id) in processorIDs.enumerated() {
      if id < 255, uid < 255 {
        body += [0, 8, UInt8(uid), UInt8(id)]
        body.append(u32: 1)
      } else {
        body += [9, 16, 0, 0]
        body.append(u32: id)
        body.append(u32: 1)
        body.append(u32: UInt32(uid))
      }
    }
    body += [1, 12, 0, 0]
    body.append(u32: UInt32(PhysicalMap.ioapic.lowerBound))
    body.append(u32: 0)
    // Bus ISA, source 4, edge triggered and active high.
    if hasSerialPort {
      body += [2, 10, 0, UInt8(PlatformInterrupt.serial)]
      body.append(u32: PlatformInterrupt.serial)
      body.append(u16: 0b0101)
    }
    // LINT1 of every processor is the non-maskable interrupt.
    body += [4, 6, 0xFF, 0, 0, 1]
    if processorIDs.contains(where: { $0 >= 255 }) {
      body += [10, 12, 0, 0, 0xFF, 0xFF, 0xFF, 0xFF, 1, 0, 0, 0]
    }
    return table("APIC", revision: 5, body)
  }

  private static var configurationSpace: [UInt8] {
    var body = [UInt8](repeating: 0, count: 8)
    body.append(u64: PhysicalMap.ecam.lowerBound)
    body.append(u16: 0)
    body += [0, 0]
    body.append(u32: 0)
    return table("MCFG", revision: 1, body)
  }
}
