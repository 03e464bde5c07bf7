/// Why a message was refused. The connection it came from cannot be trusted any more.
package enum MessageError: Error, Equatable, Sendable {
  /// The message ends in the middle of a field.
  case truncated
  /// Bytes are left over behind the last field.
  case trailing(byteCount: Int)
  /// No message has this number in this direction.
  case unknownKind(UInt16)
  /// A field holds a value that it must not; the name is the field's.
  case badField(StaticName)
  /// The message came with another number of descriptors than its kind and fields ask for.
  case descriptors(expected: Int, received: Int)
  /// The message is longer than `Wire.maximumLength`.
  case tooLong(byteCount: Int)

  package var message: String {
    switch self {
    case .truncated: "A control message ends in the middle of a field"
    case .trailing(let count): "A control message has \(count) bytes too many"
    case .unknownKind(let kind): "A control message has the unknown kind \(kind)"
    case .badField(let name): "A control message has a wrong value in its field '\(name.text)'"
    case .descriptors(let expected, let received):
      "A control message came with \(received) descriptors instead of \(expected)"
    case .tooLong(let count): "A control message of \(count) bytes is longer than \(Wire.maximumLength)"
    }
  }

  /// A field name fixed at compile time.
  package struct StaticName: Equatable, Sendable, ExpressibleByStringLiteral {
    package let text: String
    package init(stringLiteral value: String) { text = value }
  }
}

/// The numbers of the supervisor-core protocol that are not messages. See `protocol/control.md`.
package enum Wire {
  /// Raised whenever a message changes its shape. Both programs come from one build; a difference means a mixed
  /// installation.
  package static let version: UInt16 = 1
  /// kind (2), descriptor count (2), sequence (4).
  package static let headerLength = 8
  /// No message is longer.
  package static let maximumLength = 16 * 1024
  /// No message carries more descriptors.
  package static let maximumDescriptors = 8
}

/// Appends little-endian fields.
package struct WireWriter {
  package private(set) var bytes: [UInt8] = []

  package init() {}

  package mutating func number<Number: FixedWidthInteger>(_ value: Number) {
    for shift in stride(from: 0, to: Number.bitWidth, by: 8) {
      bytes.append(UInt8(truncatingIfNeeded: value >> Number(shift)))
    }
  }

  package mutating func flag(_ value: Bool) { number(UInt8(value ? 1 : 0)) }

  /// Two bytes of length, then UTF-8. Cut at a character boundary if it were too long for the field: texts are checked
  /// where they enter, except sentences, which may be cut.
  package mutating func text(_ value: String, limit: Int = 4096) {
    var text = Substring(value)
    while text.utf8.count > limit { text.removeLast() }
    number(UInt16(text.utf8.count))
    bytes.append(contentsOf: text.utf8)
  }

  package mutating func list<Element>(_ elements: [Element], _ write: (inout WireWriter, Element) -> Void) {
    number(UInt16(elements.count))
    for element in elements { write(&self, element) }
  }
}

/// Takes fields off the front and never reads past the end.
package struct WireReader {
  private let bytes: [UInt8]
  private var position = 0

  package init(_ bytes: [UInt8]) { self.bytes = bytes }

  package mutating func number<Number: FixedWidthInteger & UnsignedInteger>(
    _: Number.Type = Number.self
  ) throws(MessageError) -> Number {
    let count = Number.bitWidth / 8
    guard bytes.count - position >= count else { throw .truncated }
    var value: Number = 0
    for index in 0..<count { value |= Number(bytes[position + index]) << Number(8 * index) }
    position += count
    return value
  }

  package mutating func flag(_ name: MessageError.StaticName) throws(MessageError) -> Bool {
    switch try number(UInt8.self) {
    case 0: return false
    case 1: return true
    default: throw .badField(name)
    }
  }

  package mutating func text(_ name: MessageError.StaticName, limit: Int = 4096) throws(MessageError) -> String {
    let count = Int(try number(UInt16.self))
    guard count <= limit else { throw .badField(name) }
    guard bytes.count - position >= count else { throw .truncated }
    guard let text = String(validating: bytes[position..<(position + count)], as: UTF8.self) else {
      throw .badField(name)
    }
    position += count
    return text
  }

  package mutating func list<Element>(
    _ name: MessageError.StaticName, limit: Int, _ read: (inout WireReader) throws(MessageError) -> Element
  ) throws(MessageError) -> [Element] {
    let count = Int(try number(UInt16.self))
    guard count <= limit else { throw .badField(name) }
    var elements: [Element] = []
    elements.reserveCapacity(count)
    for _ in 0..<count { elements.append(try read(&self)) }
    return elements
  }

  package func finish() throws(MessageError) {
    guard position == bytes.count else { throw .trailing(byteCount: bytes.count - position) }
  }
}

/// The first eight bytes of every message.
struct WireHeader {
  var kind: UInt16
  var descriptorCount: UInt16
  var sequence: UInt32

  func write(to writer: inout WireWriter) {
    writer.number(kind)
    writer.number(descriptorCount)
    writer.number(sequence)
  }

  init(kind: UInt16, descriptorCount: Int, sequence: UInt32) {
    self.kind = kind
    self.descriptorCount = UInt16(descriptorCount)
    self.sequence = sequence
  }

  init(from reader: inout WireReader) throws(MessageError) {
    kind = try reader.number()
    descriptorCount = try reader.number()
    sequence = try reader.number()
  }

  /// The count in the header, the count the fields ask for and the count that the kernel delivered must be one number.
  func checkDescriptors(expected: Int, received: Int) throws(MessageError) {
    guard Int(descriptorCount) == expected, received == expected else {
      throw .descriptors(expected: expected, received: received)
    }
  }
}
