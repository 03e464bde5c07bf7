import ControlProtocol
import Testing
import VirtioSpec

private let configuration = CoreConfiguration(
  name: "web1", cpuCount: 4, memorySize: 1 << 30, commandLine: "console=hvc0 ä", hasInitramfs: true, hasSerial: true,
  restartsOnReset: false, replyDeadline: 5000)

private let toCore: [SupervisorMessage] = [
  .unplug(id: "blk1", isForced: true),
  .configure(configuration),
  .device(DeviceAssignment(id: "blk0", deviceType: .block, pciSlot: 1, queueSizes: [256, 128])),
  .device(
    DeviceAssignment(
      id: "net0", deviceType: .net, pciSlot: 31, queueSizes: [2, 32768], allowedFeatures: FeatureSet(rawValue: 1 << 63),
      ownFeatures: [.version1], configuration: [1, 2, 3])),
  .stream(.serial), .start(deviceCount: 0x1F), .pause, .resume, .powerButton, .reboot, .shutdown, .information, .reattach(id: "blk0"),
  .examine(id: "blk0"), .exchange(id: "blk0", drain: 0x1234), .forget(id: "blk0"),
]

private let toSupervisor: [CoreMessage] = [
  .plugged(slot: 31), .unplugged(id: "blk1"),
  .ready, .started, .done, .refused("No."), .examined([.init(.fine, "queues", "2"), .init(.refusal, "capacity", "Too small.")]),
  .guest(.poweredOff), .guest(.crashed), .failed(.device, "Gone."),
  .information(
    VMInformation(state: .paused, resetCount: 3, uptime: .max, counters: [.init(name: "exits", value: 7)])),
  .device(
    DeviceReport(
      id: "blk0", state: .active, features: [.version1, .eventIndex], protocolFeatures: 8,
      queues: [.init(size: 256, isEnabled: true, waitingSince: 1 << 60, waitingCount: 7), .init(size: 2, isEnabled: false)], reason: "why")),
]

@Suite struct MessageTests {
  @Test(arguments: toCore) func supervisorMessageComesBackAsItWas(_ message: SupervisorMessage) throws {
    let packet = message.encode(sequence: 77)
    let (decoded, sequence) = try SupervisorMessage.decode(packet, descriptorCount: message.descriptorCount)
    #expect(decoded == message)
    #expect(sequence == 77)
  }

  @Test(arguments: toSupervisor) func coreMessageComesBackAsItWas(_ message: CoreMessage) throws {
    let (decoded, sequence) = try CoreMessage.decode(message.encode(sequence: 5))
    #expect(decoded == message)
    #expect(sequence == 5)
  }

