import KVM
import Machine
import Testing

@Suite("I/O APIC")
struct IOAPICTests {
  private static let masked: UInt32 = 1 << 16
  private static let level: UInt32 = 1 << 15
  private static let remoteIRR: UInt32 = 1 << 14

  /// The register that the selector names.
  private static func read(_ apic: inout IOAPIC, _ register: UInt8) -> UInt32 {
    var effects: [IOAPIC.Effect] = []
    apic.write(offset: 0, value: UInt32(register), effects: &effects)
    #expect(effects.isEmpty)
    return apic.read(offset: 0x10)
  }

  private static func write(_ apic: inout IOAPIC, _ register: UInt8, _ value: UInt32) -> [IOAPIC.Effect] {
    var effects: [IOAPIC.Effect] = []
    apic.write(offset: 0, value: UInt32(register), effects: &effects)
    apic.write(offset: 0x10, value: value, effects: &effects)
    return effects
  }

  private static func line(_ apic: inout IOAPIC, _ pin: UInt32, _ isHigh: Bool) -> [IOAPIC.Effect] {
    var effects: [IOAPIC.Effect] = []
    apic.setLine(pin, isHigh, effects: &effects)
    return effects
  }

  private static func end(_ apic: inout IOAPIC, _ vector: UInt8) -> [IOAPIC.Effect] {
    var effects: [IOAPIC.Effect] = []
    apic.endOfInterrupt(vector: vector, effects: &effects)
    return effects
  }

  private static func message(_ address: UInt64, _ data: UInt32) -> IOAPIC.Effect {
    .deliver(MSIMessage(guestAddress: 0xFEE0_0000 | address, data: data))
  }

  @Test("After power-on it has 24 masked pins and version 0x11; what is not there reads as zero")
  func powerOn() {
    var apic = IOAPIC()
    #expect(Self.read(&apic, 1) == 0x0017_0011)
    for pin in 0..<24 as Range<UInt8> {
      #expect(Self.read(&apic, 0x10 + 2 * pin) == Self.masked)
      #expect(Self.read(&apic, 0x11 + 2 * pin) == 0)
      #expect(Self.line(&apic, UInt32(pin), true).isEmpty)
    }
    for register in [3, 0x0F, 0x40, 0xFF] as [UInt8] {
      #expect(Self.write(&apic, register, .max).isEmpty)
      #expect(Self.read(&apic, register) == 0)
    }
    #expect(Self.write(&apic, 0, .max).isEmpty)
    #expect(Self.read(&apic, 0) == 0x0F00_0000)
    #expect(apic.read(offset: 4) == 0 && apic.read(offset: 0xFFF) == 0)
  }

