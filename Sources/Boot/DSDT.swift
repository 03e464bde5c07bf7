/// The differentiated system description: host bridge with its slots, motherboard resources, processors, serial port, power
/// button.
enum DSDT {
  /// Definition blocks for `processorCount` processors with unique ids from 0.
  static func body(map: PhysicalMap, processorCount: Int, hasSerialPort: Bool) -> [UInt8] {
    AML.scope(
      "\\_SB_",
      [hostBridge(map), motherboard, processors(processorCount)] + (hasSerialPort ? [serialPort] : [])
        + [powerButton, eventDevice])
      // Sleep type 5 for power-off; the others are not offered.
      + AML.name("\\_S5_", AML.package([AML.integer(5), AML.integer(5), AML.integer(0), AML.integer(0)]))
  }

  private static func hostBridge(_ map: PhysicalMap) -> AML.Term {
    var windows = [
      AML.busRange(0, through: 0),
      AML.ports(0xCF8, count: 8),
      AML.portWindow(0x0000, through: 0x0CF7),
      AML.portWindow(0x0D00, through: 0xFFFF),
      AML.memoryWindow32(PhysicalMap.pciWindow32),
    ]
    if let window = map.pciWindow64 { windows.append(AML.memoryWindow64(window)) }
    return AML.device(
      "PC00",
      [
        AML.name("_HID", AML.eisaID("PNP0A08")),
        AML.name("_CID", AML.eisaID("PNP0A03")),
        AML.name("_SEG", AML.integer(0)),
        AML.name("_BBN", AML.integer(0)),
        AML.name("_UID", AML.integer(0)),
        // Device DMA is coherent with the processors' caches.
        AML.name("_CCA", AML.integer(1)),
        AML.currentResources(windows),
        operatingSystemCapabilities,
      ] + hotPlug)
  }

  // MARK: hot plug

  /// Device numbers that a device can be plugged into.
  private static let slots: ClosedRange<UInt64> = 1...31

  /// The slots of bus 0, and the method that the event device calls when one has something new: it tells the operating system
  /// of each slot of the two registers, which are empty afterwards.
  private static var hotPlug: [AML.Term] {
    let notifications = slots.map { slot in
      AML.if(
        AML.and(AML.arg0, AML.integer(1 << slot)),
        [AML.notify(named: slotName(slot), AML.arg1)])
    }
    return [
      AML.portRegion("PHPR", at: PlatformPort.pluggedSlots, count: 12),
      AML.doubleWordFields(region: "PHPR", names: ["PHUP", "PHDN", "PHEJ"]),
      AML.method("PHNT", arguments: 2, serialized: true, notifications),
      AML.method(
        "PHEV", arguments: 0, serialized: true,
        [
          // 1: look whether a device is there. 3: let go of it.
          AML.call("PHNT", [AML.path("PHUP"), AML.integer(1)]),
          AML.call("PHNT", [AML.path("PHDN"), AML.integer(3)]),
        ]),
    ]
      + slots.map { slot in
        AML.device(
          named: slotName(slot),
          [
            AML.name("_SUN", AML.integer(slot)),
            AML.name("_ADR", AML.integer(slot << 16)),
            AML.method("_EJ0", arguments: 1, serialized: true, [AML.store(AML.integer(1 << slot), into: AML.path("PHEJ"))]),
          ])
      }
  }

  private static func slotName(_ slot: UInt64) -> [UInt8] {
    let digits = AML.ascii("0123456789ABCDEF")
    return AML.ascii("SL") + [digits[Int(slot >> 4)], digits[Int(slot & 0xF)]]
  }

