/// Protocol features, negotiated by `GET_PROTOCOL_FEATURES` and `SET_PROTOCOL_FEATURES`.
public struct ProtocolFeatures: OptionSet, Equatable, Hashable, Sendable {
  public var rawValue: UInt64

  public init(rawValue: UInt64) { self.rawValue = rawValue }

  public static let mq = ProtocolFeatures(rawValue: 1 << 0)
  /// The dirty log is passed as a descriptor and `SET_LOG_BASE` is answered.
  public static let logShmFD = ProtocolFeatures(rawValue: 1 << 1)
  public static let rarp = ProtocolFeatures(rawValue: 1 << 2)
  /// Requests without a reply of their own may ask for an acknowledgement.
  public static let replyAck = ProtocolFeatures(rawValue: 1 << 3)
  public static let netMTU = ProtocolFeatures(rawValue: 1 << 4)
  /// `BACKEND_REQ`: the back end gets a channel for requests of its own.
  public static let backEndRequests = ProtocolFeatures(rawValue: 1 << 5)
  public static let crossEndian = ProtocolFeatures(rawValue: 1 << 6)
  public static let cryptoSession = ProtocolFeatures(rawValue: 1 << 7)
  public static let pageFault = ProtocolFeatures(rawValue: 1 << 8)
  public static let config = ProtocolFeatures(rawValue: 1 << 9)
  public static let backEndSendsFD = ProtocolFeatures(rawValue: 1 << 10)
  public static let hostNotifier = ProtocolFeatures(rawValue: 1 << 11)
  public static let inflightShmFD = ProtocolFeatures(rawValue: 1 << 12)
  public static let resetDevice = ProtocolFeatures(rawValue: 1 << 13)
  public static let inbandNotifications = ProtocolFeatures(rawValue: 1 << 14)
  /// Regions can be added and removed one by one.
  public static let configureMemSlots = ProtocolFeatures(rawValue: 1 << 15)
  public static let status = ProtocolFeatures(rawValue: 1 << 16)
  public static let xenMmap = ProtocolFeatures(rawValue: 1 << 17)
  public static let sharedObject = ProtocolFeatures(rawValue: 1 << 18)
  public static let deviceState = ProtocolFeatures(rawValue: 1 << 19)
  /// `GET_VRING_BASE` with `num` 1 suspends a ring instead of draining it. Needs `inflightShmFD`.
  public static let getVringBaseInflight = ProtocolFeatures(rawValue: 1 << 20)
  /// Named so that it is recognised; never offered, because its wording is unsettled.
  public static let gpaAddresses = ProtocolFeatures(rawValue: 1 << 21)
  public static let sharedMemory = ProtocolFeatures(rawValue: 1 << 22)

  /// Names as the specification has them, by bit.
  static let names = [
    "MQ", "LOG_SHMFD", "RARP", "REPLY_ACK", "MTU", "BACKEND_REQ", "CROSS_ENDIAN", "CRYPTO_SESSION", "PAGEFAULT", "CONFIG",
    "BACKEND_SEND_FD", "HOST_NOTIFIER", "INFLIGHT_SHMFD", "RESET_DEVICE", "INBAND_NOTIFICATIONS", "CONFIGURE_MEM_SLOTS",
    "STATUS", "XEN_MMAP", "SHARED_OBJECT", "DEVICE_STATE", "GET_VRING_BASE_INFLIGHT", "GPA_ADDRESSES", "SHMEM",
  ]

  /// The specification's names of the bits that are set; bits without a name as `bit 40`.
  public var featureNames: [String] {
    (0..<64).filter { rawValue & (1 << UInt64($0)) != 0 }.map { $0 < Self.names.count ? Self.names[$0] : "bit \($0)" }
  }

  /// Without the bits that need another one which is not there: 14 needs 3 and 5, 20 needs 12, 22 needs 5.
  public var withoutUnmetDependencies: ProtocolFeatures {
    var features = self
    if !features.contains([.replyAck, .backEndRequests]) { features.remove(.inbandNotifications) }
    if !features.contains(.inflightShmFD) { features.remove(.getVringBaseInflight) }
    if !features.contains(.backEndRequests) { features.subtract([.sharedMemory, .hostNotifier]) }
    return features
  }
}
