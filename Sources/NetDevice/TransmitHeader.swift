import VirtioSpec

/// Why a frame of the driver's is not sent.
package enum FrameRefusal: Error, Equatable, Sendable {
  /// Shorter than header and Ethernet addresses, or longer than any frame can be.
  case length
  /// Asks for a checksum or segmentation that was not negotiated.
  case notNegotiated
  /// The place of the checksum does not lie within the frame, behind its Ethernet header.
  case checksumPlace
  /// A segmentation kind that does not exist, or an impossible segment size.
  case segmentation
  /// Segmentation of something that is not the TCP packet the header says it is.
  case protocolMismatch
}

/// What the driver may ask of the device when it transmits: the negotiated part of the features.
package struct TransmitOffloads: OptionSet, Sendable {
  package let rawValue: UInt8
  package init(rawValue: UInt8) { self.rawValue = rawValue }
  package static let checksum = TransmitOffloads(rawValue: 1)
  package static let tso4 = TransmitOffloads(rawValue: 2)
  package static let tso6 = TransmitOffloads(rawValue: 4)
  package static let ecn = TransmitOffloads(rawValue: 8)

  package init(_ features: FeatureSet) {
    self = []
    if features.contains(.netChecksum) { insert(.checksum) }
    if features.contains(.netHostTSO4) { insert(.tso4) }
    if features.contains(.netHostTSO6) { insert(.tso6) }
    if features.contains(.netHostECN) { insert(.ecn) }
  }
}

/// The header that goes to the tap in place of the driver's: made of values that were checked, never the driver's bytes.
package struct TransmitHeader: Equatable, Sendable {
  /// Ethernet addresses and type.
  static let ethernetByteCount = 14
  /// Ethernet, two VLAN tags, an IPv6 header and the greatest payload it can carry.
  package static let greatestFrame = 14 + 8 + 40 + 65535
  /// How much of a frame with segmentation is looked at: Ethernet to TCP with all options. Longer headers are refused.
  package static let greatestHeaders = 256
  /// Linux never cuts TCP smaller than this; a smaller size would only make the host work 65535 times for one frame.
  static let leastSegment: UInt16 = 8

  package let header: NetHeader

  /// Bytes of the frame's start that `check` wants to see: none unless the frame is to be segmented.
  package static func inspectedByteCount(_ header: NetHeader, frameByteCount: Int) -> Int {
    header.gsoType == NetHeader.gsoNone ? 0 : min(frameByteCount, greatestHeaders)
  }

  /// Checks every field the driver set (virtio 1.4, 5.1.6.2.2: the device "MUST NOT use" the others).
  /// - Parameters:
  ///   - frameByteCount: the frame without its virtio header.
  ///   - start: a copy of the frame's first `inspectedByteCount` bytes. What is sent must begin with this very copy.
  package static func check(
    _ header: NetHeader, frameByteCount: Int, start: UnsafeRawBufferPointer, offloads: TransmitOffloads
  ) -> Result<TransmitHeader, FrameRefusal> {
    guard frameByteCount >= ethernetByteCount, frameByteCount <= greatestFrame else { return .failure(.length) }
    var checked = NetHeader()
    if header.flags & NetHeader.needsChecksum != 0 {
      guard offloads.contains(.checksum) else { return .failure(.notNegotiated) }
      let place = Int(header.checksumStart) + Int(header.checksumOffset)
      guard Int(header.checksumStart) >= ethernetByteCount, place + 2 <= frameByteCount else { return .failure(.checksumPlace) }
      checked.flags = NetHeader.needsChecksum
      checked.checksumStart = header.checksumStart
      checked.checksumOffset = header.checksumOffset
    }
    guard header.gsoType != NetHeader.gsoNone else { return .success(TransmitHeader(header: checked)) }

    // Segmentation needs the checksum to be completed (5.1.6.2.1).
    guard checked.flags == NetHeader.needsChecksum else { return .failure(.segmentation) }
    let kind = header.gsoType & ~NetHeader.gsoECN
    switch kind {
    case NetHeader.gsoTCPv4: if !offloads.contains(.tso4) { return .failure(.notNegotiated) }
    case NetHeader.gsoTCPv6: if !offloads.contains(.tso6) { return .failure(.notNegotiated) }
    default: return .failure(.segmentation)
    }
    if header.gsoType & NetHeader.gsoECN != 0, !offloads.contains(.ecn) { return .failure(.notNegotiated) }
    guard header.gsoSize >= leastSegment, header.checksumOffset == 16 else { return .failure(.segmentation) }
    guard Int(header.headerLength) <= frameByteCount else { return .failure(.segmentation) }
    guard
      let headers = unsafe tcpHeadersByteCount(
        start, isIPv6: kind == NetHeader.gsoTCPv6, transportOffset: Int(header.checksumStart)),
      headers <= frameByteCount
    else { return .failure(.protocolMismatch) }
    checked.gsoType = header.gsoType
    checked.gsoSize = header.gsoSize
    // Only a hint, and the driver's own may be anything: the real length is known here.
    checked.headerLength = UInt16(headers)
    return .success(TransmitHeader(header: checked))
  }

  /// Bytes from the frame's start to the end of its TCP header, when it is TCP over the IP version asked for and its TCP
  /// header begins at `transportOffset`.
  private static func tcpHeadersByteCount(_ frame: UnsafeRawBufferPointer, isIPv6: Bool, transportOffset: Int) -> Int? {
    func byte(_ offset: Int) -> UInt8? {
      // SAFETY: compared with the count before the access; the bytes are a private copy.
      offset < frame.count ? unsafe frame[offset] : nil
    }
    func type(_ offset: Int) -> Int? {
      guard let high = byte(offset), let low = byte(offset + 1) else { return nil }
      return Int(high) << 8 | Int(low)
    }
    var network = ethernetByteCount
    guard var etherType = type(network - 2) else { return nil }
    // At most two VLAN tags (802.1Q, 802.1ad).
    for _ in 0..<2 where etherType == 0x8100 || etherType == 0x88A8 {
      network += 4
      guard let next = type(network - 2) else { return nil }
      etherType = next
    }
    guard let version = byte(network) else { return nil }
    if isIPv6 {
      guard etherType == 0x86DD, version >> 4 == 6, transportOffset >= network + 40 else { return nil }
      // Extension headers may stand between; without any the next header is TCP.
      guard let next = byte(network + 6), transportOffset > network + 40 || next == 6 else { return nil }
    } else {
      guard etherType == 0x0800, version >> 4 == 4, let next = byte(network + 9), next == 6 else { return nil }
      let length = Int(version & 15) * 4
      guard length >= 20, transportOffset == network + length else { return nil }
    }
    guard let dataOffset = byte(transportOffset + 12) else { return nil }
    let length = Int(dataOffset >> 4) * 4
    guard length >= 20, transportOffset + length <= frame.count else { return nil }
    return transportOffset + length
  }
}
