import Glibc
import HostSystem
import NetDevice
import TestSupport
import Testing
import VhostUser
import VirtioQueue
import VirtioSpec

@Suite(.serialized) struct TransmitTests {
  @Test(arguments: [false, true]) func framesOfEverySizeArriveUnchanged(packed: Bool) throws {
    let rig = try NetRig(wanting: { packed ? $0 : $0.subtracting(.packedRing) })
    checkEqual(rig.front.features.contains(.packedRing), packed)
    for size in Array(14...130) + [1513, 1514, 1515, 4096, 9000, 65_549] {
      let frame = Frames.plain(size, seed: UInt8(truncatingIfNeeded: size))
      try rig.send(frame)
      let arrived = try unwrap(try rig.peerTake())
      check(arrived.frame == frame, "\(size) bytes")
      checkEqual(arrived.header, NetHeader())
    }
  }

  @Test func headerAndFrameMayBeSplitAnywhere() throws {
    let rig = try NetRig()
    let frame = Frames.plain(200)
    for indirect in [false, true] {
      for first in 1...30 {
        for second in [1, 5, 12, 100] {
          try rig.send(frame, pieces: [first, second], indirect: indirect)
          check(try rig.peerTake()?.frame == frame, "\(first), \(second), indirect \(indirect)")
        }
      }
      try rig.send(frame, pieces: [Int](repeating: 2, count: 100), indirect: indirect)
      check(try rig.peerTake()?.frame == frame)
    }
  }

  @Test func segmentationArrivesWithTheCheckedHeader() throws {
    let rig = try NetRig()
    var header = NetHeader()
    header.flags = 0xFF
    header.gsoType = NetHeader.gsoTCPv4
    header.headerLength = 999
    header.gsoSize = 1448
    header.checksumStart = 34
    header.checksumOffset = 16
    header.bufferCount = 77
    let frame = Frames.tcp4(payload: 60_000)
    for pieces in [[12], [12, 54], [5, 3, 20, 40], [12, 66, 1000], []] {
      try rig.send(header, frame, pieces: pieces)
      let arrived = try unwrap(try rig.peerTake())
      check(arrived.frame == frame, "\(pieces)")
      var expected = header
      expected.flags = NetHeader.needsChecksum
      expected.headerLength = 54
      expected.bufferCount = 0
      checkEqual(arrived.header, expected)
    }
  }

  @Test func garbageIsUsedUpAndNeverSent() throws {
    let rig = try NetRig()
    var bad = NetHeader()
    bad.flags = NetHeader.needsChecksum
    bad.checksumStart = 100
    bad.checksumOffset = 0xFFF0
    try rig.send(bad, Frames.plain(200))
    bad = NetHeader()
    bad.gsoType = NetHeader.gsoUDP
    try rig.send(bad, Frames.plain(200))
    for short in [1, 5, 11, 12, 13, 25] { try rig.sendRaw([UInt8](repeating: 0, count: short)) }
    // A chain the device could only write.
    let room = rig.front.allocate(100)
    rig.transmit.offer([DriverBuffer(room, 100, isDeviceWritable: true)])
    _ = try rig.transmit.nextUsed()
    // None of it arrived; the next good frame does.
    try rig.send(Frames.plain(60))
    check(try rig.peerTake()?.frame == Frames.plain(60))
    check(try rig.peerTake(within: .milliseconds(50)) == nil)
  }

  @Test func offloadsThatWereNotNegotiatedAreRefused() throws {
    let rig = try NetRig(wanting: { $0.subtracting([.packedRing, .netHostTSO4, .netHostTSO6, .netHostECN]) })
    var header = NetHeader()
    header.flags = NetHeader.needsChecksum
    header.gsoType = NetHeader.gsoTCPv4
    header.gsoSize = 1448
    header.checksumStart = 34
    header.checksumOffset = 16
    try rig.send(header, Frames.tcp4(payload: 5000))
    header.gsoType = 0
    header.gsoSize = 0
    try rig.send(header, Frames.tcp4(payload: 500))
    let arrived = try unwrap(try rig.peerTake())
    checkEqual(arrived.frame.count, 554)
    checkEqual(arrived.header.flags, NetHeader.needsChecksum)
  }

  @Test func aPeerThatDoesNotReadHoldsFramesBackAndLosesNone() throws {
    let rig = try NetRig(size: 256)
    let count = 200
    for number in 0..<count {
      var frame = Frames.plain(5000)
      frame[20] = UInt8(number)
      let buffer = DriverBuffer(rig.place(NetRig.bytes(NetHeader()) + frame), 5012, isDeviceWritable: false)
      check(rig.transmit.offer([buffer]) != nil)
    }
    // The socket holds far less than that.
    for number in 0..<count {
      let arrived = try unwrap(try rig.peerTake())
      checkEqual(Int(arrived.frame[20]), number)
    }
    for _ in 0..<count { _ = try rig.transmit.nextUsed() }
  }

  @Test func aStoppedQueueGoesOnWhereItStood() throws {
    let rig = try NetRig()
    for round in 0..<5 {
      try rig.send(Frames.plain(100 + round))
      checkEqual(try rig.peerTake()?.frame.count, 100 + round)
      let base = try rig.front.stop(rig.transmit)
      checkEqual(base, UInt32(round + 1))
      try rig.front.start(rig.transmit, base: base)
    }
  }

  @Test func aBrokenRingIsReportedAndTheOtherQueueLivesOn() throws {
    let rig = try NetRig()
    rig.transmit.driver.setAvailableIndex(5000)
    rig.transmit.kick.signal()
    check(try rig.transmit.error.fd.waitUntil(.readable, timeout: .seconds(5)), "The error descriptor is signalled")
    try rig.offer([2000])
    try rig.peerSend(Frames.plain(99))
    checkEqual(try rig.take().frame.count, 99)
  }

  @Test func driversThatFloodAreCalledOncePerBatch() throws {
    let rig = try NetRig(size: 256)
    let packet = rig.place(NetRig.bytes(NetHeader()) + Frames.plain(60))
    rig.transmit.driver.disableCalls()
    for _ in 0..<200 { _ = rig.transmit.driver.add([DriverBuffer(packet, 72, isDeviceWritable: false)].span) }
    check(!rig.transmit.driver.enableCalls())
    rig.transmit.show()
    for _ in 0..<200 { _ = try rig.peerTake() }
    for _ in 0..<200 { _ = try rig.transmit.nextUsed() }
    // The counter of the call descriptor was taken by `nextUsed`; what is left is at most a batch or two.
    check(rig.transmit.call.drain() <= 4)
  }

  @Test func aDisabledCardDropsWhatIsTransmittedAndReceivesNothing() throws {
    let rig = try NetRig()
    for index: UInt32 in 0...1 { _ = try rig.front.frontEnd.request(.setVringEnable(VringState(index: index, number: 0))) }
    for _ in 0..<3 { try rig.send(Frames.plain(100)) }
    check(try rig.peerTake(within: .milliseconds(50)) == nil)
    try rig.offer([2000])
    try rig.peerSend(Frames.plain(200))
    usleep(50_000)
    checkEqual(rig.receive.driver.nextUsed(), .empty)
    for index: UInt32 in 0...1 { _ = try rig.front.frontEnd.request(.setVringEnable(VringState(index: index, number: 1))) }
    checkEqual(try rig.take().frame.count, 200)
    try rig.send(Frames.plain(100))
    checkEqual(try rig.peerTake()?.frame.count, 100)
  }
}
