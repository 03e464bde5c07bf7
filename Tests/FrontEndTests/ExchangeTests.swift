import FrontEnd
import HostSystem
import TestSupport
import Testing
import VhostUser
import VirtioSpec
import VirtioTransport

/// Another back end beside the one that serves.
private final class Successor {
  var back: BackEndConnection?
  var device = RecordingDevice()
  /// How many messages it still answers; nil: all.
  var patience: Int?
  /// What it does after that: nothing, or it is gone.
  var dies = true

  static func offer(
    _ features: FeatureSet = [Bench.features, .packedRing], _ protocolFeatures: ProtocolFeatures = BackEndOffer.implemented, queues: Int = 2
  ) -> BackEndOffer {
    BackEndOffer(features: features, protocolFeatures: protocolFeatures, queueCount: queues, maximumQueueSize: 256)
  }

  /// Gives its other end to the device.
  init(_ bench: Bench, _ offer: BackEndOffer = Successor.offer(), space: [UInt8]? = nil) throws {
    let pair = try UnixSocket.pair(.stream)
    back = BackEndConnection(pair.second, offer: offer)
    if let space { device.configurationSpace = space }
    guard try bench.device.examine(pair.first, now: bench.now) else { throw Bench.NotReady() }
  }

  func serveOnce(_ bench: Bench) {
    if let patience, patience <= 0 {
      if dies { back = nil }
      return
    }
    guard var living = back.take() else { return }
    do {
      try living.receive(now: bench.now, &device)
      back = consume living
    } catch { back = nil }
    patience = patience.map { $0 - 1 }
  }

  func settle(_ bench: Bench, rounds: Int = 60) throws {
    for isLater in [false, true] {
      // A disk's rings stand still for a moment before they are stopped.
      if isLater { bench.pass(.milliseconds(11)) }
      for _ in 0..<rounds {
        serveOnce(bench)
        try bench.settle()
      }
    }
  }
}

extension Bench {
  fileprivate var refusals: [String] {
    events.flatMap { event -> [String] in
      guard case .examined(let findings) = event else { return [] }
      return findings.filter { $0.verdict == .refusal }.map(\.subject)
    }
  }

  fileprivate var isExamined: Bool { events.contains { if case .examined = $0 { true } else { false } } }
  fileprivate var hasFailed: Bool { events.contains { if case .exchangeFailed = $0 { true } else { false } } }
}

/// A device at work, and a candidate that has been found to be able to take over.
private func examined(_ features: FeatureSet = Bench.features, awaitsSuccessor: Bool = false) throws -> (Bench, Successor) {
  let bench = try Bench()
  bench.device.awaitsSuccessor = awaitsSuccessor
  bench.startDriver(features)
  try bench.settle()
  let new = try Successor(bench)
  try new.settle(bench)
  return (bench, new)
}

@Suite struct ExchangeTests {
  @Test func theNewOneGoesOnWhereTheOldOneStopped() throws {
    let bench = try Bench()
    bench.startDriver()
    try bench.settle()
    bench.backDevice.log = []
    let new = try Successor(bench)
    try new.settle(bench)
    check(bench.isExamined)
    checkEqual(bench.refusals, [])
    // Everything but the rings is done, and the old one has noticed nothing.
    checkEqual(new.device.log, ["features [28, 29, 32]", "memory 2"])
    checkEqual(bench.backDevice.log, [])
    #expect(bench.device.state == .running)

    check(bench.device.exchange(drain: .seconds(1), now: bench.now))
    try new.settle(bench)
    check(bench.events.contains(.exchanged))
    checkEqual(bench.backDevice.log, ["kick 0", "kick 1", "stop 0", "stop 1"])
    checkEqual(
      new.device.log, ["features [28, 29, 32]", "memory 2", "start 0 size 64 base 5 enabled", "start 1 size 64 base 5 enabled"])
    #expect(bench.device.state == .running && bench.host.status == 15)
    // A kick that nobody has acted on, a call that was not made.
    let kick = EventFD(adopting: try bench.host.kicks[0].fd.duplicate())
    #expect(kick.drain() == 1)

    bench.device.forget(now: bench.now)
    bench.killBackEnd()
    // From now on it is the device's back end.
    new.device.log = []
    bench.write(VirtioPCILayout.device + 32, 1, 5)
    try new.settle(bench)
    checkEqual(new.device.log, ["write 32 [5]"])
    bench.host.usedIndex = 10
    bench.write(VirtioPCI.Common.deviceStatus, 1, 0)
    try new.settle(bench)
    #expect(bench.host.status == 0)
  }

