import CLinux
import HostSystem

/// The listening socket for `martlet ctl` and its connections. One request line of words, one JSON object line back; a
/// connection may carry several.
final class ControlServer {
  /// More are refused at once.
  static let clientLimit = 16
  /// A longer request line ends its connection.
  static let lineLimit = 4096

  private final class Client {
    let socket: OwnedFD
    var received: [UInt8] = []

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
    /// The connection is over; its number, to stop watching.
    case closed(CInt)
  }

  func read(_ id: Int) -> Input {
    guard let client = clients[id] else { return .lines([]) }
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

  private func close(_ id: Int, _ client: Client) -> Input {
    clients[id] = nil
    return .closed(client.socket.rawValue)
  }

  /// Sends an answer. A client that does not read its answers loses them: we never wait for it.
  func write(_ line: [UInt8], to id: Int) {
    guard let client = clients[id] else { return }
    _ = UnixSocket.send(client.socket, line, waiting: false)
  }
}
