import HostSystem

/// A front end that waits: for tools and tests, never for a process that serves a guest.
///
/// The typed half (`request`) speaks the protocol properly. The raw half sends any bytes with any descriptors and takes
/// whatever comes back, to find out how a back end treats a front end that misbehaves.
///
///     var frontEnd = BlockingFrontEnd(try UnixSocket.connect(to: path))
///     let features = try frontEnd.number(.getFeatures)
///     frontEnd.sendRaw([1, 0, 0, 0, 0x11, 0, 0, 0, 0, 0, 0, 0])
///     let answer = try frontEnd.receiveRaw()
@safe
public struct BlockingFrontEnd: ~Copyable {
  /// An answer with what came along.
  @frozen public struct Answer: ~Copyable {
    public let reply: Reply
    public var descriptors: ReceivedDescriptors
  }

  private var connection: Connection
  /// What was negotiated by `request(.setProtocolFeatures)`; decides about acknowledgements and the log's reply.
  public var protocolFeatures: ProtocolFeatures = []
  /// How long `request` and `receiveRaw` wait for a whole message.
  public var timeout: Duration = .seconds(5)

  public init(_ socket: consuming OwnedFD) {
    connection = Connection(socket, expecting: .anything, descriptorLimit: ReceivedDescriptors.capacity)
  }

  public var socketNumber: CInt { connection.socket.rawValue }

  /// Sends a request and waits for its reply: its own, or the acknowledgement where that was negotiated. Without either
  /// the request is followed by `GET_FEATURES` and its reply, so that it has been processed when this returns.
  ///
  /// - Throws: `peerRefused` when the acknowledgement is not zero.
  public mutating func request(_ message: FrontEndMessage, descriptors: [CInt] = []) throws(VhostUserError) -> Answer {
    let request = message.request
    let expected: ReplyPayload?
    switch request.rules.reply {
    case .always(let payload): expected = payload
    case .with(let feature, let payload): expected = protocolFeatures.contains(feature) ? payload : nil
    case .acknowledgement: expected = nil
    }
    let acknowledges = expected == nil && protocolFeatures.contains(.replyAck) && request != .setProtocolFeatures
    try connection.send(message.header(needsReply: acknowledges), message.payload, descriptors: descriptors)
    if case .setProtocolFeatures(let features) = message { protocolFeatures = features }
    if expected == nil, !acknowledges { return try self.request(.getFeatures) }
    connection.expectation = .reply(to: request.rawValue)
    defer { connection.expectation = .anything }
    guard let incoming = try receive() else {
      throw .noReply(to: request.name, milliseconds: Int(timeout.nanoseconds / 1_000_000))
    }
    let reply = try Reply(expected ?? .number, payload: incoming.payload)
    try reply.checkDescriptorCount(incoming.descriptors.count, expected ?? .number)
    if acknowledges, case .number(let code) = reply, code != 0 { throw .peerRefused(request: request.name, code: code) }
    return Answer(reply: reply, descriptors: incoming.descriptors)
  }

  /// As `request`, for a reply that is a number.
  public mutating func number(_ message: FrontEndMessage) throws(VhostUserError) -> UInt64 {
    let answer = try request(message)
    guard case .number(let value) = answer.reply else { throw .misuse("\(message.request.name) is not answered by a number") }
    return value
  }

  /// Sends bytes as they are.
  @discardableResult
  public mutating func sendRaw(_ bytes: [UInt8], descriptors: [CInt] = []) -> Transfer {
    connection.sendRaw(bytes, descriptors: descriptors)
  }

  /// Sends a header and a payload that need not fit each other.
  @discardableResult
  public mutating func sendRaw(_ header: MessageHeader, _ payload: [UInt8], descriptors: [CInt] = []) -> Transfer {
    connection.sendRaw(header.encoded + payload, descriptors: descriptors)
  }

  /// The next message, whatever it is; nil when none came in time.
  ///
  /// - Throws: `closed` when the back end closed the connection.
  public mutating func receiveRaw() throws(VhostUserError) -> IncomingMessage? { try receive() }

  private mutating func receive() throws(VhostUserError) -> IncomingMessage? {
    let end = MonotonicTime.now.advanced(by: timeout)
    while true {
      if let message = try connection.receive(now: .now) { return message }
      let now = MonotonicTime.now
      guard now < end else { return nil }
      do { try connection.socket.waitUntil(.readable, timeout: end.since(now)) } catch { throw .system("waiting", error.errno) }
    }
  }
}
