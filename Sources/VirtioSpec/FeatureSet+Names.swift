extension FeatureSet {
  /// The specification's names of the bits, in rising order, as `device` means them; "bit N" where it has no name.
  public func names(for device: DeviceID?) -> [String] {
    let table = device.map(Self.deviceNames(of:)) ?? []
    return bits.map { bit in
      (table + Self.transportNames).first { $0.bit == bit }?.name ?? "bit \(bit)"
    }
  }

  /// Whether `device` gives the bit a meaning of its own; true for devices whose bits are not listed here.
  public static func hasName(bit: Int, _ device: DeviceID) -> Bool {
    deviceNames(of: device).contains { $0.bit == bit } || !isListed(device)
  }

  /// Devices of which it is known which bits they have; entropy sources have none.
  private static func isListed(_ device: DeviceID) -> Bool { device == .entropy || !deviceNames(of: device).isEmpty }

  /// Names of ring and transport bits.
  static let transportNames: [(bit: Int, name: String)] = [
    (24, "NOTIFY_ON_EMPTY"), (26, "LOG_ALL"), (27, "ANY_LAYOUT"), (28, "INDIRECT_DESC"), (29, "EVENT_IDX"),
    (30, "PROTOCOL_FEATURES"), (32, "VERSION_1"), (33, "ACCESS_PLATFORM"), (34, "RING_PACKED"), (35, "IN_ORDER"),
    (36, "ORDER_PLATFORM"), (37, "SR_IOV"), (38, "NOTIFICATION_DATA"), (39, "NOTIF_CONFIG_DATA"), (40, "RING_RESET"),
    (41, "ADMIN_VQ"), (43, "SUSPEND"),
  ]

  /// Names of the bits that only `device` knows.
  static func deviceNames(of device: DeviceID) -> [(bit: Int, name: String)] {
    switch device {
    case .block:
      [
        (1, "SIZE_MAX"), (2, "SEG_MAX"), (4, "GEOMETRY"), (5, "RO"), (6, "BLK_SIZE"), (9, "FLUSH"), (10, "TOPOLOGY"),
        (11, "CONFIG_WCE"), (12, "MQ"), (13, "DISCARD"), (14, "WRITE_ZEROES"), (15, "LIFETIME"),
        (16, "SECURE_ERASE"), (17, "ZONED"),
      ]
    case .net:
      [
        (0, "CSUM"), (1, "GUEST_CSUM"), (2, "CTRL_GUEST_OFFLOADS"), (3, "MTU"), (5, "MAC"), (7, "GUEST_TSO4"),
        (8, "GUEST_TSO6"), (9, "GUEST_ECN"), (10, "GUEST_UFO"), (11, "HOST_TSO4"), (12, "HOST_TSO6"),
        (13, "HOST_ECN"), (14, "HOST_UFO"), (15, "MRG_RXBUF"), (16, "STATUS"), (17, "CTRL_VQ"), (18, "CTRL_RX"),
        (19, "CTRL_VLAN"), (20, "CTRL_RX_EXTRA"), (21, "GUEST_ANNOUNCE"), (22, "MQ"), (23, "CTRL_MAC_ADDR"),
        (50, "DEVICE_STATS"), (51, "HASH_TUNNEL"), (52, "VQ_NOTF_COAL"), (53, "NOTF_COAL"), (54, "GUEST_USO4"),
        (55, "GUEST_USO6"), (56, "HOST_USO"), (57, "HASH_REPORT"), (59, "GUEST_HDRLEN"), (60, "RSS"),
        (61, "RSC_EXT"), (62, "STANDBY"), (63, "SPEED_DUPLEX"),
      ]
    case .console:
      [
        (0, "SIZE"), (1, "MULTIPORT"), (2, "EMERG_WRITE"),
      ]
    case .fileSystem:
      [
        (0, "NOTIFICATION")
      ]
    case .balloon:
      [
        (0, "MUST_TELL_HOST"), (1, "STATS_VQ"), (2, "DEFLATE_ON_OOM"), (3, "FREE_PAGE_HINT"), (4, "PAGE_POISON"),
        (5, "PAGE_REPORTING"),
      ]
    case .vsock:
      [
        (0, "STREAM"), (1, "SEQPACKET"), (2, "NO_IMPLIED_STREAM"),
      ]
    case .persistentMemory:
      [
        (0, "SHMEM_REGION")
      ]
    case .scsi:
      [
        (0, "INOUT"), (1, "HOTPLUG"), (2, "CHANGE"), (3, "T10_PI"),
      ]
    default: []
    }
  }
}
