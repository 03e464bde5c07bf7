/// The words of the NBD protocol (the project's doc/proto.md): big-endian, fixed newstyle.
package enum NBDWire {
  static let greeting: UInt64 = 0x4E42_444D_4147_4943  // "NBDMAGIC"
  static let option: UInt64 = 0x4948_4156_454F_5054  // "IHAVEOPT"
  static let optionReply: UInt64 = 0x0003_E889_0455_65A9
  static let request: UInt32 = 0x2560_9513
  static let simpleReply: UInt32 = 0x6744_6698
  static let structuredReply: UInt32 = 0x668E_33EF

  /// Handshake flags: fixed newstyle, no zeroes.
  static let fixedNewstyle: UInt16 = 1
  static let noZeroes: UInt16 = 2

  enum Option: UInt32 {
    case exportName = 1
    case abort, list
    case startTLS = 5
    case info, go
    case structuredReply = 8
  }

  enum OptionReply: UInt32 {
    case acknowledge = 1
    case server, info
    case unsupported = 0x8000_0001
    case policy = 0x8000_0002
    case invalid = 0x8000_0003
    case unknown = 0x8000_0006
  }

  /// What an `info` reply tells.
  static let infoExport: UInt16 = 0
  static let infoBlockSize: UInt16 = 3

  package struct TransmissionFlags: OptionSet, Sendable {
    package let rawValue: UInt16
    package init(rawValue: UInt16) { self.rawValue = rawValue }
    static let hasFlags = TransmissionFlags(rawValue: 1)
    static let readOnly = TransmissionFlags(rawValue: 1 << 1)
    static let flush = TransmissionFlags(rawValue: 1 << 2)
    static let forceUnitAccess = TransmissionFlags(rawValue: 1 << 3)
    static let trim = TransmissionFlags(rawValue: 1 << 5)
    static let writeZeroes = TransmissionFlags(rawValue: 1 << 6)
    static let dontFragment = TransmissionFlags(rawValue: 1 << 7)
    static let multipleConnections = TransmissionFlags(rawValue: 1 << 8)
  }

  enum Command: UInt16 {
    case read, write, disconnect, flush, trim
    case writeZeroes = 6
  }

  static let commandForceUnitAccess: UInt16 = 1
  static let commandNoHole: UInt16 = 2
  static let commandDontFragment: UInt16 = 4

  enum Failure: UInt32 {
    case notPermitted = 1
    case inputOutput = 5
    case invalid = 22
    case noSpace = 28
    case notSupported = 95
  }

  /// Chunks of structured replies.
  static let chunkDone: UInt16 = 1
  static let chunkData: UInt16 = 1
  static let chunkError: UInt16 = 0x8001

  static let requestByteCount = 28
  static let optionByteCount = 16
  /// The most a client may read or write at once; libnbd and QEMU stay below.
  static let longestTransfer: UInt64 = 32 << 20
  static let longestOption = 16384

  static func bytes<T: FixedWidthInteger>(_ value: T) -> [UInt8] {
    (0..<T.bitWidth / 8).reversed().map { UInt8(truncatingIfNeeded: value >> T(8 * $0)) }
  }
}

extension Collection<UInt8> {
  /// A big-endian number of `count` bytes at `offset`; bytes that are not there are zero.
  func bigEndian(at offset: Int, _ count: Int) -> UInt64 {
    var value: UInt64 = 0
    var seen = 0
    for byte in dropFirst(offset).prefix(count) {
      value = value << 8 | UInt64(byte)
      seen += 1
    }
    return value << UInt64(8 * (count - seen))
  }
}
