// Back ends that answer wrongly, late, half, never or too much, against a whole VM: its core drops each, goes on, and holds no
// descriptor and no memory more than before.

import Foundation
import Glibc
import HostSystem
import Synchronization
import TestSupport
import Testing
import VhostUser
import VirtioSpec

/// What a back end does instead of answering one request properly.
private struct Attack: Sendable {
  enum Deed: Sendable {
    /// These bytes and that many descriptors; nothing after that.
    case say([UInt8], descriptors: Int)
    case sayNothing
    /// A byte, and the next one after so long.
    case trickle([UInt8], Duration)
    case leave
    /// The right answer, and then these bytes.
    case answerAnd([UInt8])
    /// So many notices of a changed configuration on its own channel.
    case flood(Int)
    /// Bytes on its own channel.
    case sayOnChannel([UInt8], descriptors: Int)
    /// Everything that a holder can do to what it was given, and the right answer.
    case harm
  }

  let name: String
  let request: FrontEndRequest
  let deed: Deed
  /// The core sees nothing wrong with it.
  var isHarmless = false
}

private func message(_ request: UInt32, flags: UInt32, size: UInt32? = nil, _ payload: [UInt8] = []) -> [UInt8] {
  [request, flags, size ?? UInt32(payload.count)].flatMap { word in (0..<4).map { UInt8(truncatingIfNeeded: word >> (8 * UInt32($0))) } }
    + payload
}

private let eight = [UInt8](repeating: 0, count: 8)
private let reply: UInt32 = 1 | 4

/// Device by device; within one, an attack after the other.
private let attacks: [[Attack]] = [
  [
    Attack(name: "silence", request: .getFeatures, deed: .sayNothing),
    Attack(name: "half a header", request: .getFeatures, deed: .say(Array(message(1, flags: reply, eight).prefix(6)), descriptors: 0)),
    Attack(
      name: "half a payload", request: .getProtocolFeatures, deed: .say(Array(message(15, flags: reply, eight).prefix(16)), descriptors: 0)),
    Attack(name: "a byte at a time", request: .getFeatures, deed: .trickle(message(1, flags: reply, eight), .milliseconds(150))),
  ],
  [
    Attack(name: "another request's answer", request: .getFeatures, deed: .say(message(15, flags: reply, eight), descriptors: 0)),
    Attack(name: "no answer mark", request: .getFeatures, deed: .say(message(1, flags: 1, eight), descriptors: 0)),
    Attack(name: "another version", request: .getFeatures, deed: .say(message(1, flags: 4 | 2, eight), descriptors: 0)),
    Attack(name: "reserved flags", request: .getFeatures, deed: .say(message(1, flags: reply | 0x8000_0000, eight), descriptors: 0)),
    Attack(name: "too small", request: .getFeatures, deed: .say(message(1, flags: reply, [1]), descriptors: 0)),
    Attack(name: "too large", request: .getFeatures, deed: .say(message(1, flags: reply, eight + eight), descriptors: 0)),
  ],
  [
    Attack(name: "4 GiB announced", request: .getFeatures, deed: .say(message(1, flags: reply, size: .max, eight), descriptors: 0)),
    Attack(name: "one descriptor", request: .getFeatures, deed: .say(message(1, flags: reply, eight), descriptors: 1)),
    Attack(name: "8 descriptors", request: .getFeatures, deed: .say(message(1, flags: reply, eight), descriptors: 8)),
    Attack(name: "9 descriptors", request: .getFeatures, deed: .say(message(1, flags: reply, eight), descriptors: 9)),
    Attack(name: "253 descriptors", request: .getFeatures, deed: .say(message(1, flags: reply, eight), descriptors: 253)),
    Attack(name: "253 descriptors in the middle", request: .getProtocolFeatures, deed: .say([15, 0, 0, 0], descriptors: 253)),
  ],
  [
    Attack(name: "nothing offered any more", request: .getFeatures, deed: .say(message(1, flags: reply, eight), descriptors: 0)),
    Attack(name: "two answers", request: .getFeatures, deed: .answerAnd(message(1, flags: reply, eight))),
    Attack(name: "a request on the main socket", request: .getProtocolFeatures, deed: .answerAnd(message(2, flags: 1))),
    Attack(name: "a mebibyte of noise", request: .getFeatures, deed: .answerAnd([UInt8](repeating: 0xA5, count: 1 << 20))),
    Attack(name: "gone at once", request: .getFeatures, deed: .leave),
    Attack(
      name: "a refusal", request: .setOwner, deed: .say(message(3, flags: reply, [1] + [UInt8](repeating: 0, count: 7)), descriptors: 0)),
  ],
  [
    // Of the device that the guest drives, which therefore has memory, rings and a channel of its own.
    Attack(name: "harm to what it holds", request: .setVringKick, deed: .harm, isHarmless: true),
    Attack(name: "a flood on the channel", request: .setVringEnable, deed: .flood(100_000)),
    Attack(
      name: "SHMEM_MAP on the channel", request: .setVringEnable,
      deed: .sayOnChannel(message(9, flags: 1, [UInt8](repeating: 0, count: 40)), descriptors: 0)),
    Attack(name: "descriptors on the channel", request: .setVringEnable, deed: .sayOnChannel(message(2, flags: 1), descriptors: 9)),
    Attack(name: "half a message on the channel", request: .setVringEnable, deed: .sayOnChannel([2, 0, 0], descriptors: 0)),
    Attack(
      name: "an enabled ring refused", request: .setVringEnable,
      deed: .say(message(18, flags: reply, [5] + [UInt8](repeating: 0, count: 7)), descriptors: 0)),
    Attack(name: "memory unanswered", request: .setMemTable, deed: .sayNothing),
    Attack(name: "memory answered with descriptors", request: .setMemTable, deed: .say(message(5, flags: reply, eight), descriptors: 8)),
  ],
]

