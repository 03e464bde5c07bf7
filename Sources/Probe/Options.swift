import ControlProtocol
import HostSystem

/// One option of a verb.
package struct OptionRow: Sendable {
  package let name: String
  /// What stands for the value in the help text; nil for a switch.
  package let argument: String?
  package let help: String

  package init(_ name: String, _ argument: String? = nil, _ help: String) {
    self.name = name
    self.argument = argument
    self.help = help
  }
}

/// The words after a verb, checked against its options.
package struct Options: Sendable {
  package let verb: String
  private var values: [String: String] = [:]
  /// What stands after `--`.
  package private(set) var command: [String] = []

  package static let common: [OptionRow] = [
    OptionRow("socket", "PATH", "where the back end listens; with a COMMAND, where it will listen"),
    OptionRow("fd", "NUMBER", "an inherited, connected vhost-user socket"),
    OptionRow("type", "TYPE", "the device: blk, net, console, fs, ... (default: guessed)"),
    OptionRow("timeout", "SECONDS", "longest wait for an answer (default 5)"),
    OptionRow("pin-backend", "CPU", "run COMMAND on this processor only"),
  ]

  package static func parse(_ words: [String], verb: Verb) throws(ProbeError) -> Options {
    var result = Options(verb: verb.name)
    var rest = words[...]
    let known = verb.known
    while let word = rest.popFirst() {
      if word == "--" {
        guard verb.reachesBackEnd else { throw .noTarget("\(verb.name) needs no back end; leave out -- and what follows") }
        result.command = Array(rest)
        guard !rest.isEmpty else { throw .noTarget("After -- there must be a command that starts the back end") }
        break
      }
      guard word.hasPrefix("--") else { throw .unknownOption(word, verb: verb.name, nearest: nil) }
      let parts = word.dropFirst(2).split(separator: "=", maxSplits: 1, omittingEmptySubsequences: false).map(String.init)
      let name = String(parts[0].map { $0 == "_" ? "-" : $0 })
      guard let option = known.first(where: { $0.name == name }) else {
        throw .unknownOption(word, verb: verb.name, nearest: Words.nearest(to: name, in: known.map(\.name)))
      }
      var value = ""
      if option.argument != nil {
        if parts.count == 2 {
          value = parts[1]
        } else if let next = rest.popFirst(), next != "--" {
          value = next
        }
        if value.isEmpty { throw .badOption(name, why: "wants a value (\(option.argument ?? ""))") }
      } else if parts.count == 2 {
        throw .badOption(name, why: "takes no value")
      }
      guard result.values.updateValue(value, forKey: name) == nil else { throw .badOption(name, why: "is given twice") }
    }
    return result
  }

  /// For tests and for the second back end of a comparison: the same options with another command.
  package func with(command: [String]) -> Options {
    var copy = self
    copy.command = command
    return copy
  }

  package func has(_ name: String) -> Bool { values[name] != nil }
  package func text(_ name: String) -> String? { values[name] }

  package func number(_ name: String, in range: ClosedRange<Int>) throws(ProbeError) -> Int? {
    guard let text = values[name] else { return nil }
    guard let number = Quantity.unsigned(text).flatMap({ Int(exactly: $0) }), range.contains(number) else {
      throw .badOption(name, why: "wants a number from \(range.lowerBound) to \(range.upperBound), not '\(text)'")
    }
    return number
  }

  package func byteCount(_ name: String, in range: ClosedRange<UInt64>) throws(ProbeError) -> UInt64? {
    guard let text = values[name] else { return nil }
    guard let number = Quantity.byteCount(text), range.contains(number) else {
      throw .badOption(
        name,
        why: "wants a size from \(Quantity.describe(byteCount: range.lowerBound)) to "
          + "\(Quantity.describe(byteCount: range.upperBound)), not '\(text)'")
    }
    return number
  }

  /// Seconds, also with `ms`, `s` or `m` at the end and with a decimal point.
  package func duration(_ name: String, in range: ClosedRange<Double>) throws(ProbeError) -> Duration? {
    guard let text = values[name] else { return nil }
    var digits = text[...]
    var scale = 1.0
    if digits.hasSuffix("ms") {
      digits = digits.dropLast(2)
      scale = 0.001
    } else if digits.hasSuffix("s") {
      digits = digits.dropLast()
    } else if digits.hasSuffix("m") {
      digits = digits.dropLast()
      scale = 60
    }
    guard let number = Double(digits), number.isFinite, range.contains(number * scale) else {
      throw .badOption(name, why: "wants seconds from \(range.lowerBound) to \(range.upperBound), not '\(text)'")
    }
    return .nanoseconds(Int64(number * scale * 1e9))
  }

  /// Processor numbers with commas between.
  package func processors(_ name: String) throws(ProbeError) -> [Int] {
    guard let text = values[name] else { return [] }
    var numbers: [Int] = []
    for word in text.split(separator: ",", omittingEmptySubsequences: false) {
      guard let processor = Int(word), (0..<1024).contains(processor) else {
        throw .badOption(name, why: "wants processor numbers with commas between, not '\(text)'")
      }
      numbers.append(processor)
    }
    return numbers
  }

  package func choice<T>(_ name: String, _ table: [(String, T)]) throws(ProbeError) -> T? {
    guard let text = values[name] else { return nil }
    guard let row = table.first(where: { $0.0 == text }) else {
      let all = table.map(\.0).joined(separator: ", ")
      let near = Words.nearest(to: text, in: table.map(\.0))
      throw .badOption(name, why: "does not know '\(text)'; \(near.map { "did you mean \($0)? It knows " } ?? "it knows ")\(all)")
    }
    return row.1
  }
}