  /// `_OSC`: the operating system may control everything that PCI Express offers (we implement none of it in the
  /// platform). Without this method Linux reports that the platform keeps control.
  private static var operatingSystemCapabilities: AML.Term {
    // 33DB4D5B-1FF7-401C-9657-7441C03DD766 in the byte order of a UUID buffer.
    let uuid: [UInt8] = [
      0x5B, 0x4D, 0xDB, 0x33, 0xF7, 0x1F, 0x1C, 0x40, 0x96, 0x57, 0x74, 0x41, 0xC0, 0x3D, 0xD7, 0x66,
    ]
    let firstDWord = AML.path("CDW1")
    let controls = AML.path("CDW3")
    return AML.method(
      "_OSC", arguments: 4, serialized: true,
      [
        AML.createDWordField(AML.arg3, offset: 0, name: "CDW1"),
        AML.if(
          AML.equal(AML.arg0, AML.buffer(uuid)),
          [
            AML.createDWordField(AML.arg3, offset: 8, name: "CDW3"),
            AML.and(controls, AML.integer(0x1F), into: AML.local0),
            AML.if(AML.not(AML.equal(AML.arg1, AML.integer(1))), [AML.or(firstDWord, AML.integer(8), into: firstDWord)]),
            AML.if(
              AML.not(AML.equal(AML.local0, controls)), [AML.or(firstDWord, AML.integer(0x10), into: firstDWord)]),
            AML.store(AML.local0, into: controls),
          ]),
        AML.else([AML.or(firstDWord, AML.integer(4), into: firstDWord)]),
        AML.return(AML.arg3),
      ])
  }

  private static var motherboard: AML.Term {
    AML.device(
      "MBRD",
      [
        AML.name("_HID", AML.eisaID("PNP0C02")),
        AML.name("_UID", AML.integer(0)),
        AML.currentResources([
          AML.memory32Fixed(PhysicalMap.ecam),
          AML.ports(PlatformPort.sleepAndReset, count: 32),
        ]),
      ])
  }

  private static func processors(_ count: Int) -> AML.Term {
    let digits = AML.ascii("0123456789ABCDEF")
    var body = [AML.name("_HID", AML.string("ACPI0010")), AML.name("_CID", AML.eisaID("PNP0A05"))]
    let hid = AML.name("_HID", AML.string("ACPI0007"))
    for index in 0..<count {
      let name = [0x43, digits[index >> 8 & 0xF], digits[index >> 4 & 0xF], digits[index & 0xF]]
      body.append(AML.device(named: name, [hid, AML.name("_UID", AML.integer(UInt64(index)))]))
    }
    return AML.device("CPUS", body)
  }

  private static var serialPort: AML.Term {
    AML.device(
      "COM1",
      [
        AML.name("_HID", AML.eisaID("PNP0501")),
        AML.name("_UID", AML.integer(0)),
        AML.name("_DDN", AML.string("COM1")),
        AML.currentResources([
          AML.ports(PlatformPort.serial, count: 8), AML.interrupt(PlatformInterrupt.serial, .edge),
        ]),
      ])
  }

  private static var powerButton: AML.Term {
    AML.device("PWRB", [AML.name("_HID", AML.eisaID("PNP0C0C")), AML.name("_UID", AML.integer(0))])
  }

  /// The generic event device: its interrupt stays asserted while the event register is not zero; reading clears it.
  private static var eventDevice: AML.Term {
    AML.device(
      "GED_",
      [
        AML.name("_HID", AML.string("ACPI0013")),
        AML.name("_UID", AML.integer(0)),
        AML.currentResources([AML.interrupt(PlatformInterrupt.genericEvent, .level)]),
        AML.portRegion("EVRG", at: PlatformPort.genericEvent, count: 1),
        AML.byteField(region: "EVRG", name: "EVST"),
        AML.method(
          "_EVT", arguments: 1, serialized: true,
          [
            AML.store(AML.path("EVST"), into: AML.local0),
            AML.if(
              AML.and(AML.local0, AML.integer(UInt64(GenericEvent.powerButton))),
              [AML.notify("\\_SB_.PWRB", 0x80)]),
            AML.if(
              AML.and(AML.local0, AML.integer(UInt64(GenericEvent.hotPlug))),
              [AML.call("\\_SB_.PC00.PHEV", [])]),
          ]),
      ])
  }
}
