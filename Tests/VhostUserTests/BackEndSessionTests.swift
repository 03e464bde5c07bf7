import HostSystem
import TestSupport
import Testing
import VhostUser
import VirtioSpec

@Suite struct BackEndSessionTests {
  @Test func aFrontEndIsServedFromFirstContactToStop() throws {
    var bench = try BackEndBench()
    let offered = try bench.send(.getFeatures)
    let expected = FeatureSet([guestFeatures, .vhostLogAll, .vhostUserProtocolFeatures])
    #expect(offered == Reply.number(expected.rawValue).payload)
    let protocolFeatures = try bench.send(.getProtocolFeatures)
    #expect(protocolFeatures == Reply.number(BackEndOffer.implemented.rawValue).payload)
    let before = try bench.send(.setProtocolFeatures([.mq, .config]))
    #expect(before == nil)
    let queues = try bench.send(.getQueueNum)
    #expect(queues == Reply.number(4).payload)
    try bench.negotiate()
    let slots = try bench.send(.getMaxMemSlots)
    #expect(slots == Reply.number(12).payload)
    let kick = try EventFD()
    try bench.startRing(2, kick: kick)
    try bench.send(.setVringEnable(VringState(index: 2, number: 1)))
    let base = try bench.send(.getVringBase(VringState(index: 2, number: 0)))
    #expect(base == VringState(index: 2, number: 12).encoded)
    checkEqual(bench.device.log, ["features [32]", "memory 1", "start 2 size 64 base 7", "enable 2", "stop 2"])
    let layout = bench.device.layouts[2]
    #expect(layout?.descriptorTable == 0x6000 && layout?.availableRing == 0x7000 && layout?.usedRing == 0x8000)
    check(bench.backEnd.session.isSuspended)
  }

  @Test func withoutBitThirtyAllRingsAreEnabledAtOnce() throws {
    var bench = try BackEndBench()
    try bench.send(.setFeatures([.version1]))
    let object = try memoryObject("bench")
    try bench.send(.setMemTable(RegionTable(regions: regionDescriptions(1))), descriptors: [object.rawValue])
    let kick = try EventFD()
    try bench.startRing(0, kick: kick)
    checkEqual(bench.device.log.last, "start 0 size 64 base 7 enabled")
  }

  @Test func callAndErrMayComeBeforeEverythingAndAreHandedOverAtTheStart() throws {
    var bench = try BackEndBench()
    let call = try EventFD()
    let kick = try EventFD()
    try bench.send(.setVringCall(VringEvent(index: 0, carriesDescriptor: true)), descriptors: [call.fd.rawValue])
    try bench.send(.setVringErr(VringEvent(index: 0, carriesDescriptor: true)), descriptors: [call.fd.rawValue])
    try bench.negotiate()
    try bench.startRing(0, kick: kick)
    let handed = (bench.device.calls[0] != nil, bench.device.errs[0] != nil, bench.device.kicks[0] != nil)
    #expect(handed == (true, true, true))
    // While the ring runs they are replaced, and bit 8 takes them away.
    try bench.send(.setVringCall(VringEvent(index: 0, carriesDescriptor: false)))
    try bench.send(.setVringKick(VringEvent(index: 0, carriesDescriptor: true)), descriptors: [kick.fd.rawValue])
    #expect(Array(bench.device.log.suffix(2)) == ["call 0 none", "kick 0"])
    // The err descriptor outlives the stop: front ends send it once.
    try bench.send(.getVringBase(VringState(index: 0, number: 0)))
    try bench.send(.setVringKick(VringEvent(index: 0, carriesDescriptor: true)), descriptors: [kick.fd.rawValue])
    let errAgain = bench.device.errs[0] != nil
    let callAgain = bench.device.calls[0] != nil
    #expect(errAgain)
    #expect(!callAgain)
  }

  // MARK: Acknowledgements

