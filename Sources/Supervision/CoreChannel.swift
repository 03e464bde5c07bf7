import ControlProtocol
import HostSystem

/// The supervisor's end of the control channel.
final class CoreChannel {
  private let socket: OwnedFD
  /// The last one used.
  private(set) var sequence: UInt32
  private var buffer = [UInt8](repeating: 0, count: Wire.maximumLength + 1)
  private(set) var isOpen = true
  /// A message stays in the socket until it has been handled and that is remembered: `handled` and `take`.
  var isPeeking = false
  /// The message at the front, which has been handled and may still be there.
  private(set) var handledFront: [UInt8] = []
  private var front: [UInt8] = []

  init(_ socket: consuming OwnedFD, sequence: UInt32 = 0, handledFront: [UInt8] = []) {
    self.socket = socket
    self.sequence = sequence
    // One that was killed before it could take it out.
    if !handledFront.isEmpty, UnixSocket.peek(self.socket, limit: Wire.maximumLength + 1) == handledFront { _ = takeOut() }
  }

  /// So many numbers may have been used.
  func skip(_ count: UInt32) { sequence &+= count }

  /// What `receive` gave last has been handled.
  func handled() { handledFront = front }

  /// It is remembered, and taken out.
  func take() {
    guard !handledFront.isEmpty else { return }
    _ = takeOut()
    handledFront = []
    front = []
  }

  var number: CInt { socket.rawValue }

  enum Sending {
    case sent(sequence: UInt32)
    /// The core is gone; its pidfd and its last message tell why.
    case gone
    /// It lives and does not read: its socket is full.
    case full
  }

  func send(_ message: SupervisorMessage, descriptors: [CInt] = []) -> Sending {
    precondition(descriptors.count == message.descriptorCount, "A message is sent with the descriptors it asks for.")
    sequence &+= 1
    let packet = message.encode(sequence: sequence)
    switch UnixSocket.send(socket, packet, descriptors: descriptors, waiting: false) {
    case .bytes(let count) where count == packet.count: return .sent(sequence: sequence)
    case .bytes, .wouldBlock: return .full
    case .end, .failed: return .gone
    }
  }

  enum Incoming {
    case message(CoreMessage, sequence: UInt32)
    /// Nothing more now.
    case nothing
    /// The core has closed its end.
    case end
    case broken(MessageError)
  }

  func receive() -> Incoming {
    // A core that exits with messages unread resets the connection, which is reported once before what it said last.
    let first = receiveOnce()
    guard case .end = first else { return first }
    let second = receiveOnce()
    if case .end = second { isOpen = false }
    return second
  }

  private func receiveOnce() -> Incoming {
    if isPeeking {
      front = UnixSocket.peek(socket, limit: Wire.maximumLength + 1)
      if !front.isEmpty { return Self.decode(front, isCutOff: front.count > Wire.maximumLength) }
    }
    return takeOut()
  }

  private func takeOut() -> Incoming {
    // The core sends no descriptors; any that came are closed with the reception.
    // SAFETY: the buffer is lent for the call.
    let (transfer, truncated, descriptors) = unsafe buffer.withUnsafeMutableBytes { bytes in
      let reception = unsafe UnixSocket.receive(socket, into: bytes, descriptorLimit: 1)
      return (reception.transfer, reception.truncated, reception.descriptors.count)
    }
    switch transfer {
    case .wouldBlock: return .nothing
    case .end, .failed: return .end
    case .bytes(let count): return Self.decode(Array(buffer[..<count]), descriptorCount: descriptors, isCutOff: truncated)
    }
  }

  private static func decode(_ packet: [UInt8], descriptorCount: Int = 0, isCutOff: Bool) -> Incoming {
    guard !isCutOff else { return .broken(.tooLong(byteCount: packet.count)) }
    do throws(MessageError) {
      let (message, sequence) = try CoreMessage.decode(packet, descriptorCount: descriptorCount)
      return .message(message, sequence: sequence)
    } catch { return .broken(error) }
  }
}