  @Test(arguments: toCore) func everyPrefixOfASupervisorMessageIsRefused(_ message: SupervisorMessage) {
    let packet = message.encode(sequence: 1)
    for length in 0..<packet.count {
      #expect(throws: MessageError.self) {
        try SupervisorMessage.decode(Array(packet[..<length]), descriptorCount: message.descriptorCount)
      }
    }
    #expect(throws: MessageError.trailing(byteCount: 1)) {
      try SupervisorMessage.decode(packet + [0], descriptorCount: message.descriptorCount)
    }
  }

  @Test(arguments: toSupervisor) func everyPrefixOfACoreMessageIsRefused(_ message: CoreMessage) {
    let packet = message.encode(sequence: 1)
    for length in 0..<packet.count {
      #expect(throws: MessageError.self) { try CoreMessage.decode(Array(packet[..<length])) }
    }
    #expect(throws: MessageError.trailing(byteCount: 1)) { try CoreMessage.decode(packet + [0]) }
  }

  /// Every byte set to every value: decoding either refuses or gives a message that encodes to the same bytes.
  @Test(arguments: toCore) func changedBytesAreRefusedOrMeanSomething(_ message: SupervisorMessage) {
    let packet = message.encode(sequence: 1)
    for index in packet.indices {
      for value in UInt8.min...UInt8.max {
        var changed = packet
        changed[index] = value
        guard let (decoded, sequence) = try? SupervisorMessage.decode(changed, descriptorCount: message.descriptorCount)
        else { continue }
        #expect(decoded.encode(sequence: sequence) == changed)
      }
    }
  }

  @Test(arguments: toSupervisor) func changedBytesOfTheCoreAreRefusedOrMeanSomething(_ message: CoreMessage) {
    let packet = message.encode(sequence: 1)
    for index in packet.indices {
      for value in UInt8.min...UInt8.max {
        var changed = packet
        changed[index] = value
        guard let (decoded, sequence) = try? CoreMessage.decode(changed) else { continue }
        #expect(decoded.encode(sequence: sequence) == changed)
      }
    }
  }

  @Test func descriptorsMustAgree() {
    let packet = SupervisorMessage.configure(configuration).encode(sequence: 1)
    #expect(throws: MessageError.descriptors(expected: 3, received: 2)) {
      try SupervisorMessage.decode(packet, descriptorCount: 2)
    }
    #expect(throws: MessageError.descriptors(expected: 0, received: 1)) {
      try CoreMessage.decode(CoreMessage.done.encode(sequence: 1), descriptorCount: 1)
    }
  }

  @Test func messagesOfTheOtherDirectionAreUnknown() {
    #expect(throws: MessageError.unknownKind(0x8003)) {
      try SupervisorMessage.decode(CoreMessage.done.encode(sequence: 0), descriptorCount: 0)
    }
    #expect(throws: MessageError.unknownKind(5)) { try CoreMessage.decode(SupervisorMessage.pause.encode(sequence: 0)) }
  }

  @Test func startIsTheEightBytesOfTheDocument() {
    #expect(SupervisorMessage.start(deviceCount: 3).encode(sequence: 0x0102_0304) == [4, 0, 0, 0, 4, 3, 2, 1, 3, 0])
    #expect(CoreMessage.guest(.poweredOff).encode(sequence: 0) == [7, 0x80, 0, 0, 0, 0, 0, 0, 2])
  }

  @Test func longSentencesAreCutAtACharacter() throws {
    let long = String(repeating: "ä", count: 2000)
    let (message, _) = try CoreMessage.decode(CoreMessage.refused(long).encode(sequence: 0))
    #expect(message == .refused(String(repeating: "ä", count: 512)))
  }
}

@Suite struct ReplaceOrderTests {
  @Test func anOrderComesBackAsItWas() throws {
    let orders = [
      ReplaceOrder(id: "blk0", source: .same), ReplaceOrder(id: "blk0", source: .socket("/a b/%41"), isDryRun: true, drain: 1),
      ReplaceOrder(id: "net0", source: .program(["/p", "", "a\nb", "--", "%", "ä €"]), disk: "path=\"/a,b\",direct=on", drain: 600_000),
      ReplaceOrder(id: "x", source: .jailed(["/usr/bin/q", "{listen}"], profile: "/p r")),
    ]
    for order in orders {
      #expect(!order.line.contains("\n"))
      #expect(try ReplaceOrder(line: order.line) == order)
      // Never more than the line says, whatever is cut off.
      for length in 0..<order.line.utf8.count { _ = try? ReplaceOrder(line: String(order.line.prefix(length))) }
    }
  }

  @Test(arguments: [
    "replace", "replace -x", "replace a program", "replace a program 2 x", "replace a program 0",
    "replace a program 999999999999999999999 x",
    "replace a drain 0", "replace a drain x", "replace a frob", "replace a socket", "replace a jail p program 1 x", "replace a jail p 1",
    "replace a %4",
    "add a",
  ]) func aBrokenOrderIsRefused(_ line: String) { #expect(throws: ConfigurationError.self) { try ReplaceOrder(line: line) } }

  @Test func pathsAreMeantFromWhereTheClientStands() throws {
    let order = try ReplaceOrder(words: ["blk0", "--jail", "q.jail", "--disk=path=x,y=z", "--", "qsd", "./x", "{fd}"])
    let whole = order.absolute(from: "/here", find: { "/bin/" + $0 })
    #expect(whole.source == .jailed(["/bin/qsd", "./x", "{fd}"], profile: "/here/q.jail") && whole.disk == "path=/here/x,y=z")
    #expect(try ReplaceOrder(words: ["blk0", "--socket=s"]).absolute(from: "/h", find: { _ in nil }).source == .socket("/h/s"))
  }
}
