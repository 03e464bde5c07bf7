import CFuzz
import Glibc
import HostSystem
import VMMemory
import VirtioQueue
import VirtioSpec

@testable import BackendKit
@testable import ConsoleDevice

let consoleBytes = Target(
  name: "console", about: "both queues of the console and its port: nothing lost, nothing twice, whoever reads",
  seeds: {
    [
      [0x20, 0, 0, 30, 0, 0, 90, 1, 3, 200, 0, 0, 40, 1, 3, 255], [0x21, 4, 0, 20, 4, 0, 20, 5, 9, 6, 5, 200, 6],
      [0x18, 0, 0x43, 60, 60, 60, 1, 2, 1, 1, 7, 3, 80], [0x20, 0, 0, 250, 8, 0, 1, 3, 255, 3, 255, 1, 0, 9],
    ]
  }, run: passBytes)

private let bench = DeviceBench()
private let rooms = (output: GuestRoom(), input: GuestRoom())
private let ports = sure { try QueuePorts(QueueCounters(), isServedByLoop: true) }

private func queue(of driver: borrowing RingDriver) -> DeviceQueue {
  let ring = sure { try Virtqueue(driver.configuration, memory: driver.room.memory) }
  return DeviceQueue(index: 0, ring: ring, ports: ports, kickFD: -1)
}

private func passBytes(_ script: inout Script) {
  var shape = RingDriver.shape(&script, packed: script.byte() & 1 == 1)
  shape.features.remove(.inOrder)
  var writer = RingDriver(rooms.output, size: shape.size, shape.features)
  var reader = RingDriver(rooms.input, size: shape.size, shape.features)
  // Small pipes, so that a reader that does not read is felt.
  var typed: [CInt] = [0, 0]
  var shown: [CInt] = [0, 0]
  demand(cfuzz_pipe(&typed) == 0 && cfuzz_pipe(&shown) == 0, "no pipes")
  _ = fcntl(shown[1], 1031, 4096)  // F_SETPIPE_SZ
  let keyboard = OwnedFD(owning: typed[1])
  let screen = OwnedFD(owning: shown[0])
  let port = sure { try ConsolePort(ConsoleSink.terminal(input: OwnedFD(owning: typed[0]), output: OwnedFD(owning: shown[1]))) }
  let output = OutputQueue()
  let input = InputQueue()
  output.start(queue(of: writer))
  input.start(queue(of: reader))
  var counter: UInt8 = 0
  var shownBytes: [UInt8] = []
  var typedBytes = 0
  var buffer = [UInt8](repeating: 0, count: 4096)

  while !script.isOver {
    switch script.byte() % 10 {
    case 0:
      // Bytes in a known order, in pieces.
      let pieces = script.byte() & 3
      var buffers: [DriverBuffer] = []
      for _ in 0...pieces {
        let count = Int(script.byte()) + 1
        let place = writer.allocate(count)
        let bytes = (0..<count).map { _ in
          counter &+= 1
          return counter
        }
        _ = writer.room.memory.copyIn(bytes, at: GuestAddress(place))
        buffers.append(DriverBuffer(GuestAddress(place), UInt32(count), isDeviceWritable: false))
      }
      // A place used again before it was read would be the driver's own fault.
      if writer.offered - writer.collected > 6 || writer.offer(buffers) == nil { writer.isHonest = false }
    case 1:
      _ = output.drain(to: port)
      writer.collect()
    case 2: _ = port.flush()
    case 3:
      let count = Int(script.byte()) + 1
      let transfer = buffer.withUnsafeMutableBytes { screen.read(into: UnsafeMutableRawBufferPointer(rebasing: $0[..<count])) }
      if case .bytes(let count) = transfer { shownBytes += buffer[..<count] }
      _ = port.ready(ConsolePort.Token.output, .writable)
    case 4:
      let count = Int(script.byte()) + 1
      for _ in 0...(script.byte() & 1) {
        reader.offer([DriverBuffer(GuestAddress(reader.allocate(count)), UInt32(count), isDeviceWritable: true)])
      }
    case 5:
      let bytes = [UInt8](repeating: 65, count: Int(script.byte()) + 1)
      if case .bytes(let count) = bytes.withUnsafeBytes({ keyboard.write($0) }) { typedBytes += count }
      _ = port.ready(ConsolePort.Token.input, .readable)
      demand(port.inputCount <= ConsolePort.inputByteCount, "more input is kept than there is room for")
    case 6:
      let before = port.inputCount
      input.fill(from: port)
      demand(port.inputCount <= before && before <= typedBytes, "input comes from nowhere")
      reader.collect()
    case 7: if script.bool() { writer.misbehave(&script) } else { reader.misbehave(&script) }
    case 8: _ = port.ready(Int(script.byte()) % 6 + 100, script.bool() ? .readable : [.writable, .hangUp])
    default: filterKeys(script.take(Int(script.byte() & 31)))
    }
    demand(port.unsentByteCount <= ConsolePort.outputByteCount, "more output is kept than there is room for")
  }
  // What was seen is what was written, in order, unless some had to be dropped.
  if writer.isHonest, port.droppedByteCount == 0 {
    for (index, byte) in shownBytes.enumerated() { demand(byte == UInt8(truncatingIfNeeded: index + 1), "byte \(index) is another one") }
  }
  guard let first = output.stop(port), let second = input.stop() else { return demand(false, "a queue does not come back") }
  checkFlight(first.ring, 0)
  checkFlight(second.ring, 0)
}

/// The escape key takes nothing away but itself.
private func filterKeys(_ bytes: [UInt8]) {
  var filter = EscapeFilter()
  var passed: [UInt8] = []
  var expected: [UInt8] = []
  var isPending = false
  for byte in bytes {
    if isPending, byte == 0x78 || byte == 0x58 { return demand(filter.filter(byte) == .quit, "the escape key does not end") }
    if isPending {
      expected += byte == EscapeFilter.key ? [byte] : [EscapeFilter.key, byte]
      isPending = false
    } else if byte == EscapeFilter.key {
      isPending = true
    } else {
      expected.append(byte)
    }
    switch filter.filter(byte) {
    case .byte(let byte): passed.append(byte)
    case .keyAnd(let byte): passed += [EscapeFilter.key, byte]
    case .nothing: break
    case .quit: return demand(false, "ended without the escape key")
    }
  }
  demand(passed == expected, "keys are lost or changed")
}
