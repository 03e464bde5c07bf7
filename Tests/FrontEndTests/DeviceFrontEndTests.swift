import FrontEnd
import HostSystem
import TestSupport
import Testing
import VhostUser
import VirtioSpec
import VirtioTransport

/// The machine's side: registers, doorbells and vectors, and what was done with them.
final class FakeHost: DeviceHost {
  var function: VirtioPCIFunction
  let kicks: [SharedDescriptor]
  let vectors: [SharedDescriptor]
  /// What updates of the device caused.
  var effects: [TransportEffect] = []

  init(_ offer: Offer, queues: Int) throws {
    function = try VirtioPCIFunction(
      .init(
        device: .block, offeredFeatures: offer.features.union(FeatureSet(bit: 10)), queueSizes: Array(repeating: 256, count: queues),
        configuration: offer.configuration ?? [], writableConfiguration: [32..<33, 40..<44]))
    kicks = try (0..<queues).map { _ in SharedDescriptor(try EventFD().fd.duplicate()) }
    vectors = try (0...queues).map { _ in SharedDescriptor(try EventFD().fd.duplicate()) }
  }

  func kick(ofQueue queue: Int) -> SharedDescriptor? { kicks.indices.contains(queue) ? kicks[queue] : nil }
  func call(ofVector vector: Int) -> SharedDescriptor? { vectors.indices.contains(vector) ? vectors[vector] : nil }
  var usedIndices: [UInt64: UInt16] = [:]
  var words: [UInt64: UInt16] = [:]
  func word(at address: UInt64) -> UInt16? { words[address] }
  /// A used ring that nobody said anything about stands where the back end stops rings.
  var usedIndex: UInt16 = 5
  func usedIndex(ofUsedRing address: UInt64) -> UInt16? { usedIndices[address] ?? usedIndex }
  func update(_ change: (inout VirtioPCIFunction) -> [TransportEffect]) { effects += change(&function) }

  var status: UInt8 { function.state.status.rawValue }
}

/// A guest's driver, the device's front end, a back end and the sockets between, by turns on this thread.
final class Bench {
  let device: DeviceFrontEnd
  let host: FakeHost
  var back: BackEndConnection?
  var backDevice = RecordingDevice()
  var now = MonotonicTime(nanoseconds: 1_000_000_000)
  var events: [DeviceFrontEnd.Event] = []

  static let features: FeatureSet = [.version1, .eventIndex, .indirectDescriptors]

  init(queues: Int = 2, wanted: ProtocolFeatures = [.mq, .replyAck, .config, .resetDevice]) throws {
    let pair = try UnixSocket.pair(.stream)
    var configuration = FrontEndConfiguration(
      allowedFeatures: [Self.features, .ringReset, .accessPlatform, .packedRing, .blockReadOnly, FeatureSet(bit: 3)])
    configuration.wantedProtocolFeatures = wanted
    configuration.configurationByteCount = 60
    configuration.hearsConfigurationChanges = true
    let file = SharedDescriptor(try SharedMemory.sealed(name: "guest", byteCount: 1 << 20))
    let memory = SharedGuestMemory(
      regions: [(guestAddress: 0, byteCount: 0x8_0000, fileOffset: 0), (guestAddress: 1 << 32, byteCount: 0x8_0000, fileOffset: 0x8_0000)],
      file: file)
    let device = try DeviceFrontEnd(name: "disk0", .block, pair.first, configuration, memory)
    var back = BackEndConnection(
      pair.second,
      offer: BackEndOffer(
        features: [Self.features, .packedRing], protocolFeatures: BackEndOffer.implemented, queueCount: queues, maximumQueueSize: 256))
    var backDevice = RecordingDevice()
    device.start(now: now)
    for _ in 0..<50 {
      try back.receive(now: now, &backDevice)
      device.receive(now: now)
    }
    guard case .ready(let offer) = device.nextEvent() else { throw NotReady() }
    host = try FakeHost(offer, queues: queues)
    device.attach(host)
    self.device = device
    self.back = consume back
    self.backDevice = backDevice
  }

