/// Loads and stores of little-endian integers in byte arrays: configuration spaces and register files, never the data
/// path and never guest memory.
public enum LittleEndian {
  /// The integer of type `Value` at `offset`. The caller promises that the bytes exist.
  public static func load<Value: FixedWidthInteger & UnsignedInteger>(
    _ type: Value.Type = Value.self, from bytes: [UInt8], at offset: Int
  ) -> Value {
    var value: Value = 0
    for index in 0..<(Value.bitWidth / 8) {
      value |= Value(bytes[offset + index]) << (8 * index)
    }
    return value
  }

  /// Stores `value` at `offset`. The caller promises that the bytes exist.
  public static func store<Value: FixedWidthInteger & UnsignedInteger>(
    _ value: Value, to bytes: inout [UInt8], at offset: Int
  ) {
    for index in 0..<(Value.bitWidth / 8) {
      bytes[offset + index] = UInt8(truncatingIfNeeded: value >> (8 * index))
    }
  }
}
