import ControlProtocol
import HostSystem

/// The core's end of the channel to the supervisor: packets in, packets out.
struct ControlChannel: ~Copyable {
  enum Failure: Error, CustomStringConvertible {
    case message(MessageError)
    case system(Errno)
    /// Descriptors or bytes were dropped on the way.
    case truncated

    var description: String {
      switch self {
      case .message(let error): error.message
      case .system(let errno): "Control channel: \(errno.explanation)"
      case .truncated: "Control channel: a message lost bytes or descriptors"
      }
    }
  }

  /// One message with what came with it.
  struct Received: ~Copyable {
    let message: SupervisorMessage
    let sequence: UInt32
    var descriptors: ReceivedDescriptors
  }

  enum Outcome: ~Copyable {
    case message(Received)
    case nothing
    case end
  }

  let socket: OwnedFD
  private var buffer = [UInt8](repeating: 0, count: Wire.maximumLength + 1)

  init(_ socket: consuming OwnedFD) {
    self.socket = socket
  }

  mutating func receive() throws(Failure) -> Outcome {
    var slot: Reception?
    // SAFETY: the bytes are ours and used only during the call.
    unsafe buffer.withUnsafeMutableBytes { bytes in
      slot = unsafe UnixSocket.receive(socket, into: bytes, descriptorLimit: Wire.maximumDescriptors)
    }
    guard var reception = slot.take() else { return .nothing }
    switch reception.transfer {
    case .wouldBlock: return .nothing
    case .end: return .end
    case .failed(let errno): throw .system(errno)
    case .bytes(let count):
      guard !reception.truncated else { throw .truncated }
      let decoded: (message: SupervisorMessage, sequence: UInt32)
      do {
        decoded = try SupervisorMessage.decode(
          Array(buffer[..<count]), descriptorCount: reception.descriptors.count)
      } catch {
        throw .message(error)
      }
      var descriptors = ReceivedDescriptors()
      swap(&descriptors, &reception.descriptors)
      return .message(Received(message: decoded.message, sequence: decoded.sequence, descriptors: descriptors))
    }
  }

  /// Sends a packet. The supervisor reads all the time and packets are small: a full channel means that it hangs, and then
  /// the report is lost rather than the core stopped. False when nobody listens any more.
  @discardableResult
  borrowing func send(_ message: CoreMessage, sequence: UInt32 = 0) -> Bool {
    switch UnixSocket.send(socket, message.encode(sequence: sequence), waiting: false) {
    case .bytes: return true
    case .wouldBlock:
      Log.warning("The supervisor does not read its channel; a report is lost")
      return true
    case .end, .failed: return false
    }
  }
}