  @Test func failuresAreAcknowledgedAndTheConnectionStays() throws {
    var bench = try BackEndBench()
    try bench.negotiate()
    let kick = try EventFD()
    let refused: [(FrontEndMessage, [CInt])] = [
      (.setVringNum(VringState(index: 4, number: 64)), []),
      (.setVringNum(VringState(index: 0x10000, number: 64)), []),
      (.setVringNum(VringState(index: .max, number: 64)), []),
      (.setVringNum(VringState(index: 0, number: 2048)), []),
      (.setVringNum(VringState(index: 0, number: 63)), []),
      (.setVringNum(VringState(index: 0, number: 0)), []),
      (.setVringBase(VringState(index: 4, number: 0)), []),
      (.setVringBase(VringState(index: 0, number: 0x10000)), []),
      (.setVringAddr(ringAddress(4)), []),
      (.setVringEnable(VringState(index: 4, number: 1)), []),
      (.setVringKick(VringEvent(index: 4, carriesDescriptor: true)), [kick.fd.rawValue]),
      (.setVringKick(VringEvent(index: 0, carriesDescriptor: true)), [kick.fd.rawValue]),  // no size, no address
      (.setVringCall(VringEvent(index: 255, carriesDescriptor: true)), [kick.fd.rawValue]),
      (.setVringErr(VringEvent(index: 4, carriesDescriptor: false)), []),
      (.setFeatures(FeatureSet(bit: 60)), []),
      (.setProtocolFeatures(.xenMmap), []),
      (.setProtocolFeatures([.getVringBaseInflight, .replyAck]), []),
      (.remMemReg(SingleRegion(regionDescriptions(2)[1])), []),
      (.addMemReg(SingleRegion(regionDescriptions(1)[0])), [kick.fd.rawValue]),
      (.setConfig(ConfigMessage(offset: 63, bytes: [1, 2])), []),
      (.setBackEndRequestFD, [kick.fd.rawValue]),
      (.setInflightFD(InflightDescription(size: 4096, queueCount: 5, queueSize: 64)), [kick.fd.rawValue]),
      (.setInflightFD(InflightDescription(size: 4096, queueCount: 0, queueSize: 64)), [kick.fd.rawValue]),
      (.setInflightFD(InflightDescription(size: 4096, queueCount: 4, queueSize: 1025)), [kick.fd.rawValue]),
      (.gpuSetSocket, [kick.fd.rawValue]),
      (.setVringEndian(VringState(index: 0, number: 0)), []),
      (.vringKick(VringState(index: 0, number: 0)), []),
      (.closeCryptoSession(1), []),
      (.postcopyListen, []),
    ]
    for (message, descriptors) in refused {
      let code = try bench.acknowledge(message, descriptors: descriptors)
      #expect(code != nil && code != 0, "\(message)")
    }
    checkEqual(bench.device.log, ["features [32]", "memory 1"])
    // And it goes on.
    let code = try bench.acknowledge(.setVringNum(VringState(index: 0, number: 64)))
    #expect(code == 0)
  }

  @Test func withoutTheMarkAFailureClosesTheConnection() throws {
    var bench = try BackEndBench()
    try bench.negotiate()
    #expect(throws: VhostUserError.self) { try bench.send(.setVringNum(VringState(index: 4, number: 64))) }
  }

  @Test func theMarkMeansNothingBeforeReplyAckIsNegotiated() throws {
    var bench = try BackEndBench()
    let code = try bench.acknowledge(.setOwner)
    #expect(code == nil)
    #expect(throws: VhostUserError.self) { _ = try bench.acknowledge(.setVringNum(VringState(index: 4, number: 64))) }
  }

  @Test func theMessageThatNegotiatesAcknowledgementsIsItselfAcknowledged() throws {
    var bench = try BackEndBench()
    let code = try bench.acknowledge(.setProtocolFeatures([.replyAck]))
    #expect(code == 0)
  }

  @Test func aRequestWithAReplyOfItsOwnIsNotAcknowledgedBesides() throws {
    var bench = try BackEndBench()
    try bench.negotiate()
    let reply = try bench.send(.getQueueNum, needsReply: true)
    #expect(reply == Reply.number(4).payload)
    let more = try bench.frontEnd.receive(now: bench.now) == nil
    #expect(more)
  }

