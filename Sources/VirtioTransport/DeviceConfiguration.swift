/// The device configuration as the guest reads it: a copy, so that no read ever waits for a back end, with the counter
/// by which a driver notices a change between two reads.
package struct DeviceConfiguration: Sendable {
  package private(set) var bytes: [UInt8]
  /// The bytes a driver may write.
  let writable: [Range<Int>]
  /// `config_generation`
  package private(set) var generation: UInt8 = 0
  /// The bytes have changed since the driver last read any. The counter moves at the driver's next read and not at the
  /// change, so 256 changes between two reads cannot bring it back to where it was.
  private var hasUnseenChange = false

  init(bytes: [UInt8], writable: [Range<Int>]) {
    self.bytes = bytes
    self.writable = writable
  }

  /// The value at `offset`, little-endian; bytes beyond the end are zero.
  mutating func read(offset: Int, width: Int) -> UInt64 {
    if hasUnseenChange {
      hasUnseenChange = false
      generation &+= 1
    }
    var value: UInt64 = 0
    for index in 0..<width where offset + index < bytes.count {
      value |= UInt64(bytes[offset + index]) << UInt64(8 * index)
    }
    return value
  }

  /// Stores the bytes that a driver may write and reports each run of them.
  mutating func write(offset: Int, width: Int, value: UInt64, effects: inout [TransportEffect]) {
    for range in writable {
      let touched = range.clamped(to: offset..<(offset + width)).clamped(to: 0..<bytes.count)
      guard !touched.isEmpty else { continue }
      for index in touched {
        bytes[index] = UInt8(truncatingIfNeeded: value >> UInt64(8 * (index - offset)))
      }
      effects.append(.configurationWritten(offset: touched.lowerBound, bytes: Array(bytes[touched])))
    }
  }

  /// Replaces the bytes from `offset` on, as far as they exist; true if any is different now.
  mutating func replace(from offset: Int, with new: [UInt8]) -> Bool {
    guard offset >= 0, offset < bytes.count else { return false }
    let count = min(new.count, bytes.count - offset)
    let target = offset..<(offset + count)
    guard bytes[target] != new[..<count] else { return false }
    bytes.replaceSubrange(target, with: new[..<count])
    hasUnseenChange = true
    return true
  }
}