/// A back end on a socket of its own that is a proper one first, and again after the last attack.
private final class HostileBackEnd: Sendable {
  let socket: String
  let attacks: [Attack]
  /// Connections that have come so far; the proper one at the end is number `attacks.count + 2`.
  let connections = Atomic<Int>(0)
  /// Attacks whose deed has been done.
  let deeds = Atomic<Int>(0)
  /// The proper one at the beginning leaves.
  let leaves = Atomic<Bool>(false)
  /// The proper one at the end has been asked everything that a device at rest, or at work, is asked.
  let isServing = Atomic<Bool>(false)
  private let listener: SharedDescriptor
  private let bomb: SharedDescriptor

  init(_ socket: String, _ attacks: [Attack]) throws {
    self.socket = socket
    self.attacks = attacks
    listener = SharedDescriptor(try UnixSocket.listen(at: socket))
    bomb = SharedDescriptor(try SharedMemory.sealed(name: "bomb", byteCount: 4096))
    _ = try HostThread.start(name: "hostile") { [self] in
      for number in (-1)... {
        guard let peer = accepted() else { return }
        connections.add(1, ordering: .sequentiallyConsistent)
        serve(peer, attacks.indices.contains(number) ? attacks[number] : nil, isLast: number >= attacks.count)
      }
    }
  }

  private func accepted() -> OwnedFD? {
    guard (try? listener.fd.waitUntil(.readable, timeout: .seconds(60))) == true else { return nil }
    let number = accept(listener.fd.rawValue, nil, nil)
    return number < 0 ? nil : try? OwnedFD.inherited(number)
  }

