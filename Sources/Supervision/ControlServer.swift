import CLinux
import ControlProtocol
import HostSystem

/// The listening socket for `martlet ctl` and its connections. One request line of words, one JSON object line back; a
/// connection may carry several. One that follows events gets a line for each from then on.
///
/// Nobody is waited for: what a client does not read is kept, up to a limit for each. Beyond it answers are lost, and so are
/// events, of which it is told how many.
final class ControlServer {
  /// More are refused at once.
  static let clientLimit = 16
  /// A longer request line ends its connection.
  static let lineLimit = 4096
  /// Bytes that are kept for a client that does not read, behind what its socket holds.
  static let answerLimit = 1 << 20
  static let eventLimit = 64 << 10

  private final class Client {
    let socket: OwnedFD
    var received: [UInt8] = []
    /// What its socket has not taken yet: the rest of a line, and whole ones.
    var outgoing: [UInt8] = []
    var followsEvents = false
    /// Since it was told last.
    var missedCount: UInt64 = 0
    var isWatchedForWriting = false

    init(_ socket: consuming OwnedFD) { self.socket = socket }
  }

  private let listener: OwnedFD
  private var clients: [Int: Client] = [:]
  private var nextID = 0

  init(_ listener: consuming OwnedFD) {
    try? listener.setNonBlocking(true)
    self.listener = listener
  }

  var number: CInt { listener.rawValue }

  /// What was served before an upgrade.
  init(_ listener: consuming OwnedFD, _ state: SupervisorState) throws(SupervisionError) {
    self.listener = listener
    nextID = Int(state.nextClient)
    for known in state.clients {
      let client = Client(try UpgradedProgram.adopt(known.socket))
      client.received = known.received
      client.outgoing = known.outgoing
      client.followsEvents = known.followsEvents
      client.missedCount = known.missedCount
      clients[Int(known.id)] = client
    }
  }

  /// The same, to be handed on.
  func capture(_ state: inout SupervisorState) {
    state.listener = listener.rawValue
    state.nextClient = UInt32(clamping: nextID)
    for (id, client) in clients.sorted(by: { $0.key < $1.key }) {
      guard client.outgoing.count <= SupervisorState.Client.longestRest else { continue }
      state.clients.append(
        .init(
          id: UInt32(clamping: id), socket: client.socket.rawValue, received: client.received, outgoing: client.outgoing,
          followsEvents: client.followsEvents, missedCount: client.missedCount))
    }
  }

  /// All connections, as id and descriptor number.
  var connections: [(id: Int, number: CInt)] { clients.map { ($0.key, $0.value.socket.rawValue) } }

  /// New connections as id and descriptor number, to be watched.
  func accept() -> [(id: Int, number: CInt)] {
    var accepted: [(id: Int, number: CInt)] = []
    // Bounded, so that a flood of connections cannot keep the loop here.
    for _ in 0..<Self.clientLimit {
      guard case .some(let socket) = try? UnixSocket.accept(listener) else { break }
      guard clients.count < Self.clientLimit else { continue }  // dropped: closed at once
      try? socket.setNonBlocking(true)
      let client = Client(socket)
      nextID += 1
      clients[nextID] = client
      accepted.append((nextID, client.socket.rawValue))
    }
    return accepted
  }

  enum Input {
    case lines([String])
    /// An order waits at the front of the connection, whole; it is not taken out.
    case order(String)
    /// The connection is over; its number, to stop watching.
    case closed(CInt)
  }

  func read(_ id: Int) -> Input {
    guard let client = clients[id] else { return .lines([]) }
    if client.received.isEmpty, let order = Self.waitingOrder(client.socket) { return .order(order) }
    var chunk = [UInt8](repeating: 0, count: 1024)
    // SAFETY: the chunk is lent for the call.
    switch unsafe chunk.withUnsafeMutableBytes({ bytes in unsafe client.socket.read(into: bytes) }) {
    case .wouldBlock: return .lines([])
    case .end, .failed: return close(id, client)
    case .bytes(let count): client.received += chunk[..<count]
    }
    var lines: [String] = []
    while let end = client.received.firstIndex(of: 10) {
      lines.append(String(decoding: client.received[..<end], as: UTF8.self))
      client.received.removeSubrange(...end)
    }
    return client.received.count > Self.lineLimit ? close(id, client) : .lines(lines)
  }

