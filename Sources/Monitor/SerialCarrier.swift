import HostSystem
import Machine

/// The stream between the serial port and whoever carries its bytes. Never blocks: what the stream does not take stays in
/// the port, and what the port does not take stays in the stream.
final class SerialCarrier {
  private var stream: OwnedFD?
  /// The stream was full; its writability is awaited.
  private(set) var awaitsWriting = false
  /// The port has room; bytes are awaited.
  private(set) var awaitsReading = true
  private var buffer = [UInt8](repeating: 0, count: 64)

  /// Gives the port a carrier.
  func open(_ stream: consuming OwnedFD) {
    self.stream = consume stream
    awaitsReading = true
  }

  var number: CInt? {
    switch stream {
    case .some(let stream): stream.rawValue
    case .none: nil
    }
  }

  var interest: Readiness {
    var interest: Readiness = []
    if awaitsReading { interest.insert(.readable) }
    if awaitsWriting { interest.insert(.writable) }
    return interest
  }

  /// Moves output of the port to the stream. Without a stream it is dropped. False when the stream has ended.
  func send(from machine: Machine) -> Bool {
    var isOpen = true
    machine.drainSerial { bytes in
      switch stream {
      case .none: return bytes.count
      case .some(let stream):
        switch UnixSocket.send(stream, bytes, waiting: false) {
        case .bytes(let count):
          awaitsWriting = count < bytes.count
          return count
        case .wouldBlock:
          awaitsWriting = true
          return 0
        case .end, .failed:
          isOpen = false
          return bytes.count
        }
      }
    }
    return isOpen
  }

  /// The last output of a guest that has ended: waits for a carrier that is slow or has only just been started, at most
  /// as long as `patience`. Only where nothing else is left to be served.
  func finish(from machine: Machine, patience: Duration = .milliseconds(1500)) {
    let deadline = MonotonicTime.now.advanced(by: patience)
    // Bounded by the deadline.
    while machine.hasSerialOutput, MonotonicTime.now < deadline {
      guard send(from: machine), awaitsWriting else { continue }
      switch stream {
      case .none: return
      case .some(let stream): _ = try? stream.waitUntil(.writable, timeout: deadline.since(.now))
      }
    }
  }

  /// Moves input to the port as far as it has room. False when the stream has ended.
  func receive(into machine: Machine) -> Bool {
    guard let room = Optional(machine.serialInputRoom), room > 0 else {
      awaitsReading = false
      return true
    }
    awaitsReading = true
    switch stream {
    case .none: return true
    case .some(let stream):
      let outcome = unsafe buffer.withUnsafeMutableBytes { bytes in
        let part = unsafe UnsafeMutableRawBufferPointer(rebasing: bytes[..<min(room, bytes.count)])
        return unsafe UnixSocket.receive(stream, into: part, descriptorLimit: 0).transfer
      }
      switch outcome {
      case .bytes(let count):
        machine.receiveSerial(buffer[..<count])
        awaitsReading = machine.serialInputRoom > 0
        return true
      case .wouldBlock: return true
      case .end, .failed: return false
      }
    }
  }

  /// Looks again for room after the guest has read.
  func refresh(_ machine: Machine) {
    awaitsReading = machine.serialInputRoom > 0
  }

  /// Nobody carries the bytes any more; output is dropped from here on.
  func close() {
    stream = nil
    awaitsWriting = false
    awaitsReading = false
  }
}
