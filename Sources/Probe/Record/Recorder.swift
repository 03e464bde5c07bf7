import CLinux
import Glibc
import HostSystem
import VhostUser
import VirtioSpec

/// Stands between a front end and a back end, passes everything on, and writes it down.
final class Recorder {
  private let target: Target
  /// For the names of feature bits.
  private let device: DeviceID?
  private let path: String
  private let listener: OwnedFD
  private let file: OutputFile?
  private let log: OutputFile?
  private var begin: MonotonicTime?
  /// The back end's own channel of the present connection: the front end's end, and ours of the one the back end has.
  private var channel: (frontEnd: OwnedFDBox, backEnd: OwnedFDBox)?
  private(set) var messageCount = 0
  private(set) var connectionCount = 0

  init(_ target: Target, _ device: DeviceID?, listen path: String, output: String?, log: String?) throws(ProbeError) {
    if let output { file = try OutputFile(output, Array((Recording.firstLine + "\n").utf8)) } else { file = nil }
    if let log { self.log = try OutputFile(log, []) } else { self.log = nil }
    listener = try wrapping { () throws(SystemError) in
      let listener = try UnixSocket.listen(at: path)
      try listener.setNonBlocking(true)
      return listener
    }
    self.target = target
    self.device = device
    self.path = path
  }

  deinit { _ = unsafe unlink(path) }

  /// Until interrupted, or, with `once`, until the first front end has left.
  func run(_ interruption: Interruption, once: Bool) throws(ProbeError) {
    Output.error("martlet probe: recording what passes \(path)")
    // Endless by purpose; every turn waits.
    while !interruption.isRequested {
      var entries = [
        pollfd(fd: interruption.descriptor, events: Int16(POLLIN), revents: 0),
        pollfd(fd: listener.rawValue, events: Int16(POLLIN), revents: 0),
      ]
      // SAFETY: the array is ours and has so many entries.
      _ = unsafe entries.withUnsafeMutableBufferPointer { unsafe poll($0.baseAddress, nfds_t($0.count), 1000) }
      guard entries[1].revents != 0 else { continue }
      let accepted = try wrapping { () throws(SystemError) in try UnixSocket.accept(listener) }
      guard let frontEnd = accepted else { continue }
      let backEnd = try target.connect()
      if begin == nil { begin = .now }
      connectionCount += 1
      write("\(Recording.connectionMark) \(connectionCount)", "connection \(connectionCount)")
      try pass(frontEnd, backEnd, interruption)
      if once { break }
    }
  }

  /// One conversation to its end.
  private func pass(_ frontEnd: borrowing OwnedFD, _ backEnd: borrowing OwnedFD, _ interruption: Interruption) throws(ProbeError) {
    channel = nil
    defer { channel = nil }
    // Ends when either side hangs up; every turn waits.
    while !interruption.isRequested {
      var entries = [
        interruption.descriptor, frontEnd.rawValue, backEnd.rawValue, channel?.backEnd.fd.rawValue ?? -1,
        channel?.frontEnd.fd.rawValue ?? -1,
      ].map { pollfd(fd: $0, events: Int16(POLLIN), revents: 0) }
      // SAFETY: the array is ours and has so many entries.
      _ = unsafe entries.withUnsafeMutableBufferPointer { unsafe poll($0.baseAddress, nfds_t($0.count), 1000) }
      // What passes on the channel belongs to what the back end does before it answers.
      if let sides = channel {
        var end = entries[3].revents != 0 ? relay(sides.backEnd.fd, sides.frontEnd.fd, .channelRequest) : nil
        if end == nil, entries[4].revents != 0 { end = relay(sides.frontEnd.fd, sides.backEnd.fd, .channelAnswer) }
        if let end {
          write(nil, "on the back end's own channel: \(end)")
          channel = nil
        }
      }
      var end = entries[2].revents != 0 ? relay(backEnd, frontEnd, .backEnd) : nil
      if end == nil, entries[1].revents != 0 { end = relay(frontEnd, backEnd, .frontEnd) }
      if let end {
        write(nil, end)
        return
      }
    }
  }

