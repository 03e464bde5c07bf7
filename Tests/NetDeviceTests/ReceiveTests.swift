import Glibc
import HostSystem
import NetDevice
import TestSupport
import Testing
import VirtioQueue
import VirtioSpec

@Suite(.serialized) struct ReceiveTests {
  static let big = 12 + 65_562

  private func noMerging(_ features: FeatureSet) -> FeatureSet { features.subtracting([.packedRing, .netMergeableReceiveBuffers]) }

  @Test(arguments: [false, true]) func framesOfEverySizeArriveInOneBuffer(packed: Bool) throws {
    let rig = try NetRig(wanting: { packed ? $0 : $0.subtracting(.packedRing) })
    for size in Array(14...130) + [1513, 1514, 1515, 4096, 9000, 65_549] {
      try rig.offer([Self.big])
      let frame = Frames.plain(size, seed: UInt8(truncatingIfNeeded: size))
      try rig.peerSend(frame)
      let arrived = try rig.take()
      check(arrived.frame == frame, "\(size) bytes")
      checkEqual(arrived.buffers, 1)
    }
  }

  @Test func bigBuffersWithoutMergingTakeEveryFrame() throws {
    let rig = try NetRig(wanting: noMerging)
    for size in [14, 60, 1514, 30_000, 65_549] {
      try rig.offer([12, 1000, 64_562])
      try rig.peerSend(Frames.plain(size))
      let arrived = try rig.take()
      check(arrived.frame == Frames.plain(size))
      checkEqual(arrived.header.bufferCount, 1)
    }
  }

  @Test func withoutMergingAFrameThatDoesNotFitIsDroppedAndItsBufferKept() throws {
    let rig = try NetRig(wanting: noMerging)
    try rig.offer([12 + 1514])
    try rig.peerSend(Frames.plain(1515))
    try rig.peerSend(Frames.plain(1514))
    checkEqual(try rig.take().frame.count, 1514)
  }

  @Test(arguments: [false, true]) func aFrameFillsAsManyBuffersAsItNeeds(packed: Bool) throws {
    let rig = try NetRig(size: 256, wanting: { packed ? $0 : $0.subtracting(.packedRing) })
    for (frame, buffer) in [(1514, 512), (9000, 1526), (65_549, 1526), (65_549, 600), (3000, 3012), (3001, 3012), (2988, 1500)] {
      let needed = (frame + 12 + buffer - 1) / buffer
      for _ in 0..<needed + 2 { try rig.offer([buffer]) }
      for _ in 0..<2 {
        try rig.peerSend(Frames.plain(frame))
        if rig.offered.count < needed { for _ in 0..<needed { try rig.offer([buffer]) } }
        let arrived = try rig.take()
        check(arrived.frame == Frames.plain(frame), "\(frame) in buffers of \(buffer)")
        checkEqual(arrived.buffers, needed)
      }
      while rig.offered.count > 0 {
        try rig.peerSend(Frames.plain(60))
        _ = try rig.take()
      }
    }
  }

  @Test func buffersOfManyPiecesAreFilledPieceByPiece() throws {
    let rig = try NetRig(size: 256)
    for pieces in [[1, 11, 1, 200, 3000], [5, 7, 14, 1, 1, 1, 3000], [13, 3000], [12, 3000], [6, 6, 3000], [11, 3000]] {
      try rig.offer(pieces)
      try rig.peerSend(Frames.plain(1000))
      check(try rig.take().frame == Frames.plain(1000), "\(pieces)")
    }
    try rig.offer([Int](repeating: 9, count: 120))
    try rig.peerSend(Frames.plain(1000))
    check(try rig.take().frame == Frames.plain(1000))
  }

  @Test(arguments: [false, true]) func aFrameWaitsForBuffersAndTakesNoneBefore(packed: Bool) throws {
    let rig = try NetRig(wanting: { packed ? $0 : $0.subtracting(.packedRing) })
    try rig.offer([1000])
    try rig.offer([1000])
    try rig.peerSend(Frames.plain(5000, seed: 3))
    try rig.peerSend(Frames.plain(100, seed: 4))
    usleepUnlessUsed(rig)
    checkEqual(rig.receive.driver.nextUsed(), .empty)
    // One by one: each new buffer is a kick that must not be lost.
    for _ in 0..<3 {
      try rig.offer([1000])
      usleepUnlessUsed(rig)
      checkEqual(rig.receive.driver.nextUsed(), .empty)
    }
    try rig.offer([1000])
    let arrived = try rig.take()
    check(arrived.frame == Frames.plain(5000, seed: 3))
    checkEqual(arrived.buffers, 6)
    try rig.offer([1000])
    check(try rig.take().frame == Frames.plain(100, seed: 4))
  }

