import VirtioSpec

/// What the driver agreed to receive: the negotiated part of the features, or less when it has switched some off.
package struct ReceiveOffloads: OptionSet, Sendable {
  package let rawValue: UInt8
  package init(rawValue: UInt8) { self.rawValue = rawValue }
  package static let checksum = ReceiveOffloads(rawValue: 1)
  package static let tso4 = ReceiveOffloads(rawValue: 2)
  package static let tso6 = ReceiveOffloads(rawValue: 4)
  package static let ecn = ReceiveOffloads(rawValue: 8)

  /// From feature bits; bits whose dependency is missing are dropped (GUEST_TSO needs GUEST_CSUM, GUEST_ECN a GUEST_TSO).
  package init(_ features: FeatureSet) {
    self = []
    guard features.contains(.netGuestChecksum) else { return }
    insert(.checksum)
    if features.contains(.netGuestTSO4) { insert(.tso4) }
    if features.contains(.netGuestTSO6) { insert(.tso6) }
    if features.contains(.netGuestECN), !isDisjoint(with: [.tso4, .tso6]) { insert(.ecn) }
  }

  package var hasSegmentation: Bool { !isDisjoint(with: [.tso4, .tso6]) }
}

/// The header of a received frame as the driver gets it.
package enum ReceiveHeader {
  /// The header for the driver from the one that came with the frame: nothing it did not agree to, and the number of
  /// buffers. Nil when the frame needs what the driver cannot do (the tap is told what may come, a peer socket is not).
  package static func adjusted(_ header: NetHeader, offloads: ReceiveOffloads, bufferCount: UInt16) -> NetHeader? {
    var result = NetHeader()
    result.bufferCount = bufferCount
    if header.flags & NetHeader.needsChecksum != 0 {
      guard offloads.contains(.checksum) else { return nil }
      result.flags = NetHeader.needsChecksum
      result.checksumStart = header.checksumStart
      result.checksumOffset = header.checksumOffset
    } else if header.flags & NetHeader.dataValid != 0, offloads.contains(.checksum) {
      result.flags = NetHeader.dataValid
    }
    guard header.gsoType != NetHeader.gsoNone else { return result }
    switch header.gsoType & ~NetHeader.gsoECN {
    case NetHeader.gsoTCPv4: if !offloads.contains(.tso4) { return nil }
    case NetHeader.gsoTCPv6: if !offloads.contains(.tso6) { return nil }
    default: return nil
    }
    if header.gsoType & NetHeader.gsoECN != 0, !offloads.contains(.ecn) { return nil }
    result.gsoType = header.gsoType
    result.gsoSize = header.gsoSize
    result.headerLength = header.headerLength
    return result
  }
}
