import HostSystem
import TestSupport
import Testing
import VhostUser
import VirtioSpec

@Suite struct FrontEndSessionTests {
  private typealias Event = FrontEndSession.Event

  // MARK: Both ends against each other

  @Test func bothEndsGoFromFirstContactToResetAndBack() throws {
    var bench = try SessionBench(standardConfiguration())
    let object = try memoryObject("session")
    bench.front.negotiate(now: bench.now)
    let negotiated = try bench.run()
    let offer = Offer(
      features: guestFeatures, protocolFeatures: [.mq, .replyAck, .config, .resetDevice, .configureMemSlots],
      hasProtocolFeatures: true, queueCount: 4, maximumMemorySlots: 12, configuration: Array(0..<16))
    #expect(negotiated == [.negotiated(offer)])

    bench.front.activate(try sampleActivation(rings: 2, object), now: bench.now)
    let activated = try bench.run()
    #expect(activated == [.activated])
    checkEqual(
      bench.device.log,
      [
        "features [29, 32]", "memory 1", "start 0 size 64 base 0 enabled", "start 1 size 64 base 0 enabled",
      ])

    bench.device.log = []
    bench.front.stop(now: bench.now)
    bench.front.resume(now: bench.now)
    let paused = try bench.run()
    #expect(paused == [.stopped([VringState(index: 0, number: 5), VringState(index: 1, number: 5)]), .resumed])
    checkEqual(bench.device.log, ["stop 0", "stop 1", "start 0 size 64 base 5 enabled", "start 1 size 64 base 5 enabled"])

    bench.device.log = []
    bench.front.reset(now: bench.now)
    let reset = try bench.run()
    #expect(reset == [.reset([VringState(index: 0, number: 10), VringState(index: 1, number: 10)])])
    checkEqual(bench.device.log, ["stop 0", "stop 1", "reset"])

    bench.device.log = []
    bench.front.activate(try sampleActivation(rings: 1, object), now: bench.now)
    let again = try bench.run()
    #expect(again == [.activated])
    checkEqual(bench.device.log, ["features [29, 32]", "memory 1", "start 0 size 64 base 0 enabled"])
  }

  @Test func withoutAcknowledgementsABarrierEndsEveryOperation() throws {
    var configuration = standardConfiguration()
    configuration.wantedProtocolFeatures = [.config]
    var bench = try SessionBench(configuration)
    let object = try memoryObject("session")
    bench.front.negotiate(now: bench.now)
    bench.front.activate(try sampleActivation(rings: 2, object), now: bench.now)
    bench.front.writeConfiguration(offset: 3, bytes: [9], now: bench.now)
    let events = try bench.run()
    check(events.contains(.activated))
    // The device saw all of it before the front end said so.
    checkEqual(Array(bench.device.log.suffix(2)), ["start 1 size 64 base 0 enabled", "write 3 [9]"])
    check(bench.front.isIdle)
  }

