/// Why a text is not JSON, and where.
package struct JSONError: Error, Equatable, Sendable {
  package enum Reason: Equatable, Sendable {
    case end, unexpectedByte, trailing, badNumber, badString, tooDeep, tooLong, duplicateName
  }
  package let reason: Reason
  /// Byte offset.
  package let offset: Int
}

extension JSONValue {
  /// Nesting deeper than this is refused, so that no text can exhaust the stack.
  package static let depthLimit = 64
  /// Texts longer than this many bytes are refused.
  package static let lengthLimit = 16 << 20

  /// Reads exactly one value.
  package init(parsing bytes: [UInt8]) throws(JSONError) {
    guard bytes.count <= Self.lengthLimit else { throw JSONError(reason: .tooLong, offset: Self.lengthLimit) }
    var reader = JSONReader(bytes: bytes)
    self = try reader.value(depth: 0)
    reader.skipBlanks()
    guard reader.position == bytes.count else { throw JSONError(reason: .trailing, offset: reader.position) }
  }

  package init(parsing text: String) throws(JSONError) { try self.init(parsing: Array(text.utf8)) }
}

private struct JSONReader {
  let bytes: [UInt8]
  var position = 0

  private func fail(_ reason: JSONError.Reason) -> JSONError { JSONError(reason: reason, offset: position) }

  private var next: UInt8? { position < bytes.count ? bytes[position] : nil }

  mutating func skipBlanks() {
    while let byte = next, byte == 0x20 || byte == 0x09 || byte == 0x0A || byte == 0x0D { position += 1 }
  }

  private mutating func expect(_ word: StaticString, _ value: JSONValue) throws(JSONError) -> JSONValue {
    for byte in word.description.utf8 {
      guard let found = next else { throw fail(.end) }
      guard found == byte else { throw fail(.unexpectedByte) }
      position += 1
    }
    return value
  }

  mutating func value(depth: Int) throws(JSONError) -> JSONValue {
    guard depth < JSONValue.depthLimit else { throw fail(.tooDeep) }
    skipBlanks()
    guard let byte = next else { throw fail(.end) }
    switch byte {
    case UInt8(ascii: "n"): return try expect("null", .null)
    case UInt8(ascii: "t"): return try expect("true", .bool(true))
    case UInt8(ascii: "f"): return try expect("false", .bool(false))
    case UInt8(ascii: "\""): return .string(try string())
    case UInt8(ascii: "["): return try array(depth: depth)
    case UInt8(ascii: "{"): return try object(depth: depth)
    case UInt8(ascii: "-"), UInt8(ascii: "0")...UInt8(ascii: "9"): return try number()
    default: throw fail(.unexpectedByte)
    }
  }

  /// After a value inside brackets: true when another follows, false at the closing one.
  private mutating func separator(closing: UInt8) throws(JSONError) -> Bool {
    skipBlanks()
    guard let byte = next else { throw fail(.end) }
    guard byte == closing || byte == UInt8(ascii: ",") else { throw fail(.unexpectedByte) }
    position += 1
    return byte != closing
  }

  private mutating func array(depth: Int) throws(JSONError) -> JSONValue {
    position += 1
    skipBlanks()
    if next == UInt8(ascii: "]") {
      position += 1
      return .array([])
    }
    var values: [JSONValue] = []
    repeat { values.append(try value(depth: depth + 1)) } while try separator(closing: UInt8(ascii: "]"))
    return .array(values)
  }

  private mutating func object(depth: Int) throws(JSONError) -> JSONValue {
    position += 1
    skipBlanks()
    if next == UInt8(ascii: "}") {
      position += 1
      return .object([])
    }
    var members: [JSONValue.Member] = []
    var names: Set<String> = []
    repeat {
      skipBlanks()
      guard next == UInt8(ascii: "\"") else { throw fail(next == nil ? .end : .unexpectedByte) }
      let name = try string()
      guard names.insert(name).inserted else { throw fail(.duplicateName) }
      skipBlanks()
      guard next == UInt8(ascii: ":") else { throw fail(next == nil ? .end : .unexpectedByte) }
      position += 1
      members.append(JSONValue.Member(name, try value(depth: depth + 1)))
    } while try separator(closing: UInt8(ascii: "}"))
    return .object(members)
  }