  /// Lets everybody work until nothing happens.
  func settle() throws {
    for _ in 0..<100 {
      try serveOnce()
      device.receive(now: now)
    }
    while let event = device.nextEvent() { events.append(event) }
  }

  func serveOnce() throws {
    guard var living = back.take() else { return }
    try living.receive(now: now, &backDevice)
    back = consume living
  }

  struct NotReady: Error {}

  func killBackEnd() { back = nil }

  /// Another back end, whose first contact begins.
  func revive() throws {
    let pair = try UnixSocket.pair(.stream)
    back = BackEndConnection(
      pair.second,
      offer: BackEndOffer(
        features: [Self.features, .packedRing], protocolFeatures: BackEndOffer.implemented, queueCount: 2, maximumQueueSize: 256))
    backDevice = RecordingDevice()
    guard try device.reattach(pair.first, now: now) else { throw NotReady() }
  }

  /// Which memory object the back end records in.
  func area() throws -> UInt64? { try backDevice.inflight?.fd.status().inode }
  /// Waits longer than any deadline but that of draining.
  func expire() { pass(.seconds(2)) }

  func pass(_ time: Duration) {
    now = now.advanced(by: time)
    device.handleTimeout(now: now)
  }

  /// The back end's queue has come to rest.
  func finishStop(_ index: Int) throws {
    guard var living = back.take() else { return }
    try living.finishStop(at: index, base: 5)
    back = consume living
    try settle()
  }

  func write(_ offset: Int, _ width: Int, _ value: UInt64) {
    for effect in host.function.writeBAR(offset: UInt64(offset), width: width, value: value) { device.handle(effect, now: now) }
  }

  /// What a driver does from reset to DRIVER_OK.
  func startDriver(
    _ features: FeatureSet = Bench.features, queues: [Int] = [0, 1], descriptors: (Int) -> UInt64 = { UInt64($0) * 0x4000 + (1 << 32) }
  ) {
    write(VirtioPCI.Common.deviceStatus, 1, 0)
    write(VirtioPCI.Common.deviceStatus, 1, 3)
    for half in 0..<2 {
      write(VirtioPCI.Common.driverFeatureSelect, 4, UInt64(half))
      write(VirtioPCI.Common.driverFeature, 4, features.rawValue >> (32 * UInt64(half)) & 0xFFFF_FFFF)
    }
    write(VirtioPCI.Common.deviceStatus, 1, 11)
    for queue in queues {
      write(VirtioPCI.Common.queueSelect, 2, UInt64(queue))
      write(VirtioPCI.Common.queueSize, 2, 64)
      write(VirtioPCI.Common.queueVector, 2, UInt64(queue + 1))
      write(VirtioPCI.Common.queueDescriptors, 8, descriptors(queue))
      write(VirtioPCI.Common.queueDriver, 8, UInt64(queue) * 0x4000 + 0x1000)
      write(VirtioPCI.Common.queueDevice, 8, UInt64(queue) * 0x4000 + 0x2000)
      write(VirtioPCI.Common.queueEnable, 2, 1)
    }
    write(VirtioPCI.Common.deviceStatus, 1, 15)
  }
}

