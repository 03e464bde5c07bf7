/// One option of a command: its name, the shape of its value, its help, and what it does to the configuration. The
/// parser, the suggestions and `--help` all read the same table, so an option is added in one place.
package struct OptionDescription<Draft>: Sendable {
  package enum Occurrence: Sendable { case once, many }

  package enum Shape: Sendable {
    /// A plain switch.
    case none
    /// The whole value as it stands.
    case text(String)
    /// `key=value` parts; `words` may stand alone.
    case list(keys: [KeyDescription], words: [KeyDescription] = [])
  }

  package let name: String
  package let shape: Shape
  package let occurrence: Occurrence
  package let group: String
  package let summary: String
  package let example: String
  package let apply: @Sendable (inout Draft, OptionValues) throws(ConfigurationError) -> Void

  package init(
    _ name: String, _ shape: Shape, _ occurrence: Occurrence = .once, group: String, summary: String, example: String,
    apply: @escaping @Sendable (inout Draft, OptionValues) throws(ConfigurationError) -> Void
  ) {
    self.name = name
    self.shape = shape
    self.occurrence = occurrence
    self.group = group
    self.summary = summary
    self.example = example
    self.apply = apply
  }
}

/// A key of an option value, or a word that may stand alone.
package struct KeyDescription: Sendable {
  package let name: String
  package let value: String
  package let summary: String
  package let required: Bool

  package init(_ name: String, _ value: String = "", required: Bool = false, _ summary: String) {
    self.name = name
    self.value = value
    self.summary = summary
    self.required = required
  }
}

/// The options of one command.
package struct OptionTable<Draft>: Sendable {
  package let options: [OptionDescription<Draft>]

  package init(_ options: [OptionDescription<Draft>]) { self.options = options }

  /// Reads the arguments in order and applies each option to the draft. `--opt value`, `--opt=value`, and for options
  /// that may stand often several values after one flag (`--disk path=a path=b`).
  package func apply(_ arguments: [String], to draft: inout Draft) throws(ConfigurationError) {
    var seen: Set<String> = []
    var index = 0
    while index < arguments.count {
      let argument = arguments[index]
      index += 1
      guard argument.hasPrefix("--"), argument.utf8.count > 2 else { throw .unexpectedArgument(argument) }
      let (name, attached) = Self.splitFlag(argument)
      guard let option = options.first(where: { $0.name == name }) else {
        throw .unknownOption(name, nearest: EditDistance.nearest(to: name, in: options.map(\.name)))
      }
      if option.occurrence == .once, !seen.insert(name).inserted { throw .optionGivenTwice(name) }
      var values: [String] = []
      if let attached {
        values.append(attached)
      } else {
        // Values never begin with two dashes unless attached by an equals sign, so a forgotten value is noticed.
        while index < arguments.count, !arguments[index].hasPrefix("--") {
          if case .none = option.shape { break }
          if option.occurrence == .once, values.count == 1 { break }
          values.append(arguments[index])
          index += 1
        }
      }
      if case .none = option.shape {
        if let value = values.first { throw .unexpectedValue(option: name, value: value) }
        try option.apply(&draft, OptionValues(option: name, example: option.example, text: "", parts: []))
        continue
      }
      if values.isEmpty { throw .missingValue(option: name, example: option.example) }
      for value in values { try option.apply(&draft, option.check(value)) }
    }
  }

  private static func splitFlag(_ argument: String) -> (name: String, value: String?) {
    let body = argument.dropFirst(2)
    guard let equals = body.firstIndex(of: "=") else { return (String(body), nil) }
    return (String(body[..<equals]), String(body[body.index(after: equals)...]))
  }
}

extension OptionDescription {
  /// Brings a value into parts whose keys this option knows, each at most once, none of the required ones missing.
  fileprivate func check(_ text: String) throws(ConfigurationError) -> OptionValues {
    guard case .list(let keys, let words) = shape else {
      return OptionValues(option: name, example: example, text: text, parts: [])
    }
    guard let parts = ListGrammar.parts(of: text) else { throw .unbalanced(option: name, text: text) }
    var seen: Set<String> = []
    for part in parts {
      if part.value == nil {
        guard words.contains(where: { $0.name == part.key }) else {
          throw .unknownWord(
            option: name, word: part.key,
            nearest: EditDistance.nearest(to: part.key, in: words.map(\.name) + keys.map { $0.name + "=" }),
            example: example)
        }
      } else if !keys.contains(where: { $0.name == part.key }) {
        throw .unknownKey(
          option: name, key: part.key, nearest: EditDistance.nearest(to: part.key, in: keys.map(\.name)),
          known: keys.map(\.name))
      }
      guard seen.insert(part.key).inserted else { throw .keyGivenTwice(option: name, key: part.key) }
    }
    for key in keys where key.required && !seen.contains(key.name) {
      throw .missingKey(option: name, key: key.name, example: example)
    }
    return OptionValues(option: name, example: example, text: text, parts: parts)
  }
}