  @Test("An edge interrupts once; one that came while masked is held, once")
  func edges() {
    var apic = IOAPIC()
    for isHigh in [true, false, true] { #expect(Self.line(&apic, 4, isHigh).isEmpty) }
    #expect(Self.write(&apic, 0x18, 0x31) == [Self.message(0, 0x31)])
    // Still high: no new edge.
    #expect(Self.line(&apic, 4, true).isEmpty)
    #expect(Self.write(&apic, 0x18, 0x32).isEmpty)
    #expect(Self.line(&apic, 4, false).isEmpty)
    #expect(Self.line(&apic, 4, true) == [Self.message(0, 0x32)])
    #expect(Self.end(&apic, 0x32).isEmpty)
    #expect(apic.levelRoutes.isEmpty)
  }

  @Test("A level interrupts again after each end of interrupt for as long as it is high")
  func levels() {
    var apic = IOAPIC()
    let data = 0x41 | UInt32(3 << 14)
    #expect(Self.write(&apic, 0x22, 0x41 | Self.level) == [.routesChanged])
    #expect(Self.line(&apic, 9, true) == [Self.message(0, data)])
    #expect(Self.read(&apic, 0x22) == 0x41 | Self.level | Self.remoteIRR)
    for isHigh in [false, true] { #expect(Self.line(&apic, 9, isHigh).isEmpty) }
    #expect(Self.end(&apic, 0x40).isEmpty)
    #expect(Self.end(&apic, 0x41) == [Self.message(0, data)])
    #expect(Self.line(&apic, 9, false).isEmpty)
    #expect(Self.end(&apic, 0x41).isEmpty)
    #expect(Self.read(&apic, 0x22) == 0x41 | Self.level)
    #expect(Self.line(&apic, 9, true) == [Self.message(0, data)])
  }

  @Test("A level that falls while masked is forgotten, one that stays is delivered on unmasking")
  func maskedLevels() {
    var apic = IOAPIC()
    #expect(Self.write(&apic, 0x22, 0x41 | Self.level | Self.masked) == [.routesChanged])
    for isHigh in [true, false] { #expect(Self.line(&apic, 9, isHigh).isEmpty) }
    #expect(Self.write(&apic, 0x22, 0x41 | Self.level).isEmpty)
    #expect(Self.write(&apic, 0x22, 0x41 | Self.level | Self.masked).isEmpty)
    #expect(Self.line(&apic, 9, true).isEmpty)
    #expect(Self.write(&apic, 0x22, 0x41 | Self.level).count == 1)
  }

  @Test("Software cannot write the remote flag, but clears it by a turn to edge trigger")
  func remoteFlag() {
    var apic = IOAPIC()
    _ = Self.write(&apic, 0x22, 0x41 | Self.level | Self.remoteIRR | 1 << 12)
    #expect(Self.read(&apic, 0x22) == 0x41 | Self.level)
    _ = Self.line(&apic, 9, true)
    _ = Self.write(&apic, 0x22, 0x41 | Self.level)
    #expect(Self.read(&apic, 0x22) & Self.remoteIRR != 0)
    _ = Self.write(&apic, 0x22, 0x41 | Self.masked)
    #expect(Self.read(&apic, 0x22) & Self.remoteIRR == 0)
  }

  @Test(
    "Redirection entries become messages",
    arguments: [
      // High word, low word, address bits, data.
      (0x0700_0000, 0x0000_0031, 0x7000, 0x31),
      // Logical destination, lowest priority.
      (0x0300_0000, 0x0000_0931, 0x300C, 0x131),
      // NMI.
      (0x0000_0000, 0x0000_0400, 0x0000, 0x400),
      // Bits 14:8 of an extended destination.
      (0x02FE_0000, 0x0000_0031, 0x2FE0, 0x31),
    ] as [(UInt32, UInt32, UInt64, UInt32)])
  func messages(_ high: UInt32, _ low: UInt32, _ address: UInt64, _ data: UInt32) {
    var apic = IOAPIC()
    #expect(Self.write(&apic, 0x19, high).isEmpty)
    #expect(Self.write(&apic, 0x18, low).isEmpty)
    #expect(Self.line(&apic, 4, true) == [Self.message(address, data)])
  }

  @Test("KVM is told the messages of level pins, masked ones too, whenever one changes")
  func routes() {
    var apic = IOAPIC()
    #expect(Self.write(&apic, 0x22, 0x41 | Self.level | Self.masked) == [.routesChanged])
    #expect(apic.levelRoutes == [MSIRoute(gsi: 9, message: MSIMessage(guestAddress: 0xFEE0_0000, data: 0x41 | 3 << 14))])
    #expect(Self.write(&apic, 0x22, 0x41 | Self.level).isEmpty)
    #expect(Self.write(&apic, 0x23, 0x0100_0000) == [.routesChanged])
    #expect(apic.levelRoutes == [MSIRoute(gsi: 9, message: MSIMessage(guestAddress: 0xFEE0_1000, data: 0x41 | 3 << 14))])
    // Vectors below 16 are none.
    #expect(Self.write(&apic, 0x22, 0x0F | Self.level) == [.routesChanged])
    #expect(apic.levelRoutes.isEmpty)
    #expect(Self.write(&apic, 0x22, 0x41) == [.routesChanged])
    #expect(apic.levelRoutes.isEmpty)
  }
}
