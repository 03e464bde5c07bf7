// Network device (virtio 1.4, section 5.1; linux/virtio_net.h).

/// Configuration space of a network device, `struct virtio_net_config`. The driver may not write it.
///
/// A field is meaningful only with its feature; without it, leave it as it is.
public struct NetConfiguration: Hashable, Sendable {
  /// Bytes of the whole structure.
  @inlinable public static var byteCount: Int { 28 }

  /// Byte offsets of the fields.
  public enum Offset {
    @inlinable public static var mac: Int { 0 }
    @inlinable public static var status: Int { 6 }
    @inlinable public static var maxQueuePairs: Int { 8 }
    @inlinable public static var mtu: Int { 10 }
    @inlinable public static var speed: Int { 12 }
    @inlinable public static var duplex: Int { 16 }
    @inlinable public static var rssMaxKeySize: Int { 17 }
    @inlinable public static var rssMaxIndirectionTableLength: Int { 18 }
    @inlinable public static var supportedHashTypes: Int { 20 }
    @inlinable public static var supportedTunnelTypes: Int { 24 }
  }

  /// `mac` (`netMAC`).
  public var mac = MACAddress()
  /// `NetSpec.linkUp`, `NetSpec.announce` (`netStatus`).
  public var status: UInt16 = 0
  /// `max_virtqueue_pairs`, 1 to 0x8000 (`netMultipleQueues`, `netReceiveSideScaling`).
  public var maxQueuePairs: UInt16 = 0
  /// 68 to 65535 (`netMTU`).
  public var mtu: UInt16 = 0
  /// Mbit/s, all ones unknown (`netSpeedDuplex`).
  public var speed: UInt32 = 0xFFFF_FFFF
  /// 1 full, 0 half, 0xFF unknown.
  public var duplex: UInt8 = 0xFF
  /// At least 40 (`netReceiveSideScaling`, `netHashReport`).
  public var rssMaxKeySize: UInt8 = 0
  /// At least 128.
  public var rssMaxIndirectionTableLength: UInt16 = 0
  /// Bit set of hash types.
  public var supportedHashTypes: UInt32 = 0
  /// (`netHashTunnel`)
  public var supportedTunnelTypes: UInt32 = 0

  public init() {}

  /// The fields from the start of `bytes`. A field that does not fit is zero: a peer may know a shorter structure.
  public init(decoding bytes: [UInt8]) {
    var whole = Array(bytes.prefix(Self.byteCount))
    whole.append(contentsOf: repeatElement(0, count: Self.byteCount - whole.count))
    mac = MACAddress(
      octets: (whole[0], whole[1], whole[2], whole[3], whole[4], whole[5]))
    status = LittleEndian.load(from: whole, at: Offset.status)
    maxQueuePairs = LittleEndian.load(from: whole, at: Offset.maxQueuePairs)
    mtu = LittleEndian.load(from: whole, at: Offset.mtu)
    speed = LittleEndian.load(from: whole, at: Offset.speed)
    duplex = LittleEndian.load(from: whole, at: Offset.duplex)
    rssMaxKeySize = LittleEndian.load(from: whole, at: Offset.rssMaxKeySize)
    rssMaxIndirectionTableLength = LittleEndian.load(from: whole, at: Offset.rssMaxIndirectionTableLength)
    supportedHashTypes = LittleEndian.load(from: whole, at: Offset.supportedHashTypes)
    supportedTunnelTypes = LittleEndian.load(from: whole, at: Offset.supportedTunnelTypes)
  }

  /// `byteCount` bytes, little-endian, padding zero.
  public func encoded() -> [UInt8] {
    var bytes = [UInt8](repeating: 0, count: Self.byteCount)
    bytes.replaceSubrange(0..<6, with: mac.bytes)
    LittleEndian.store(status, to: &bytes, at: Offset.status)
    LittleEndian.store(maxQueuePairs, to: &bytes, at: Offset.maxQueuePairs)
    LittleEndian.store(mtu, to: &bytes, at: Offset.mtu)
    LittleEndian.store(speed, to: &bytes, at: Offset.speed)
    LittleEndian.store(duplex, to: &bytes, at: Offset.duplex)
    LittleEndian.store(rssMaxKeySize, to: &bytes, at: Offset.rssMaxKeySize)
    LittleEndian.store(rssMaxIndirectionTableLength, to: &bytes, at: Offset.rssMaxIndirectionTableLength)
    LittleEndian.store(supportedHashTypes, to: &bytes, at: Offset.supportedHashTypes)
    LittleEndian.store(supportedTunnelTypes, to: &bytes, at: Offset.supportedTunnelTypes)
    return bytes
  }
}

/// Six octets in the order they go over the wire.
public struct MACAddress: Hashable, Sendable, CustomStringConvertible {
  /// The octets as the low 48 bits of a number, first octet highest.
  public let rawValue: UInt64

  /// All zero.
  @inlinable
  public init() { rawValue = 0 }

  public init(octets: (UInt8, UInt8, UInt8, UInt8, UInt8, UInt8)) {
    let high = UInt64(octets.0) << 40 | UInt64(octets.1) << 32 | UInt64(octets.2) << 24
    rawValue = high | UInt64(octets.3) << 16 | UInt64(octets.4) << 8 | UInt64(octets.5)
  }