  @Test("A reply that has a form for failure takes it, marked or not, and the connection stays", arguments: [false, true])
  func failuresInReplies(isMarked: Bool) throws {
    var bench = try BackEndBench()
    try bench.negotiate()
    let error = UInt64(Errno.notSupported.rawValue)
    let object = try memoryObject("state")
    let failures: [(FrontEndMessage, [CInt], Reply)] = [
      (.getConfig(ConfigMessage(offset: 62, bytes: [0, 0, 0, 0])), [], .configRefused),
      (.getInflightFD(InflightDescription(queueCount: 9, queueSize: 64)), [], .inflight(InflightDescription(queueCount: 0, queueSize: 0))),
      (.postcopyAdvise, [], .empty), (.postcopyEnd, [], .number(error)), (.checkDeviceState, [], .number(error)),
      (.getSharedObject(SharedObjectName([UInt8](repeating: 1, count: 16))), [], .number(error)),
      (.setDeviceStateFD(DeviceStateTransfer(direction: .save)), [object.rawValue], .number(0x100 | error)),
      (.getShmemConfig, [], .sharedMemory(SharedMemoryConfiguration(sizes: []))),
      (.iotlb(IOTLBMessage(iova: 0, size: 4096, userAddress: 0, permission: 3, kind: .update)), [], .number(error)),
    ]
    for (message, descriptors, expected) in failures {
      let reply = try bench.send(message, needsReply: isMarked, descriptors: descriptors)
      #expect(reply == expected.payload, "\(message)")
      let more = try bench.frontEnd.receive(now: bench.now) == nil
      #expect(more, "\(message)")
    }
    #expect(openDescriptors(of: "state") == 1)
    checkEqual(bench.device.log, ["features [32]", "memory 1"])
  }

  @Test func numbersAreToldAlsoToThoseThatDidNotNegotiateThem() throws {
    var bench = try BackEndBench()
    let queues = try bench.send(.getQueueNum)
    let slots = try bench.send(.getMaxMemSlots)
    let status = try bench.send(.getStatus, needsReply: true)
    #expect([queues, slots, status] == [4, 12, 0].map { Reply.number($0).payload })
  }

  @Test func aRequestWithAReplyOfItsOwnThatFailsClosesEvenWithTheMark() throws {
    // An acknowledgement in place of the reply would be taken for one.
    var bench = try BackEndBench()
    try bench.negotiate()
    #expect(throws: VhostUserError.self) { try bench.send(.getVringBase(VringState(index: 9, number: 0)), needsReply: true) }
  }

  @Test func whatBreaksTheFramingClosesEvenWithTheMark() throws {
    for vector in try GoldenVector.load() where vector.kind == .frontRequest && vector.refusal != nil {
      guard let refusal = vector.refusal, ["version", "flags", "reply", "unknown", "size", "fds"].contains(refusal) else { continue }
      var bench = try BackEndBench()
      try bench.negotiate()
      let event = try EventFD()
      var bytes = vector.bytes
      if refusal == "fds" || refusal == "size" { bytes[4] |= 8 }
      let sent = bench.frontEnd.sendRaw(bytes, descriptors: Array(repeating: event.fd.rawValue, count: vector.descriptorCount))
      #expect(sent == .bytes(bytes.count))
      #expect(throws: VhostUserError.self, "\(vector.name)") { try bench.serve() }
    }
  }

  @Test func everyRequestWithAnyWrongNumberOfDescriptorsClosesAndLeaksNothing() throws {
    let good = try GoldenVector.load().filter { $0.kind == .frontRequest && $0.refusal == nil }
    for vector in good {
      let name = "count-\(vector.name)"
      let object = try memoryObject(name)
      for count in [0, 1, 2, 8, 9, 33, 253] where count != vector.descriptorCount {
        // This one is allowed either way.
        if vector.name.hasPrefix("rem-mem-reg"), count < 2 { continue }
        var bench = try BackEndBench()
        try bench.negotiate()
        _ = bench.frontEnd.sendRaw(vector.bytes, descriptors: Array(repeating: object.rawValue, count: count))
        #expect(throws: VhostUserError.self, "\(vector.name) with \(count)") { try bench.serve() }
      }
      #expect(openDescriptors(of: name) == 1, "\(vector.name)")
    }
  }

  // MARK: State

