import Boot
import KVM

/// The I/O APIC's registers (version 0x11, 24 pins) as a pure state machine; what it sends are messages.
package struct IOAPIC: Sendable {
  package enum Effect: Equatable {
    /// Send this interrupt.
    case deliver(MSIMessage)
    /// The messages of level-triggered pins changed: KVM must know them to report their end of interrupt.
    case routesChanged
  }

  private enum Bits {
    static let deliveryStatus: UInt64 = 1 << 12
    static let remoteIRR: UInt64 = 1 << 14
    static let level: UInt64 = 1 << 15
    static let masked: UInt64 = 1 << 16
    static let readOnly = deliveryStatus | remoteIRR
  }

  private var select: UInt8 = 0
  private var id: UInt32 = 0
  private var entries: [UInt64]
  /// Inputs that are high.
  private var lines: UInt32 = 0
  /// Rising edges that came while masked; delivered on unmasking.
  private var heldEdges: UInt32 = 0

  package init() {
    entries = Array(repeating: Bits.masked, count: Int(PlatformInterrupt.pinCount))
  }

  // MARK: registers

  /// 32-bit registers at +0x00 (selector) and +0x10 (window).
  package func read(offset: UInt64) -> UInt32 {
    switch offset {
    case 0x00: return UInt32(select)
    case 0x10:
      switch select {
      case 0x00, 0x02: return id
      case 0x01: return (PlatformInterrupt.pinCount - 1) << 16 | 0x11
      case 0x10..<0x10 + 2 * UInt8(PlatformInterrupt.pinCount):
        let entry = entries[Int(select - 0x10) / 2]
        return UInt32(truncatingIfNeeded: select & 1 == 0 ? entry : entry >> 32)
      default: return 0
      }
    default: return 0
    }
  }

  package mutating func write(offset: UInt64, value: UInt32, effects: inout [Effect]) {
    switch offset {
    case 0x00: select = UInt8(truncatingIfNeeded: value)
    case 0x10:
      switch select {
      case 0x00: id = value & 0x0F00_0000
      case 0x10..<0x10 + 2 * UInt8(PlatformInterrupt.pinCount):
        writeEntry(Int(select - 0x10) / 2, high: select & 1 != 0, value, effects: &effects)
      default: break
      }
    default: break
    }
  }

  private mutating func writeEntry(_ pin: Int, high: Bool, _ value: UInt32, effects: inout [Effect]) {
    let before = entries[pin]
    var after = before
    if high {
      after = before & 0xFFFF_FFFF | UInt64(value) << 32
    } else {
      after = before & 0xFFFF_FFFF_0000_0000 | UInt64(value) & ~Bits.readOnly | before & Bits.readOnly
    }
    // Software that has no end-of-interrupt register clears the remote flag by a turn to edge trigger.
    if after & Bits.level == 0 { after &= ~Bits.remoteIRR }
    entries[pin] = after
    let routeBits = ~(Bits.readOnly | Bits.masked)
    if (before | after) & Bits.level != 0, before & routeBits != after & routeBits { effects.append(.routesChanged) }
    service(pin, effects: &effects)
  }

  // MARK: inputs

  package mutating func setLine(_ pin: UInt32, _ isHigh: Bool, effects: inout [Effect]) {
    let bit = UInt32(1) << pin
    let wasHigh = lines & bit != 0
    guard wasHigh != isHigh else { return }
    if isHigh {
      lines |= bit
      if entries[Int(pin)] & Bits.level == 0 { heldEdges |= bit }
      service(Int(pin), effects: &effects)
    } else {
      lines &= ~bit
    }
  }

  /// A processor acknowledged `vector`: level-triggered pins that used it may interrupt again.
  package mutating func endOfInterrupt(vector: UInt8, effects: inout [Effect]) {
    for pin in entries.indices {
      let entry = entries[pin]
      guard entry & Bits.level != 0, entry & Bits.remoteIRR != 0, UInt8(truncatingIfNeeded: entry) == vector else {
        continue
      }
      entries[pin] &= ~Bits.remoteIRR
      service(pin, effects: &effects)
    }
  }

  private mutating func service(_ pin: Int, effects: inout [Effect]) {
    let entry = entries[pin]
    let bit = UInt32(1) << UInt32(pin)
    guard entry & Bits.masked == 0 else { return }
    if entry & Bits.level != 0 {
      guard lines & bit != 0, entry & Bits.remoteIRR == 0 else { return }
      entries[pin] |= Bits.remoteIRR
    } else {
      guard heldEdges & bit != 0 else { return }
      heldEdges &= ~bit
    }
    effects.append(.deliver(Self.message(entry)))
  }

  // MARK: messages

  /// What a redirection entry sends. Destination bits 14:8 are in bits 55:49 where the guest uses the extended format.
  private static func message(_ entry: UInt64) -> MSIMessage {
    let destination = entry >> 56
    let extended = entry >> 49 & 0x7F
    let mode = entry >> 8 & 7
    let isLowestPriority: UInt64 = mode == 1 ? 1 : 0
    let address =
      0xFEE0_0000 | destination << 12 | extended << 5 | isLowestPriority << 3 | (entry >> 11 & 1) << 2
    let isLevel = entry & Bits.level != 0
    let data = entry & 0x7FF | (isLevel ? 1 << 15 | 1 << 14 : 0)
    return MSIMessage(guestAddress: address, data: UInt32(truncatingIfNeeded: data))
  }

  /// Routes of the level-triggered pins, for KVM's end-of-interrupt reports. Masked pins too: Linux masks the pin of a
  /// threaded one-shot handler before it ends the interrupt, and would wait for ever for the remote flag to fall. Nothing
  /// is ever delivered by these routes; `deliver` sends.
  package var levelRoutes: [MSIRoute] {
    entries.indices.compactMap { pin in
      let entry = entries[pin]
      guard entry & Bits.level != 0, entry & 0xFF >= 16 else { return nil }
      return MSIRoute(gsi: UInt32(pin), message: Self.message(entry))
    }
  }
}
