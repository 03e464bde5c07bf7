/// Names of vhost-user protocol feature bits (`VHOST_USER_PROTOCOL_F_*`), for people.
package enum ProtocolFeatureName {
  private static let table: [(bit: Int, name: String)] = [
    (0, "MQ"), (1, "LOG_SHMFD"), (2, "RARP"), (3, "REPLY_ACK"), (4, "NET_MTU"), (5, "BACKEND_REQ"),
    (6, "CROSS_ENDIAN"), (7, "CRYPTO_SESSION"), (8, "PAGEFAULT"), (9, "CONFIG"), (10, "BACKEND_SEND_FD"),
    (11, "HOST_NOTIFIER"), (12, "INFLIGHT_SHMFD"), (13, "RESET_DEVICE"), (14, "INBAND_NOTIFICATIONS"),
    (15, "CONFIGURE_MEM_SLOTS"), (16, "STATUS"), (17, "XEN_MMAP"), (18, "SHARED_OBJECT"), (19, "DEVICE_STATE"),
    (20, "GET_VRING_BASE_INFLIGHT"),
  ]

  /// The names of the bits set, in rising order; "bit N" where there is none.
  package static func names(_ bits: UInt64) -> [String] {
    (0..<64).filter { bits >> UInt64($0) & 1 == 1 }.map { bit in
      table.first { $0.bit == bit }?.name ?? "bit \(bit)"
    }
  }
}
