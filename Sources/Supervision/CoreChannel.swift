import ControlProtocol
import HostSystem

/// The supervisor's end of the control channel.
final class CoreChannel {
  private let socket: OwnedFD
  /// The last one used.
  private(set) var sequence: UInt32
  private var buffer = [UInt8](repeating: 0, count: Wire.maximumLength + 1)
  private(set) var isOpen = true

  init(_ socket: consuming OwnedFD, sequence: UInt32 = 0) {
    self.socket = socket
    self.sequence = sequence
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
    // The core sends no descriptors; any that came are closed with the reception.
    // SAFETY: the buffer is lent for the call.
    let (transfer, truncated, descriptors) = unsafe buffer.withUnsafeMutableBytes { bytes in
      let reception = unsafe UnixSocket.receive(socket, into: bytes, descriptorLimit: 1)
      return (reception.transfer, reception.truncated, reception.descriptors.count)
    }
    switch transfer {
    case .wouldBlock: return .nothing
    case .end, .failed: return .end
    case .bytes(let count):
      guard !truncated else { return .broken(.tooLong(byteCount: count)) }
      do throws(MessageError) {
        let (message, sequence) = try CoreMessage.decode(
          Array(buffer[..<count]), descriptorCount: descriptors)
        return .message(message, sequence: sequence)
      } catch { return .broken(error) }
    }
  }
}
