/// A 16550 serial port as a pure state machine: registers on one side, bytes on the other. Both directions are bounded;
/// a full output buffer shows to the guest as a transmitter that is not empty.
package struct SerialPort: Sendable {
  /// Bytes of output held for a slow reader.
  package static let outputCapacity = 64 * 1024
  /// Bytes of input taken from outside before the guest reads them.
  package static let inputCapacity = 64

  private enum Enable {
    static let received: UInt8 = 1
    static let transmitterEmpty: UInt8 = 2
    static let lineStatus: UInt8 = 4
    static let modemStatus: UInt8 = 8
  }

  private enum Line {
    static let dataReady: UInt8 = 0x01
    static let overrun: UInt8 = 0x02
    static let holdingEmpty: UInt8 = 0x20
    static let transmitterEmpty: UInt8 = 0x40
  }

  package init() {}

  private var interruptEnable: UInt8 = 0
  private var fifoControl: UInt8 = 0
  private var lineControl: UInt8 = 3
  private var modemControl: UInt8 = 8
  private var scratch: UInt8 = 0
  private var divisor: UInt16 = 12
  private var hasOverrun = false
  private var modemDeltas: UInt8 = 0
  /// The transmitter-empty interrupt is waiting: set when the holding register empties, cleared by reading it as cause.
  private var transmitterInterrupt = false
  private var input: [UInt8] = []
  /// Bytes for the outside, oldest first.
  package private(set) var output: [UInt8] = []

  private var isLoop: Bool { modemControl & 0x10 != 0 }
  private var hasOutputRoom: Bool { output.count < Self.outputCapacity }

  private var lineStatus: UInt8 {
    var status: UInt8 = 0
    if !input.isEmpty { status |= Line.dataReady }
    if hasOverrun { status |= Line.overrun }
    if hasOutputRoom { status |= Line.holdingEmpty | Line.transmitterEmpty }
    return status
  }

  private var modemStatus: UInt8 {
    guard isLoop else { return 0xB0 | modemDeltas }
    // Loop-back: DTR, RTS, OUT1, OUT2 appear as DSR, CTS, RI, DCD.
    let outputs = modemControl
    var status: UInt8 = modemDeltas
    if outputs & 1 != 0 { status |= 0x20 }
    if outputs & 2 != 0 { status |= 0x10 }
    if outputs & 4 != 0 { status |= 0x40 }
    if outputs & 8 != 0 { status |= 0x80 }
    return status
  }

  /// Cause of the most urgent interrupt, without the FIFO bits; 1 = none.
  private var cause: UInt8 {
    if interruptEnable & Enable.lineStatus != 0, hasOverrun { return 0x06 }
    if interruptEnable & Enable.received != 0, !input.isEmpty { return 0x04 }
    if interruptEnable & Enable.transmitterEmpty != 0, transmitterInterrupt { return 0x02 }
    if interruptEnable & Enable.modemStatus != 0, modemDeltas != 0 { return 0x00 }
    return 0x01
  }

  /// The state of the interrupt line.
  package var isInterrupting: Bool { cause != 1 }

  // MARK: registers

  package mutating func read(_ offset: UInt16) -> UInt8 {
    let isDivisor = lineControl & 0x80 != 0
    switch offset {
    case 0:
      if isDivisor { return UInt8(truncatingIfNeeded: divisor) }
      return input.isEmpty ? 0 : input.removeFirst()
    case 1: return isDivisor ? UInt8(truncatingIfNeeded: divisor >> 8) : interruptEnable
    case 2:
      let current = cause
      if current == 0x02 { transmitterInterrupt = false }
      return current | (fifoControl & 1 != 0 ? 0xC0 : 0)
    case 3: return lineControl
    case 4: return modemControl
    case 5:
      let status = lineStatus
      hasOverrun = false
      return status
    case 6:
      let status = modemStatus
      modemDeltas = 0
      return status
    default: return scratch
    }
  }

  package mutating func write(_ offset: UInt16, _ value: UInt8) {
    let isDivisor = lineControl & 0x80 != 0
    switch offset {
    case 0:
      if isDivisor {
        divisor = divisor & 0xFF00 | UInt16(value)
      } else {
        transmit(value)
      }
    case 1:
      if isDivisor {
        divisor = divisor & 0x00FF | UInt16(value) << 8
      } else {
        let added = value & ~interruptEnable
        interruptEnable = value & 0x0F
        // Enabling the interrupt while the transmitter is empty raises it.
        if added & Enable.transmitterEmpty != 0, hasOutputRoom { transmitterInterrupt = true }
      }
    case 2:
      fifoControl = value & 0xC9
      if value & 0x02 != 0 { input.removeAll(keepingCapacity: true) }
    case 3: lineControl = value
    case 4:
      let before = modemStatus & 0xF0
      modemControl = value & 0x1F
      let changed = before ^ modemStatus & 0xF0
      if isLoop { modemDeltas |= changed >> 4 & 0x0B | (before & ~modemStatus & 0x40) >> 4 }
    case 7: scratch = value
    default: break
    }
  }

  private mutating func transmit(_ byte: UInt8) {
    transmitterInterrupt = false
    if isLoop {
      if input.count < Self.inputCapacity { input.append(byte) } else { hasOverrun = true }
      transmitterInterrupt = true
      return
    }
    // A guest that does not wait for the transmitter loses bytes, as on a real line; a processor never waits here.
    if hasOutputRoom { output.append(byte) }
    if hasOutputRoom { transmitterInterrupt = true }
  }

  // MARK: the outside

  /// Room for input; ask before taking bytes from their source.
  package var inputRoom: Int { isLoop ? 0 : max(0, Self.inputCapacity - input.count) }

  package mutating func receive(_ bytes: ArraySlice<UInt8>) {
    for byte in bytes {
      if input.count < Self.inputCapacity { input.append(byte) } else { hasOverrun = true }
    }
  }

  /// The first `count` bytes of the output have been taken.
  package mutating func consumeOutput(_ count: Int) {
    let wasFull = !hasOutputRoom
    output.removeFirst(min(count, output.count))
    if wasFull, hasOutputRoom { transmitterInterrupt = true }
  }

  /// As after power-on; output not yet taken stays.
  package mutating func reset() {
    let kept = output
    self = SerialPort()
    output = kept
  }
}