@Suite struct DeviceFrontEndTests {
  @Test func aDriverGetsItsQueuesServedAndItsResetDone() throws {
    let bench = try Bench()
    #expect(bench.device.state == .idle)
    #expect(bench.device.offer?.features == [Bench.features, .packedRing])
    bench.startDriver()
    #expect(bench.device.state == .activating)
    try bench.settle()
    #expect(bench.device.state == .running)
    #expect(bench.device.activeQueues == [0, 1])
    checkEqual(
      bench.backDevice.log,
      ["features [28, 29, 32]", "memory 2", "start 0 size 64 base 0 enabled", "start 1 size 64 base 0 enabled"])
    // The back end found the rings where the guest has them.
    let layout = bench.backDevice.layouts[1]
    #expect(layout?.descriptorTable == 0x1_0000_4000 && layout?.availableRing == 0x5000 && layout?.usedRing == 0x6000)

    bench.backDevice.log = []
    bench.write(VirtioPCI.Common.deviceStatus, 1, 0)
    #expect(bench.host.status == 15)
    try bench.settle()
    #expect(bench.host.status == 0)
    #expect(bench.device.state == .idle && bench.device.activeQueues == [])
    checkEqual(bench.backDevice.log, ["stop 0", "stop 1", "reset"])

    bench.backDevice.log = []
    bench.startDriver(queues: [0])
    try bench.settle()
    checkEqual(bench.backDevice.log, ["features [28, 29, 32]", "memory 2", "start 0 size 64 base 0 enabled"])
    #expect(bench.events == [])
  }

  /// The driver has reset its device, whose back end has answered all but one of what it had taken.
  private func resetWithARequestInFlight() throws -> Bench {
    let bench = try Bench()
    bench.startDriver()
    try bench.settle()
    bench.host.usedIndices = [0x6000: 4]
    bench.write(VirtioPCI.Common.deviceStatus, 1, 0)
    try bench.settle()
    return bench
  }

  @Test func aResetIsOverWhenWhatWasTakenIsAnswered() throws {
    let bench = try resetWithARequestInFlight()
    checkEqual(bench.backDevice.log.suffix(3), ["stop 0", "stop 1", "reset"])
    #expect(bench.host.status != 0 && bench.device.state == .resetting)
    // Asked for again, and paused: nothing of that makes it over sooner.
    bench.write(VirtioPCI.Common.deviceStatus, 1, 0)
    bench.device.pause(now: bench.now)
    bench.pass(.seconds(1))
    try bench.settle()
    #expect(bench.host.status != 0 && bench.device.state == .pausing)
    bench.host.usedIndices = [:]
    bench.pass(.milliseconds(1))
    try bench.settle()
    #expect(bench.host.status == 0 && bench.device.state == .paused)
    bench.device.resume(now: bench.now)
    try bench.settle()
    #expect(bench.device.state == .idle && bench.device.deadline == nil)
  }

  @Test func whoNeverAnswersWhatItTookIsLost() throws {
    let bench = try resetWithARequestInFlight()
    bench.pass(.seconds(31))
    try bench.settle()
    check(bench.events.contains(.lost(.unfinished(rings: 1))))
    #expect(bench.host.status == 0 && bench.device.state == .lost)
  }

  @Test func aResetDuringActivationIsDoneInOrder() throws {
    let bench = try Bench()
    bench.startDriver()
    bench.write(VirtioPCI.Common.deviceStatus, 1, 0)
    #expect(bench.host.status == 15)
    try bench.settle()
    #expect(bench.host.status == 0)
    checkEqual(Array(bench.backDevice.log.suffix(3)), ["stop 0", "stop 1", "reset"])
    #expect(bench.device.state == .idle)
  }

  @Test func addressesNamedToTheBackEndAreNotThoseOfTheCore() throws {
    let bench = try Bench()
    bench.startDriver()
    try bench.settle()
    let back = try unwrap(bench.back.take())
    let regions = back.session.regions
    #expect(regions.map(\.guestAddress) == [0, 0x1_0000_0000])
    #expect(regions.map(\.userAddress) == [0x4000_0000_0000, 0x4001_0000_0000])
    #expect(regions.map(\.mapOffset) == [0, 0x8_0000])
  }

  @Test(arguments: [0x7_FC10, 0x8_0000, 1 << 31, UInt64.max - 0xF, (1 << 32) + 0x8_0000 - 0x3F0] as [UInt64])
  func ringsOutsideMemoryAreNeverNamedToTheBackEnd(address: UInt64) throws {
    let bench = try Bench()
    bench.startDriver(queues: [0], descriptors: { _ in address })
    try bench.settle()
    #expect(bench.device.state == .broken)
    #expect(bench.host.status & DeviceStatus.needsReset.rawValue != 0)
    checkEqual(bench.backDevice.log, [])
    // The driver may try again.
    bench.startDriver(queues: [0])
    try bench.settle()
    #expect(bench.device.state == .running)
    #expect(bench.host.status == 15)
  }

