import CLinux
import Glibc
import HostSystem
import VMMemory
import VhostUser
import VirtioQueue
import VirtioSpec

/// Malformed messages: every request in every wrong form.
enum MessageFaults {
  static let all: [FaultCase] = FrontEndRequest.allCases.flatMap(cases) + headers

  private enum Form: String, CaseIterable {
    case none, short, long, full, huge, ones, reply, version, reserved, descriptors, early, cut

    var sentence: String {
      switch self {
      case .none: "without payload"
      case .short: "one byte too short"
      case .long: "one byte too long"
      case .full: "with 4096 bytes of payload"
      case .huge: "announcing 4 GiB"
      case .ones: "with every bit of the payload set"
      case .reply: "marked as a reply"
      case .version: "of version 2"
      case .reserved: "with reserved flags"
      case .descriptors: "with 16 descriptors"
      case .early: "as the first message"
      case .cut: "cut in the middle"
      }
    }
  }

  private static func cases(_ request: FrontEndRequest) -> [FaultCase] {
    Form.allCases.map { form in
      FaultCase("message.\(request.name.lowercased()).\(form.rawValue)", "\(request.name) \(form.sentence)") { context in
        var link = form == .early ? try context.open() : try context.negotiated()
        try send(&link, request, form)
        // A barrier on the same connection: what was sent is processed when it is answered, or the connection is closed.
        try barrier(&link)
      }
    }
  }

  private static func size(_ request: FrontEndRequest) -> Int {
    switch request.rules.size {
    case .exactly(let size): size
    case .either(let size, _): size
    case .within(let range): range.lowerBound
    }
  }

  private static func send(_ link: inout Link, _ request: FrontEndRequest, _ form: Form) throws(ProbeError) {
    let size = size(request)
    var header = MessageHeader(
      request: request.rawValue, flags: link.hasAcknowledgements ? [.version1, .needReply] : .version1, size: UInt32(size))
    var payload = [UInt8](repeating: 0, count: size)
    var descriptors: [CInt] = []
    let one = try wrapping { () throws(SystemError) in try EventFD() }
    switch request.rules.descriptors {
    case .one, .perEvent, .perRegion: descriptors = [one.fd.rawValue]
    default: break
    }
    switch form {
    case .none: payload = []
    case .short: payload = [UInt8](repeating: 0, count: max(0, size - 1))
    case .long: payload.append(0)
    case .full: payload = [UInt8](repeating: 0xFF, count: 4096)
    case .huge:
      header.size = .max
      payload = []
    case .ones: payload = [UInt8](repeating: 0xFF, count: size)
    case .reply: header.flags.insert(.reply)
    case .version: header.flags = MessageFlags(rawValue: 2)
    case .reserved: header.flags = MessageFlags(rawValue: 0xFFFF_FFF1)
    case .descriptors: descriptors = [CInt](repeating: one.fd.rawValue, count: 16)
    case .early: break
    case .cut: payload = [UInt8](repeating: 0, count: size / 2)
    }
    switch form {
    case .none, .short, .long, .full: header.size = UInt32(payload.count)
    default: break
    }
    try link.tell(header, payload, descriptors: descriptors, name: request.name)
  }

  static func barrier(_ link: inout Link) throws(ProbeError) {
    link.frontEnd.timeout = .milliseconds(30)
    try link.tell(.getFeatures)
    // An acknowledgement may come first, or nothing at all when the message was taken for part of another.
    for _ in 0..<3 {
      guard let message = try link.hear() else { return }
      if message.header.request == 1 { return }
      if message.payload.count == 8, message.payload.number(at: 0, 8) != 0 {
        throw .protocolError("do it", .peerRefused(request: "it", code: message.payload.number(at: 0, 8)))
      }
    }
  }

  private static let headers: [FaultCase] = [
    FaultCase("header.half", "Half a header, then the end") { context in
      let link = try context.open()
      _ = link.frontEnd.sendRawQuietly([1, 0, 0, 0, 1, 0])
    },
    FaultCase("header.half-silence", "Half a header, then silence for two seconds") { context in
      var link = try context.open()
      _ = link.frontEnd.sendRaw([1, 0, 0, 0, 1, 0])
      link.frontEnd.timeout = .seconds(2)
      _ = try link.hear()
    },
    FaultCase("header.zeros", "Four KiB of zeros") { context in
      var link = try context.open()
      _ = link.frontEnd.sendRaw([UInt8](repeating: 0, count: 4096))
      try MessageFaults.barrier(&link)
    },
    FaultCase("header.ones", "Four KiB of ones") { context in
      var link = try context.open()
      _ = link.frontEnd.sendRaw([UInt8](repeating: 0xFF, count: 4096))
      try MessageFaults.barrier(&link)
    },
    FaultCase("header.text", "An HTTP request") { context in
      var link = try context.open()
      _ = link.frontEnd.sendRaw(Array("GET / HTTP/1.1\r\nHost: localhost\r\n\r\n".utf8))
      try MessageFaults.barrier(&link)
    },
    FaultCase("header.unknown", "Request numbers that do not exist") { context in
      for number in [0, 45, 63, 255, 0x1_0001, 0x7FFF_FFFF, 0xFFFF_FFFF] as [UInt32] {
        var link = try context.open()
        try link.tell(MessageHeader(request: number, flags: .version1, size: 0), [])
        try? MessageFaults.barrier(&link)
      }
    },
    FaultCase("header.descriptors-many", "253 descriptors on one message, twenty times") { context in
      let event = try EventFD()
      for _ in 0..<20 {
        var link = try context.open()
        try link.tell(
          MessageHeader(request: 1, flags: .version1, size: 0), [], descriptors: [CInt](repeating: event.fd.rawValue, count: 253))
        try? MessageFaults.barrier(&link)
      }
    },
    FaultCase("header.descriptors-late", "Descriptors attached to the payload instead of the header") { context in
      let event = try EventFD()
      var link = try context.negotiated()
      let message = FrontEndMessage.setVringCall(VringEvent(index: 0, carriesDescriptor: true))
      _ = link.frontEnd.sendRaw(message.header().encoded)
      usleep(2000)
      _ = link.frontEnd.sendRaw(message.payload, descriptors: [event.fd.rawValue])
      try MessageFaults.barrier(&link)
    },
  ]
}

extension BlockingFrontEnd {
  /// Sends without being asked what came of it.
  borrowing func sendRawQuietly(_ bytes: [UInt8]) -> Int {
    // SAFETY: the array is not changed during the call.
    unsafe bytes.withUnsafeBytes { unsafe Glibc.send(socketNumber, $0.baseAddress, $0.count, CInt(MSG_NOSIGNAL)) }
  }
}
