import HostSystem

/// Why a message, a connection or a session failed. Cases up to `tooManyMessages` are the peer's doing.
public enum VhostUserError: Error, Equatable, Sendable {
  /// The header's version bits are not 1.
  case wrongVersion(UInt32)
  /// A flag that must be zero is set; the whole flags word.
  case reservedFlags(UInt32)
  /// A request came marked as a reply, or a reply without the mark.
  case replyFlag(request: UInt32, expected: Bool)
  /// A reply came to another request than the outstanding one.
  case unexpectedReply(to: UInt32, awaiting: UInt32)
  /// A message came where none may: a reply with no request outstanding.
  case unsolicited(request: UInt32)
  /// The number names no request of this direction.
  case unknownRequest(UInt32)
  /// The header announces more than `MessageHeader.maximumPayload` bytes.
  case payloadTooLarge(request: UInt32, size: UInt32)
  /// A payload has a size its message does not have, in bytes.
  case wrongSize(of: String, expected: Int, actual: Int)
  /// A field holds a value it may not hold.
  case invalidValue(field: String, value: UInt64)
  /// Two regions of a memory table overlap; the guest or user address where the second one starts.
  case overlappingRegions(at: UInt64)
  /// A message carried another number of descriptors than its rule says.
  case wrongDescriptorCount(message: String, allowed: ClosedRange<Int>, actual: Int)
  /// The kernel had to drop descriptors or the peer attached them where none are allowed.
  case strayDescriptors
  /// A request whose feature was not negotiated, or which this end never offers.
  case notNegotiated(request: String)
  /// A request that does not fit the state the session is in.
  case wrongState(request: String, why: String)
  /// The owner of the session refused what the request asked for; `code` is an errno value.
  case refused(request: String, why: String, code: UInt64)
  /// The peer acknowledged a request with a failure.
  case peerRefused(request: String, code: UInt64)
  /// The peer closed the connection, between messages or in the middle of one.
  case closed(midMessage: Bool)
  /// A message was begun and not finished in time.
  case incompleteMessage
  /// A reply did not come in time.
  case noReply(to: String, milliseconds: Int)
  /// Rings were stopped by GET_VRING_BASE, and what had been taken from them was not finished in time.
  case unfinished(rings: Int)
  /// The peer lacks a feature that is needed.
  case missingFeature(String)
  /// What the peer offers now is less than what was fixed at first contact.
  case offerShrank(String)
  /// The back end sends more messages than its budget allows.
  case tooManyMessages
  /// The peer leaves a whole socket buffer of messages unread.
  case peerDoesNotRead
  /// The caller asked for something the session cannot do now; our bug, or a request too early.
  case misuse(String)
  /// The kernel refused an operation on the socket; what we were doing.
  case system(String, Errno)
}

extension VhostUserError: CustomStringConvertible {
  public var description: String {
    switch self {
    case .wrongVersion(let version): "The message has protocol version \(version); only 1 exists"
    case .reservedFlags(let flags): "The message has reserved flags set (flags 0x\(hex(flags)))"
    case .replyFlag(let request, true): "The answer to request \(request) is not marked as a reply"
    case .replyFlag(let request, false): "Request \(request) came marked as a reply"
    case .unexpectedReply(let to, let awaiting): "A reply to request \(to) came while request \(awaiting) was outstanding"
    case .unsolicited(let request): "A message (\(request)) came though nothing was asked"
    case .unknownRequest(let number): "Request \(number) does not exist"
    case .payloadTooLarge(let request, let size):
      "Request \(request) announces \(size) payload bytes; at most \(MessageHeader.maximumPayload) are accepted"
    case .wrongSize(let what, let expected, let actual): "The \(what) has \(actual) bytes instead of \(expected)"
    case .invalidValue(let field, let value): "The \(field) has the impossible value 0x\(hex(value))"
    case .overlappingRegions(let start): "The memory region at 0x\(hex(start)) overlaps another one"
    case .wrongDescriptorCount(let message, let allowed, let actual):
      "The message \(message) carried \(actual) descriptors instead of \(allowed.lowerBound)"
        + (allowed.count > 1 ? " to \(allowed.upperBound)" : "")
    case .strayDescriptors: "Descriptors arrived where the protocol allows none"
    case .notNegotiated(let request): "The request \(request) was sent without its feature being negotiated"
    case .wrongState(let request, let why): "The request \(request) came at the wrong time: \(why)"
    case .refused(let request, let why, _): "The request \(request) was refused: \(why)"
    case .peerRefused(let request, let code): "The peer refused \(request) with code \(code)"
    case .closed(true): "The peer closed the connection in the middle of a message"
    case .closed(false): "The peer closed the connection"
    case .unfinished(let rings):
      "The peer answered GET_VRING_BASE with requests in flight, and those of \(rings) ring\(rings == 1 ? "" : "s") were not finished in time"
    case .incompleteMessage: "The peer began a message and did not finish it in time"
    case .noReply(let request, let milliseconds): "The peer did not answer \(request) within \(milliseconds) ms"
    case .missingFeature(let feature): "The peer does not offer \(feature), which is needed"
    case .offerShrank(let what): "The peer now offers less than at first contact: \(what)"
    case .tooManyMessages: "The back end floods its message channel"
    case .peerDoesNotRead: "The peer does not read its messages"
    case .misuse(let why): "The vhost-user session was used wrongly: \(why)"
    case .system(let doing, let errno): "The vhost-user socket failed while \(doing): \(errno.explanation)"
    }
  }
}

func hex(_ value: some BinaryInteger) -> String { String(value, radix: 16) }