  @Test func featuresThatCannotBeCarriedAreNotOffered() throws {
    let bench = try Bench()
    let offered = bench.host.function.state.offered
    #expect(!offered.contains(.ringReset) && !offered.contains(.accessPlatform))
    #expect(offered.isDisjoint(with: .vhostOnlyMask))
  }

  @Test func aFeatureOfTheCoresOwnIsBetweenGuestAndCore() throws {
    let bench = try Bench()
    bench.startDriver(Bench.features.union(FeatureSet(bit: 10)), queues: [0])
    try bench.settle()
    #expect(bench.host.status == 15)
    #expect(bench.device.driverFeatures.contains(FeatureSet(bit: 10)))
    checkEqual(bench.backDevice.log.first, "features [28, 29, 32]")
    #expect(bench.device.state == .running)
  }

  // MARK: Configuration

  @Test func theGuestReadsACopyThatFollowsTheBackEnd() throws {
    let bench = try Bench()
    #expect(bench.host.function.readBAR(offset: UInt64(VirtioPCILayout.device + 8), width: 4) == 0x0b0a_0908)
    bench.startDriver()
    try bench.settle()
    bench.backDevice.configurationSpace[8] = 0xEE
    bench.back?.notifyConfigurationChange()
    let generation = bench.host.function.configuration.generation
    try bench.settle()
    #expect(bench.host.function.readBAR(offset: UInt64(VirtioPCILayout.device + 8), width: 4) == 0x0b0a_09ee)
    #expect(bench.host.function.configuration.generation == generation &+ 1)
  }

  @Test func writesReachTheBackEndAndRefusedOnesLeaveTheGuestsView() throws {
    let bench = try Bench()
    bench.startDriver()
    try bench.settle()
    bench.write(VirtioPCILayout.device + 32, 1, 7)
    try bench.settle()
    checkEqual(bench.backDevice.log.last, "write 32 [7]")
    bench.backDevice.refusal = Refusal("that field is read-only")
    bench.write(VirtioPCILayout.device + 32, 1, 9)
    #expect(bench.host.function.readBAR(offset: UInt64(VirtioPCILayout.device + 32), width: 1) == 9)
    try bench.settle()
    #expect(bench.host.function.readBAR(offset: UInt64(VirtioPCILayout.device + 32), width: 1) == 7)
    #expect(bench.device.state == .running)
  }

  @Test func aWriteThatCrossesAReadIsNotUndoneByIt() throws {
    let bench = try Bench()
    bench.startDriver()
    try bench.settle()
    bench.back?.notifyConfigurationChange()
    bench.device.receive(now: bench.now)  // the read is on its way
    bench.write(VirtioPCILayout.device + 32, 1, 9)
    for _ in 0..<20 {
      try bench.serveOnce()
      bench.device.receive(now: bench.now)
      #expect(bench.host.function.readBAR(offset: UInt64(VirtioPCILayout.device + 32), width: 1) == 9)
    }
    checkEqual(bench.backDevice.log.last, "write 32 [9]")
  }

  @Test func aFloodOfWritesIsToldInFewRequests() throws {
    let bench = try Bench()
    bench.startDriver()
    try bench.settle()
    bench.backDevice.log = []
    for round in 0..<10_000 { bench.write(VirtioPCILayout.device + 40, 4, UInt64(round)) }
    try bench.settle()
    // The first, and all the others in one.
    checkEqual(bench.backDevice.log, ["write 40 [0, 0, 0, 0]", "write 40 [15, 39, 0, 0]"])
    #expect(bench.host.function.readBAR(offset: UInt64(VirtioPCILayout.device + 40), width: 4) == 9999)
  }

