import Glibc
import HostSystem
import VMMemory
import VhostUser
import VirtioQueue
import VirtioSpec

/// Consoles with several ports: the control queues, and the queues of the second port.
enum ConsolePortCases {
  static let all: [CheckCase] = [
    ports("console.port-queues", "There are two queues for each port, and two for control", "virtio 1.4, 5.3.2") { context in
      try context.needs(.mq)
      guard let space = context.offer.configuration else { throw CaseStop.notApplicable("it gives no configuration") }
      let count = ConsoleConfiguration(decoding: space).maxPortCount
      let told = context.offer.queueCount ?? 0
      try context.expect(told >= 2 * UInt64(count) + 2, "max_nr_ports is \(count), and GET_QUEUE_NUM says \(told)")
    },
    ports("console.port-add", "After DEVICE_READY every port is added once, with a number below max_nr_ports", "virtio 1.4, 5.3.6.2") {
      context in
      let client = try PortClient(context)
      let added = try client.begin().filter { $0.control.event == ConsoleControl.portAdd }.map(\.control.port)
      try context.expect(!added.isEmpty, "no port was added")
      try context.expect(Set(added).count == added.count, "ports \(added) were added")
      try context.expect(added.allSatisfy { $0 < client.maxPortCount }, "ports \(added) were added; max_nr_ports is \(client.maxPortCount)")
    },
    ports(
      "console.port-messages", "The device says only what the specification knows, about ports that it added, in whole messages",
      "virtio 1.4, 5.3.6.2"
    ) { context in
      let client = try PortClient(context)
      var messages = try client.begin()
      let added = Set(messages.filter { $0.control.event == ConsoleControl.portAdd }.map(\.control.port))
      for port in added.sorted() { messages += try client.open(port) }
      for message in messages {
        let control = message.control
        let words = message.bytes.hexText()
        try context.expect(message.bytes.count >= ConsoleControl.byteCount, "a message has \(message.bytes.count) bytes: \(words)")
        try context.expect(added.contains(control.port), "a message is about port \(control.port), which was not added: \(words)")
        let rest = message.bytes.count - ConsoleControl.byteCount
        switch control.event {
        case ConsoleControl.portAdd, ConsoleControl.portRemove, ConsoleControl.consolePort:
          try context.expect(rest == 0, "event \(control.event) has \(rest) bytes too many: \(words)")
        case ConsoleControl.portOpen: try context.expect(control.value <= 1, "PORT_OPEN has value \(control.value): \(words)")
        case ConsoleControl.resize: try context.expect(rest == 4, "RESIZE has \(rest) bytes of size instead of 4: \(words)")
        case ConsoleControl.portName: try context.expect(rest > 0, "PORT_NAME has no name: \(words)")
        default: throw CaseStop.fail("event \(control.event) is none that a device sends: \(words)")
        }
      }
    },
    ports(
      "console.port-odd", "Control messages that are short, unknown, or about ports that do not exist do not end the device",
      "virtio 1.4, 5.3.6.2"
    ) { context in
      do {
        let client = try PortClient(context)
        _ = try client.begin()
        let odd: [[UInt8]] = [
          [1], [0, 0, 0, 0, 3, 0, 1], PortClient.bytes(ConsoleControl(port: 0xFFFF_0000, event: ConsoleControl.portReady, value: 1)),
          PortClient.bytes(ConsoleControl(port: 0, event: 999, value: 1)),
          PortClient.bytes(ConsoleControl(port: 7777, event: ConsoleControl.portOpen, value: 1)),
          PortClient.bytes(ConsoleControl(port: 0, event: ConsoleControl.portReady, value: 0)), [UInt8](repeating: 0xFF, count: 600),
        ]
        for bytes in odd { try? client.say(bytes) }
      }
      let again = try PortClient(context)
      try context.expect(try !again.begin().isEmpty, "the next front end hears of no port")
    },
    ports("console.port-transmit", "Output of each port is taken by the port's own queue, with 0 bytes reported", "virtio 1.4, 5.3.6") {
      context in
      let client = try PortClient(context)
      let added = try client.begin().filter { $0.control.event == ConsoleControl.portAdd }.map(\.control.port)
      let reachable = Set(added).sorted().filter { client.transmitQueue($0) != nil }
      guard reachable.contains(where: { $0 > 0 }) else { throw CaseStop.notApplicable("there is no second port") }
      for port in reachable {
        _ = try client.open(port)
        for count in [1, 100, 4096] {
          let written = try client.transmit(port, [UInt8](repeating: 0x2E, count: count))
          try context.expect(written == 0, "\(count) bytes of output of port \(port) report \(written) bytes written")
        }
      }
    },
  ]

  private static func ports(
    _ id: String, _ sentence: String, _ section: String, _ body: @escaping @Sendable (CheckContext) throws -> Void
  ) -> CheckCase {
    CheckCase(id, sentence, section) { context in
      guard context.device == .console else { throw CaseStop.notApplicable("the device is no console") }
      try context.needs(.consoleMultiplePorts)
      try body(context)
    }
  }
}

/// The driver of a console with several ports, of which it uses the first two at most.
private final class PortClient {
  struct Message {
    var bytes: [UInt8]
    var control: ConsoleControl
  }

  let maxPortCount: UInt32
  private var link: Link
  private let arena: Arena
  private let rings: [RingClient.RingBox]
  private let output: GuestAddress
  private let input: GuestAddress
  private var addressOfHead: [UInt16: GuestAddress] = [:]
  private let patience: Duration
  /// The longest that the device took to take something.
  private var slowness = Duration.zero

  private static let inputByteCount = 256
  private static let inputCount = 16