  @Test func whatTheGuestWouldNoticeIsRefusedAndNothingHappens() throws {
    let cases: [(BackEndOffer, [UInt8]?, String)] = [
      (Successor.offer([.version1, .eventIndex]), nil, "features"),
      (Successor.offer([Bench.features, FeatureSet(bit: 3)]), nil, "device type"),
      (Successor.offer([Bench.features, .blockReadOnly]), nil, "read-only"),
      (Successor.offer(queues: 1), nil, "queues"),
      (Successor.offer(BackEndOffer.implemented.isEmpty ? [] : Bench.features, [.replyAck, .mq]), nil, "protocol features"),
      (Successor.offer(), [UInt8](repeating: 0, count: 64), "capacity"),
      (Successor.offer([.version1, .eventIndex, .indirectDescriptors, .accessPlatform], [.config, .mq]), [1], "first contact"),
    ]
    for (offer, space, subject) in cases {
      let bench = try Bench()
      bench.startDriver()
      try bench.settle()
      bench.backDevice.log = []
      let new = try Successor(bench, offer, space: space)
      try new.settle(bench)
      check(bench.refusals.contains(subject))
      #expect(!bench.device.exchange(drain: .seconds(1), now: bench.now))
      checkEqual(bench.backDevice.log, [])
      #expect(bench.device.state == .running && bench.host.status == 15)
      #expect(new.back == nil || bench.device.candidateNumber == nil)
    }
  }

  @Test(arguments: [true, false]) func theOldOneGoesOnWhateverMessageTheNewOneFailsAt(dies: Bool) throws {
    var wasExchanged = false
    for patience in 0..<110 {
      let bench = try Bench()
      bench.startDriver()
      try bench.settle()
      bench.backDevice.log = []
      let new = try Successor(bench)
      new.patience = patience
      new.dies = dies
      try new.settle(bench, rounds: 25)
      if !dies, !bench.isExamined { bench.expire() }
      if bench.device.exchange(drain: .seconds(1), now: bench.now) { try new.settle(bench, rounds: 25) }
      if bench.events.contains(.exchanged) {
        wasExchanged = true
        break
      }
      if !dies, !bench.hasFailed, bench.device.candidateNumber != nil { bench.expire() }
      try bench.settle()
      check(bench.hasFailed || !bench.refusals.isEmpty || !bench.isExamined || new.back == nil)
      // The process has ended.
      bench.device.forget(now: bench.now)
      try bench.settle()
      #expect(bench.device.state == .running && bench.host.status == 15, "after \(patience) messages")
      checkEqual(bench.host.effects, [])
      // Stopped or not, its rings run.
      #expect(bench.backDevice.log.count { $0.hasPrefix("stop") } == bench.backDevice.log.count { $0.hasPrefix("start") })
      bench.backDevice.log = []
      bench.write(VirtioPCILayout.device + 32, 1, 5)
      try bench.settle()
      checkEqual(bench.backDevice.log, ["write 32 [5]"])
    }
    #expect(wasExchanged)
  }

  @Test func whatTheNewOneHadBegunIsFencedAsAfterADeath() throws {
    for patience in 0..<110 {
      let bench = try Bench()
      bench.device.awaitsSuccessor = true
      bench.startDriver()
      try bench.settle()
      let new = try Successor(bench)
      try new.settle(bench, rounds: 25)
      new.patience = patience
      check(bench.device.exchange(drain: .seconds(1), now: bench.now))
      try new.settle(bench, rounds: 25)
      if bench.events.contains(.exchanged) { return }
      bench.device.forget(now: bench.now)
      try bench.settle()
      let hasBegun = new.device.log.contains { $0.hasPrefix("start") }
      #expect(bench.device.state == (hasBegun ? .detached : .running) || !hasBegun, "after \(patience) messages")
      #expect(bench.host.status == 15)
    }
    Issue.record("It was never exchanged")
  }

