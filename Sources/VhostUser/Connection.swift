import HostSystem

/// One complete message as it came from the peer: the header was checked, the payload is whole, nothing was decoded yet.
/// Descriptors not taken are closed with it.
@frozen public struct IncomingMessage: ~Copyable {
  public let header: MessageHeader
  public let payload: [UInt8]
  public var descriptors: ReceivedDescriptors

  public init(header: MessageHeader, payload: [UInt8], descriptors: consuming ReceivedDescriptors) {
    self.header = header
    self.payload = payload
    self.descriptors = descriptors
  }
}

/// Frames messages over a connected Unix stream socket. It never waits: `receive` takes what is there, and a send that
/// does not fit into the socket's buffer is the peer's fault, because with one outstanding request per direction a peer
/// that reads cannot fill it.
///
/// Descriptors are accepted with the first byte of a message only. After an error the connection is dead and repeats it.
@safe
public struct Connection: ~Copyable {
  /// What may come in now; the header is judged by it before the payload is read.
  public enum Expectation: Equatable, Sendable {
    /// Requests of the front end (we are the back end).
    case frontEndRequests
    /// Requests of the back end (we are the front end, on the back end's channel).
    case backEndRequests
    /// The answer to the request of this number.
    case reply(to: UInt32)
    /// Nothing: a message now breaks the protocol.
    case nothing
    /// Whatever has a payload that fits; for tools that look at peers which misbehave.
    case anything
  }

  /// From the first byte of a message to its last.
  public static var messageTimeout: Duration { .seconds(1) }

  public let socket: OwnedFD
  public var expectation: Expectation
  /// Most descriptors that may ride on one message; more are closed by the kernel, which is fatal.
  public let descriptorLimit: Int

  private var buffer: [UInt8]
  private var filled = 0
  /// Bytes until the header, then until the message is whole.
  private var needed = MessageHeader.byteCount
  private var header: MessageHeader?
  private var descriptors = ReceivedDescriptors()
  private var firstByteTime: MonotonicTime?
  private var failure: VhostUserError?

  /// - Parameter descriptorLimit: 32 suits a back end, 8 a front end.
  public init(_ socket: consuming OwnedFD, expecting expectation: Expectation, descriptorLimit: Int) {
    self.socket = socket
    self.expectation = expectation
    self.descriptorLimit = min(descriptorLimit, ReceivedDescriptors.capacity)
    buffer = Array(repeating: 0, count: MessageHeader.byteCount + MessageHeader.maximumPayload)
  }

  /// When a message that has begun must be whole; nil between messages.
  public var deadline: MonotonicTime? { firstByteTime?.advanced(by: Self.messageTimeout) }

  /// The next complete message, or nil when the rest of it has not come yet. Call again until nil: each call returns one.
  public mutating func receive(now: MonotonicTime) throws(VhostUserError) -> IncomingMessage? {
    if let failure { throw failure }
    do throws(VhostUserError) {
      return try receiveMore(now)
    } catch {
      fail(error)
      throw error
    }
  }

  /// Fails when a message was begun too long ago.
  public mutating func checkDeadline(now: MonotonicTime) throws(VhostUserError) {
    if let failure { throw failure }
    if let deadline, now >= deadline {
      fail(.incompleteMessage)
      throw .incompleteMessage
    }
  }

  private mutating func fail(_ error: VhostUserError) {
    failure = error
    descriptors.closeAll()
    firstByteTime = nil
  }

  private mutating func receiveMore(_ now: MonotonicTime) throws(VhostUserError) -> IncomingMessage? {
    try checkDeadline(now: now)
    // Bounded: every turn but two per message takes at least one of the at most 12 + 4096 bytes, or leaves.
    while true {
      if filled == needed {
        if header == nil {
          let header = try checkedHeader()
          self.header = header
          needed += Int(header.size)
          continue
        }
        return takeMessage()
      }
      let limit = filled == 0 ? descriptorLimit : 0
      let reception = Self.fill(&buffer, filled..<needed, &descriptors, from: socket, limit)
      guard !reception.isTruncated else { throw .strayDescriptors }
      switch reception.transfer {
      case .bytes(let count):
        if filled == 0 { firstByteTime = now }
        filled += count
      case .wouldBlock: return nil
      case .end, .failed(.connectionReset), .failed(.brokenPipe): throw .closed(midMessage: filled > 0)
      case .failed(let errno): throw .system("receiving", errno)
      }
    }
  }

