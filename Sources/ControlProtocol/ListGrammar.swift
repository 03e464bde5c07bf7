/// The inner grammar of option values, shared by all options:
///
///     value   = part *("," part)
///     part    = word / key "=" text
///     text    = any characters; commas count as text inside "double quotes" and inside [brackets]
///     list    = "[" item *("," item) "]"      item = number / number "-" number
///
/// Quotes are removed from the result; a doubled quote inside quotes stands for one quote. Brackets stay: the key's
/// own parser wants to see them.
package enum ListGrammar {
  /// One part of a value: a bare word has no `value`.
  package struct Part: Equatable, Sendable {
    package let key: String
    package let value: String?
  }

  /// Splits a value at its commas. Nil when a quote or bracket is not closed.
  package static func parts(of text: String) -> [Part]? {
    guard let pieces = split(Array(text.utf8)) else { return nil }
    return pieces.map { piece in
      guard let equals = piece.equals else { return Part(key: string(piece.bytes[...]), value: nil) }
      return Part(key: string(piece.bytes[..<equals]), value: string(piece.bytes[equals...]))
    }
  }

  /// The items of `[a,b,[c,d]]`, one level deep. Nil without the outer brackets. An empty list has no items.
  package static func items(of text: String) -> [String]? {
    let bytes = Array(text.utf8)
    guard bytes.count >= 2, bytes.first == UInt8(ascii: "["), bytes.last == UInt8(ascii: "]") else { return nil }
    let inner = bytes[1..<(bytes.count - 1)]
    if inner.isEmpty { return [] }
    return split(Array(inner))?.map { string($0.original[...]) }
  }

  /// The numbers of `[1,3-5]` (1, 3, 4, 5), at most `limit` of them.
  package static func numbers(of text: String, limit: Int) -> [UInt64]? {
    guard let items = items(of: text) else { return nil }
    var numbers: [UInt64] = []
    for item in items {
      let ends = item.split(separator: "-", omittingEmptySubsequences: false).map(String.init)
      guard ends.count <= 2, let first = Quantity.unsigned(ends[0]), let last = Quantity.unsigned(ends[ends.count - 1]),
        first <= last, last - first < UInt64(limit), numbers.count + Int(last - first) + 1 <= limit
      else { return nil }
      numbers.append(contentsOf: first...last)
    }
    return numbers
  }

  /// A text as a value that reads as that text.
  package static func quoted(_ text: String) -> String {
    let special = text.utf8.contains { [UInt8(ascii: ","), UInt8(ascii: "\""), UInt8(ascii: "["), UInt8(ascii: "]")].contains($0) }
    // Lists in brackets are read as they stand.
    guard special, !(text.hasPrefix("[") && parts(of: text)?.count == 1) else { return text }
    return "\"" + text.replacing("\"", with: "\"\"") + "\""
  }

  private struct Piece {
    var bytes: [UInt8] = []
    var original: [UInt8] = []
    var equals: Int?
  }

  /// One pass over the bytes; `equals` is where the value begins in `bytes`, which has neither quotes nor the sign.
  private static func split(_ text: [UInt8]) -> [Piece]? {
    var pieces: [Piece] = []
    var piece = Piece()
    var depth = 0
    var quoted = false
    var index = 0
    while index < text.count {
      let byte = text[index]
      index += 1
      if quoted {
        piece.original.append(byte)
        if byte != UInt8(ascii: "\"") {
          piece.bytes.append(byte)
        } else if index < text.count, text[index] == UInt8(ascii: "\"") {
          piece.bytes.append(byte)
          piece.original.append(byte)
          index += 1
        } else {
          quoted = false
        }
        continue
      }
      if byte == UInt8(ascii: ","), depth == 0 {
        pieces.append(piece)
        piece = Piece()
        continue
      }
      piece.original.append(byte)
      switch byte {
      case UInt8(ascii: "\""): quoted = true
      case UInt8(ascii: "="):
        if piece.equals == nil, depth == 0 { piece.equals = piece.bytes.count } else { piece.bytes.append(byte) }
      case UInt8(ascii: "["):
        depth += 1
        piece.bytes.append(byte)
      case UInt8(ascii: "]"):
        depth -= 1
        if depth < 0 { return nil }
        piece.bytes.append(byte)
      default: piece.bytes.append(byte)
      }
    }
    guard depth == 0, !quoted else { return nil }
    pieces.append(piece)
    return pieces
  }

  private static func string(_ bytes: ArraySlice<UInt8>) -> String { String(decoding: bytes, as: UTF8.self) }
}