  @Test func geometryIsFrozenWhileARingRuns() throws {
    var bench = try BackEndBench()
    try bench.negotiate()
    let kick = try EventFD()
    try bench.startRing(0, kick: kick)
    var moved = ringAddress(0)
    moved.usedRing += 4
    let frozen: [FrontEndMessage] = [
      .setVringNum(VringState(index: 0, number: 128)),
      .setVringNum(VringState(index: 0, number: 64)),
      .setVringBase(VringState(index: 0, number: 0)),
      .setVringAddr(moved),
      .setFeatures([.version1, .eventIndex, .vhostUserProtocolFeatures]),
      .setProtocolFeatures([.replyAck]),
    ]
    for message in frozen {
      let code = try bench.acknowledge(message)
      #expect(code != 0, "\(message)")
    }
    // The log may change.
    let address = try bench.acknowledge(.setVringAddr(ringAddress(0, flags: 1, log: 0x2000)))
    let features = try bench.acknowledge(.setFeatures([.version1, .vhostLogAll, .vhostUserProtocolFeatures]))
    #expect(address == 0 && features == 0)
    checkEqual(bench.device.layouts[0]?.log, 0x2000)
    // Another ring is not touched by it.
    let other = try bench.acknowledge(.setVringNum(VringState(index: 1, number: 128)))
    #expect(other == 0)
    // And after the stop all may change.
    try bench.send(.getVringBase(VringState(index: 0, number: 0)))
    let after = try bench.acknowledge(.setVringNum(VringState(index: 0, number: 128)))
    #expect(after == 0)
  }

  @Test(arguments: [
    (0, 0x1000, 0x2000, true), (8, 0x1000, 0x2000, false), (0, 0x1001, 0x2000, false), (0, 0x1000, 0x2002, false),
    (0xfc00, 0x1000, 0x2000, true), (0xfc10, 0x1000, 0x2000, false), (0, 0xff7a, 0x2000, true), (0, 0xff7c, 0x2000, false),
    (0, 0x1000, 0xfdf8, true), (0, 0x1000, 0xfdfc, false), (0x10000, 0x1000, 0x2000, false), (-16, 0x1000, 0x2000, false),
  ])
  func everyAreaOfARingMustBeAlignedAndWholeInsideARegion(descriptors: Int, available: Int, used: Int, isGood: Bool) throws {
    var bench = try BackEndBench()
    try bench.negotiate()
    try bench.send(.setVringNum(VringState(index: 0, number: 64)))
    func address(_ offset: Int) -> UInt64 { UInt64(Int(frontEndBase) + offset) }
    let code = try bench.acknowledge(
      .setVringAddr(
        VringAddress(
          index: 0, descriptorTable: address(descriptors), availableRing: address(available), usedRing: address(used))))
    #expect((code == 0) == isGood)
  }

  @Test func aPackedRingHasItsOwnSizesAlignmentsAndBases() throws {
    var bench = try BackEndBench()
    try bench.negotiate([.version1, .packedRing, .vhostUserProtocolFeatures])
    let kick = try EventFD()
    let size = try bench.acknowledge(.setVringNum(VringState(index: 0, number: 63)))
    let base = try bench.acknowledge(.setVringBase(VringState(index: 0, number: 0x8000_8000)))
    var address = ringAddress(0)
    address.availableRing = frontEndBase + 0xfffc
    address.usedRing = frontEndBase + 0xfff8
    let place = try bench.acknowledge(.setVringAddr(address))
    address.availableRing = frontEndBase + 0xfffe
    let misplaced = try bench.acknowledge(.setVringAddr(address))
    #expect(size == 0 && base == 0 && place == 0 && misplaced != 0)
    let started = try bench.acknowledge(
      .setVringKick(VringEvent(index: 0, carriesDescriptor: true)), descriptors: [kick.fd.rawValue])
    #expect(started == 0)
    checkEqual(bench.device.layouts[0]?.isPacked, true)
    checkEqual(bench.device.bases[0], 0x8000_8000)
  }