  private func usleepUnlessUsed(_ rig: NetRig) {
    for _ in 0..<30 where !rig.receive.driver.hasUsed() { usleep(1000) }
  }

  @Test func aStopWhileAFrameWaitsLosesNoBuffer() throws {
    let rig = try NetRig()
    try rig.offer([1000])
    try rig.peerSend(Frames.plain(5000))
    usleepUnlessUsed(rig)
    let base = try rig.front.stop(rig.receive)
    checkEqual(base, 0)  // The buffer was never taken.
    try rig.front.start(rig.receive, base: base)
    try rig.peerSend(Frames.plain(300))
    check(try rig.take().frame == Frames.plain(300))
  }

  @Test func framesThatNeedWhatTheDriverCannotDoAreDropped() throws {
    let rig = try NetRig(wanting: { $0.subtracting([.packedRing, .netGuestTSO4, .netGuestTSO6, .netGuestECN, .netGuestChecksum]) })
    try rig.offer([Self.big])
    var header = NetHeader()
    header.flags = NetHeader.needsChecksum
    header.checksumStart = 34
    header.checksumOffset = 16
    try rig.peerSend(header, Frames.tcp4(payload: 100))
    header.gsoType = NetHeader.gsoTCPv4
    header.gsoSize = 1448
    try rig.peerSend(header, Frames.tcp4(payload: 10_000))
    try rig.peerSend(Frames.plain(77))
    checkEqual(try rig.take().frame.count, 77)
  }

  @Test func offloadsTheDriverAgreedToReachIt() throws {
    let rig = try NetRig()
    try rig.offer([Self.big])
    var header = NetHeader()
    header.flags = NetHeader.needsChecksum
    header.gsoType = NetHeader.gsoTCPv4
    header.gsoSize = 1448
    header.headerLength = 54
    header.checksumStart = 34
    header.checksumOffset = 16
    try rig.peerSend(header, Frames.tcp4(payload: 30_000))
    let arrived = try rig.take()
    header.bufferCount = 1
    checkEqual(arrived.header, header)
    check(arrived.frame == Frames.tcp4(payload: 30_000))
  }

  @Test func uselessBuffersAreGivenBackEmpty() throws {
    let rig = try NetRig()
    for size in [1, 5, 12] { try rig.offer([size]) }
    // A chain the device could only read.
    let text = rig.place([1, 2, 3])
    rig.receive.offer([DriverBuffer(text, 3, isDeviceWritable: false)])
    try rig.offer([2000])
    try rig.peerSend(Frames.plain(500))
    for _ in 0..<4 {
      let used = try rig.receive.nextUsed()
      checkEqual(used.written ?? 0, 0)
      rig.offered.removeValue(forKey: used.head)
    }
    checkEqual(try rig.take().frame.count, 500)
  }

  @Test func everyFrameArrivesInOrderUnderLoad() throws {
    let rig = try NetRig(size: 256, memory: 128 << 20)
    var random = SeededRandom(7)
    var sent: [(Int, UInt8)] = []
    for _ in 0..<100 { try rig.offer([1526]) }
    for number in 0..<3000 {
      let size = number % 10 == 0 ? Int.random(in: 14...9000, using: &random) : Int.random(in: 14...1514, using: &random)
      try rig.peerSend(Frames.plain(size, seed: UInt8(truncatingIfNeeded: number)))
      sent.append((size, UInt8(truncatingIfNeeded: number)))
      if number % 20 == 19 {
        for (size, seed) in sent {
          let arrived = try rig.take()
          check(arrived.frame == Frames.plain(size, seed: seed), "frame \(number)")
          for _ in 0..<arrived.buffers { try rig.offer([1526]) }
        }
        sent = []
      }
    }
  }

  @Test func theEndOfThePeerTakesTheLinkDown() throws {
    let rig = try NetRig(arguments: ["--mac=52:54:00:12:34:56", "--mtu=9000"])
    var space = NetConfiguration(decoding: try rig.front.configuration(28))
    checkEqual(space.status, NetSpec.linkUp)
    checkEqual(space.mac.description, "52:54:00:12:34:56")
    checkEqual(space.mtu, 9000)
    try rig.offer([2000])
    shutdown(rig.peer.rawValue, CInt(SHUT_RDWR))
    for _ in 0..<200 where space.status != 0 {
      usleep(5000)
      space = NetConfiguration(decoding: try rig.front.configuration(28))
    }
    checkEqual(space.status, 0)
    // The driver's frames go nowhere and hold nothing up.
    try rig.send(Frames.plain(100))
  }
}
