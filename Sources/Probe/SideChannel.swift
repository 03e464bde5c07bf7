import HostSystem
import VhostUser

/// The front end's end of the back end's own channel (SET_BACKEND_REQ_FD): whole messages in, answers out.
final class SideChannel {
  private let fd: OwnedFD

  init(_ fd: consuming OwnedFD) { self.fd = fd }

  var number: CInt { fd.rawValue }

  /// The next request, if one has come; descriptors with it are closed.
  func receive() throws(ProbeError) -> (MessageHeader, [UInt8])? {
    guard let head = try read(MessageHeader.byteCount, isFirst: true) else { return nil }
    guard let header = try? MessageHeader(decoding: head), header.size <= MessageHeader.maximumPayload else {
      throw .notVhostUser("on its own channel it says \(head.hexText())")
    }
    guard header.size > 0 else { return (header, []) }
    guard let payload = try read(Int(header.size), isFirst: false) else { return nil }
    return (header, payload)
  }

  /// - Parameter isFirst: nothing at all is then no message; else it is half of one.
  private func read(_ count: Int, isFirst: Bool) throws(ProbeError) -> [UInt8]? {
    var bytes: [UInt8] = []
    // Bounded: every turn brings some.
    while bytes.count < count {
      let isStart = isFirst && bytes.isEmpty
      let isReady = try wrapping { () throws(SystemError) in
        try fd.waitUntil(.readable, timeout: isStart ? .zero : .seconds(5))
      }
      guard isReady else {
        if isStart { return nil }
        throw .notVhostUser("on its own channel it says half a message: \(bytes.hexText())")
      }
      var chunk = [UInt8](repeating: 0, count: count - bytes.count)
      // SAFETY: the buffer is ours.
      guard case .bytes(let got) = unsafe chunk.withUnsafeMutableBytes({ unsafe fd.read(into: $0) }) else {
        throw .notVhostUser("it closed its own channel")
      }
      bytes += chunk[..<got]
    }
    return bytes
  }

  func answer(_ request: UInt32, _ payload: [UInt8]) {
    let header = MessageHeader(request: request, flags: .replyExactly, size: UInt32(payload.count))
    _ = UnixSocket.send(fd, header.encoded + payload, waiting: false)
  }
}
