import Glibc
import HostSystem

/// Captured frames in the classic file format of libpcap (not pcapng), Ethernet only.
package enum PcapFile {
  static let headerByteCount = 24
  static let recordByteCount = 16
  private static let microseconds: UInt32 = 0xA1B2_C3D4
  private static let nanoseconds: UInt32 = 0xA1B2_3C4D
  private static let ethernet: UInt32 = 1
  static let longestFrame = 65549

  package struct Frame: Equatable, Sendable {
    /// Since the epoch.
    package var nanoseconds: UInt64
    package var bytes: [UInt8]

    package init(nanoseconds: UInt64, bytes: [UInt8]) {
      self.nanoseconds = nanoseconds
      self.bytes = bytes
    }
  }

  /// All frames of a file.
  package static func read(_ bytes: [UInt8], name: String) throws(ProbeError) -> [Frame] {
    guard bytes.count >= headerByteCount else { throw .unsuitable("\(name) is no capture file: it has \(bytes.count) bytes") }
    let magic = UInt32(bytes.number(at: 0, 4))
    let isForeign = magic.byteSwapped == microseconds || magic.byteSwapped == nanoseconds
    let native = isForeign ? magic.byteSwapped : magic
    guard native == microseconds || native == nanoseconds else {
      throw .unsuitable(
        "\(name) is no capture file in libpcap's format" + (magic == 0x0A0D_0D0A ? " but pcapng; convert it with: editcap -F pcap" : ""))
    }
    func number(_ offset: Int) -> UInt32 {
      var value: UInt32 = 0
      for index in 0..<4 { value |= UInt32(bytes[offset + index]) << UInt32(8 * index) }
      return isForeign ? value.byteSwapped : value
    }
    guard number(20) & 0x0FFF_FFFF == ethernet else {
      throw .unsuitable("\(name) holds frames of link type \(number(20) & 0x0FFF_FFFF); Ethernet (1) is needed")
    }
    let unit: UInt64 = native == nanoseconds ? 1 : 1000
    var frames: [Frame] = []
    var offset = headerByteCount
    // Bounded: every turn goes on in the file.
    while offset < bytes.count {
      guard bytes.count - offset >= recordByteCount, number(offset + 8) <= longestFrame,
        bytes.count - offset - recordByteCount >= Int(number(offset + 8))
      else { throw .unsuitable("\(name) breaks off or is damaged at byte \(offset), after \(frames.count) frames") }
      let time = UInt64(number(offset)) * 1_000_000_000 + UInt64(number(offset + 4)) * unit
      let count = Int(number(offset + 8))
      frames.append(Frame(nanoseconds: time, bytes: Array(bytes[offset + recordByteCount..<offset + recordByteCount + count])))
      offset += recordByteCount + count
    }
    return frames
  }

  static func bytes(_ value: UInt32) -> [UInt8] { (0..<4).map { UInt8(truncatingIfNeeded: value >> UInt32(8 * $0)) } }

  package static var header: [UInt8] {
    bytes(nanoseconds) + [2, 0, 4, 0] + bytes(0) + bytes(0) + bytes(UInt32(longestFrame)) + bytes(ethernet)
  }

  package static func record(_ frame: Frame) -> [UInt8] {
    let count = bytes(UInt32(frame.bytes.count))
    return bytes(UInt32(truncatingIfNeeded: frame.nanoseconds / 1_000_000_000)) + bytes(UInt32(frame.nanoseconds % 1_000_000_000)) + count
      + count + frame.bytes
  }
}