  private static func fill(
    _ buffer: inout [UInt8], _ range: Range<Int>, _ descriptors: inout ReceivedDescriptors, from socket: borrowing OwnedFD,
    _ limit: Int
  ) -> (transfer: Transfer, isTruncated: Bool) {
    // SAFETY: the range lies inside the buffer, which has room for a header and the largest payload and is ours alone.
    unsafe buffer.withUnsafeMutableBytes { bytes in
      let reception = unsafe UnixSocket.receive(
        socket, into: UnsafeMutableRawBufferPointer(rebasing: bytes[range]), descriptorLimit: limit, waiting: false)
      let outcome = (reception.transfer, reception.truncated)
      descriptors.append(reception.descriptors)
      return outcome
    }
  }

  private func checkedHeader() throws(VhostUserError) -> MessageHeader {
    let header = try MessageHeader(decoding: buffer[..<MessageHeader.byteCount])
    switch expectation {
    case .frontEndRequests:
      try header.checkRequest()
      guard let request = FrontEndRequest(rawValue: header.request) else { throw .unknownRequest(header.request) }
      try check(header, request.rules.size, request.name)
    case .backEndRequests:
      try header.checkRequest()
      guard let request = BackEndRequest(rawValue: header.request) else { throw .unknownRequest(header.request) }
      try check(header, request.rules.size, request.name)
    case .reply(let outstanding): try header.checkReply(to: outstanding)
    case .nothing: throw .unsolicited(request: header.request)
    case .anything:
      guard header.size <= UInt32(MessageHeader.maximumPayload) else {
        throw .payloadTooLarge(request: header.request, size: header.size)
      }
    }
    return header
  }

  private func check(_ header: MessageHeader, _ rule: RequestRules.SizeRule, _ name: String) throws(VhostUserError) {
    guard rule.allows(Int(header.size)) else {
      throw .wrongSize(of: "payload of \(name)", expected: rule.example, actual: Int(header.size))
    }
  }

  private mutating func takeMessage() -> IncomingMessage? {
    guard let header else { return nil }
    var taken = ReceivedDescriptors()
    swap(&taken, &descriptors)
    let payload = Array(buffer[MessageHeader.byteCount..<needed])
    self.header = nil
    filled = 0
    needed = MessageHeader.byteCount
    firstByteTime = nil
    return IncomingMessage(header: header, payload: payload, descriptors: taken)
  }

  /// Sends a whole message, descriptors with its first byte. Never waits.
  ///
  /// - Parameter descriptors: numbers that stay open for the call.
  public mutating func send(_ header: MessageHeader, _ payload: [UInt8], descriptors: [CInt] = []) throws(VhostUserError) {
    if let failure { throw failure }
    do throws(VhostUserError) {
      try Self.send(header.encoded + payload, descriptors, to: socket)
    } catch {
      fail(error)
      throw error
    }
  }

  private static func send(_ bytes: [UInt8], _ descriptors: [CInt], to socket: borrowing OwnedFD) throws(VhostUserError) {
    switch UnixSocket.send(socket, bytes, descriptors: descriptors, waiting: false) {
    case .bytes(bytes.count): return
    case .bytes, .wouldBlock: throw .peerDoesNotRead
    case .end, .failed(.brokenPipe), .failed(.connectionReset): throw .closed(midMessage: false)
    case .failed(let errno): throw .system("sending", errno)
    }
  }

  /// Sends bytes as they are, without any check; for tools and tests that play a broken peer.
  public borrowing func sendRaw(_ bytes: [UInt8], descriptors: [CInt] = []) -> Transfer {
    UnixSocket.send(socket, bytes, descriptors: descriptors, waiting: false)
  }
}

extension RequestRules.SizeRule {
  /// A size the rule allows, for messages.
  var example: Int {
    switch self {
    case .exactly(let size), .either(let size, _): size
    case .within(let range): range.lowerBound
    }
  }
}