/// Words of people.
package enum Words {
  static func nearest(to word: String, in known: [String]) -> String? { EditDistance.nearest(to: word, in: known) }

  /// A command line in one string, split as a shell would: blanks, 'single' and "double" quotes, backslash.
  package static func split(_ text: String) -> [String]? {
    var words: [String] = []
    var word: String?
    var quote: Character?
    var isEscaped = false
    for character in text {
      if isEscaped {
        word = (word ?? "") + String(character)
        isEscaped = false
      } else if let open = quote {
        if character == open { quote = nil } else { word = (word ?? "") + String(character) }
      } else if character == "\\" {
        isEscaped = true
      } else if character == "'" || character == "\"" {
        quote = character
        word = word ?? ""
      } else if character == " " || character == "\t" || character == "\n" {
        if let done = word { words.append(done) }
        word = nil
      } else {
        word = (word ?? "") + String(character)
      }
    }
    if let done = word { words.append(done) }
    return quote == nil && !isEscaped ? words : nil
  }
}

extension String {
  func padded(to width: Int) -> String {
    utf8.count >= width ? self + " " : self + String(repeating: " ", count: width - utf8.count)
  }

  func leftPadded(to width: Int) -> String {
    utf8.count >= width ? self : String(repeating: " ", count: width - utf8.count) + self
  }
}

extension UInt8 {
  var hexText: String { (self < 16 ? "0" : "") + String(self, radix: 16) }
}

extension Sequence<UInt8> {
  /// `01 00 ff`, at most `limit` bytes of it.
  func hexText(limit: Int = 48) -> String {
    let all = Array(self)
    return all.prefix(limit).map(\.hexText).joined(separator: " ") + (all.count > limit ? " ... (\(all.count) bytes)" : "")
  }
}

/// A number with so many digits after the point.
func decimal(_ value: Double, _ digits: Int = 1) -> String {
  guard value.isFinite else { return "-" }
  var scale = 1.0
  for _ in 0..<digits { scale *= 10 }
  let rounded = (value.magnitude * scale).rounded()
  guard rounded < 9e18 else { return "\(value)" }
  let whole = UInt64(rounded)
  let text = String(whole / UInt64(scale)) + (digits == 0 ? "" : "." + fraction(whole % UInt64(scale), digits))
  return value < 0 && whole != 0 ? "-" + text : text
}

private func fraction(_ value: UInt64, _ digits: Int) -> String {
  String(String(value).reversed() + repeatElement("0", count: max(0, digits - String(value).count))).reversedText
}

extension String {
  fileprivate var reversedText: String { String(reversed()) }
}
