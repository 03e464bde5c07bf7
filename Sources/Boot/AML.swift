/// Builds ACPI machine language: each function returns the bytes of one term, and terms nest as arguments.
/// Encodings: ACPI specification 6.5, chapter 20.
enum AML {
  typealias Term = [UInt8]

  // MARK: data

  static func integer(_ value: UInt64) -> Term {
    var bytes: Term = []
    switch value {
    case 0: bytes = [0x00]
    case 1: bytes = [0x01]
    case 2...0xFF: bytes = [0x0A, UInt8(value)]
    case 0x100...0xFFFF:
      bytes = [0x0B]
      bytes.append(u16: UInt16(value))
    case 0x1_0000...0xFFFF_FFFF:
      bytes = [0x0C]
      bytes.append(u32: UInt32(value))
    default:
      bytes = [0x0E]
      bytes.append(u64: value)
    }
    return bytes
  }

  static func string(_ text: StaticString) -> Term {
    [0x0D] + ascii(text) + [0]
  }

  static func buffer(_ bytes: [UInt8]) -> Term {
    let size = integer(UInt64(bytes.count))
    return [0x11] + packageLength(size.count + bytes.count) + size + bytes
  }

  static func package(_ elements: [Term]) -> Term {
    let body = [UInt8(elements.count)] + elements.flatMap { $0 }
    return [0x12] + packageLength(body.count) + body
  }

  /// A compressed EISA identifier such as `PNP0A08`, as the integer that `_HID` holds.
  static func eisaID(_ text: StaticString) -> Term {
    let characters = ascii(text)
    precondition(characters.count == 7, "An EISA id has three letters and four digits")
    var value: UInt32 = 0
    for letter in characters.prefix(3) { value = value << 5 | UInt32(letter & 0x1F) }
    for digit in characters.dropFirst(3) {
      value = value << 4 | UInt32(digit <= 0x39 ? digit - 0x30 : digit - 0x37)
    }
    return integer(UInt64(value.byteSwapped))
  }

  // MARK: names and containers

  /// A name such as `_HID`, `GED_` or `\\_SB_.PC00`; segments have exactly four characters.
  static func path(_ text: StaticString) -> Term {
    path(ascii(text))
  }

  static func path(_ characters: [UInt8]) -> Term {
    let root = characters.first == 0x5C
    let segments = characters.dropFirst(root ? 1 : 0).split(separator: 0x2E)
    precondition(segments.allSatisfy { $0.count == 4 }, "AML name segments have four characters")
    var bytes: Term = root ? [0x5C] : []
    switch segments.count {
    case 1: break
    case 2: bytes.append(0x2E)
    default: bytes += [0x2F, UInt8(segments.count)]
    }
    for segment in segments { bytes += segment }
    return bytes
  }

  static func name(_ name: StaticString, _ value: Term) -> Term {
    [0x08] + path(name) + value
  }

  static func scope(_ name: StaticString, _ body: [Term]) -> Term {
    container([0x10], path(name), body)
  }

  static func device(_ name: StaticString, _ body: [Term]) -> Term {
    container([0x5B, 0x82], path(name), body)
  }

  static func device(named characters: [UInt8], _ body: [Term]) -> Term {
    container([0x5B, 0x82], path(characters), body)
  }

  static func method(_ name: StaticString, arguments: UInt8, serialized: Bool = false, _ body: [Term]) -> Term {
    container([0x14], path(name) + [arguments | (serialized ? 8 : 0)], body)
  }

  /// An operation region in I/O port space.
  static func portRegion(_ name: StaticString, at port: UInt16, count: UInt8) -> Term {
    [0x5B, 0x80] + path(name) + [0x01] + integer(UInt64(port)) + integer(UInt64(count))
  }

  /// Fields of 32-bit registers from the start of `region` on.
  static func doubleWordFields(region: StaticString, names: [StaticString]) -> Term {
    // Flags: double-word access, no lock, writes as zeros.
    var bits: Term = []
    for name in names { bits += path(name) + packageFieldLength(32) }
    return container([0x5B, 0x81], path(region) + [0x43], [bits])
  }

  /// The length of a field in bits, encoded as a package length that does not count itself.
  private static func packageFieldLength(_ bits: UInt8) -> Term {
    precondition(bits < 0x40, "One byte of length")
    return [bits]
  }

  /// A field of one byte-wide register at the start of `region`.
  static func byteField(region: StaticString, name: StaticString) -> Term {
    // Flags: byte access, no lock, writes as zeros. The field's own length is in bits and counts no length bytes.
    container([0x5B, 0x81], path(region) + [0x41], [path(name) + [8]])
  }

  // MARK: statements

  static let local0: Term = [0x60]
  static let arg0: Term = [0x68]
  static let arg1: Term = [0x69]
  static let arg3: Term = [0x6B]

  static func store(_ value: Term, into target: Term) -> Term { [0x70] + value + target }
  static func and(_ a: Term, _ b: Term, into target: Term = [0]) -> Term { [0x7B] + a + b + target }
  static func or(_ a: Term, _ b: Term, into target: Term = [0]) -> Term { [0x7D] + a + b + target }
  /// A call of a method that takes these arguments.
  static func call(_ method: StaticString, _ arguments: [Term]) -> Term { path(method) + arguments.flatMap { $0 } }
  static func equal(_ a: Term, _ b: Term) -> Term { [0x93] + a + b }
  static func not(_ a: Term) -> Term { [0x92] + a }
  static func `if`(_ condition: Term, _ body: [Term]) -> Term { container([0xA0], condition, body) }
  static func `else`(_ body: [Term]) -> Term { container([0xA1], [], body) }
  static func `return`(_ value: Term) -> Term { [0xA4] + value }
  static func notify(_ object: StaticString, _ value: UInt64) -> Term { [0x86] + path(object) + integer(value) }
  static func notify(named characters: [UInt8], _ value: Term) -> Term { [0x86] + path(characters) + value }
  static func createDWordField(_ source: Term, offset: UInt64, name: StaticString) -> Term {
    [0x8A] + source + integer(offset) + path(name)
  }

  // MARK: encoding

  static func ascii(_ text: StaticString) -> [UInt8] {
    text.withUTF8Buffer { unsafe [UInt8]($0) }
  }

  private static func container(_ opcode: [UInt8], _ head: Term, _ body: [Term]) -> Term {
    let contentCount = head.count + body.reduce(0) { $0 + $1.count }
    var bytes = opcode
    bytes += packageLength(contentCount)
    bytes += head
    for term in body { bytes += term }
    return bytes
  }

  /// PkgLength: counts itself. One byte up to 63, otherwise the low nibble and one to three further bytes.
  static func packageLength(_ contentCount: Int) -> [UInt8] {
    precondition(contentCount < (1 << 28) - 4, "AML packages have at most 28 bits of length")
    if contentCount + 1 < 0x40 { return [UInt8(contentCount + 1)] }
    for extra in 1...3 {
      let total = contentCount + 1 + extra
      if total < 1 << (4 + 8 * extra) {
        var bytes = [UInt8(extra) << 6 | UInt8(total & 0xF)]
        for index in 0..<extra { bytes.append(UInt8(truncatingIfNeeded: total >> (4 + 8 * index))) }
        return bytes
      }
    }
    preconditionFailure("AML package length was bounded above")
  }
}
