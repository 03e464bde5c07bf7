// VhostUser: the vhost-user protocol, both ends of it.
//
// The module is in layers, each usable alone:
//   1. messages: one definition of every message for both ends (`FrontEndMessage`, `FrontEndReply`, `BackEndMessage`),
//      with a table of rules per request (`RequestRules`). Bytes in, checked values out, and back. No I/O.
//   2. `Connection`: frames messages and descriptors over a Unix stream socket without ever blocking.
//   3. `BackEndSession` and `FrontEndSession`: what each end has to remember and check between messages.
//
// It leaves to others: mapping the memory the regions describe, what runs in the rings, and the event loop that calls it.
//
//     let message = FrontEndMessage.setVringNum(VringState(index: 0, number: 256))
//     let bytes = message.header(needsReply: true).encoded + message.payload
//     let header = try MessageHeader(decoding: bytes.prefix(12))
//     let same = try FrontEndMessage(request: .setVringNum, payload: bytes.dropFirst(12))
//
// The prose is in `protocol/vhost-user.md`, the bytes in `protocol/vectors/vhost-user.txt`.

/// The twelve bytes in front of every message: request, flags, payload size; three 32-bit words in host byte order.
public struct MessageHeader: Equatable, Sendable {
  /// Bytes of an encoded header.
  public static let byteCount = 12
  /// The largest payload either end accepts or sends. The largest one defined is 2056 bytes (`GET_SHMEM_CONFIG`).
  public static let maximumPayload = 4096

  /// The number of the request; the front end's and the back end's requests are numbered separately.
  public var request: UInt32
  public var flags: MessageFlags
  /// Payload bytes that follow; the header is not counted.
  public var size: UInt32

  public init(request: UInt32, flags: MessageFlags, size: UInt32) {
    self.request = request
    self.flags = flags
    self.size = size
  }

  /// Takes the fields as they stand; `check` judges them.
  public init(decoding bytes: some Collection<UInt8>) throws(VhostUserError) {
    var reader = try WireReader(bytes, of: "message header", exactly: Self.byteCount)
    request = reader.u32()
    flags = MessageFlags(rawValue: reader.u32())
    size = reader.u32()
  }

  public var encoded: [UInt8] {
    var writer = WireWriter()
    writer.u32(request)
    writer.u32(flags.rawValue)
    writer.u32(size)
    return writer.bytes
  }

  /// What can be said of a request's header before its payload is read: version 1, no reply bit, reserved bits zero, a
  /// payload that fits. Whether the request is known is for the one who knows the direction.
  public func checkRequest() throws(VhostUserError) {
    try checkCommon()
    guard !flags.contains(.reply) else { throw .replyFlag(request: request, expected: false) }
  }

  /// What can be said of a reply's header: flags exactly `0x5`, the number of the outstanding request, a payload that fits.
  public func checkReply(to outstanding: UInt32) throws(VhostUserError) {
    try checkCommon()
    guard flags.contains(.reply) else { throw .replyFlag(request: request, expected: true) }
    guard flags == .replyExactly else { throw .reservedFlags(flags.rawValue) }
    guard request == outstanding else { throw .unexpectedReply(to: request, awaiting: outstanding) }
  }

  private func checkCommon() throws(VhostUserError) {
    guard flags.rawValue & MessageFlags.versionMask == MessageFlags.version1.rawValue else {
      throw .wrongVersion(flags.rawValue & MessageFlags.versionMask)
    }
    guard flags.rawValue & ~MessageFlags.defined == 0 else { throw .reservedFlags(flags.rawValue) }
    guard size <= UInt32(Self.maximumPayload) else { throw .payloadTooLarge(request: request, size: size) }
  }
}

/// The flags word of a header.
public struct MessageFlags: OptionSet, Equatable, Sendable {
  public var rawValue: UInt32

  public init(rawValue: UInt32) { self.rawValue = rawValue }

  /// Bits 0 and 1 hold the protocol version, which has been 1 since the beginning.
  public static let version1 = MessageFlags(rawValue: 0x1)
  /// `VHOST_USER_REPLY`: this message answers one.
  public static let reply = MessageFlags(rawValue: 0x4)
  /// `VHOST_USER_NEED_REPLY`: the sender wants an acknowledgement (`REPLY_ACK`).
  public static let needReply = MessageFlags(rawValue: 0x8)
  /// The only flags a reply may carry.
  public static let replyExactly: MessageFlags = [.version1, .reply]

  static let versionMask: UInt32 = 0x3
  static let defined: UInt32 = 0xF
}
