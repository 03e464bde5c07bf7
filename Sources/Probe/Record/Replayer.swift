import CLinux
import Glibc
import HostSystem
import VhostUser
import VirtioSpec

/// Says the front end's half of a recording to a back end, and compares what comes back.
final class Replayer {
  private let target: Target
  private let interruption: Interruption
  private(set) var sentCount = 0
  private(set) var replyCount = 0
  /// What the back end asked on its own channel.
  private(set) var channelCount = 0
  private(set) var differences: [String] = []
  /// Whether a difference is one of features, which what is acknowledged afterwards depends on.
  private(set) var offersDiffer = false
  private let isVerbose: Bool
  /// Whether features that this back end does not offer are left out of what is acknowledged.
  private let adapts: Bool
  /// For the names of feature bits.
  private var device: DeviceID? { target.askedType }

  init(_ target: Target, _ interruption: Interruption, verbose: Bool, adapts: Bool) {
    self.target = target
    self.interruption = interruption
    isVerbose = verbose
    self.adapts = adapts
  }

  func run(_ recording: Recording) throws(ProbeError) {
    for (index, lines) in recording.connections.enumerated() where !lines.isEmpty && !interruption.happened {
      try replay(lines, "connection \(index + 1)")
    }
  }

  private func replay(_ lines: [Recording.Line], _ place: String) throws(ProbeError) {
    var link = try Link(target)
    var kept: [Held] = []
    var channel: SideChannel?
    var answers = lines.filter { $0.side == .channelAnswer }
    // What it offers, by the request that acknowledges it.
    var offers: [UInt32: UInt64] = [:]
    for (index, line) in lines.enumerated() where line.side == .frontEnd {
      if interruption.isRequested { return }
      var payload = line.payload
      if adapts, payload.count == 8, let offer = offers[line.header.request] {
        payload = BlockWire.bytes(payload.number(at: 0, 8) & offer, 8)
      }
      let words = MessageText.request(line.header, payload, device: device)
      let isInflight = line.header.request == FrontEndRequest.setInflightFD.rawValue
      var numbers: [CInt] = []
      for attachment in line.attachments {
        if isInflight, let area = kept.last(where: { $0.isInflight }) {
          numbers.append(area.fd.rawValue)
          continue
        }
        if line.header.request == FrontEndRequest.setBackEndRequestFD.rawValue {
          let pair = try wrapping { () throws(SystemError) in try UnixSocket.pair(.stream) }
          kept.append(
            pair.split { ours, theirs in
              channel = SideChannel(ours)
              return Held(theirs)
            })
          if let held = kept.last { numbers.append(held.fd.rawValue) }
          continue
        }
        let held = Held(try Self.make(attachment))
        numbers.append(held.fd.rawValue)
        kept.append(held)
      }
      if isVerbose { Output.line("> \(words)") }
      do throws(ProbeError) { try link.tell(line.header, payload, descriptors: numbers, name: words) } catch {
        differences.append("\(place), message \(index + 1), \(words): \(target.explaining(error))")
        return
      }
      sentCount += 1
      let reply = Self.recordedReply(lines, after: index)
      if let asked = channel {
        do throws(ProbeError) {
          try serve(asked, &answers, until: reply == nil ? nil : link.frontEnd.socketNumber)
        } catch {
          channel = nil
          if isVerbose { Output.line("the back end's own channel: \(error)") }
        }
      }
      guard let reply else { continue }
      do throws(ProbeError) {
        guard var answer = try link.hear() else {
          differences.append(
            "\(place), message \(index + 1), \(words): no answer; the recording has: \(MessageText.reply(reply.header, reply.payload, device: device))"
          )
          return
        }
        replyCount += 1
        if line.header.request == FrontEndRequest.getInflightFD.rawValue, let fd = answer.descriptors.takeFirst() {
          kept.append(Held(fd, isInflight: true))
        }
        if answer.payload.count == 8, let acknowledging = Self.acknowledging[answer.header.request] {
          offers[acknowledging] = answer.payload.number(at: 0, 8)
        }
        let now = MessageText.reply(answer.header, answer.payload, device: device)
        if isVerbose { Output.line("< \(now)") }
        if let difference = Self.difference(reply, answer.header, answer.payload) {
          offersDiffer = offersDiffer || Self.acknowledging[answer.header.request] != nil
          differences.append(
            "\(place), message \(index + 1), \(words): \(difference)\n    recorded: \(MessageText.reply(reply.header, reply.payload, device: device))\n    now:      \(now)"
          )
        }
      } catch {
        differences.append("\(place), message \(index + 1), \(words): \(target.explaining(error))")
        return
      }
    }
  }

