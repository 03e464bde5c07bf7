/// Numbers as people write them on the command line.
package enum Quantity {
  /// A byte count: decimal digits and an optional `K`, `M`, `G` or `T` (powers of 1024). Nil when it is something else
  /// or does not fit 64 bits.
  package static func byteCount(_ text: String) -> UInt64? {
    var digits = Substring(text)
    var shift: UInt64 = 0
    switch digits.utf8.last {
    case UInt8(ascii: "K"), UInt8(ascii: "k"): shift = 10
    case UInt8(ascii: "M"), UInt8(ascii: "m"): shift = 20
    case UInt8(ascii: "G"), UInt8(ascii: "g"): shift = 30
    case UInt8(ascii: "T"), UInt8(ascii: "t"): shift = 40
    default: break
    }
    if shift > 0 { digits.removeLast() }
    guard let number = unsigned(String(digits)) else { return nil }
    let (product, overflow) = number.multipliedReportingOverflow(by: 1 << shift)
    return overflow ? nil : product
  }

  /// Decimal digits only, or `0x` and hexadecimal digits: no sign, no blank.
  package static func unsigned(_ text: String) -> UInt64? {
    if text.hasPrefix("0x") || text.hasPrefix("0X") {
      let digits = text.dropFirst(2)
      guard !digits.isEmpty, digits.utf8.allSatisfy({ hexadecimalDigit($0) != nil }) else { return nil }
      return UInt64(digits, radix: 16)
    }
    guard !text.isEmpty, text.utf8.allSatisfy({ $0 >= UInt8(ascii: "0") && $0 <= UInt8(ascii: "9") }) else { return nil }
    return UInt64(text)
  }

  /// `on`/`off`, also `true`/`false`.
  package static func onOff(_ text: String) -> Bool? {
    switch text {
    case "on", "true": true
    case "off", "false": false
    default: nil
    }
  }

  /// The shortest exact way to write a byte count: `512M`, `4G`, `4097`.
  package static func describe(byteCount: UInt64) -> String {
    for (shift, unit) in [(40, "T"), (30, "G"), (20, "M"), (10, "K")] as [(UInt64, String)]
    where byteCount >= 1 << shift && byteCount & ((1 << shift) - 1) == 0 {
      return "\(byteCount >> shift)\(unit)"
    }
    return "\(byteCount)"
  }

  static func hexadecimalDigit(_ byte: UInt8) -> UInt8? {
    switch byte {
    case UInt8(ascii: "0")...UInt8(ascii: "9"): byte - UInt8(ascii: "0")
    case UInt8(ascii: "a")...UInt8(ascii: "f"): byte - UInt8(ascii: "a") + 10
    case UInt8(ascii: "A")...UInt8(ascii: "F"): byte - UInt8(ascii: "A") + 10
    default: nil
    }
  }
}
