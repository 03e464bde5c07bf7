import NetDevice
import Testing
import VirtioSpec

/// Frames as a driver makes them.
enum Frames {
  /// Ethernet with some content; `etherType` not IP.
  static func plain(_ byteCount: Int, seed: UInt8 = 1) -> [UInt8] {
    var frame: [UInt8] = [2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 2, 0x88, 0xB5]
    frame += (0..<max(0, byteCount - 14)).map { UInt8(truncatingIfNeeded: $0 &* 7 &+ Int(seed)) }
    return Array(frame.prefix(byteCount))
  }

  /// TCP over IPv4, VLAN tags before it.
  static func tcp4(payload: Int, vlans: Int = 0, options: Int = 0) -> [UInt8] {
    var frame: [UInt8] = [2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 2]
    for _ in 0..<vlans { frame += [0x81, 0x00, 0x00, 0x07] }
    frame += [0x08, 0x00]
    let total = 20 + 20 + options + payload
    frame += [0x45, 0, UInt8(total >> 8 & 0xFF), UInt8(total & 0xFF), 0, 1, 0, 0, 64, 6, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2]
    frame += [0x12, 0x34, 0, 80, 0, 0, 0, 1, 0, 0, 0, 0, UInt8(((20 + options) / 4) << 4), 0x18, 0xFF, 0xFF, 0, 0, 0, 0]
    frame += [UInt8](repeating: 1, count: options)
    return frame + [UInt8](repeating: 0x55, count: payload)
  }

  static func tcp6(payload: Int) -> [UInt8] {
    var frame: [UInt8] = [2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 2, 0x86, 0xDD]
    let total = 20 + payload
    frame += [0x60, 0, 0, 0, UInt8(total >> 8 & 0xFF), UInt8(total & 0xFF), 6, 64]
    frame += [UInt8](repeating: 0xFD, count: 32)
    frame += [0x12, 0x34, 0, 80, 0, 0, 0, 1, 0, 0, 0, 0, 0x50, 0x18, 0xFF, 0xFF, 0, 0, 0, 0]
    return frame + [UInt8](repeating: 0x55, count: payload)
  }
}

@Suite struct TransmitHeaderTests {
  static let all: TransmitOffloads = [.checksum, .tso4, .tso6, .ecn]

  private func judge(_ header: NetHeader, _ frame: [UInt8], _ offloads: TransmitOffloads = all) -> Result<NetHeader, FrameRefusal> {
    let count = TransmitHeader.inspectedByteCount(header, frameByteCount: frame.count)
    let start = Array(frame.prefix(count))
    return start.withUnsafeBytes { TransmitHeader.check(header, frameByteCount: frame.count, start: $0, offloads: offloads) }
      .map(\.header)
  }

  private func tso4(start: UInt16 = 34, size: UInt16 = 1448) -> NetHeader {
    var header = NetHeader()
    header.flags = NetHeader.needsChecksum
    header.gsoType = NetHeader.gsoTCPv4
    header.headerLength = 54
    header.gsoSize = size
    header.checksumStart = start
    header.checksumOffset = 16
    return header
  }