  @Test func anAddressThatCameBeforeTheMemoryIsCheckedAtTheKick() throws {
    var bench = try BackEndBench()
    try bench.send(.setProtocolFeatures(BackEndOffer.implemented))
    try bench.send(.setFeatures([.version1, .vhostUserProtocolFeatures]))
    let kick = try EventFD()
    let address = try bench.acknowledge(.setVringAddr(ringAddress(0)))
    let size = try bench.acknowledge(.setVringNum(VringState(index: 0, number: 64)))
    let early = try bench.acknowledge(
      .setVringKick(VringEvent(index: 0, carriesDescriptor: true)), descriptors: [kick.fd.rawValue])
    #expect(address == 0 && size == 0 && early != 0)
    try bench.negotiate()
    let late = try bench.acknowledge(
      .setVringKick(VringEvent(index: 0, carriesDescriptor: true)), descriptors: [kick.fd.rawValue])
    #expect(late == 0)
  }

  @Test func aSplitRingDoesNotStartFromABaseBeyondItsIndex() throws {
    var bench = try BackEndBench()
    try bench.send(.setProtocolFeatures(BackEndOffer.implemented))
    // Whether the ring is packed is not known yet.
    let early = try bench.acknowledge(.setVringBase(VringState(index: 0, number: 0x8000_8000)))
    #expect(early == 0)
    try bench.negotiate()
    try bench.send(.setVringNum(VringState(index: 0, number: 64)))
    try bench.send(.setVringAddr(ringAddress(0)))
    let kick = try EventFD()
    let code = try bench.acknowledge(
      .setVringKick(VringEvent(index: 0, carriesDescriptor: true)), descriptors: [kick.fd.rawValue])
    #expect(code != nil && code != 0)
  }

  @Test func legacyRingsAreNotSpoken() throws {
    var bench = try BackEndBench()
    try bench.negotiate([.eventIndex, .vhostUserProtocolFeatures])
    let kick = try EventFD()
    #expect(throws: VhostUserError.self) { try bench.startRing(0, kick: kick) }
  }

  // MARK: Memory

  @Test func aTableOfNoRegionsTakesAllMemoryAwayUnlessARingRuns() throws {
    var bench = try BackEndBench()
    try bench.negotiate()
    let kick = try EventFD()
    try bench.startRing(0, kick: kick)
    let running = try bench.acknowledge(.setMemTable(RegionTable(regions: [])))
    #expect(running == UInt64(Errno.invalid.rawValue))
    checkEqual(bench.backEnd.session.regions.count, 1)
    try bench.send(.getVringBase(VringState(index: 0, number: 0)))
    let stopped = try bench.acknowledge(.setMemTable(RegionTable(regions: [])))
    #expect(stopped == 0)
    checkEqual(bench.backEnd.session.regions.count, 0)
    checkEqual(bench.device.log.last, "memory 0")
    // And no ring starts where no memory is.
    let code = try bench.acknowledge(
      .setVringKick(VringEvent(index: 0, carriesDescriptor: true)), descriptors: [kick.fd.rawValue])
    #expect(code == UInt64(Errno.invalid.rawValue))
  }

  @Test func aNewTableMovesRunningRingsAndMustHoldThem() throws {
    var bench = try BackEndBench()
    try bench.negotiate()
    let kick = try EventFD()
    try bench.startRing(0, kick: kick)
    let object = try memoryObject("bench")
    var elsewhere = regionDescriptions(1)
    elsewhere[0].guestAddress = 0x40_0000
    let moved = try bench.acknowledge(.setMemTable(RegionTable(regions: elsewhere)), descriptors: [object.rawValue])
    #expect(moved == 0)
    checkEqual(bench.device.layouts[0]?.descriptorTable, 0x40_0000)
    #expect(Array(bench.device.log.suffix(2)) == ["memory 1", "move 0"])
    // A table without the ring changes nothing.
    elsewhere[0].userAddress += 1 << 32
    let lost = try bench.acknowledge(.setMemTable(RegionTable(regions: elsewhere)), descriptors: [object.rawValue])
    #expect(lost != 0)
    checkEqual(bench.backEnd.session.regions[0].userAddress, frontEndBase)
    let removed = try bench.acknowledge(.remMemReg(SingleRegion(bench.backEnd.session.regions[0])))
    #expect(removed != 0)
    try bench.send(.getVringBase(VringState(index: 0, number: 0)))
    let afterStop = try bench.acknowledge(.remMemReg(SingleRegion(bench.backEnd.session.regions[0])))
    #expect(afterStop == 0)
    check(bench.backEnd.session.regions.isEmpty)
  }