  @Test func anOldOneThatTakesTooLongGoesOnWhenItIsDone() throws {
    let (bench, new) = try examined()
    bench.backDevice.drains = true
    check(bench.device.exchange(drain: .milliseconds(500), now: bench.now))
    try new.settle(bench)
    #expect(!bench.hasFailed)
    bench.expire()
    try new.settle(bench)
    check(bench.hasFailed)
    bench.device.forget(now: bench.now)
    #expect(bench.device.state == .exchanging)
    bench.backDevice.drains = false
    try bench.finishStop(0)
    try new.settle(bench)
    #expect(bench.device.state == .running)
    #expect(!new.device.log.contains { $0.hasPrefix("start") })
  }

  @Test func whatIsCalledOffIsAnsweredAndAnotherOneMayCome() throws {
    let bench = try Bench()
    bench.startDriver()
    try bench.settle()
    let new = try Successor(bench)
    bench.device.forget(now: bench.now)
    try new.settle(bench)
    check(bench.hasFailed)
    bench.events = []
    let other = try Successor(bench)
    try other.settle(bench)
    check(bench.isExamined && !bench.hasFailed)
    bench.device.forget(now: bench.now)
    try bench.settle()
    check(!bench.hasFailed)
    #expect(bench.device.state == .running)
  }

  @Test func aDiskHearsNoKicksBeforeItIsStoppedAndItsOwnAgainIfItGoesOn() throws {
    let (bench, new) = try examined()
    bench.backDevice.log = []
    check(bench.device.exchange(drain: .milliseconds(200), now: bench.now))
    // It is at work as long as it may be.
    for index in 0..<50 {
      bench.host.usedIndex = UInt16(100 + index)
      try bench.settle()
      bench.pass(.milliseconds(5))
    }
    try bench.settle()
    check(bench.hasFailed)
    check(!bench.backDevice.log.contains { $0.hasPrefix("stop") })
    bench.device.forget(now: bench.now)
    try bench.settle()
    #expect(bench.device.state == .running && bench.device.deadline == nil)
    // What came meanwhile is heard now.
    let kick = EventFD(adopting: try bench.host.kicks[0].fd.duplicate())
    #expect(kick.drain() == 1)
    check(!new.device.log.contains { $0.hasPrefix("start") })
  }

  /// The storage daemon of QEMU 7.2: it says where it stopped and finishes what it had taken afterwards.
  @Test func aRingWhoseBackEndIsStillAtWorkIsNotHandedOn() throws {
    let (bench, new) = try examined()
    bench.host.usedIndices = [0x2000: 3]
    check(bench.device.exchange(drain: .seconds(1), now: bench.now))
    try new.settle(bench)
    #expect(bench.device.state == .exchanging)
    check(!new.device.log.contains { $0.hasPrefix("start") })
    bench.pass(.milliseconds(100))
    try new.settle(bench)
    check(!new.device.log.contains { $0.hasPrefix("start") })
    bench.host.usedIndices = [:]
    bench.pass(.milliseconds(1))
    try new.settle(bench)
    check(bench.events.contains(.exchanged))
    checkEqual(new.device.log.suffix(2), ["start 0 size 64 base 5 enabled", "start 1 size 64 base 5 enabled"])
    #expect(bench.device.state == .running && bench.device.deadline == nil)
  }

  @Test func whoNeverFinishesWhatItHadTakenGoesOn() throws {
    let (bench, new) = try examined()
    bench.host.usedIndices = [0x2000: 3]
    check(bench.device.exchange(drain: .milliseconds(500), now: bench.now))
    try new.settle(bench)
    bench.backDevice.log = []
    bench.pass(.milliseconds(501))
    try new.settle(bench)
    check(bench.events.contains { if case .exchangeFailed(let why) = $0 { why.contains("of 1 ring were not finished") } else { false } })
    bench.device.forget(now: bench.now)
    try new.settle(bench)
    #expect(bench.device.state == .running)
    checkEqual(bench.backDevice.log, ["start 0 size 64 base 5 enabled", "start 1 size 64 base 5 enabled"])
    check(!new.device.log.contains { $0.hasPrefix("start") })
  }