  /// Which request acknowledges what another one's answer offered.
  private static let acknowledging: [UInt32: UInt32] = [
    FrontEndRequest.getFeatures.rawValue: FrontEndRequest.setFeatures.rawValue,
    FrontEndRequest.getProtocolFeatures.rawValue: FrontEndRequest.setProtocolFeatures.rawValue,
  ]

  /// Answers what is asked on the channel as it was answered then, or with success; with a socket, until something can be
  /// read there.
  private func serve(_ channel: SideChannel, _ answers: inout [Recording.Line], until socket: CInt?) throws(ProbeError) {
    let end = MonotonicTime.now.advanced(by: target.timeout)
    repeat {
      while let (header, payload) = try channel.receive() {
        channelCount += 1
        if isVerbose { Output.line("< channel: \(MessageText.channelRequest(header, payload))") }
        let isAsked = header.flags.contains(.needReply) || header.request == BackEndRequest.sharedObjectLookup.rawValue
        guard isAsked else { continue }
        let position = answers.firstIndex { $0.header.request == header.request }
        channel.answer(header.request, position.map { answers.remove(at: $0).payload } ?? [UInt8](repeating: 0, count: 8))
      }
      guard let socket else { return }
      var entries = [socket, channel.number].map { pollfd(fd: $0, events: Int16(POLLIN), revents: 0) }
      // SAFETY: the array is ours and has so many entries.
      _ = unsafe entries.withUnsafeMutableBufferPointer { unsafe poll($0.baseAddress, nfds_t($0.count), 200) }
      if entries[0].revents != 0 { return }
    } while MonotonicTime.now < end && !interruption.isRequested
  }

  private final class Held {
    let fd: OwnedFD
    let isInflight: Bool
    init(_ fd: consuming OwnedFD, isInflight: Bool = false) {
      self.fd = fd
      self.isInflight = isInflight
    }
  }

  /// The answer to message `index`: the back end's next reply to that request before the front end's next message.
  private static func recordedReply(_ lines: [Recording.Line], after index: Int) -> Recording.Line? {
    for line in lines[(index + 1)...] {
      if line.side == .frontEnd { return nil }
      guard line.side == .backEnd else { continue }
      if line.header.flags.contains(.reply), line.header.request == lines[index].header.request { return line }
    }
    return nil
  }

  /// How an answer differs from the recorded one. Where a ring stands is not compared: nothing was in the rings.
  private static func difference(_ recorded: Recording.Line, _ header: MessageHeader, _ payload: [UInt8]) -> String? {
    if header.request != recorded.header.request { return "another request is answered" }
    if header.flags != recorded.header.flags { return "the flags differ" }
    if payload.count != recorded.payload.count { return "the lengths differ" }
    let compared = header.request == FrontEndRequest.getVringBase.rawValue ? 4 : payload.count
    return payload.prefix(compared).elementsEqual(recorded.payload.prefix(compared)) ? nil : "the answers differ"
  }

  /// Something of the same kind, empty.
  private static func make(_ attachment: Recording.Attachment) throws(ProbeError) -> OwnedFD {
    try wrapping { () throws(SystemError) in
      switch attachment {
      case .memory(let byteCount): return try SharedMemory.sealed(name: "martlet-probe", byteCount: max(4096, byteCount))
      case .event, .other: return try EventFD().fd.duplicate()
      case .socket, .pipe:
        return try UnixSocket.pair(.stream).split { ours, theirs in
          _ = consume ours
          return theirs
        }
      }
    }
  }
}
