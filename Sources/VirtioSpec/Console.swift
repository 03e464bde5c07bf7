// Console device (virtio 1.4, section 5.3; linux/virtio_console.h).

/// Configuration space of a console, `struct virtio_console_config`.
public struct ConsoleConfiguration: Hashable, Sendable {
  /// Bytes of the whole structure.
  @inlinable public static var byteCount: Int { 12 }

  /// Byte offsets of the fields.
  public enum Offset {
    @inlinable public static var columns: Int { 0 }
    @inlinable public static var rows: Int { 2 }
    @inlinable public static var maxPortCount: Int { 4 }
    @inlinable public static var emergencyWrite: Int { 8 }
  }

  /// Width in characters (`consoleSize`).
  public var columns: UInt16 = 0
  /// Height in characters (`consoleSize`).
  public var rows: UInt16 = 0
  /// `max_nr_ports` (`consoleMultiplePorts`).
  public var maxPortCount: UInt32 = 0
  /// `emerg_wr`: the driver writes a byte here (`consoleEmergencyWrite`).
  public var emergencyWrite: UInt32 = 0

  public init() {}

  /// The fields from the start of `bytes`. A field that does not fit is zero: a peer may know a shorter structure.
  public init(decoding bytes: [UInt8]) {
    var whole = Array(bytes.prefix(Self.byteCount))
    whole.append(contentsOf: repeatElement(0, count: Self.byteCount - whole.count))
    columns = LittleEndian.load(from: whole, at: Offset.columns)
    rows = LittleEndian.load(from: whole, at: Offset.rows)
    maxPortCount = LittleEndian.load(from: whole, at: Offset.maxPortCount)
    emergencyWrite = LittleEndian.load(from: whole, at: Offset.emergencyWrite)
  }

  /// `byteCount` bytes, little-endian, padding zero.
  public func encoded() -> [UInt8] {
    var bytes = [UInt8](repeating: 0, count: Self.byteCount)
    LittleEndian.store(columns, to: &bytes, at: Offset.columns)
    LittleEndian.store(rows, to: &bytes, at: Offset.rows)
    LittleEndian.store(maxPortCount, to: &bytes, at: Offset.maxPortCount)
    LittleEndian.store(emergencyWrite, to: &bytes, at: Offset.emergencyWrite)
    return bytes
  }
}

/// A message of the control queues, `struct virtio_console_control`. Memory layout is that of the specification.
public struct ConsoleControl: Hashable, Sendable {
  @inlinable public static var byteCount: Int { 8 }

  public var port: UInt32
  public var event: UInt16
  public var value: UInt16

  @inlinable
  public init(port: UInt32 = 0, event: UInt16 = 0, value: UInt16 = 0) {
    self.port = port
    self.event = event
    self.value = value
  }

  @inlinable public static var deviceReady: UInt16 { 0 }
  @inlinable public static var portAdd: UInt16 { 1 }
  @inlinable public static var portRemove: UInt16 { 2 }
  @inlinable public static var portReady: UInt16 { 3 }
  @inlinable public static var consolePort: UInt16 { 4 }
  @inlinable public static var resize: UInt16 { 5 }
  @inlinable public static var portOpen: UInt16 { 6 }
  @inlinable public static var portName: UInt16 { 7 }
}

/// Queue numbers of the console.
public enum ConsoleSpec {
  /// Device to driver, port 0.
  @inlinable public static var receiveQueue: Int { 0 }
  /// Driver to device, port 0.
  @inlinable public static var transmitQueue: Int { 1 }
  @inlinable public static var controlReceiveQueue: Int { 2 }
  @inlinable public static var controlTransmitQueue: Int { 3 }
}