  private static func waitingOrder(_ socket: borrowing OwnedFD) -> String? {
    guard let line = Spawner.waitingLine(socket),
      [DeviceOrder.verb, ReplaceOrder.verb].contains(where: { line.starts(with: Array("\($0) ".utf8)) })
    else { return nil }
    return String(decoding: line, as: UTF8.self)
  }

  /// Connections whose request has been read, or has not come yet: in another program nobody knows which.
  var unclear: [Int] {
    clients.filter { !$0.value.followsEvents && UnixSocket.peek($0.value.socket, limit: 1).isEmpty }.keys.sorted()
  }

  /// Ends a connection; its number, to stop watching.
  func drop(_ id: Int) -> CInt? { clients.removeValue(forKey: id)?.socket.rawValue }

  /// The descriptor of a connection, to be lent to a call.
  func number(of id: Int) -> CInt? { clients[id]?.socket.rawValue }

  /// Takes the line at the front out.
  func takeOrder(from id: Int) {
    guard let client = clients[id], let line = Spawner.waitingLine(client.socket) else { return }
    var buffer = [UInt8](repeating: 0, count: line.count + 1)
    // SAFETY: the buffer is lent for the call.
    _ = unsafe buffer.withUnsafeMutableBytes { bytes in unsafe client.socket.read(into: bytes) }
  }

  private func close(_ id: Int, _ client: Client) -> Input {
    clients[id] = nil
    return .closed(client.socket.rawValue)
  }

  /// Sends an answer, or keeps it until the client reads. One that does not read its answers loses them: we never wait for it.
  func write(_ line: [UInt8], to id: Int) {
    guard let client = clients[id], client.outgoing.count + line.count <= Self.answerLimit else { return }
    send(line, to: client)
  }

  /// From here on the client gets every event.
  func follow(_ id: Int) { clients[id]?.followsEvents = true }

  var hasFollowers: Bool { clients.values.contains { $0.followsEvents } }

  /// Sends an event's line to all who follow.
  func publish(_ line: [UInt8]) {
    for client in clients.values where client.followsEvents {
      if client.outgoing.count + line.count > Self.eventLimit {
        client.missedCount += 1
      } else {
        tellOfMissed(client)
        send(line, to: client)
      }
    }
  }

  /// The client may have room again.
  func flush(_ id: Int) {
    guard let client = clients[id] else { return }
    if !client.outgoing.isEmpty { send([], to: client) }
    if client.outgoing.isEmpty { tellOfMissed(client) }
  }

  private func tellOfMissed(_ client: Client) {
    guard client.missedCount > 0 else { return }
    send(Supervisor.line(.record(["event": .string("missed"), "count": .unsigned(client.missedCount)])), to: client)
    client.missedCount = 0
  }

  private func send(_ line: [UInt8], to client: Client) {
    client.outgoing += line
    // Each round hands over some of what is there.
    while !client.outgoing.isEmpty {
      guard case .bytes(let count) = UnixSocket.send(client.socket, client.outgoing, waiting: false), count > 0 else { return }
      client.outgoing.removeFirst(count)
    }
  }

  /// Clients that have to be watched for other things than before.
  func takeWatchChanges() -> [(number: CInt, Readiness)] {
    var changes: [(number: CInt, Readiness)] = []
    for client in clients.values where client.isWatchedForWriting == client.outgoing.isEmpty {
      client.isWatchedForWriting.toggle()
      changes.append((client.socket.rawValue, client.isWatchedForWriting ? [.readable, .writable] : .readable))
    }
    return changes
  }
}