  @Test func aBackEndThatRefusesReadsIsNotAskedForEver() throws {
    let bench = try Bench()
    bench.startDriver()
    try bench.settle()
    bench.backDevice.configurationSpace = []
    bench.back?.notifyConfigurationChange()
    try bench.settle()
    #expect(bench.device.deadline == nil)
    #expect(bench.device.state == .running)
  }

  // MARK: Vectors

  @Test func aQueuesVectorChangesWhileItRuns() throws {
    let bench = try Bench()
    bench.startDriver()
    try bench.settle()
    bench.backDevice.log = []
    bench.write(VirtioPCI.Common.queueSelect, 2, 1)
    for _ in 0..<1000 {
      bench.write(VirtioPCI.Common.queueVector, 2, 0xFFFF)
      bench.write(VirtioPCI.Common.queueVector, 2, 1)
    }
    bench.write(VirtioPCI.Common.queueVector, 2, 0xFFFF)
    try bench.settle()
    #expect(bench.backDevice.log.count <= 2)
    checkEqual(bench.backDevice.log.last, "call 1 none")
  }

  // MARK: Pause

  @Test func aPauseStopsTheRingsAndResumingGoesOnWhereTheyWere() throws {
    let bench = try Bench()
    bench.startDriver()
    try bench.settle()
    bench.backDevice.log = []
    bench.device.pause(now: bench.now)
    try bench.settle()
    #expect(bench.events == [.paused] && bench.device.state == .paused)
    // What the guest had done just before waits.
    bench.write(VirtioPCILayout.device + 32, 1, 5)
    try bench.settle()
    checkEqual(bench.backDevice.log, ["stop 0", "stop 1"])
    bench.device.resume(now: bench.now)
    try bench.settle()
    #expect(bench.events == [.paused, .resumed] && bench.device.state == .running)
    checkEqual(
      bench.backDevice.log,
      ["stop 0", "stop 1", "start 0 size 64 base 5 enabled", "start 1 size 64 base 5 enabled", "write 32 [5]"])
  }

  /// The back end answers 5 for both rings. The first has got on to 8 by itself; the second is in the middle of something.
  @Test func whatWasAnsweredIsNotTakenAgainAfterAPause() throws {
    let bench = try Bench()
    bench.startDriver()
    try bench.settle()
    bench.device.pause(now: bench.now)
    try bench.settle()
    #expect(bench.events == [.paused])
    bench.host.usedIndices = [0x2000: 8, 0x6000: 3]
    bench.backDevice.log = []
    bench.device.resume(now: bench.now)
    try bench.settle()
    checkEqual(bench.backDevice.log, ["start 0 size 64 base 8 enabled", "start 1 size 64 base 5 enabled"])
  }

  @Test func aPauseIsReachedInEveryState() throws {
    for prepare in [
      { (_: Bench) in }, { $0.startDriver() },
      { bench in
        bench.startDriver()
        bench.write(VirtioPCI.Common.deviceStatus, 1, 0)
      },
      { $0.startDriver(queues: [0], descriptors: { _ in 1 << 40 }) }, { $0.killBackEnd() },
    ] {
      let bench = try Bench()
      prepare(bench)
      bench.device.pause(now: bench.now)
      try bench.settle()
      check(bench.events.contains(.paused))
      bench.device.resume(now: bench.now)
      try bench.settle()
      check(bench.events.last == .resumed)
    }
  }

  // MARK: Death

  @Test func aDeadBackEndLeavesADeviceThatNeedsResetAndALivingGuest() throws {
    let bench = try Bench()
    bench.startDriver()
    try bench.settle()
    bench.killBackEnd()
    try bench.settle()
    #expect(bench.events == [.lost(.closed(midMessage: false))])
    #expect(bench.host.status == 15 | DeviceStatus.needsReset.rawValue)
    // A reset by the driver ends at once, and the next start needs one again.
    bench.write(VirtioPCI.Common.deviceStatus, 1, 0)
    #expect(bench.host.status == 0)
    bench.startDriver()
    #expect(bench.host.status == 15 | DeviceStatus.needsReset.rawValue)
    try bench.settle()
    #expect(bench.events.count == 1)
  }

