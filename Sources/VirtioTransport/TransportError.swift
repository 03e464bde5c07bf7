import VirtioSpec

/// Why a function cannot be built from a description. All of these come from options of the user or from a back end.
package enum TransportError: Error, Equatable, Sendable {
  /// There must be 1 to `limit` queues.
  case queueCount(Int, limit: Int)
  /// The size of queue `index` is not a power of two from 1 to 32768.
  case queueSize(index: Int, size: UInt16)
  /// There must be 1 to `limit` interrupt vectors.
  case vectorCount(Int, limit: Int)
  /// The device configuration is longer than `limit` bytes.
  case configurationByteCount(Int, limit: Int)
  /// The device id has no PCI id: it is not 1 to 63.
  case device(DeviceID)
  /// BAR 0 cannot be at this address: it is not a multiple of the size of the BAR.
  case baseAddress(UInt64)
}

extension TransportError: CustomStringConvertible {
  package var description: String {
    switch self {
    case .queueCount(let count, let limit): "A virtio device needs 1 to \(limit) queues, not \(count)"
    case .queueSize(let index, let size):
      "Queue \(index) cannot have \(size) entries; use a power of two from 1 to 32768"
    case .vectorCount(let count, let limit): "A virtio device needs 1 to \(limit) interrupt vectors, not \(count)"
    case .configurationByteCount(let count, let limit):
      "The device configuration has \(count) bytes, of which at most \(limit) can be shown to a guest"
    case .device(let id): "Device id \(id.rawValue) cannot be shown on PCI; use 1 to \(DeviceID.greatest)"
    case .baseAddress(let address): "BAR 0 cannot be at 0x\(String(address, radix: 16)), which is not aligned to its size"
    }
  }
}