  private func serve(_ peer: consuming OwnedFD, _ attack: Attack?, isLast: Bool) {
    var connection = Connection(peer, expecting: .anything, descriptorLimit: ReceivedDescriptors.capacity)
    var device = RecordingDevice()
    var session = BackEndSession(
      offer: BackEndOffer(
        features: [.version1, .eventIndex, .indirectDescriptors], protocolFeatures: BackEndOffer.implemented, queueCount: 1))
    // Our end of the channel for requests of our own.
    var channel: OwnedFD?
    var isDone = false
    while true {
      if attack == nil, !isLast, leaves.load(ordering: .sequentiallyConsistent) { return }
      do {
        _ = try? connection.socket.waitUntil(.readable, timeout: .milliseconds(20))
        while var request = try connection.receive(now: .now) {
          if isDone, attack?.isHarmless != true { continue }
          let code = request.header.request
          if code == FrontEndRequest.setBackEndRequestFD.rawValue {
            channel = request.descriptors.takeFirst()
            if request.header.flags.contains(.needReply) { say(connection, message(code, flags: reply, eight)) }
            continue
          }
          guard let attack, !isDone, code == attack.request.rawValue else {
            try answer(request, &session, &device, connection)
            continue
          }
          isDone = true
          switch attack.deed {
          case .say(let bytes, let descriptors): say(connection, bytes, descriptors)
          case .sayNothing: break
          case .trickle(let bytes, let pause):
            for byte in bytes where say(connection, [byte]) {
              usleep(UInt32(pause.nanoseconds / 1000))
            }
          case .leave:
            deeds.add(1, ordering: .sequentiallyConsistent)
            return
          case .answerAnd(let bytes):
            try answer(request, &session, &device, connection)
            say(connection, bytes)
          case .flood(let count):
            try answer(request, &session, &device, connection)
            for _ in 0..<count where !sayOn(channel, message(2, flags: 1)) { break }
          case .sayOnChannel(let bytes, let descriptors):
            try answer(request, &session, &device, connection)
            _ = sayOn(channel, bytes, descriptors)
          case .harm:
            try answer(request, &session, &device, connection)
            harm(device)
            usleep(100_000)
            deeds.add(1, ordering: .sequentiallyConsistent)
            return
          }
          deeds.add(1, ordering: .sequentiallyConsistent)
        }
        if isLast, session.hasOwner { isServing.store(true, ordering: .sequentiallyConsistent) }
      } catch { return }
    }
  }

  private func answer(
    _ request: consuming IncomingMessage, _ session: inout BackEndSession, _ device: inout RecordingDevice,
    _ connection: borrowing Connection
  ) throws {
    guard let answer = try session.handle(request, &device) else { return }
    let descriptors: [CInt] =
      switch answer.descriptor {
      case .some(let fd): [fd.rawValue]
      case .none: []
      }
    _ = connection.sendRaw(answer.header.encoded + answer.payload, descriptors: descriptors)
  }

  /// False when the core has gone.
  @discardableResult
  private func say(_ connection: borrowing Connection, _ bytes: [UInt8], _ descriptors: Int = 0) -> Bool {
    if case .bytes = connection.sendRaw(bytes, descriptors: Array(repeating: bomb.fd.rawValue, count: descriptors)) { return true }
    return false
  }

  /// False when the other end takes no more.
  private func sayOn(_ channel: borrowing OwnedFD?, _ bytes: [UInt8], _ descriptors: Int = 0) -> Bool {
    switch channel {
    case .some(let channel):
      let outcome = UnixSocket.send(
        channel, bytes, descriptors: Array(repeating: bomb.fd.rawValue, count: descriptors), waiting: false)
      if case .bytes = outcome { return true }
      if case .wouldBlock = outcome { return (try? channel.waitUntil(.writable, timeout: .milliseconds(200))) == true }
      return false
    case .none:
      Issue.record("There is no channel")
      return false
    }
  }

  /// Guest memory cut, grown, sealed; the events that we share filled and made blocking.
  private func harm(_ device: borrowing RecordingDevice) {
    #expect(!device.memory.isEmpty && !device.kicks.isEmpty)
    for memory in device.memory {
      let fd = memory.fd.rawValue
      #expect(ftruncate(fd, 0) == -1 && errno == EPERM)
      #expect(ftruncate(fd, 1 << 40) == -1 && errno == EPERM)
      // F_ADD_SEALS, F_SEAL_WRITE
      #expect(fcntl(fd, 1033, 8) == -1 && errno == EPERM)
    }
    for event in Array(device.kicks.values) + Array(device.calls.values) {
      let fd = event.fd.rawValue
      var most = UInt64.max - 1
      _ = write(fd, &most, 8)
      #expect(fcntl(fd, F_SETFL, fcntl(fd, F_GETFL) & ~O_NONBLOCK) == 0)
    }
  }
}