  @Test func aDeathDuringAResetEndsTheReset() throws {
    let bench = try Bench()
    bench.startDriver()
    try bench.settle()
    bench.write(VirtioPCI.Common.deviceStatus, 1, 0)
    bench.killBackEnd()
    try bench.settle()
    #expect(bench.host.status == 0)
    #expect(bench.device.state == .lost)
  }

  enum ResetMoment: CaseIterable { case never, beforeDeath, whileAlone, duringFirstContact, duringActivation }

  @Test(arguments: ResetMoment.allCases)
  func whatWasInFlightIsPassedOnUnlessTheDriverHasReset(_ moment: ResetMoment) throws {
    let bench = try Bench(wanted: [.mq, .replyAck, .config, .resetDevice, .inflightShmFD])
    bench.device.awaitsSuccessor = true
    bench.startDriver()
    try bench.settle()
    let first = try #require(try bench.area())
    func reset() { bench.write(VirtioPCI.Common.deviceStatus, 1, 0) }
    if moment == .beforeDeath { reset() }
    bench.killBackEnd()
    try bench.settle()
    #expect(bench.device.state == .detached)
    if moment == .whileAlone { reset() }
    try bench.revive()
    if moment == .duringFirstContact { reset() }
    if moment == .duringActivation {
      for _ in 0..<100 where bench.device.state != .activating {
        try bench.serveOnce()
        bench.device.receive(now: bench.now)
      }
      try #require(bench.device.state == .activating)
      reset()
    }
    try bench.settle()
    // Whoever brought the successor hears that it serves, also when there is nothing left to go on with.
    #expect(bench.events.filter { $0 == .restored }.count == 1)
    if moment != .never {
      #expect(bench.host.status == 0)
      bench.startDriver()
      try bench.settle()
    }
    #expect(bench.device.state == .running)
    let second = try #require(try bench.area())
    #expect((first == second) == (moment == .never))
  }

  /// Two rings of which the back end has answered 5 of 8 and 5 of 5: the three are named, unless they are recorded.
  @Test(arguments: [false, true]) func whatWasInFlightWithoutARecordIsCounted(_ isRecorded: Bool) throws {
    let bench = try Bench(wanted: isRecorded ? [.mq, .replyAck, .config, .inflightShmFD] : [.mq, .replyAck, .config])
    bench.device.awaitsSuccessor = true
    bench.startDriver()
    try bench.settle()
    for queue in [0, 1] as [UInt64] {
      bench.host.words[queue * 0x4000 + 0x1002] = queue == 0 ? 8 : 5
      bench.host.words[queue * 0x4000 + 0x2002] = 5
    }
    bench.killBackEnd()
    try bench.settle()
    try bench.revive()
    try bench.settle()
    #expect(bench.device.state == .running)
    #expect(bench.device.unrecorded == (isRecorded ? 0 : 3))
  }

  @Test func aBackEndThatHangsWhenItsRingsAreTakenBackIsLostAndTheResetIsOver() throws {
    let bench = try Bench()
    bench.device.awaitsSuccessor = true
    bench.startDriver()
    try bench.settle()
    bench.write(VirtioPCI.Common.deviceStatus, 1, 0)
    let deadline = try #require(bench.device.deadline)
    bench.device.handleTimeout(now: deadline)
    #expect(bench.device.nextEvent() == .detached(.noReply(to: "GET_VRING_BASE", milliseconds: 30_000)))
    #expect(bench.host.status == 0)
    // The next one finds a device without a driver.
    bench.device.closeLost()
    try bench.revive()
    try bench.settle()
    #expect(bench.device.state == .idle)
    bench.startDriver()
    try bench.settle()
    #expect(bench.device.state == .running)
  }