  @Test func regionsAreAddedUpToTheSlotsAndRemovedWithOrWithoutADescriptor() throws {
    var bench = try BackEndBench()
    try bench.negotiate()
    let object = try memoryObject("bench")
    let all = regionDescriptions(13)
    for region in all[1..<12] {
      let code = try bench.acknowledge(.addMemReg(SingleRegion(region)), descriptors: [object.rawValue])
      #expect(code == 0)
    }
    let over = try bench.acknowledge(.addMemReg(SingleRegion(all[12])), descriptors: [object.rawValue])
    #expect(over != 0)
    var sameWithoutOffset = all[11]
    sameWithoutOffset.mapOffset = 0
    let bare = try bench.acknowledge(.remMemReg(SingleRegion(sameWithoutOffset)))
    let carrying = try bench.acknowledge(.remMemReg(SingleRegion(all[10])), descriptors: [object.rawValue])
    #expect(bare == 0 && carrying == 0)
    checkEqual(bench.backEnd.session.regions.count, 10)
  }

  @Test func aRefusalOfTheDeviceLeavesTheTableAsItWas() throws {
    var bench = try BackEndBench()
    try bench.negotiate()
    let object = try memoryObject("bench")
    bench.device.refusal = Refusal("it is not sealed", .notPermitted)
    let code = try bench.acknowledge(
      .setMemTable(RegionTable(regions: regionDescriptions(2))), descriptors: [object.rawValue, object.rawValue])
    #expect(code == 1)
    checkEqual(bench.backEnd.session.regions, regionDescriptions(1))
  }

  // MARK: Repetition

  @Test func repeatedMessagesDoNotCollectDescriptors() throws {
    var bench = try BackEndBench()
    try bench.negotiate()
    bench.device.inflightName = "repeated-inflight"
    let name = "repeated"
    let object = try memoryObject(name)
    let kick = try EventFD()
    for _ in 0..<20_000 {
      try bench.send(.setVringNum(VringState(index: 1, number: 64)))
      try bench.send(.setVringCall(VringEvent(index: 1, carriesDescriptor: true)), descriptors: [object.rawValue])
      try bench.send(.setVringErr(VringEvent(index: 1, carriesDescriptor: true)), descriptors: [object.rawValue])
      try bench.send(.setMemTable(RegionTable(regions: regionDescriptions(1))), descriptors: [object.rawValue])
      try bench.send(.getInflightFD(InflightDescription(queueCount: 1, queueSize: 64)))
    }
    // One each of call, err and memory, and ours.
    #expect(openDescriptors(of: name) == 4)
    #expect(openDescriptors(of: "repeated-inflight") == 0)
    try bench.startRing(1, kick: kick)
    for _ in 0..<20_000 {
      try bench.send(.setVringCall(VringEvent(index: 1, carriesDescriptor: true)), descriptors: [object.rawValue])
      try bench.send(.setVringKick(VringEvent(index: 1, carriesDescriptor: true)), descriptors: [object.rawValue])
    }
    #expect(openDescriptors(of: name) == 5)
    try bench.send(.getVringBase(VringState(index: 1, number: 0)))
    #expect(openDescriptors(of: name) == 3)
  }

  @Test func aFloodOfRequestsIsWorkedOffInPortions() throws {
    var bench = try BackEndBench()
    for _ in 0..<100 { try bench.frontEnd.send(FrontEndMessage.setOwner.header(), []) }
    try bench.frontEnd.send(FrontEndMessage.getFeatures.header(), [])
    try bench.serve()
    let early = try bench.frontEnd.receive(now: bench.now) == nil
    try bench.serve()
    let late = try bench.frontEnd.receive(now: bench.now) != nil
    #expect(early)
    #expect(late)
  }

  // MARK: Stopping and reset

