import Machine
import Testing

@Suite("Serial port")
struct SerialPortTests {
  private static let dataReady: UInt8 = 0x01
  private static let overrun: UInt8 = 0x02
  private static let empty: UInt8 = 0x60

  @Test("After power-on nothing interrupts, the transmitter is empty and a carrier is there")
  func powerOn() {
    var port = SerialPort()
    #expect(!port.isInterrupting)
    #expect((0..<8).map { port.read($0) } == [0, 0, 1, 3, 8, Self.empty, 0xB0, 0])
    #expect(port.inputRoom == SerialPort.inputCapacity)
  }

  @Test("The divisor hides data and interrupt enable while it is selected")
  func divisor() {
    var port = SerialPort()
    port.write(3, 0x83)
    port.write(0, 0x34)
    port.write(1, 0x12)
    #expect([port.read(0), port.read(1)] == [0x34, 0x12])
    port.write(3, 0x03)
    #expect(port.output.isEmpty && port.read(1) == 0)
    port.write(7, 0xA5)
    #expect(port.read(7) == 0xA5)
  }

  @Test("Output is kept in order until it is taken, and never more than there is room for")
  func output() {
    var port = SerialPort()
    for index in 0..<SerialPort.outputCapacity + 5 { port.write(0, UInt8(truncatingIfNeeded: index)) }
    #expect(port.output == (0..<SerialPort.outputCapacity).map { UInt8(truncatingIfNeeded: $0) })
    #expect(port.read(5) & Self.empty == 0)
    port.consumeOutput(3)
    #expect(port.read(5) & Self.empty == Self.empty)
    #expect(port.output.first == 3)
    port.consumeOutput(.max)
    #expect(port.output.isEmpty)
  }

  @Test("The transmitter interrupts when enabled, after each byte and when there is room again; reading the cause ends it")
  func transmitterInterrupt() {
    var port = SerialPort()
    port.write(1, 2)
    #expect(port.isInterrupting && port.read(2) == 2)
    #expect(!port.isInterrupting && port.read(2) == 1)
    port.write(0, 0x41)
    #expect(port.isInterrupting && port.read(2) == 2)
    for _ in 1..<SerialPort.outputCapacity { port.write(0, 0x41) }
    // Full: not until somebody takes a byte.
    #expect(!port.isInterrupting)
    port.consumeOutput(1)
    #expect(port.read(2) == 2)
    // Enabling it again while it is enabled raises nothing.
    port.write(1, 2)
    #expect(!port.isInterrupting)
  }

  @Test("Input interrupts until it is read; what does not fit is an overrun, told once")
  func input() {
    var port = SerialPort()
    port.write(1, 5)
    port.write(2, 1)
    port.receive([1, 2, 3])
    #expect(port.read(2) == 0xC4)
    #expect((0..<4).map { _ in port.read(0) } == [1, 2, 3, 0])
    #expect(!port.isInterrupting && port.read(2) == 0xC1)
    port.receive(ArraySlice(repeating: 7, count: SerialPort.inputCapacity + 1))
    #expect(port.inputRoom == 0)
    #expect(port.read(2) == 0xC6)
    #expect(port.read(5) & (Self.overrun | Self.dataReady) == Self.overrun | Self.dataReady)
    #expect(port.read(5) & Self.overrun == 0)
    #expect(port.read(2) == 0xC4)
    // The FIFO's reset drops it.
    port.write(2, 3)
    #expect(port.inputRoom == SerialPort.inputCapacity && port.read(5) & Self.dataReady == 0)
  }

  @Test("In loop-back bytes come back, none leaves or enters, and the modem's outputs are its inputs")
  func loopBack() {
    var port = SerialPort()
    port.write(4, 0x10)
    #expect(port.inputRoom == 0)
    port.write(0, 0x5A)
    #expect(port.output.isEmpty && port.read(0) == 0x5A)
    for (outputs, inputs) in [(0x11, 0x20), (0x12, 0x10), (0x14, 0x40), (0x18, 0x80), (0x1F, 0xF0)] as [(UInt8, UInt8)] {
      port.write(4, outputs)
      #expect(port.read(6) & 0xF0 == inputs)
      // What changed is told once.
      #expect(port.read(6) == inputs)
    }
    port.write(4, 0x10)
    #expect(port.read(6) & 0x0F != 0)
  }

  @Test("A reset keeps what the guest has said and nobody has taken")
  func reset() {
    var port = SerialPort()
    port.write(1, 0x0F)
    port.write(0, 0x21)
    port.receive([1])
    port.reset()
    #expect(port.output == [0x21])
    #expect(!port.isInterrupting && port.inputRoom == SerialPort.inputCapacity && port.read(1) == 0)
  }
}