  private mutating func number() throws(JSONError) -> JSONValue {
    let start = position
    var isWhole = true
    func isDigit(_ byte: UInt8?) -> Bool { byte.map { (0x30...0x39).contains($0) } ?? false }
    if next == UInt8(ascii: "-") { position += 1 }
    guard isDigit(next) else { throw fail(.badNumber) }
    if next == UInt8(ascii: "0") {
      position += 1
      if isDigit(next) { throw fail(.badNumber) }
    }
    while isDigit(next) { position += 1 }
    if next == UInt8(ascii: ".") {
      isWhole = false
      position += 1
      guard isDigit(next) else { throw fail(.badNumber) }
      while isDigit(next) { position += 1 }
    }
    if next == UInt8(ascii: "e") || next == UInt8(ascii: "E") {
      isWhole = false
      position += 1
      if next == UInt8(ascii: "+") || next == UInt8(ascii: "-") { position += 1 }
      guard isDigit(next) else { throw fail(.badNumber) }
      while isDigit(next) { position += 1 }
    }
    let text = String(decoding: bytes[start..<position], as: UTF8.self)
    if isWhole {
      if let number = UInt64(text) { return .unsigned(number) }
      if let number = Int64(text) { return .signed(number) }
    }
    guard let number = Double(text), number.isFinite else { throw fail(.badNumber) }
    return .number(number)
  }

  private mutating func string() throws(JSONError) -> String {
    position += 1
    var text: [UInt8] = []
    while let byte = next {
      position += 1
      switch byte {
      case UInt8(ascii: "\""):
        guard let result = String(validating: text, as: UTF8.self) else { throw fail(.badString) }
        return result
      case UInt8(ascii: "\\"): text.append(contentsOf: try escape())
      case 0..<0x20: throw fail(.badString)
      default: text.append(byte)
      }
    }
    throw fail(.end)
  }

  private mutating func escape() throws(JSONError) -> [UInt8] {
    guard let byte = next else { throw fail(.end) }
    position += 1
    switch byte {
    case UInt8(ascii: "\""), UInt8(ascii: "\\"), UInt8(ascii: "/"): return [byte]
    case UInt8(ascii: "b"): return [0x08]
    case UInt8(ascii: "f"): return [0x0C]
    case UInt8(ascii: "n"): return [0x0A]
    case UInt8(ascii: "r"): return [0x0D]
    case UInt8(ascii: "t"): return [0x09]
    case UInt8(ascii: "u"):
      var code = try hexadecimal()
      if (0xD800..<0xDC00).contains(code) {
        guard next == UInt8(ascii: "\\") else { throw fail(.badString) }
        position += 1
        guard next == UInt8(ascii: "u") else { throw fail(.badString) }
        position += 1
        let low = try hexadecimal()
        guard (0xDC00..<0xE000).contains(low) else { throw fail(.badString) }
        code = 0x10000 + (code - 0xD800) << 10 + (low - 0xDC00)
      }
      guard let scalar = Unicode.Scalar(code) else { throw fail(.badString) }
      return Array(UTF8.encode(scalar) ?? UTF8.encodedReplacementCharacter)
    default: throw fail(.badString)
    }
  }

  private mutating func hexadecimal() throws(JSONError) -> UInt32 {
    var code: UInt32 = 0
    for _ in 0..<4 {
      guard let byte = next else { throw fail(.end) }
      guard let digit = Quantity.hexadecimalDigit(byte) else { throw fail(.badString) }
      code = code << 4 | UInt32(digit)
      position += 1
    }
    return code
  }
}
