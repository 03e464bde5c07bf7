import HostSystem

/// A back end's session on its socket: takes what came, handles it, sends the replies. Never waits.
///
///     var backEnd = BackEndConnection(socket, offer: BackEndOffer(features: [.version1], queueCount: 1))
///     try loop.add(backEnd.socket, for: .readable, token: .control)
///     // on .control:
///     try backEnd.receive(now: .now, &device)      // throws when the connection has to end
///
/// While `isBusy`, a ring is draining or a reset under way: stop watching the socket for reading (hang-up is still
/// reported), and call `finishStop` or `finishReset` when it is done.
@safe
public struct BackEndConnection: ~Copyable {
  public var session: BackEndSession
  var connection: Connection

  public init(_ socket: consuming OwnedFD, offer: BackEndOffer) {
    session = BackEndSession(offer: offer)
    connection = Connection(socket, expecting: .frontEndRequests, descriptorLimit: ReceivedDescriptors.capacity)
  }

  /// For the event loop, by number; see `Connection.socket`.
  public var socketNumber: CInt { connection.socket.rawValue }

  public var isBusy: Bool { session.isBusy }

  /// When a message that has begun must be whole; call `checkDeadline` then.
  public var deadline: MonotonicTime? { connection.deadline }

  /// Handles the requests that have come, at most `limit` so that a flood leaves time for the rings.
  ///
  /// - Throws: when the connection is to be closed: the front end left, or broke the protocol.
  public mutating func receive<D: BackEndDelegate & ~Copyable>(
    now: MonotonicTime, _ delegate: inout D, limit: Int = 64
  ) throws(VhostUserError) {
    for _ in 0..<limit {
      guard !session.isBusy, let message = try connection.receive(now: now) else { return }
      if let reply = try session.handle(message, &delegate) { try send(reply) }
    }
  }

  /// Fails when the front end began a message and does not finish it.
  public mutating func checkDeadline(now: MonotonicTime) throws(VhostUserError) { try connection.checkDeadline(now: now) }

  /// A ring that was draining is stopped.
  public mutating func finishStop(at index: Int, base: UInt32) throws(VhostUserError) {
    try send(session.finishStop(at: index, base: base))
  }

  /// A reset that took its time is done.
  public mutating func finishReset() throws(VhostUserError) {
    if let reply = try session.finishReset() { try send(reply) }
  }

  /// See `BackEndSession.notifyConfigurationChange`.
  @discardableResult
  public mutating func notifyConfigurationChange() -> Bool { session.notifyConfigurationChange() }

  private mutating func send(_ reply: consuming OutgoingReply) throws(VhostUserError) {
    // Borrowed, so that the descriptor is open until it was sent.
    switch reply.descriptor {
    case .some(let fd): try connection.send(reply.header, reply.payload, descriptors: [fd.rawValue])
    case .none: try connection.send(reply.header, reply.payload)
    }
  }
}
