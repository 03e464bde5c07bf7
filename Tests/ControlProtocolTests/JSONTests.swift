import ControlProtocol
import Foundation
import Testing

@Suite struct JSONTests {
  @Test func valuesComeBackAsTheyWere() throws {
    let value = JSONValue.record([
      "ok": .bool(true), "n": .null, "u": .unsigned(.max), "s": .signed(.min), "d": .number(1.5),
      "t": .string("a\"\\\n\u{1}ä🙂/"), "a": .array([.unsigned(0), .object([])]), "e": .array([]),
    ])
    #expect(try JSONValue(parsing: value.text) == value)
    #expect(!value.text.contains("\n"))
  }

  /// What we write is what another implementation reads.
  @Test func foundationReadsWhatIsWritten() throws {
    let value = JSONValue.record(["t": .string("a\"\\\n\u{1}\u{7F}ä🙂"), "u": .unsigned(18_446_744_073_709_551_615)])
    let object = try #require(try JSONSerialization.jsonObject(with: Data(value.text.utf8)) as? [String: Any])
    #expect(object["t"] as? String == "a\"\\\n\u{1}\u{7F}ä🙂")
    #expect((object["u"] as? NSNumber)?.uint64Value == .max)
  }

  @Test(arguments: [
    (" [1 , -2, 0.5e+1 ,true,false,null] ", JSONValue.array([.unsigned(1), .signed(-2), .number(5), .bool(true), .bool(false), .null])),
    ("\"\\u00e4\\ud83d\\ude42\\/\\b\"", .string("ä🙂/\u{8}")), ("-0", .unsigned(0)),
    ("18446744073709551616", .number(18_446_744_073_709_551_616)),
    ("{}", .object([])),
  ])
  func accepts(_ text: String, _ value: JSONValue) throws { #expect(try JSONValue(parsing: text) == value) }

  @Test(arguments: [
    "", " ", "nul", "[1,]", "[1 2]", "{\"a\":1,}", "{a:1}", "{\"a\" 1}", "01", "1.", ".5", "+1", "1e", "-", "\"", "\"\\x\"",
    "\"\\ud800\"", "\"\\ud800\\u0041\"", "\"\\udc00\"", "\"a\nb\"", "[", "{", "1 2", "{\"a\":1,\"a\":2}", "1e999", "tru e",
    "\"\\u12\"",
  ])
  func refuses(_ text: String) { #expect(throws: JSONError.self) { try JSONValue(parsing: text) } }

  @Test func invalidUTF8IsRefused() {
    #expect(throws: JSONError.self) { try JSONValue(parsing: [0x22, 0xFF, 0x22]) }
  }

  @Test func deepNestingIsRefused() throws {
    let fits = String(repeating: "[", count: 64) + String(repeating: "]", count: 64)
    _ = try JSONValue(parsing: fits)
    #expect(throws: JSONError.self) { try JSONValue(parsing: String(repeating: "[", count: 100_000)) }
  }
}

@Suite struct WallTimeTests {
  /// Against the calendar of another implementation: turns of years and centuries, leap days, and any moment.
  @Test func timesAreThoseOfTheCalendar() throws {
    let formatter = DateFormatter()
    formatter.locale = Locale(identifier: "en_US_POSIX")
    formatter.timeZone = TimeZone(identifier: "UTC")
    formatter.dateFormat = "yyyy-MM-dd'T'HH:mm:ss"
    var moments: [UInt64] = [0, 951_782_399, 951_782_400, 4_107_542_399, 4_107_542_400, 1_709_164_800, 13_569_465_599]
    var random = SystemRandomNumberGenerator()
    for _ in 0..<500 { moments.append(UInt64.random(in: 0...13_000_000_000, using: &random)) }
    for seconds in moments {
      let expected = formatter.string(from: Date(timeIntervalSince1970: Double(seconds)))
      #expect(WallTime.text(seconds * 1_000_000_000 + 1_234_567) == expected + ".001234Z")
    }
  }
}