  @Test(arguments: [true, false])
  func aCandidateThatGoesWhileTheOldOneFinishesChangesNothing(dies: Bool) throws {
    let (bench, new) = try examined()
    bench.host.usedIndices = [0x2000: 3]
    check(bench.device.exchange(drain: .seconds(1), now: bench.now))
    try new.settle(bench)
    if dies { new.back = nil }
    try new.settle(bench)
    bench.device.forget(now: bench.now)
    try new.settle(bench)
    check(bench.hasFailed)
    #expect(bench.device.state == .running)
    bench.host.usedIndices = [:]
    bench.host.usedIndex = 10
    bench.write(VirtioPCI.Common.deviceStatus, 1, 0)
    try bench.settle()
    #expect(bench.host.status == 0 && bench.device.state == .idle)
  }

  @Test func packedRingsWithRequestsInFlightAreNotHandedOn() throws {
    let (bench, new) = try examined([Bench.features, .packedRing])
    check(bench.device.exchange(drain: .seconds(1), now: bench.now))
    try new.settle(bench)
    // 5: taken up to there, answered up to 0.
    check(bench.hasFailed)
    bench.device.forget(now: bench.now)
    try new.settle(bench)
    #expect(bench.device.state == .running)
    check(!new.device.log.contains { $0.hasPrefix("start") })
  }

  @Test func anOldOneThatDiesMeanwhileIsADeathAsAnyOther() throws {
    let (bench, new) = try examined(awaitsSuccessor: true)
    bench.backDevice.drains = true
    check(bench.device.exchange(drain: .seconds(1), now: bench.now))
    try new.settle(bench, rounds: 3)
    bench.killBackEnd()
    try new.settle(bench)
    #expect(bench.device.state == .detached && bench.hasFailed)
    // The candidate of before is not one any more; another one may come.
    bench.host.usedIndex = 0
    let other = try Successor(bench)
    try other.settle(bench)
    check(bench.device.exchange(drain: .seconds(1), now: bench.now))
    try other.settle(bench)
    check(bench.events.contains(.exchanged))
    #expect(bench.device.state == .running)
    checkEqual(other.device.log.suffix(2), ["start 0 size 64 base 0 enabled", "start 1 size 64 base 0 enabled"])
  }

  @Test func whatTheGuestDoesMeanwhileComesAfterwards() throws {
    let (bench, new) = try examined()
    bench.backDevice.drains = true
    check(bench.device.exchange(drain: .seconds(1), now: bench.now))
    try new.settle(bench, rounds: 2)
    #expect(bench.device.state == .exchanging)
    bench.write(VirtioPCI.Common.deviceStatus, 1, 0)
    bench.device.pause(now: bench.now)
    bench.backDevice.drains = false
    try bench.finishStop(0)
    bench.host.usedIndex = 10
    try new.settle(bench)
    bench.pass(.milliseconds(1))
    try new.settle(bench)
    check(bench.events.contains(.exchanged) && bench.events.contains(.paused))
    bench.device.resume(now: bench.now)
    bench.host.usedIndex = 15
    try new.settle(bench)
    #expect(bench.host.status == 0 && bench.device.state == .idle)
    checkEqual(new.device.log.suffix(3), ["stop 0", "stop 1", "reset"])
  }

  @Test func adriverThatComesBetweenLookAndExchangeIsSetUpAnew() throws {
    let bench = try Bench()
    let new = try Successor(bench)
    try new.settle(bench)
    checkEqual(new.device.log, [])
    bench.startDriver(queues: [0])
    try bench.settle()
    check(bench.device.exchange(drain: .seconds(1), now: bench.now))
    try new.settle(bench)
    check(bench.events.contains(.exchanged))
    checkEqual(new.device.log, ["features [28, 29, 32]", "memory 2", "start 0 size 64 base 5 enabled"])
  }

  @Test func withoutADriverTheNextOneIsOfferedWhatTheNewOneHas() throws {
    let bench = try Bench()
    let new = try Successor(bench, Successor.offer(Bench.features))
    try new.settle(bench)
    check(bench.device.exchange(drain: .seconds(1), now: bench.now))
    try new.settle(bench)
    check(bench.events.contains(.exchanged))
    #expect(!bench.host.function.state.offered.contains(.packedRing))
    bench.startDriver()
    try new.settle(bench)
    #expect(bench.device.state == .running && bench.host.status == 15)
  }
}