  @Test func aRingThatDrainsIsAnsweredWhenItHasStopped() throws {
    var bench = try BackEndBench()
    try bench.negotiate()
    let kick = try EventFD()
    try bench.startRing(0, kick: kick)
    bench.device.drains = true
    let early = try bench.send(.getVringBase(VringState(index: 0, number: 0)))
    #expect(early == nil)
    check(bench.backEnd.isBusy)
    // A request behind it waits in the socket.
    let behind = try bench.send(.getFeatures)
    #expect(behind == nil)
    try bench.backEnd.finishStop(at: 0, base: 99)
    let reply = try #require(try bench.frontEnd.receive(now: bench.now)?.payload)
    #expect(reply == VringState(index: 0, number: 99).encoded)
    try bench.serve()
    let features = try bench.frontEnd.receive(now: bench.now)?.header.request
    #expect(features == 1)
    check(!bench.backEnd.session.isStarted(0))
  }

  @Test func askingARingThatNeverRanForItsBaseIsNoError() throws {
    var bench = try BackEndBench()
    try bench.negotiate()
    let untouched = try bench.send(.getVringBase(VringState(index: 3, number: 0)))
    #expect(untouched == VringState(index: 3, number: 0).encoded)
    let suspended = try bench.send(.getVringBase(VringState(index: 3, number: 1)))
    #expect(suspended == VringState(index: 3, number: 0).encoded)
    checkEqual(bench.device.log.count, 2)
  }

  @Test func resetForgetsRingsAndFeaturesAndKeepsTheRest() throws {
    var bench = try BackEndBench()
    try bench.negotiate()
    let kick = try EventFD()
    try bench.startRing(0, kick: kick)
    bench.device.resetTakesTime = true
    let early = try bench.acknowledge(.resetDevice)
    #expect(early == nil)
    try bench.backEnd.finishReset()
    let reply = try bench.frontEnd.receive(now: bench.now)?.payload
    #expect(reply == Reply.number(0).payload)
    checkEqual(bench.backEnd.session.features, [])
    checkEqual(bench.backEnd.session.regions.count, 1)
    checkEqual(bench.backEnd.session.protocolFeatures, BackEndOffer.implemented)
    check(bench.backEnd.session.isSuspended)
    // And from the beginning.
    try bench.negotiate()
    try bench.startRing(0, kick: kick)
    checkEqual(bench.device.log.last, "start 0 size 64 base 7")
  }

  @Test func aResetForgetsACallThatWasNeverHandedOver() throws {
    var bench = try BackEndBench()
    try bench.negotiate()
    let name = "reset-call"
    let object = try memoryObject(name)
    try bench.send(.setVringCall(VringEvent(index: 0, carriesDescriptor: true)), descriptors: [object.rawValue])
    #expect(openDescriptors(of: name) == 2)
    try bench.send(.resetDevice)
    #expect(openDescriptors(of: name) == 1)
  }

  @Test func resetOwnerOnlyDisables() throws {
    var bench = try BackEndBench()
    try bench.negotiate()
    let kick = try EventFD()
    try bench.startRing(0, kick: kick)
    try bench.send(.setVringEnable(VringState(index: 0, number: 1)))
    try bench.send(.resetOwner)
    checkEqual(bench.device.log.last, "disable 0")
    check(bench.backEnd.session.isStarted(0))
    check(bench.backEnd.session.features.contains(.version1))
  }

  @Test func statusIsKeptAndZeroResets() throws {
    var bench = try BackEndBench()
    try bench.negotiate()
    try bench.send(.setStatus(15))
    let status = try bench.send(.getStatus)
    #expect(status == Reply.number(15).payload)
    let reset = try bench.acknowledge(.setStatus(0))
    #expect(reset == 0)
    let after = try bench.send(.getStatus)
    #expect(after == Reply.number(0).payload)
    #expect(Array(bench.device.log.suffix(2)) == ["status 15", "reset"])
  }

  // MARK: The rest

