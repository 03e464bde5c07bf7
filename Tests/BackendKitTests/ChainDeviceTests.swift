import BackendKit
import BackendTesting
import Foundation
import HostSystem
import TestSupport
import Testing
import VirtioQueue
import VirtioSpec

// Devices as an author writes them, in this process, behind the front end that authors test with.

/// Answers in capitals. A request that begins with `!` waits until the configuration space is written to.
private struct Upper: ChainDevice {
  var isOpen = false
  var served = 0

  var profile: DeviceProfile { DeviceProfile(device: DeviceID(rawValue: 42), queueCount: 2) }
  var configuration: [UInt8] { [UInt8(truncatingIfNeeded: served)] }

  mutating func serve(_ chain: inout DescriptorChain, queue: Int, _ context: inout BackendContext) -> ChainAnswer {
    let request = chain.takeReadableBytes(atMost: 4096)
    if request.first == 0x21, !isOpen { return .later }
    served += 1
    chain.put(request.map { (0x61...0x7A).contains($0) ? $0 - 0x20 : $0 })
    return .done
  }

  mutating func writeConfiguration(_ bytes: [UInt8], at offset: Int, _ context: inout BackendContext) -> Bool {
    isOpen = bytes == [1]
    for queue in 0..<2 { context.serveAgain(queue: queue) }
    return true
  }

  mutating func reset(_ context: inout BackendContext) { served = 0 }
}

private let layouts: [FeatureSet] = [
  [], [.eventIndex], [.packedRing], [.packedRing, .eventIndex], [.indirectDescriptors, .packedRing, .eventIndex],
]

@Suite struct ChainDeviceTests {
  @Test("Requests are answered whole, on every queue and in every layout", arguments: layouts)
  func answers(_ features: FeatureSet) throws {
    let front = try FakeFrontEnd(.init(queueCount: 2, queueSize: 8, features: features)) { Upper() }
    #expect(front.features == features.union(.version1))
    // More than the ring has, so that it wraps.
    for round in 0..<50 {
      let text = "martlet \(round)"
      #expect(try front.request(Array(text.utf8), room: 64, queue: round % 2).bytes == Array(text.uppercased().utf8))
    }
    #expect(try front.configuration(4) == [50, 0, 0, 0])
    // Room for less than the answer, or for none.
    #expect(try front.request(Array("abcdef".utf8), room: 3).bytes == Array("ABC".utf8))
    #expect(try front.request(Array("abcdef".utf8)).bytes == [])
  }

  @Test("A chain that has to wait holds up its own queue only, and is served when the device says so", arguments: layouts)
  func waiting(_ features: FeatureSet) throws {
    let front = try FakeFrontEnd(.init(queueCount: 2, features: features)) { Upper() }
    let held = try front.offer(Array("!one".utf8), room: 8)
    let behind = try front.offer(Array("two".utf8), room: 8)
    #expect(try front.nextAnswer(queue: 0, within: .milliseconds(50)) == nil)
    #expect(try front.request(Array("other".utf8), room: 8, queue: 1).bytes == Array("OTHER".utf8))
    try front.writeConfiguration([1], at: 0)
    let first = try front.nextAnswer()
    let second = try front.nextAnswer()
    #expect(first.head == held && first.bytes == Array("!ONE".utf8))
    #expect(second.head == behind && second.bytes == Array("TWO".utf8))
  }

  @Test func moreThanOneTurnIsServedWithoutAnotherKick() throws {
    let front = try FakeFrontEnd(.init(queueSize: 1024, features: [])) { Upper() }
    try front.writeConfiguration([0], at: 0)
    // Held back, then all at once: the device's turn has 256 chains.
    try front.offer(Array("!".utf8), room: 1)
    for _ in 0..<500 { try front.offer(Array("x".utf8), room: 1) }
    try front.writeConfiguration([1], at: 0)
    for _ in 0...500 { _ = try front.nextAnswer() }
  }

  @Test func queuesGoOnWhereTheyStoodAfterStopAndAreNewAfterReset() throws {
    let front = try FakeFrontEnd(.init(queueSize: 8)) { Upper() }
    for _ in 0..<13 { _ = try front.request([0x61], room: 1) }
    let base = try front.stop(queue: 0)
    try front.offer([0x62], room: 1)
    #expect(try front.nextAnswer(queue: 0, within: .milliseconds(30)) == nil)
    try front.start(queue: 0, base: base)
    #expect(try front.nextAnswer().bytes == [0x42])
    try front.reset()
    #expect(try front.configuration(1) == [0])
    #expect(try front.request([0x63], room: 1).bytes == [0x43])
  }

