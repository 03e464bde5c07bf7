import ControlProtocol
import HostSystem

/// The supervisor's end of the control channel.
final class CoreChannel {
  private let socket: OwnedFD
  private var sequence: UInt32 = 0
  private var buffer = [UInt8](repeating: 0, count: Wire.maximumLength + 1)
  private(set) var isOpen = true

  init(_ socket: consuming OwnedFD) { self.socket = socket }

  var number: CInt { socket.rawValue }

  /// Sends a message and returns its sequence; nil when the core does not take it: it is dead, or so far behind that its
  /// socket is full.
  func send(_ message: SupervisorMessage, descriptors: [CInt] = []) -> UInt32? {
    precondition(descriptors.count == message.descriptorCount, "A message is sent with the descriptors it asks for.")
    sequence &+= 1
    let packet = message.encode(sequence: sequence)
    guard case .bytes(let count) = UnixSocket.send(socket, packet, descriptors: descriptors, waiting: false),
      count == packet.count
    else { return nil }
    return sequence
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
    // The core sends no descriptors; any that came are closed with the reception.
    // SAFETY: the buffer is lent for the call.
    let (transfer, truncated, descriptors) = unsafe buffer.withUnsafeMutableBytes { bytes in
      let reception = unsafe UnixSocket.receive(socket, into: bytes, descriptorLimit: 1)
      return (reception.transfer, reception.truncated, reception.descriptors.count)
    }
    switch transfer {
    case .wouldBlock: return .nothing
    case .end, .failed:
      isOpen = false
      return .end
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