  @Test func configurationIsReadAndWrittenWithinBounds() throws {
    var bench = try BackEndBench()
    try bench.negotiate()
    let zeros = [UInt8](repeating: 0, count: 4)
    let read = try bench.send(.getConfig(ConfigMessage(offset: 8, flags: 1, bytes: zeros)))
    #expect(read == ConfigMessage(offset: 8, flags: 1, bytes: [8, 9, 10, 11]).encoded)
    let beyond = try bench.send(.getConfig(ConfigMessage(offset: 62, bytes: zeros)))
    #expect(beyond == [])
    // Nothing asked for, nothing told; and nothing to write is refused.
    let nothing = try bench.send(.getConfig(ConfigMessage(offset: 8, bytes: [])))
    #expect(nothing == ConfigMessage(offset: 8, bytes: []).encoded)
    let unwritten = try bench.acknowledge(.setConfig(ConfigMessage(offset: 8, bytes: [])))
    #expect(unwritten == UInt64(Errno.invalid.rawValue))
    try bench.send(.setConfig(ConfigMessage(offset: 32, bytes: [1])))
    try bench.send(.setConfig(ConfigMessage(offset: 33, flags: 1, bytes: [2])))
    try bench.send(.setConfig(ConfigMessage(offset: 34, flags: 2, bytes: [3])))
    #expect(Array(bench.device.log.suffix(3)) == ["write 32 [1]", "write 33 [2]", "write 34 [3] migrating"])
  }

  @Test func theDirtyLogIsEchoed() throws {
    var bench = try BackEndBench()
    try bench.negotiate()
    let object = try memoryObject("log")
    let reply = try bench.send(.setLogBase(LogDescription(size: 4096, mapOffset: 0)), descriptors: [object.rawValue])
    #expect(reply == LogDescription(size: 4096, mapOffset: 0).encoded)
    try bench.send(.setLogFD, descriptors: [object.rawValue])
    try bench.send(.netSetMTU(1400))
    try bench.send(.sendRARP(0x5634_1200_5452))
    #expect(Array(bench.device.log.suffix(4)) == ["log 4096", "log signal", "mtu 1400", "rarp [82, 84, 0, 18, 52, 86]"])
  }

  @Test func gatedRequestsNeedTheirFeature() throws {
    let gated: [FrontEndMessage] = [
      .remMemReg(SingleRegion(regionDescriptions(1)[0])), .resetDevice, .netSetMTU(1500), .setStatus(1),
      .setVringEnable(VringState(index: 0, number: 1)),
    ]
    for message in gated {
      var bench = try BackEndBench()
      #expect(throws: VhostUserError.notNegotiated(request: message.request.name)) { try bench.send(message) }
    }
  }

  @Test func ringsMayBeSwitchedOffAndStoppedBeforeAnythingIsNegotiated() throws {
    var bench = try BackEndBench()
    for index: UInt32 in 0...1 { try bench.send(.setVringEnable(VringState(index: index, number: 0))) }
    // What stands beside the index means nothing yet.
    let base = try bench.send(.getVringBase(VringState(index: 0, number: 0x55B3)))
    #expect(base == VringState(index: 0, number: 0).encoded)
    check(bench.device.log.isEmpty)
    try bench.negotiate()
    let kick = try EventFD()
    try bench.startRing(0, kick: kick)
    check(bench.backEnd.session.isStarted(0))
  }

  @Test func theFrontEndIsToldOfAChangedConfigurationWhenARingRuns() throws {
    var bench = try BackEndBench()
    try bench.negotiate()
    check(!bench.backEnd.notifyConfigurationChange())
    let pair = try UnixSocket.pair(.stream)
    var channel = Connection(pair.first, expecting: .backEndRequests, descriptorLimit: 0)
    try bench.send(.setBackEndRequestFD, descriptors: [pair.second.rawValue])
    check(bench.backEnd.notifyConfigurationChange())
    let early = try channel.receive(now: bench.now) == nil
    #expect(early)
    let kick = try EventFD()
    try bench.startRing(0, kick: kick)
    let due = try channel.receive(now: bench.now)?.header.request
    #expect(due == BackEndRequest.configChange.rawValue)
    let once = try channel.receive(now: bench.now) == nil
    #expect(once)
    check(bench.backEnd.notifyConfigurationChange())
    let direct = try channel.receive(now: bench.now)?.header.request
    #expect(direct == BackEndRequest.configChange.rawValue)
  }
}