  /// Passes one message on; why there are no more of them, if so.
  private func relay(_ from: borrowing OwnedFD, _ to: borrowing OwnedFD, _ side: Recording.Side) -> String? {
    let isFrontEnd = side == .frontEnd || side == .channelAnswer
    let name = isFrontEnd ? "the front end" : "the back end"
    var bytes: [UInt8] = []
    var descriptors: [OwnedFDBox] = []
    var wanted = MessageHeader.byteCount
    let buffer = UnsafeMutableRawBufferPointer.allocate(byteCount: MessageHeader.byteCount + Self.longest, alignment: 16)
    defer { unsafe buffer.deallocate() }
    // Bounded: a message has at most `longest` bytes, and every turn brings some.
    while bytes.count < wanted {
      // SAFETY: the memory is ours, of `longest` and a header's bytes, and so much is never missing.
      let room = unsafe UnsafeMutableRawBufferPointer(rebasing: buffer[..<(wanted - bytes.count)])
      var reception = unsafe UnixSocket.receive(from, into: room, waiting: true)
      while let fd = reception.descriptors.takeFirst() { descriptors.append(OwnedFDBox(fd)) }
      switch reception.transfer {
      case .bytes(let count): unsafe bytes.append(contentsOf: room[..<count])
      case .wouldBlock: continue
      case .end: return bytes.isEmpty ? "\(name) hung up" : "\(name) hung up in the middle of a message"
      case .failed(let errno): return "\(name): \(errno.explanation)"
      }
      if bytes.count == MessageHeader.byteCount, wanted == bytes.count {
        let size = Int(bytes.number(at: 8, 4))
        guard size <= Self.longest else { return "\(name) sends a message of \(size) bytes" }
        wanted += size
      }
    }
    guard let header = try? MessageHeader(decoding: bytes.prefix(MessageHeader.byteCount)) else { return "\(name) sends no message" }
    note(header, Array(bytes.dropFirst(MessageHeader.byteCount)), descriptors, side)
    if side == .frontEnd, header.request == FrontEndRequest.setBackEndRequestFD.rawValue, descriptors.count == 1,
      let pair = try? UnixSocket.pair(.stream)
    {
      // The back end gets a channel to us, and we have the front end's.
      let own = descriptors[0]
      descriptors = [
        pair.split { ours, theirs in
          channel = (frontEnd: own, backEnd: OwnedFDBox(ours))
          return OwnedFDBox(theirs)
        }
      ]
    }
    var sent = 0
    // Bounded: every turn sends some.
    while sent < bytes.count {
      let numbers = sent == 0 ? descriptors.map { $0.fd.rawValue } : []
      guard case .bytes(let count) = UnixSocket.send(to, Array(bytes[sent...]), descriptors: numbers) else {
        return "\(isFrontEnd ? "the back end" : "the front end") hung up"
      }
      sent += count
    }
    return nil
  }

  private static let longest = 1 << 16

  private final class OwnedFDBox {
    let fd: OwnedFD
    init(_ fd: consuming OwnedFD) { self.fd = fd }
  }

  private func note(_ header: MessageHeader, _ payload: [UInt8], _ descriptors: [OwnedFDBox], _ side: Recording.Side) {
    messageCount += 1
    let attachments = descriptors.map { Recording.Attachment($0.fd) }
    let time = UInt64(clamping: begin.map { MonotonicTime.now.since($0).nanoseconds } ?? 0)
    let line = Recording.Line(nanoseconds: time, side: side, header: header, payload: payload, attachments: attachments)
    write(line.text, line.words(device))
  }

  private func write(_ record: String?, _ words: String) {
    if let record { file?.write(Array((record + "\n").utf8)) }
    if let log { log.write(Array((words + "\n").utf8)) } else { Output.line(words) }
  }
}

extension Recording.Line {
  /// For people: seconds, direction, message.
  func words(_ device: DeviceID?) -> String {
    let (arrow, words) =
      switch side {
      case .frontEnd: (">", MessageText.request(header, payload, device: device))
      case .backEnd: ("<", MessageText.reply(header, payload, device: device))
      case .channelRequest: ("< channel:", MessageText.channelRequest(header, payload))
      case .channelAnswer: ("> channel:", MessageText.channelAnswer(header, payload))
      }
    let carried = attachments.isEmpty ? "" : "  [" + attachments.map(\.text).joined(separator: ", ") + "]"
    return "\(decimal(Double(nanoseconds) / 1e9, 6).leftPadded(to: 12)) \(arrow) \(words)\(carried)"
  }
}