  @Test func ringsThatStandStillAreSeenFromTheirIndices() throws {
    let bench = try Bench()
    let look = { bench.device.look(now: bench.now) }
    #expect(!look())
    bench.startDriver()
    try bench.settle()
    let (available, used) = (0x1000 + 2 as UInt64, 0x2000 + 2 as UInt64)
    bench.host.words = [available: 65535, used: 65535]
    #expect(!look() && bench.device.wait(ofQueue: 0) == nil)
    bench.host.words[available] = 4
    #expect(look())
    let since = bench.now
    bench.now = bench.now.advanced(by: .seconds(3))
    bench.host.words[available] = 6
    #expect(look())
    #expect(bench.device.wait(ofQueue: 0) == QueueWait(since: since, count: 7))
    // One answer, and the time begins anew; with the last one nothing waits.
    bench.host.words[used] = 0
    #expect(look())
    #expect(bench.device.wait(ofQueue: 0) == QueueWait(since: bench.now, count: 6))
    bench.host.words[used] = 6
    #expect(!look() && bench.device.wait(ofQueue: 0) == nil)
    // A dead back end's requests wait as well.
    bench.host.words[available] = 7
    bench.device.awaitsSuccessor = true
    bench.killBackEnd()
    try bench.settle()
    #expect(look() && bench.device.wait(ofQueue: 0)?.count == 1)
    bench.write(VirtioPCI.Common.deviceStatus, 1, 0)
    #expect(!look())
  }

  @Test func aPackedRingThatStandsStillIsSeenWhereItsDriverWaits() throws {
    let bench = try Bench()
    bench.startDriver([Bench.features, .packedRing])
    try bench.settle()
    let look = { bench.device.look(now: bench.now) }
    let (event, flags) = (0x1000 as UInt64, (1 << 32) + 3 * 16 + 14 as UInt64)
    // Waits for entry 3 in the round with wrap counter 1; the entry is available.
    bench.host.words = [event: 0x8003, event + 2: 2, flags: 1 << 7]
    #expect(look() && bench.device.wait(ofQueue: 0) == QueueWait(since: bench.now, count: nil))
    bench.host.words[flags] = 1 << 7 | 1 << 15
    #expect(!look())
    // Available in the round before: nothing of this one waits. An offset that does not count, or beyond the ring.
    bench.host.words[flags] = 1 << 15
    #expect(!look())
    bench.host.words[flags] = 1 << 7
    bench.host.words[event + 2] = 0
    #expect(!look())
    bench.host.words[event + 2] = 2
    bench.host.words[event] = 0xFFFF
    #expect(!look())
  }

  @Test func theConversationIsKeptWholeAndBounded() throws {
    let bench = try Bench()
    for _ in 0..<20 {
      bench.startDriver()
      try bench.settle()
      bench.write(VirtioPCI.Common.deviceStatus, 1, 0)
      try bench.settle()
    }
    let lines = bench.device.conversation.split(separator: "\n")
    #expect(lines.prefix(2) == ["martlet-recording 2", "connection"])
    #expect(lines.count <= FlightRecorder.messageLimit + 2 && bench.device.conversation.utf8.count <= FlightRecorder.textLimit)
    // SET_MEM_TABLE names both pieces of memory.
    #expect(lines.contains { $0.contains(" f 05000000") && $0.hasSuffix(" memory:524288,memory:1048576") })
    bench.killBackEnd()
    try bench.settle()
    bench.device.closeLost()
    #expect(bench.device.conversation.isEmpty)
  }

  @Test func aSilentBackEndIsGivenUpAndTheGuestTold() throws {
    let bench = try Bench()
    bench.startDriver()
    let deadline = try #require(bench.device.deadline)
    #expect(deadline == bench.now.advanced(by: .seconds(1)))
    bench.device.handleTimeout(now: deadline)
    #expect(bench.device.nextEvent() == .lost(.noReply(to: "SET_FEATURES", milliseconds: 1000)))
    #expect(bench.host.status & DeviceStatus.needsReset.rawValue != 0)
    #expect(bench.device.deadline == nil)
  }
}
