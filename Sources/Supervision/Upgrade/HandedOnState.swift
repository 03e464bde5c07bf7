import ControlProtocol

/// What one program hands on to the next: a number that names it, its version, and what it says.
protocol HandedOnState {
  static var magic: UInt32 { get }
  static var version: UInt16 { get }
  /// Bytes; more are not looked at.
  static var limit: Int { get }
  /// Reads what follows the version.
  init(from reader: inout WireReader) throws(MessageError)
}

extension HandedOnState {
  static func decode(_ bytes: [UInt8]) throws(StateError) -> Self {
    guard bytes.count <= limit else { throw .broken(.tooLong(byteCount: bytes.count)) }
    var reader = WireReader(bytes)
    let head: (magic: UInt32, version: UInt16)
    do throws(MessageError) { head = (try reader.number(), try reader.number()) } catch { throw .broken(error) }
    guard head.magic == magic else { throw .broken(.badField("magic")) }
    guard head.version == version else { throw .version(head.version) }
    do throws(MessageError) {
      let state = try Self(from: &reader)
      try reader.finish()
      return state
    } catch { throw .broken(error) }
  }
}