  @Test func aBackEndWithoutProtocolFeaturesIsServedTheOldWay() throws {
    var peer = try ScriptedBackEnd(standardConfiguration())
    peer.front.negotiate(now: peer.now)
    checkEqual(try peer.next(), .setOwner)
    checkEqual(try peer.next(), .getFeatures)
    peer.answer(.number(guestFeatures.rawValue), to: 1)
    let events = peer.events()
    #expect(events == [.negotiated(Offer(features: guestFeatures, protocolFeatures: [], hasProtocolFeatures: false))])
    let object = try memoryObject("session")
    peer.front.activate(try sampleActivation(rings: 1, object), now: peer.now)
    var sent: [FrontEndRequest] = []
    while let message = try peer.nextOrNil() { sent.append(message.request) }
    #expect(
      sent == [
        .setFeatures, .setMemTable, .setVringNum, .setVringBase, .setVringAddr, .setVringCall, .setVringKick, .getFeatures,
      ])
    let early = peer.events()
    peer.answer(.number(guestFeatures.rawValue), to: 1)
    let late = peer.events()
    #expect(early == [] && late == [.activated])
  }

  @Test func moreThanEightRegionsAreAddedOneByOneAndTakenBackBeforeTheNext() throws {
    var bench = try SessionBench(standardConfiguration())
    let object = try memoryObject("session")
    bench.front.negotiate(now: bench.now)
    bench.front.activate(try sampleActivation(rings: 1, regions: 9, object), now: bench.now)
    _ = try bench.run()
    checkEqual(bench.back.session.regions, regionDescriptions(9))
    bench.front.reset(now: bench.now)
    bench.front.activate(try sampleActivation(rings: 1, regions: 10, object), now: bench.now)
    _ = try bench.run()
    checkEqual(bench.back.session.regions, regionDescriptions(10))
    bench.front.reset(now: bench.now)
    bench.front.activate(try sampleActivation(rings: 1, regions: 13, object), now: bench.now)
    let events = try bench.run()
    #expect(events.last == .failed(.missingFeature("13 memory slots (it has 12)")))
  }

  @Test func theInflightAreaIsAskedForOnceAndGivenBackAtEveryStart() throws {
    var configuration = standardConfiguration()
    configuration.wantedProtocolFeatures.insert(.inflightShmFD)
    var bench = try SessionBench(configuration)
    let object = try memoryObject("session")
    bench.device.inflightName = "session-inflight"
    bench.front.negotiate(now: bench.now)
    bench.front.activate(try sampleActivation(rings: 2, object), now: bench.now)
    bench.front.stop(now: bench.now)
    bench.front.resume(now: bench.now)
    let events = try bench.run()
    #expect(events.last == .resumed)
    checkEqual(bench.device.log.filter { $0.hasPrefix("inflight") }, ["inflight 2x64", "inflight 2x64"])
    // One is the session's, one the device's: there is only one area.
    #expect(openDescriptors(of: "session-inflight") == 2)
    bench.front.reset(now: bench.now)
    _ = try bench.run()
    #expect(openDescriptors(of: "session-inflight") == 1)
  }

  @Test func suspendingAsksNotToWaitWhereThatWasNegotiated() throws {
    var configuration = standardConfiguration()
    configuration.wantedProtocolFeatures.formUnion([.inflightShmFD, .getVringBaseInflight])
    var bench = try SessionBench(configuration)
    let object = try memoryObject("session")
    bench.front.negotiate(now: bench.now)
    bench.front.activate(try sampleActivation(rings: 1, object), now: bench.now)
    bench.front.stop(.suspend, now: bench.now)
    _ = try bench.run()
    checkEqual(bench.device.log.last, "stop 0 suspending")
  }

  @Test func callsAreReplacedWhileRingsRunAndKeptForTheNextStart() throws {
    var bench = try SessionBench(standardConfiguration())
    let object = try memoryObject("session")
    bench.front.negotiate(now: bench.now)
    bench.front.activate(try sampleActivation(rings: 2, object), now: bench.now)
    _ = try bench.run()
    bench.front.replaceCall(index: 1, nil, now: bench.now)
    let events = try bench.run()
    #expect(events == [.callReplaced(index: 1)])
    checkEqual(bench.device.log.last, "call 1 none")
    bench.front.stop(now: bench.now)
    bench.front.resume(now: bench.now)
    _ = try bench.run()
    check(bench.device.calls[0] != nil && bench.device.calls[1] == nil)
  }

  @Test func configurationIsReadWrittenAndRefused() throws {
    var bench = try SessionBench(standardConfiguration())
    bench.front.negotiate(now: bench.now)
    _ = try bench.run()
    bench.front.readConfiguration(offset: 2, count: 3, now: bench.now)
    bench.front.writeConfiguration(offset: 2, bytes: [7], now: bench.now)
    bench.front.readConfiguration(offset: 2, count: 1, now: bench.now)
    bench.front.readConfiguration(offset: 63, count: 4, now: bench.now)
    bench.front.writeConfiguration(offset: 64, bytes: [1], now: bench.now)
    let events = try bench.run()
    #expect(
      events == [
        .configuration(offset: 2, bytes: [2, 3, 4]), .configurationWritten, .configuration(offset: 2, bytes: [7]),
        .configurationRefused, .configurationRefused,
      ])
    check(!bench.front.hasFailed)
  }

  // MARK: First contact

  @Test func onlyAllowedFeaturesArePassedOnAndNoneThatAreBetweenTheEnds() throws {
    var configuration = standardConfiguration()
    configuration.allowedFeatures = [.version1, .vhostLogAll, .vhostUserProtocolFeatures, .inOrder]
    var bench = try SessionBench(configuration)
    bench.front.negotiate(now: bench.now)
    _ = try bench.run()
    checkEqual(bench.front.offer?.features, .version1)
  }

  @Test func aBackEndWithoutVersionOneIsRefused() throws {
    var bench = try SessionBench(standardConfiguration(), BackEndOffer(features: [.eventIndex], queueCount: 1))
    bench.front.negotiate(now: bench.now)
    let events = try bench.run()
    #expect(events == [.failed(.missingFeature("feature bits [32]"))])
  }

  @Test func aMissingProtocolFeatureThatIsRequiredIsNamed() throws {
    var configuration = standardConfiguration()
    configuration.requiredProtocolFeatures = [.config]
    var bench = try SessionBench(configuration, BackEndOffer(features: .version1, queueCount: 1))
    bench.front.negotiate(now: bench.now)
    let events = try bench.run()
    #expect(events == [.failed(.missingFeature("protocol features [\"CONFIG\"]"))])
  }

  @Test func aLaterContactKeepsTheFirstOneAndRefusesLess() throws {
    var first = try SessionBench(standardConfiguration())
    first.front.negotiate(now: first.now)
    _ = try first.run()
    let agreed = first.front.offer
    let fixed = try #require(agreed)
    var configuration = standardConfiguration()
    configuration.fixedOffer = fixed

    var more = fullOffer()
    more.features.insert(.inOrder)
    configuration.allowedFeatures.insert(.inOrder)
    var second = try SessionBench(configuration, more)
    second.front.negotiate(now: second.now)
    let same = try second.run()
    #expect(same == [.negotiated(fixed)])

    var less = fullOffer()
    less.features.remove(.eventIndex)
    var third = try SessionBench(configuration, less)
    third.front.negotiate(now: third.now)
    let refused = try third.run()
    #expect(refused == [.failed(.offerShrank("feature bits [29] are gone"))])

    var fourth = try SessionBench(configuration, fullOffer(queues: 3))
    fourth.front.negotiate(now: fourth.now)
    let fewer = try fourth.run()
    #expect(fewer == [.failed(.offerShrank("3 queues instead of 4"))])

    let basic = BackEndOffer(
      features: fullOffer().features, protocolFeatures: [.mq, .config, .resetDevice], queueCount: 4)
    var fifth = try SessionBench(configuration, basic)
    fifth.front.negotiate(now: fifth.now)
    let poorer = try fifth.run()
    #expect(poorer == [.failed(.offerShrank("protocol features [\"REPLY_ACK\", \"CONFIGURE_MEM_SLOTS\"] are gone"))])
  }

  // MARK: Hostile and silent back ends

  @Test func aReplyThatIsNotExactlyRightEndsTheSession() throws {
    let right = Reply.number(guestFeatures.rawValue)
    let wrong: [(MessageHeader, [UInt8])] = [
      (right.header(to: 15), right.payload),
      (MessageHeader(request: 1, flags: .version1, size: 8), right.payload),
      (MessageHeader(request: 1, flags: [.version1, .reply, .needReply], size: 8), right.payload),
      (MessageHeader(request: 1, flags: MessageFlags(rawValue: 0x15), size: 8), right.payload),
      (MessageHeader(request: 1, flags: MessageFlags(rawValue: 0x6), size: 8), right.payload),
      (MessageHeader(request: 1, flags: .replyExactly, size: 0), []),
      (MessageHeader(request: 1, flags: .replyExactly, size: 12), right.payload + [0, 0, 0, 0]),
      (MessageHeader(request: 1, flags: .replyExactly, size: 5000), right.payload),
    ]
    for (header, payload) in wrong {
      var peer = try ScriptedBackEnd(standardConfiguration())
      peer.front.negotiate(now: peer.now)
      _ = try peer.next()
      _ = try peer.next()
      peer.send(header.encoded + payload)
      let events = peer.events()
      #expect(events.count == 1)
      guard case .failed = events.first else {
        Issue.record("\(header) was accepted: \(events)")
        continue
      }
      // Dead is dead.
      peer.front.negotiate(now: peer.now)
      check(peer.events().isEmpty && peer.front.deadline == nil)
    }
  }

  @Test(arguments: [1, 8, 9, 253])
  func aReplyWithDescriptorsEndsTheSessionAndNoneStaysOpen(count: Int) throws {
    let name = "fd-bomb-\(count)"
    let object = try memoryObject(name)
    var peer = try ScriptedBackEnd(standardConfiguration())
    peer.front.negotiate(now: peer.now)
    _ = try peer.next()
    _ = try peer.next()
    let reply = Reply.number(guestFeatures.rawValue)
    peer.send(reply.header(to: 1).encoded + reply.payload, Array(repeating: object.rawValue, count: count))
    let events = peer.events()
    guard case .failed = events.first else { Issue.record("\(count) descriptors were accepted"); return }
    #expect(openDescriptors(of: name) == 1)
  }

  @Test func aMessageNobodyAskedForEndsTheSession() throws {
    var peer = try ScriptedBackEnd(standardConfiguration())
    peer.send(Reply.number(0).header(to: 1).encoded + Reply.number(0).payload)
    let events = peer.events()
    #expect(events == [.failed(.unsolicited(request: 1))])
  }

  @Test func aSilentBackEndIsGivenUpAfterASecond() throws {
    var peer = try ScriptedBackEnd(standardConfiguration())
    let start = peer.now
    peer.front.negotiate(now: start)
    checkEqual(peer.front.deadline, start.advanced(by: .seconds(1)))
    peer.front.handleTimeout(now: start.advanced(by: .milliseconds(999)))
    check(peer.events().isEmpty)
    peer.front.handleTimeout(now: start.advanced(by: .seconds(1)))
    let events = peer.events()
    #expect(events == [.failed(.noReply(to: "GET_FEATURES", milliseconds: 1000))])
    checkEqual(peer.front.deadline, nil)
  }

  @Test func aTricklingBackEndIsGivenUpToo() throws {
    var peer = try ScriptedBackEnd(standardConfiguration())
    let start = peer.now
    peer.front.negotiate(now: start)
    let reply = Reply.number(guestFeatures.rawValue)
    for byte in (reply.header(to: 1).encoded + reply.payload).prefix(3) {
      peer.send([byte])
      peer.now = peer.now.advanced(by: .milliseconds(400))
      peer.front.receive(now: peer.now)
      peer.front.handleTimeout(now: peer.now)
    }
    let events = peer.events()
    #expect(events.count == 1)
    check(peer.front.hasFailed)
  }

  @Test func stoppingHasLongerDeadlinesThanSetUp() throws {
    var configuration = standardConfiguration()
    configuration.timeouts.drain = .seconds(12)
    var bench = try SessionBench(configuration)
    let object = try memoryObject("session")
    bench.front.negotiate(now: bench.now)
    bench.front.activate(try sampleActivation(rings: 1, object), now: bench.now)
    _ = try bench.run()
    bench.device.drains = true
    bench.front.stop(now: bench.now)
    checkEqual(bench.front.deadline, bench.now.advanced(by: .seconds(12)))
    _ = try bench.run()
    bench.front.handleTimeout(now: bench.now.advanced(by: .seconds(11)))
    check(!bench.front.hasFailed)
    try bench.back.finishStop(at: 0, base: 3)
    let events = try bench.run()
    #expect(events == [.stopped([VringState(index: 0, number: 3)])])
  }

  @Test func aRefusedAcknowledgementFailsTheBackEnd() throws {
    var bench = try SessionBench(standardConfiguration())
    let object = try memoryObject("session")
    bench.front.negotiate(now: bench.now)
    _ = try bench.run()
    bench.device.refusal = Refusal("no")
    bench.front.activate(try sampleActivation(rings: 1, object), now: bench.now)
    let events = try bench.run()
    #expect(events == [.failed(.peerRefused(request: "SET_FEATURES", code: 22))])
  }

  @Test func aBackEndThatLeavesIsNoticedAtOnce() throws {
    let pair = try UnixSocket.pair(.stream)
    var front = try FrontEndSession(pair.first, standardConfiguration())
    let backEnd = pair.second
    _ = consume backEnd
    front.receive(now: .now)
    let event = front.nextEvent()
    #expect(event == .failed(.closed(midMessage: false)))
  }

  @Test(arguments: [([], 16), ([.blockZoned], 96), ([.blockSecureErase], 72)] as [(FeatureSet, Int)])
  func noMoreOfTheConfigurationIsAskedForThanTheOfferedFeaturesHave(more: FeatureSet, count: Int) throws {
    var configuration = standardConfiguration()
    configuration.allowedFeatures.formUnion([.blockZoned, .blockSecureErase])
    configuration.configurationGrowth = [(.blockSecureErase, 72), (.blockZoned, 96)]
    configuration.wantedProtocolFeatures = [.config]
    var peer = try ScriptedBackEnd(configuration)
    peer.front.negotiate(now: peer.now)
    var asked: Int?
    while let message = try peer.nextOrNil() {
      switch message {
      case .getFeatures: peer.answer(.number(guestFeatures.union(more).union(.vhostUserProtocolFeatures).rawValue), to: 1)
      case .getProtocolFeatures: peer.answer(.number(ProtocolFeatures.config.rawValue), to: 15)
      case .getConfig(let message):
        asked = message.bytes.count
        peer.send(Reply.configRefused.header(to: 24).encoded, [])
      default: break
      }
      peer.front.receive(now: peer.now)
    }
    #expect(asked == count)
    let events = peer.events()
    #expect(events == [.failed(.missingFeature("\(count) bytes of configuration space, though it offers CONFIG"))])
  }

  @Test func anInflightAreaOfAnImpossibleSizeIsRefused() throws {
    for size in [0x100, 0x100_0000] as [UInt64] {
      var configuration = standardConfiguration()
      configuration.wantedProtocolFeatures = [.inflightShmFD]
      configuration.configurationByteCount = 0
      var peer = try ScriptedBackEnd(configuration)
      let object = try memoryObject("session")
      peer.front.negotiate(now: peer.now)
      peer.front.activate(try sampleActivation(rings: 1, object), now: peer.now)
      while let message = try peer.nextOrNil() {
        switch message {
        case .getFeatures: peer.answer(.number(guestFeatures.union(.vhostUserProtocolFeatures).rawValue), to: 1)
        case .getProtocolFeatures: peer.answer(.number(ProtocolFeatures.inflightShmFD.rawValue), to: 15)
        case .getInflightFD(let wanted):
          let area = InflightDescription(size: size, queueCount: wanted.queueCount, queueSize: wanted.queueSize)
          peer.send(Reply.inflight(area).header(to: 31).encoded + area.encoded, [object.rawValue])
        default: break
        }
        peer.front.receive(now: peer.now)
      }
      let events = peer.events()
      #expect(events.last == .failed(.invalidValue(field: "inflight size", value: size)))
    }
  }

  @Test(arguments: [0, 65537, 1 << 32, UInt64.max])
  func anImpossibleNumberOfQueuesIsRefused(count: UInt64) throws {
    var configuration = standardConfiguration()
    configuration.wantedProtocolFeatures = [.mq]
    configuration.configurationByteCount = 0
    var peer = try ScriptedBackEnd(configuration)
    peer.front.negotiate(now: peer.now)
    while let message = try peer.nextOrNil() {
      switch message {
      case .getFeatures: peer.answer(.number(guestFeatures.union(.vhostUserProtocolFeatures).rawValue), to: 1)
      case .getProtocolFeatures: peer.answer(.number(ProtocolFeatures.mq.rawValue), to: 15)
      case .getQueueNum: peer.answer(.number(count), to: 17)
      default: break
      }
      peer.front.receive(now: peer.now)
    }
    #expect(peer.events() == [.failed(.invalidValue(field: "queue count", value: count))])
  }

  /// None, two, or one that does not fit its words: closed, each of them.
  @Test(arguments: [0, 2, 8, 253])
  func anInflightAreaWithAnyOtherNumberOfDescriptorsIsRefused(count: Int) throws {
    var configuration = standardConfiguration()
    configuration.wantedProtocolFeatures = [.inflightShmFD]
    configuration.configurationByteCount = 0
    var peer = try ScriptedBackEnd(configuration)
    let memory = try memoryObject("session")
    let name = "inflight-bomb-\(count)"
    let object = try memoryObject(name)
    peer.front.negotiate(now: peer.now)
    peer.front.activate(try sampleActivation(rings: 1, memory), now: peer.now)
    while let message = try peer.nextOrNil() {
      switch message {
      case .getFeatures: peer.answer(.number(guestFeatures.union(.vhostUserProtocolFeatures).rawValue), to: 1)
      case .getProtocolFeatures: peer.answer(.number(ProtocolFeatures.inflightShmFD.rawValue), to: 15)
      case .getInflightFD(let wanted):
        let entries = UInt64(wanted.queueCount) * UInt64(wanted.queueSize)
        let area = InflightDescription(size: entries * 16 + 64, queueCount: wanted.queueCount, queueSize: wanted.queueSize)
        peer.send(Reply.inflight(area).header(to: 31).encoded + area.encoded, Array(repeating: object.rawValue, count: count))
      default: break
      }
      peer.front.receive(now: peer.now)
    }
    guard case .failed = peer.events().last else { Issue.record("\(count) descriptors were accepted"); return }
    #expect(openDescriptors(of: name) == 1)
  }

  @Test(arguments: [0, 2] as [UInt32])
  func aBaseOfAnotherRingThanTheOneAskedForIsRefused(index: UInt32) throws {
    var configuration = standardConfiguration()
    configuration.configurationByteCount = 0
    var peer = try ScriptedBackEnd(configuration)
    let object = try memoryObject("session")
    var activation = try sampleActivation(rings: 1, object)
    activation.vrings[0].index = 1
    peer.front.negotiate(now: peer.now)
    peer.front.activate(activation, now: peer.now)
    peer.front.stop(now: peer.now)
    while let message = try peer.nextOrNil() {
      switch message {
      case .getFeatures: peer.answer(.number(guestFeatures.rawValue), to: 1)
      case .getVringBase: peer.answer(.vringState(VringState(index: index, number: 4)), to: 11)
      default: break
      }
      peer.front.receive(now: peer.now)
    }
    let events = peer.events()
    #expect(events.last == .failed(.invalidValue(field: "ring index of GET_VRING_BASE", value: UInt64(index))))
  }

  // MARK: The back end's channel

  private func listening() throws -> SessionBench {
    var configuration = standardConfiguration()
    configuration.hearsConfigurationChanges = true
    var bench = try SessionBench(configuration)
    let object = try memoryObject("session")
    checkEqual(bench.front.channelNumber, nil)
    bench.front.negotiate(now: bench.now)
    bench.front.activate(try sampleActivation(rings: 1, object), now: bench.now)
    _ = try bench.run()
    check(bench.front.channelNumber != nil)
    return bench
  }

  @Test func aChangedConfigurationIsHeard() throws {
    var bench = try listening()
    check(bench.back.notifyConfigurationChange())
    let events = try bench.run()
    #expect(events == [.configurationChanged])
  }

  @Test func aFloodOnTheChannelIsHeardTwentyTimesAndThenEndsTheSession() throws {
    var bench = try listening()
    for _ in 0..<21 { bench.back.notifyConfigurationChange() }
    let events = try bench.run()
    #expect(events == [.configurationChanged, .failed(.tooManyMessages)])
  }

  @Test func tenChangesASecondMayGoOnForEver() throws {
    var bench = try listening()
    for _ in 0..<100 {
      bench.back.notifyConfigurationChange()
      let events = try bench.run()
      #expect(events == [.configurationChanged])
      bench.now = bench.now.advanced(by: .milliseconds(100))
    }
  }

  @Test func withoutBeingWantedThereIsNoChannel() throws {
    var bench = try SessionBench(standardConfiguration())
    bench.front.negotiate(now: bench.now)
    _ = try bench.run()
    check(!bench.back.notifyConfigurationChange())
    checkEqual(bench.front.channelNumber, nil)
  }

  @Test func anythingElseOnTheChannelEndsTheSession() throws {
    for vector in try GoldenVector.load() where vector.kind == .backRequest && vector.refusal == nil {
      if vector.name.hasPrefix("backend-config-change") { continue }
      var peer = try ScriptedBackEnd.withChannel()
      let object = try memoryObject("session")
      let descriptors = [CInt](repeating: object.rawValue, count: vector.descriptorCount)
      try check(UnixSocket.send(peer.channel(), vector.bytes, descriptors: descriptors) == .bytes(vector.bytes.count))
      let events = peer.events()
      guard case .failed = events.first else { Issue.record("\(vector.name) was accepted: \(events)"); continue }
    }
  }

  @Test func aMarkedChangeIsAcknowledgedBeforeAnythingIsAsked() throws {
    var peer = try ScriptedBackEnd.withChannel()
    let message = BackEndMessage.configChange
    try check(UnixSocket.send(peer.channel(), message.header(needsReply: true).encoded) == .bytes(12))
    let events = peer.events()
    #expect(events == [.configurationChanged])
    var reader = Connection(try peer.channel().duplicate(), expecting: .reply(to: 2), descriptorLimit: 0)
    let reply = try reader.receive(now: peer.now)?.payload
    #expect(reply == Reply.number(0).payload)
  }

  @Test func aClosedChannelIsNotTheEndOfTheDevice() throws {
    var peer = try ScriptedBackEnd.withChannel()
    peer.closeChannel()
    let events = peer.events()
    #expect(events == [.channelClosed])
    checkEqual(peer.front.channelNumber, nil)
    check(!peer.front.hasFailed)
  }
}

