import HostSystem
import VhostUser

/// A conversation as it was: every message whole, when it passed, which way, and what descriptors rode on it. Text, a line
/// for each; `docs/probe.md` has the format.
package struct Recording {
  package enum Side: Character {
    case frontEnd = "f"
    case backEnd = "b"
    /// On the back end's own channel: what it asks, and what the front end answers.
    case channelRequest = "q"
    case channelAnswer = "a"
  }

  /// What a descriptor was.
  package enum Attachment: Equatable {
    case memory(byteCount: UInt64)
    case event, socket, pipe, other

    init(_ fd: borrowing OwnedFD) {
      guard let status = try? fd.status() else {
        self = .other
        return
      }
      switch status.kind {
      case .regular: self = .memory(byteCount: status.byteCount)
      case .socket: self = .socket
      case .pipe: self = .pipe
      // Anonymous inodes have no type; an eventfd is the only one that the protocol passes every day.
      case .other: self = .event
      default: self = .other
      }
    }

    init?(_ text: Substring) {
      let parts = text.split(separator: ":", omittingEmptySubsequences: false)
      switch (parts[0], parts.count) {
      case ("memory", 2):
        guard let count = UInt64(parts[1]), count <= 1 << 48 else { return nil }
        self = .memory(byteCount: count)
      case ("event", 1): self = .event
      case ("socket", 1): self = .socket
      case ("pipe", 1): self = .pipe
      case ("other", 1): self = .other
      default: return nil
      }
    }

    var text: String {
      switch self {
      case .memory(let count): "memory:\(count)"
      case .event: "event"
      case .socket: "socket"
      case .pipe: "pipe"
      case .other: "other"
      }
    }
  }

  package struct Line {
    /// Since the first connection.
    var nanoseconds: UInt64
    var side: Side
    var header: MessageHeader
    var payload: [UInt8]
    var attachments: [Attachment]

    package var text: String {
      ConversationText.line(nanoseconds, side.rawValue, header.encoded + payload, attachments.map(\.text))
    }
  }

  static let firstLine = ConversationText.firstLine
  /// Before the back end's own channel was written down.
  static let olderFirstLine = "martlet-recording 1"
  static let connectionMark = ConversationText.connectionMark

  /// By connection.
  package var connections: [[Line]] = []

  package init(_ text: String, name: String) throws(ProbeError) {
    var lines = text.split(separator: "\n", omittingEmptySubsequences: false)[...]
    guard let first = lines.popFirst().map(String.init), first == Self.firstLine || first == Self.olderFirstLine else {
      throw .unsuitable("\(name) is no recording: it does not begin with '\(Self.firstLine)'")
    }
    var number = 1
    for line in lines where !line.isEmpty {
      number += 1
      if line.hasPrefix(Self.connectionMark) {
        connections.append([])
        continue
      }
      guard !connections.isEmpty, let parsed = Self.parse(line) else {
        throw .unsuitable("\(name) is damaged: line \(number) is no message")
      }
      connections[connections.count - 1].append(parsed)
    }
    guard !connections.joined().isEmpty else { throw .unsuitable("\(name) holds no message") }
  }

  private static func parse(_ line: Substring) -> Line? {
    let words = line.split(separator: " ")
    guard words.count == 3 || words.count == 4, let time = UInt64(words[0]), words[1].count == 1, let letter = words[1].first,
      let side = Side(rawValue: letter), words[2].utf8.count % 2 == 0
    else { return nil }
    let digits = Array(words[2].utf8)
    var bytes: [UInt8] = []
    for index in stride(from: 0, to: digits.count, by: 2) {
      guard let byte = UInt8(String(decoding: digits[index..<index + 2], as: UTF8.self), radix: 16) else { return nil }
      bytes.append(byte)
    }
    guard bytes.count >= MessageHeader.byteCount, let header = try? MessageHeader(decoding: bytes.prefix(MessageHeader.byteCount)),
      bytes.count == MessageHeader.byteCount + Int(header.size)
    else { return nil }
    var attachments: [Attachment] = []
    if words.count == 4 {
      for word in words[3].split(separator: ",", omittingEmptySubsequences: false) {
        guard let attachment = Attachment(word) else { return nil }
        attachments.append(attachment)
      }
    }
    return Line(
      nanoseconds: time, side: side, header: header, payload: Array(bytes.dropFirst(MessageHeader.byteCount)), attachments: attachments)
  }
}