@Suite("Hostile back ends against a whole VM", .serialized, .enabled(if: MicroVM.canRun, MicroVM.cannotRun))
struct HostileBackEndTests {
  private func facts(_ core: Int32) -> (descriptors: Int, memory: Int) {
    let descriptors = (try? FileManager.default.contentsOfDirectory(atPath: "/proc/\(core)/fd"))?.count ?? 0
    let text = FileManager.default.contents(atPath: "/proc/\(core)/status").map { String(decoding: $0, as: UTF8.self) } ?? ""
    let line = text.split(separator: "\n").first { $0.hasPrefix("RssAnon:") } ?? ""
    return (descriptors, line.split { $0 == " " || $0 == "\t" }.dropFirst().first.flatMap { Int($0) } ?? 0)
  }

  private func eventually(_ what: @autoclosure () -> String, _ condition: () throws -> Bool) throws {
    let end = Date().addingTimeInterval(120)
    while try !condition() {
      guard Date() < end else { throw TestFailure(what()) }
      usleep(20_000)
    }
  }

  @Test func theCoreDropsEachAndHoldsNoMoreAfterwards() throws {
    let vm = try MicroVM()
    var options = ["--deadline", "reply=500", "--serial", "file=serial"]
    var hostile: [HostileBackEnd] = []
    for (number, list) in attacks.enumerated() {
      let backEnd = try HostileBackEnd(vm.directory + "-\(number).sock", list)
      hostile.append(backEnd)
      // The one that the guest drives is the disk.
      let isDriven = number == attacks.count - 1
      options += ["--generic-vhost-user", "socket=\(backEnd.socket),device_type=\(isDriven ? "block" : "entropy"),queue_sizes=[64]"]
    }
    defer { for backEnd in hostile { unlink(backEnd.socket) } }
    // Nobody serves its request, so that it gives up and halts; its driver stays.
    let program = try vm.start("test=blk n=1 end=hang", options)
    defer { program.signal(SIGKILL) }
    try eventually("the guest does not drive its disk") {
      try vm.ctl("devices").output.contains("\"enabled\":true")
    }
    let core = try #require(vm.processes["core"])
    let before = facts(core)
    #expect(before.descriptors > 20 && before.memory > 0)
    for backEnd in hostile { backEnd.leaves.store(true, ordering: .sequentiallyConsistent) }
    // The VM can be asked all the time, and answers.
    var slowest = 0.0
    try eventually(
      "not all attacks came: \(hostile.map { ($0.deeds.load(ordering: .relaxed), $0.connections.load(ordering: .relaxed)) }), "
        + "\(program.errorText.suffix(2000))"
    ) {
      let start = Date()
      let answer = try vm.ctl("info").output
      slowest = max(slowest, Date().timeIntervalSince(start))
      try #require(answer.contains("\"state\":\"running\""), "\(answer) \(program.errorText)")
      return hostile.allSatisfy { $0.isServing.load(ordering: .sequentiallyConsistent) }
    }
    #expect(slowest < 10)
    for backEnd in hostile { checkEqual(backEnd.deeds.load(ordering: .sequentiallyConsistent), backEnd.attacks.count) }
    // Each was dropped: nobody was served twice on one connection.
    for backEnd in hostile { checkEqual(backEnd.connections.load(ordering: .sequentiallyConsistent), backEnd.attacks.count + 2) }
    try eventually("descriptors are left: \(facts(core).descriptors) instead of \(before.descriptors)") {
      facts(core).descriptors == before.descriptors
    }
    let after = facts(core)
    #expect(after.memory < before.memory + 1024, "kB: \(before.memory) before, \(after.memory) after")
    #expect(vm.processes["core"] == core)
    program.signal(SIGTERM)
    #expect(program.wait().code == 143, "\(program.errorText)")
    vm.expectNothingLeft()
  }
}