/// A back end whose every answer is the test's.
private struct ScriptedBackEnd: ~Copyable {
  var front: FrontEndSession
  var socket: Connection
  var now = MonotonicTime(nanoseconds: 1_000_000_000)
  private var channelEnd: SharedDescriptor?

  init(_ configuration: FrontEndConfiguration) throws {
    let pair = try UnixSocket.pair(.stream)
    front = try FrontEndSession(pair.first, configuration)
    socket = Connection(pair.second, expecting: .frontEndRequests, descriptorLimit: 32)
  }

  /// After first contact, with the back end's end of its channel.
  static func withChannel() throws -> ScriptedBackEnd {
    var configuration = standardConfiguration()
    configuration.hearsConfigurationChanges = true
    configuration.configurationByteCount = 0
    var peer = try ScriptedBackEnd(configuration)
    peer.front.negotiate(now: peer.now)
    while var incoming = try peer.socket.receive(now: peer.now) {
      switch FrontEndRequest(rawValue: incoming.header.request) {
      case .getFeatures: peer.answer(.number(guestFeatures.union(.vhostUserProtocolFeatures).rawValue), to: 1)
      case .getProtocolFeatures: peer.answer(.number(ProtocolFeatures([.backEndRequests, .config, .replyAck]).rawValue), to: 15)
      case .setBackEndRequestFD:
        if let fd = incoming.descriptors.takeFirst() { peer.channelEnd = SharedDescriptor(fd) }
        peer.answer(.number(0), to: 21)
      default: break
      }
      peer.front.receive(now: peer.now)
    }
    let events = peer.events()
    #expect(events.count == 1)
    check(peer.front.channelNumber != nil)
    return peer
  }

  func channel() throws -> OwnedFD { try #require(channelEnd).fd.duplicate() }

  mutating func closeChannel() { channelEnd = nil }

  func send(_ bytes: [UInt8], _ descriptors: [CInt] = []) {
    check(socket.sendRaw(bytes, descriptors: descriptors) == .bytes(bytes.count))
  }

  mutating func answer(_ reply: Reply, to request: UInt32) { send(reply.header(to: request).encoded + reply.payload) }

  /// The next request the front end sent.
  mutating func next() throws -> FrontEndMessage { try #require(try nextOrNil()) }

  mutating func nextOrNil() throws -> FrontEndMessage? {
    guard let incoming = try socket.receive(now: now) else { return nil }
    let request = try #require(FrontEndRequest(rawValue: incoming.header.request))
    let message = try FrontEndMessage(request: request, payload: incoming.payload)
    try message.checkDescriptorCount(incoming.descriptors.count)
    return message
  }

  mutating func events() -> [FrontEndSession.Event] {
    front.receive(now: now)
    var events: [FrontEndSession.Event] = []
    while let event = front.nextEvent() { events.append(event) }
    return events
  }
}
