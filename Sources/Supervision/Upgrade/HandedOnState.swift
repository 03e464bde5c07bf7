import ControlProtocol

/// What one program hands on to the next: a number that names it, its version, and what it says.
protocol HandedOnState {
  static var magic: UInt32 { get }
  static var version: UInt16 { get }
  /// Bytes; more are not looked at.
  static var limit: Int { get }
  /// Looks at what else must be the same on both sides, right behind the version.
  static func checkHead(_ reader: inout WireReader) throws(StateError)
  /// Reads what follows.
  init(from reader: inout WireReader) throws(MessageError)
}

extension HandedOnState {
  /// What every state begins with.
  static func begin() -> WireWriter {
    var writer = WireWriter()
    writer.number(magic)
    writer.number(version)
    return writer
  }

  static func checkHead(_ reader: inout WireReader) throws(StateError) {}

  /// Reads a state as what it is, somebody else's bytes. What begins it never changes its place, so that every version can say what
  /// it was given.
  static func decode(_ bytes: [UInt8]) throws(StateError) -> Self {
    guard bytes.count <= limit else { throw .broken(.tooLong(byteCount: bytes.count)) }
    var reader = WireReader(bytes)
    let head: (magic: UInt32, version: UInt16)
    do throws(MessageError) { head = (try reader.number(), try reader.number()) } catch { throw .broken(error) }
    guard head.magic == magic else { throw .broken(.badField("magic")) }
    guard head.version == version else { throw .version(head.version) }
    try checkHead(&reader)
    do throws(MessageError) {
      let state = try Self(from: &reader)
      try reader.finish()
      return state
    } catch { throw .broken(error) }
  }
}