  /// From "52:54:00:12:34:56"; `nil` for anything else.
  public init?(_ text: String) {
    let parts = text.split(separator: ":", omittingEmptySubsequences: false)
    guard parts.count == 6 else { return nil }
    var value: UInt64 = 0
    for part in parts {
      guard part.utf8.count == 2, !part.hasPrefix("+"), !part.hasPrefix("-"), let octet = UInt8(part, radix: 16) else {
        return nil
      }
      value = value << 8 | UInt64(octet)
    }
    rawValue = value
  }

  public var bytes: [UInt8] { (0..<6).map { UInt8(truncatingIfNeeded: rawValue >> (40 - 8 * UInt64($0))) } }
  /// Group addresses cannot belong to a card.
  public var isMulticast: Bool { rawValue >> 40 & 1 == 1 }

  public var description: String {
    bytes.map { $0 < 16 ? "0" + String($0, radix: 16) : String($0, radix: 16) }.joined(separator: ":")
  }
}

/// The header before every frame, `struct virtio_net_hdr_v1`: 12 bytes whether or not buffers are mergeable. Memory
/// layout is that of the specification.
public struct NetHeader: Hashable, Sendable {
  @inlinable public static var byteCount: Int { 12 }
  /// With `netHashReport`.
  @inlinable public static var hashReportByteCount: Int { 20 }

  /// `VIRTIO_NET_HDR_F_*`
  @inlinable public static var needsChecksum: UInt8 { 1 }
  @inlinable public static var dataValid: UInt8 { 2 }
  @inlinable public static var receiveCoalescingInfo: UInt8 { 4 }

  /// `VIRTIO_NET_HDR_GSO_*`
  @inlinable public static var gsoNone: UInt8 { 0 }
  @inlinable public static var gsoTCPv4: UInt8 { 1 }
  @inlinable public static var gsoUDP: UInt8 { 3 }
  @inlinable public static var gsoTCPv6: UInt8 { 4 }
  @inlinable public static var gsoUDPL4: UInt8 { 5 }
  /// May be added to a TCP kind.
  @inlinable public static var gsoECN: UInt8 { 0x80 }

  public var flags: UInt8 = 0
  public var gsoType: UInt8 = 0
  /// `hdr_len`: a hint only.
  public var headerLength: UInt16 = 0
  public var gsoSize: UInt16 = 0
  public var checksumStart: UInt16 = 0
  public var checksumOffset: UInt16 = 0
  /// `num_buffers`: how many buffers a received packet fills; 1 without mergeable buffers.
  public var bufferCount: UInt16 = 0

  @inlinable
  public init() {}
}

/// Numbers of the network device.
public enum NetSpec {
  /// Bits of `NetConfiguration.status`.
  @inlinable public static var linkUp: UInt16 { 1 }
  @inlinable public static var announce: UInt16 { 2 }

  /// Least and greatest of `mtu`.
  @inlinable public static var mtuRange: ClosedRange<UInt16> { 68...65535 }
  /// Greatest number of queue pairs.
  @inlinable public static var maxQueuePairs: UInt16 { 0x8000 }

  /// Receive queue of a pair; its transmit queue follows it.
  @inlinable public static func receiveQueue(pair: Int) -> Int { 2 * pair }
  @inlinable public static func transmitQueue(pair: Int) -> Int { 2 * pair + 1 }

  /// Control queue: classes, commands and answers.
  public enum Control {
    @inlinable public static var receive: UInt8 { 0 }
    @inlinable public static var receivePromiscuous: UInt8 { 0 }
    @inlinable public static var receiveAllMulticast: UInt8 { 1 }
    @inlinable public static var receiveAllUnicast: UInt8 { 2 }
    @inlinable public static var receiveNoMulticast: UInt8 { 3 }
    @inlinable public static var receiveNoUnicast: UInt8 { 4 }
    @inlinable public static var receiveNoBroadcast: UInt8 { 5 }
    @inlinable public static var mac: UInt8 { 1 }
    @inlinable public static var macTableSet: UInt8 { 0 }
    @inlinable public static var macAddressSet: UInt8 { 1 }
    @inlinable public static var vlan: UInt8 { 2 }
    @inlinable public static var vlanAdd: UInt8 { 0 }
    @inlinable public static var vlanDelete: UInt8 { 1 }
    @inlinable public static var announce: UInt8 { 3 }
    @inlinable public static var announceAcknowledge: UInt8 { 0 }
    @inlinable public static var multipleQueues: UInt8 { 4 }
    @inlinable public static var queuePairsSet: UInt8 { 0 }
    @inlinable public static var rssConfiguration: UInt8 { 1 }
    @inlinable public static var hashConfiguration: UInt8 { 2 }
    @inlinable public static var guestOffloads: UInt8 { 5 }
    @inlinable public static var guestOffloadsSet: UInt8 { 0 }
    @inlinable public static var notificationCoalescing: UInt8 { 6 }
    /// `VIRTIO_NET_OK`, `VIRTIO_NET_ERR`
    @inlinable public static var ok: UInt8 { 0 }
    @inlinable public static var error: UInt8 { 1 }
  }
}