  init(_ context: CheckContext) throws {
    guard let space = context.offer.configuration else { throw CaseStop.notApplicable("it gives no configuration") }
    maxPortCount = ConsoleConfiguration(decoding: space).maxPortCount
    patience = context.patience
    var link = try Link(context.target, trace: context.trace)
    try link.negotiate()
    let features = link.offer.features.intersection([.version1, .consoleMultiplePorts])
    let arena = try Arena(byteCount: 1 << 20)
    rings = try (0..<(maxPortCount > 1 ? 6 : 4)).map { index in
      RingClient.RingBox(try ProbeRing(index, size: 64, features: features, arena: arena))
    }
    output = try arena.allocate(8192)
    input = try arena.allocate(Self.inputByteCount * Self.inputCount)
    try link.accept(features)
    try link.share(arena)
    for box in rings { try link.start(box.ring) }
    try link.ready()
    self.link = link
    self.arena = arena
    for slot in 0..<Self.inputCount { give(GuestAddress(input.rawValue + UInt64(slot * Self.inputByteCount))) }
    rings[ConsoleSpec.controlReceiveQueue].ring.kick.signal()
  }

  static func bytes(_ control: ConsoleControl) -> [UInt8] {
    BlockWire.bytes(UInt64(control.port), 4) + BlockWire.bytes(UInt64(control.event), 2) + BlockWire.bytes(UInt64(control.value), 2)
  }

  /// The driver is ready; everything the device says to that.
  func begin() throws -> [Message] {
    try say(Self.bytes(ConsoleControl(port: .max, event: ConsoleControl.deviceReady, value: 1)))
    return try hear()
  }

  /// The driver has a port ready and opens it; everything the device says to that.
  func open(_ port: UInt32) throws -> [Message] {
    try say(Self.bytes(ConsoleControl(port: port, event: ConsoleControl.portReady, value: 1)))
    let answers = try hear()
    try say(Self.bytes(ConsoleControl(port: port, event: ConsoleControl.portOpen, value: 1)))
    return answers
  }

  func transmitQueue(_ port: UInt32) -> Int? {
    let queue = port == 0 ? ConsoleSpec.transmitQueue : port < 2 ? 5 : nil
    return queue.flatMap { $0 < rings.count ? $0 : nil }
  }

  func transmit(_ port: UInt32, _ bytes: [UInt8]) throws -> UInt32 {
    guard let queue = transmitQueue(port) else { throw CaseStop.notApplicable("port \(port) has no queue here") }
    return try put(bytes, queue, "output of port \(port)")
  }

  func say(_ bytes: [UInt8]) throws { _ = try put(bytes, ConsoleSpec.controlTransmitQueue, "a control message") }

  /// Makes bytes available in a queue and waits for them to be taken.
  private func put(_ bytes: [UInt8], _ queue: Int, _ what: String) throws -> UInt32 {
    link.trace.note("ring \(queue) > \(bytes.hexText(limit: 24))")
    guard arena.memory.copyIn(bytes, at: output) else { throw CaseStop.fail("the probe's buffer is too small") }
    let box = rings[queue]
    let buffers = [DriverBuffer(output, UInt32(bytes.count), isDeviceWritable: false)]
    guard let head = box.ring.queue.add(buffers.span) else { throw CaseStop.fail("the probe's ring is full") }
    let begin = MonotonicTime.now
    if box.ring.queue.publish() { box.ring.kick.signal() }
    guard let used = try takeUsed(box, within: patience) else { throw CaseStop.fail("\(what) was not taken") }
    slowness = max(slowness, MonotonicTime.now.since(begin))
    guard used.head == head else { throw CaseStop.fail("chain \(used.head) was used instead of \(head)") }
    return used.written
  }

  /// Control messages up to a moment's silence, which is longer where the device is slow to take ours.
  private func hear() throws -> [Message] {
    let box = rings[ConsoleSpec.controlReceiveQueue]
    var messages: [Message] = []
    while let used = try takeUsed(box, within: messages.isEmpty ? patience : .milliseconds(60) + slowness * 20) {
      guard let address = addressOfHead[used.head], Int(used.written) <= Self.inputByteCount,
        let bytes = arena.memory.bytes(at: address, count: Int(used.written))
      else { throw CaseStop.fail("a control message reports \(used.written) bytes") }
      link.trace.note("ring \(ConsoleSpec.controlReceiveQueue) < \(bytes.hexText(limit: 24))")
      messages.append(
        Message(
          bytes: bytes,
          control: ConsoleControl(
            port: UInt32(bytes.number(at: 0, 4)), event: UInt16(bytes.number(at: 4, 2)), value: UInt16(bytes.number(at: 6, 2)))))
      give(address)
      box.ring.kick.signal()
      guard messages.count < 1000 else { throw CaseStop.fail("control messages come without end") }
    }
    return messages
  }

  private func give(_ address: GuestAddress) {
    let box = rings[ConsoleSpec.controlReceiveQueue]
    let buffers = [DriverBuffer(address, UInt32(Self.inputByteCount), isDeviceWritable: true)]
    guard let head = box.ring.queue.add(buffers.span) else { return }
    addressOfHead[head] = address
    _ = box.ring.queue.publish()
  }

  private func takeUsed(_ box: RingClient.RingBox, within patience: Duration) throws -> (head: UInt16, written: UInt32)? {
    let end = MonotonicTime.now.advanced(by: patience)
    while true {
      switch box.ring.queue.nextUsed() {
      case .used(let head, let written): return (head, written ?? 0)
      case .broken: throw CaseStop.fail("ring \(box.ring.index) reports a chain that is not outstanding, or too many")
      case .empty: break
      }
      guard MonotonicTime.now < end else { return nil }
      usleep(500)
    }
  }
}
