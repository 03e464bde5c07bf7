import HostSystem

/// The latest messages of a conversation, kept for the day it ends badly. Requests, answers and what kind of descriptors rode on
/// them; a conversation carries addresses and settings, and no byte of what a guest reads or writes. Bounded in messages and
/// in bytes.
public struct FlightRecorder: Sendable {
  public enum Side: Character, Sendable {
    case frontEnd = "f"
    case backEnd = "b"
  }

  /// The most messages that are kept.
  public static let messageLimit = 64
  /// Of one message; more is cut off, and the message left out of the text, which must be whole.
  static let greatestMessage = 1024
  /// The text of all of them is at most so long: a message to the supervisor has room for it.
  public static let textLimit = 15_000

  private struct Entry: Sendable {
    let time: MonotonicTime
    let side: Side
    let bytes: [UInt8]
    let attachments: [String]
  }

  private var entries: [Entry] = []
  private let begin = MonotonicTime.now

  mutating func note(_ side: Side, _ header: MessageHeader, _ payload: [UInt8], _ attachments: [String], _ now: MonotonicTime) {
    guard payload.count <= Self.greatestMessage else { return }
    if entries.count == Self.messageLimit { entries.removeFirst() }
    entries.append(Entry(time: now, side: side, bytes: header.encoded + payload, attachments: attachments))
  }

  /// The recording, in the format of `martlet probe record`; empty when nothing was said. The oldest messages give way to the limit.
  public var text: String {
    var lines: [String] = []
    var length = ConversationText.firstLine.utf8.count + ConversationText.connectionMark.utf8.count + 2
    for entry in entries.reversed() {
      let time = UInt64(clamping: entry.time.since(begin).nanoseconds)
      let line = ConversationText.line(time, entry.side.rawValue, entry.bytes, entry.attachments)
      length += line.utf8.count + 1
      guard length <= Self.textLimit else { break }
      lines.append(line)
    }
    guard !lines.isEmpty else { return "" }
    return ([ConversationText.firstLine, ConversationText.connectionMark] + lines.reversed()).joined(separator: "\n") + "\n"
  }
}

/// Conversations as text: `docs/probe.md` has the format.
public enum ConversationText {
  public static let firstLine = "martlet-recording 2"
  public static let connectionMark = "connection"

  private static let digits = Array("0123456789abcdef".utf8)

  /// - Parameters:
  ///   - nanoseconds: since the connection.
  ///   - side: `f` for the front end, `b` for the back end.
  ///   - bytes: header and payload.
  ///   - attachments: what the descriptors were.
  public static func line(_ nanoseconds: UInt64, _ side: Character, _ bytes: [UInt8], _ attachments: [String]) -> String {
    var hex: [UInt8] = []
    hex.reserveCapacity(2 * bytes.count)
    for byte in bytes { hex += [digits[Int(byte >> 4)], digits[Int(byte & 15)]] }
    return "\(nanoseconds) \(side) \(String(decoding: hex, as: UTF8.self))"
      + (attachments.isEmpty ? "" : " " + attachments.joined(separator: ","))
  }
}

extension FrontEndMessage {
  /// What the descriptors are that ride on it, in the words of a recording.
  var attachmentKinds: [String] {
    switch self {
    case .setMemTable(let table): table.regions.map { "memory:\($0.mapOffset &+ $0.size)" }
    case .addMemReg(let single): ["memory:\(single.region.mapOffset &+ single.region.size)"]
    case .setInflightFD(let area): ["memory:\(area.mapOffset &+ area.size)"]
    case .setVringKick(let event), .setVringCall(let event), .setVringErr(let event): event.carriesDescriptor ? ["event"] : []
    case .setBackEndRequestFD: ["socket"]
    default: []
    }
  }
}