  @Test func aRingStartedWhereItCannotBeGoesOnBehindItsAnswers() throws {
    let front = try FakeFrontEnd(.init(queueSize: 8, features: [])) { Upper() }
    for _ in 0..<13 { _ = try front.request([0x61], room: 1) }
    _ = try front.stop(queue: 0)
    try front.offer([0x64], room: 1)
    try front.start(queue: 0, base: 0)
    #expect(try front.nextAnswer().bytes == [0x44])
    #expect(try front.request([0x65], room: 1).bytes == [0x45])
  }

  @Test func aDeviceThatNeverAnswersIsFoundOut() throws {
    struct Silent: ChainDevice {
      var profile: DeviceProfile { DeviceProfile(device: .entropy) }
      mutating func serve(_ chain: inout DescriptorChain, queue: Int, _ context: inout BackendContext) -> ChainAnswer { .later }
    }
    let front = try FakeFrontEnd { Silent() }
    front.patience = .milliseconds(50)
    #expect(throws: FakeFrontEndError.self) { try front.request(room: 1) }
  }
}

@Suite struct TemplateTests {
  @Test("The entropy device fills buffers in every layout", arguments: layouts)
  func fills(_ features: FeatureSet) throws {
    let program = try DeviceProcess("martlet-template", [])
    let front = try FakeFrontEnd(socket: program.socketPath, .init(features: features))
    var seen: Set<[UInt8]> = []
    for count in [1, 16, 64, 4096, 4097, 100_000] {
      let answer = try front.request(room: count)
      #expect(answer.bytes.count == min(count, 4096))
      if count >= 16 {
        #expect(Set(answer.bytes).count > 4)
        #expect(seen.insert(Array(answer.bytes.prefix(16))).inserted)
      }
    }
    // A buffer to be read has no room: it comes back as it is.
    #expect(try front.request([1, 2, 3]).bytes == [])
    front.leave()
    program.signal(SIGTERM)
    #expect(program.exitCode() == 0)
    #expect(program.log.isEmpty)
  }

  @Test func aSourceThatEndsEndsTheProgramWithASentence() throws {
    for (source, words) in [("/dev/null", "has come to its end"), ("/proc/self/mem", "cannot be read")] {
      let program = try DeviceProcess("martlet-template", ["--source=" + source])
      let front = try FakeFrontEnd(socket: program.socketPath)
      try front.offer(room: 8)
      #expect(program.exitCode() == 1)
      check(program.log.contains(words), program.log)
    }
    let missing = try DeviceProcess("martlet-template", ["--source=/no/such/thing"])
    #expect(missing.exitCode() == 1)
    #expect(missing.log.contains("open /no/such/thing"))
  }

  @Test("Every back end describes itself as QEMU's conventions ask", arguments: ["template", "block", "net", "console"])
  func description(_ name: String) throws {
    func json(_ option: String) throws -> [String: Any] {
      let result = try RunningProgram(BuiltPrograms.path("martlet-" + name), [option]).wait()
      #expect(result.code == 0)
      return try #require(try JSONSerialization.jsonObject(with: Data(result.output.utf8)) as? [String: Any])
    }
    let description = try json("--print-description")
    #expect(Set(description.keys) == ["description", "type", "binary"])
    #expect(description["type"] as? String == (name == "template" ? "rng" : name))
    #expect(description["type"] as? String == (try json("--print-capabilities")["type"]) as? String)
    let binary = try #require(description["binary"] as? String)
    #expect(binary.hasSuffix("/martlet-" + name) && access(binary, X_OK) == 0)
  }

  @Test func theProbeFindsNothingWrong() throws {
    let result = try RunningProgram(
      BuiltPrograms.path("martlet-probe"),
      ["check", "--type", "rng", "--format", "tap", "--", BuiltPrograms.path("martlet-template"), "--socket-path", "{socket}"]
    ).wait(seconds: 240)
    // Two hundred lines that are well hide the one that is not.
    let findings = result.output.split(separator: "\n").filter { !$0.hasPrefix("ok ") }.joined(separator: "\n")
    check(result.code == 0, "ended with \(result.code), signal \(result.signal ?? 0): \(findings) \(result.errors)")
    check(result.output.contains("rng.fill"), findings)
  }
}
