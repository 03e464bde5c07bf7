/// Names of virtio device types for `device_type=` and for tables (virtio 1.3, section 5; `linux/virtio_ids.h`).
package enum VirtioDeviceName {
  static let table: [(id: UInt16, name: String)] = [
    (1, "net"), (2, "block"), (3, "console"), (4, "rng"), (5, "balloon"), (7, "rpmsg"), (8, "scsi"), (9, "9p"),
    (11, "rproc-serial"), (16, "gpu"), (18, "input"), (19, "vsock"), (20, "crypto"), (23, "iommu"), (24, "mem"),
    (25, "sound"), (26, "fs"), (27, "pmem"), (28, "rpmb"), (30, "video-encoder"), (31, "video-decoder"), (32, "scmi"),
    (34, "i2c"), (35, "watchdog"), (36, "can"), (38, "parameter-server"), (39, "audio-policy"), (40, "bluetooth"),
    (41, "gpio"), (42, "rdma"), (45, "spi"),
  ]

  package static var names: [String] { table.map(\.name) }

  /// A name or a number from 1 to 63 (PCI device ids 0x1041 to 0x107F). Nil for anything else.
  package static func id(_ text: String) -> UInt16? {
    if let entry = table.first(where: { $0.name == text }) { return entry.id }
    if let number = Quantity.unsigned(text), (1...63).contains(number) { return UInt16(number) }
    return nil
  }

  package static func name(_ id: UInt16) -> String {
    table.first { $0.id == id }?.name ?? "type-\(id)"
  }
}