  @Test func plainFramesOfEverySizePassWithACleanHeader() {
    var header = NetHeader()
    header.headerLength = 0xFFFF
    header.gsoSize = 0xFFFF
    header.checksumStart = 0xFFFF
    header.checksumOffset = 0xFFFF
    header.bufferCount = 9
    header.flags = 0xFE  // Everything but NEEDS_CSUM: not for this direction, or unknown.
    for size in [14, 15, 60, 1514, 9014, 65535] { #expect(judge(header, Frames.plain(size)) == .success(NetHeader())) }
  }

  @Test func framesThatAreNoFramesAreRefused() {
    for size in [0, 1, 13] { #expect(judge(NetHeader(), Frames.plain(size)) == .failure(.length)) }
    #expect(judge(NetHeader(), Frames.plain(TransmitHeader.greatestFrame)) == .success(NetHeader()))
    #expect(judge(NetHeader(), Frames.plain(TransmitHeader.greatestFrame + 1)) == .failure(.length))
  }

  @Test func aChecksumMustLieInsideTheFrameBehindItsEthernetHeader() {
    func header(_ start: UInt16, _ offset: UInt16) -> NetHeader {
      var header = NetHeader()
      header.flags = NetHeader.needsChecksum
      header.checksumStart = start
      header.checksumOffset = offset
      return header
    }
    let frame = Frames.plain(60)
    #expect(judge(header(34, 6), frame) == .success(header(34, 6)))
    #expect(judge(header(34, 24), frame) == .success(header(34, 24)))  // The last two bytes.
    #expect(judge(header(34, 25), frame) == .failure(.checksumPlace))
    #expect(judge(header(60, 0), frame) == .failure(.checksumPlace))
    #expect(judge(header(13, 6), frame) == .failure(.checksumPlace))
    #expect(judge(header(0xFFFF, 0xFFFF), frame) == .failure(.checksumPlace))
    #expect(judge(header(34, 6), frame, []) == .failure(.notNegotiated))
  }

  @Test func segmentationOfRealTCPPasses() {
    var expected = tso4()
    #expect(judge(tso4(), Frames.tcp4(payload: 30_000)) == .success(expected))
    // The length of the headers is computed, whatever the driver's hint.
    var hinted = tso4()
    hinted.headerLength = 200
    #expect(judge(hinted, Frames.tcp4(payload: 30_000)) == .success(expected))
    expected = tso4(start: 42)
    expected.headerLength = 62
    #expect(judge(tso4(start: 42), Frames.tcp4(payload: 30_000, vlans: 2)) == .success(expected))
    expected = tso4()
    expected.headerLength = 66
    #expect(judge(tso4(), Frames.tcp4(payload: 30_000, options: 12)) == .success(expected))
    var six = tso4(start: 54)
    six.gsoType = NetHeader.gsoTCPv6 | NetHeader.gsoECN
    expected = six
    expected.headerLength = 74
    #expect(judge(six, Frames.tcp6(payload: 40_000)) == .success(expected))
  }

  @Test func segmentationIsRefusedUnlessNegotiated() {
    let frame = Frames.tcp4(payload: 3000)
    #expect(judge(tso4(), frame, [.checksum, .tso6, .ecn]) == .failure(.notNegotiated))
    #expect(judge(tso4(), frame, [.tso4]) == .failure(.notNegotiated))
    var ecn = tso4()
    ecn.gsoType |= NetHeader.gsoECN
    #expect(judge(ecn, frame, [.checksum, .tso4]) == .failure(.notNegotiated))
    var six = tso4(start: 54)
    six.gsoType = NetHeader.gsoTCPv6
    #expect(judge(six, Frames.tcp6(payload: 3000), [.checksum, .tso4]) == .failure(.notNegotiated))
  }

  @Test func impossibleSegmentationIsRefused() {
    let frame = Frames.tcp4(payload: 3000)
    for kind: UInt8 in [2, 3, 5, 6, 0x7F, 0x80, 0x82, 0xFF, 0x21, 0x41] {
      var header = tso4()
      header.gsoType = kind
      #expect(judge(header, frame) == .failure(.segmentation), "kind \(kind)")
    }
    for size: UInt16 in [0, 1, 7] { #expect(judge(tso4(size: size), frame) == .failure(.segmentation)) }
    var header = tso4()
    header.flags = 0
    #expect(judge(header, frame) == .failure(.segmentation))
    header = tso4()
    header.checksumOffset = 6
    #expect(judge(header, frame) == .failure(.segmentation))
    header = tso4()
    header.headerLength = UInt16(frame.count + 1)
    #expect(judge(header, frame) == .failure(.segmentation))
  }

  @Test func segmentationOfWhatIsNotTheTCPItClaimsIsRefused() {
    #expect(judge(tso4(), Frames.tcp6(payload: 3000)) == .failure(.protocolMismatch))
    #expect(judge(tso4(), Frames.plain(3000)) == .failure(.protocolMismatch))
    #expect(judge(tso4(start: 38), Frames.tcp4(payload: 3000)) == .failure(.protocolMismatch))
    var frame = Frames.tcp4(payload: 3000)
    frame[23] = 17  // UDP.
    #expect(judge(tso4(), frame) == .failure(.protocolMismatch))
    frame = Frames.tcp4(payload: 3000)
    frame[14] = 0x44  // An IP header of 16 bytes.
    #expect(judge(tso4(start: 30), frame) == .failure(.protocolMismatch))
    frame = Frames.tcp4(payload: 3000)
    frame[46] = 0x40  // A TCP header of 16 bytes.
    #expect(judge(tso4(), frame) == .failure(.protocolMismatch))
    frame = Frames.tcp4(payload: 0)
    frame[46] = 0xF0  // A TCP header longer than the frame.
    #expect(judge(tso4(), frame) == .failure(.protocolMismatch))
  }

  @Test func noHeaderAndNoStartOfAFrameTrapsTheCheck() {
    var random = SystemRandomNumberGenerator()
    var passed = 0
    for round in 0..<200_000 {
      var header = NetHeader()
      header.flags = UInt8.random(in: 0...3, using: &random)
      header.gsoType = [0, 1, 4, 0x81, 0x84, UInt8.random(in: 0...255, using: &random)][round % 6]
      header.headerLength = UInt16.random(in: 0...200, using: &random)
      header.gsoSize = UInt16.random(in: 0...2000, using: &random)
      header.checksumStart = [34, 54, UInt16.random(in: 0 ... .max, using: &random)][round % 3]
      header.checksumOffset = [16, UInt16.random(in: 0 ... .max, using: &random)][round % 2]
      var frame = round % 2 == 0 ? Frames.tcp4(payload: Int.random(in: 0...100, using: &random)) : Frames.tcp6(payload: 20)
      for _ in 0..<Int.random(in: 0...3, using: &random) {
        frame[Int.random(in: 0..<frame.count, using: &random)] = UInt8.random(in: 0...255, using: &random)
      }
      if round % 7 == 0 { frame = Array(frame.prefix(Int.random(in: 0...frame.count, using: &random))) }
      guard case .success(let checked) = judge(header, frame) else { continue }
      passed += 1
      if checked.flags != 0 { #expect(Int(checked.checksumStart) + Int(checked.checksumOffset) + 2 <= frame.count) }
      #expect(Int(checked.headerLength) <= frame.count)
    }
    #expect(passed > 1000)
  }
}

@Suite struct ReceiveHeaderTests {
  @Test func aDriverWithoutOffloadsGetsOnlyFinishedFrames() {
    var header = NetHeader()
    header.flags = NetHeader.dataValid
    header.checksumStart = 5
    var expected = NetHeader()
    expected.bufferCount = 1
    #expect(ReceiveHeader.adjusted(header, offloads: [], bufferCount: 1) == expected)
    header.flags = NetHeader.needsChecksum
    #expect(ReceiveHeader.adjusted(header, offloads: [], bufferCount: 1) == nil)
  }

  @Test func whatWasAgreedIsPassedOnWithTheNumberOfBuffers() {
    var header = NetHeader()
    header.flags = NetHeader.needsChecksum
    header.gsoType = NetHeader.gsoTCPv4
    header.gsoSize = 1448
    header.headerLength = 54
    header.checksumStart = 34
    header.checksumOffset = 16
    var expected = header
    expected.bufferCount = 12
    #expect(ReceiveHeader.adjusted(header, offloads: [.checksum, .tso4], bufferCount: 12) == expected)
    #expect(ReceiveHeader.adjusted(header, offloads: [.checksum, .tso6], bufferCount: 12) == nil)
    header.gsoType |= NetHeader.gsoECN
    #expect(ReceiveHeader.adjusted(header, offloads: [.checksum, .tso4], bufferCount: 12) == nil)
  }

  @Test func offloadsWithoutTheirDependencyCountForNothing() {
    #expect(ReceiveOffloads([.netGuestTSO4, .netGuestECN]) == [])
    #expect(ReceiveOffloads([.netGuestChecksum, .netGuestECN]) == [.checksum])
    #expect(ReceiveOffloads([.netGuestChecksum, .netGuestTSO6, .netGuestECN]) == [.checksum, .tso6, .ecn])
  }
}
