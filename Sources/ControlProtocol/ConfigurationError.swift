/// Why a command line was refused. Every case has one clear line (`message`) that names the thing and the remedy.
package enum ConfigurationError: Error, Equatable, Sendable {
  /// An option that is not in the table; `nearest` is the closest one that is.
  case unknownOption(String, nearest: String?)
  /// A key that the option does not know.
  case unknownKey(option: String, key: String, nearest: String?, known: [String])
  /// A bare word where the option wants `key=value` or one of its own words.
  case unknownWord(option: String, word: String, nearest: String?, example: String)
  /// A request that `martlet ctl` does not know.
  case unknownRequest(String, nearest: String?, known: [String])
  /// A device that `martlet ctl add` does not know.
  case unknownKind(String, nearest: String?, known: [String])
  /// `martlet ctl` without a request.
  case missingRequest(known: [String])
  /// The option stands at the end or before another option, and wants a value.
  case missingValue(option: String, example: String)
  /// The option takes no value.
  case unexpectedValue(option: String, value: String)
  /// A word that belongs to no option.
  case unexpectedArgument(String)
  /// The option may stand once only.
  case optionGivenTwice(String)
  /// The key may stand once only in a value.
  case keyGivenTwice(option: String, key: String)
  /// A key without which the option means nothing.
  case missingKey(option: String, key: String, example: String)
  /// An option without which there is no VM.
  case missingOption(String, example: String)
  /// A value that is not of the form the key wants. `place` reads `--disk path` or `--name`.
  case badValue(place: String, value: String, expected: String)
  /// Two keys or options that exclude each other, and what to do.
  case conflict(String, String, remedy: String)
  /// A bracket or quote that is not closed.
  case unbalanced(option: String, text: String)
  /// Two devices with one id.
  case duplicateID(String, first: String, second: String)
  /// More devices, processors or the like than fit.
  case tooMany(what: String, count: Int, limit: Int)

  /// One line without a full stop at its end, beginning with a capital.
  package var message: String {
    switch self {
    case .unknownOption(let option, let nearest):
      guard let nearest else { return "Unknown option --\(option); martlet run --help lists the options" }
      return "Unknown option --\(option); did you mean --\(nearest)?"
    case .unknownKey(let option, let key, let nearest, let known):
      let all = known.joined(separator: ", ")
      guard let nearest else { return "Unknown key '\(key)' in --\(option); it knows \(all)" }
      return "Unknown key '\(key)' in --\(option); did you mean '\(nearest)'? It knows \(all)"
    case .unknownWord(let option, let word, let nearest, let example):
      guard let nearest else { return "Option --\(option) does not understand '\(word)'; write for example \(example)" }
      return "Option --\(option) does not understand '\(word)'; did you mean '\(nearest)'?"
    case .unknownRequest(let word, let nearest, let known):
      let all = known.joined(separator: ", ")
      guard let nearest else { return "Unknown request '\(word)'; the requests are \(all)" }
      return "Unknown request '\(word)'; did you mean '\(nearest)'? The requests are \(all)"
    case .unknownKind(let word, let nearest, let known):
      let all = known.joined(separator: ", ")
      guard let nearest else { return "Unknown kind of device '\(word)'; those that can be added are \(all)" }
      return "Unknown kind of device '\(word)'; did you mean '\(nearest)'? Those that can be added are \(all)"
    case .missingRequest(let known):
      return "A request is missing; it is one of \(known.joined(separator: ", "))"
    case .missingValue(let option, let example):
      return "Option --\(option) wants a value; write for example \(example)"
    case .unexpectedValue(let option, let value):
      return "Option --\(option) takes no value; leave out '\(value)'"
    case .unexpectedArgument(let word):
      return "Argument '\(word)' belongs to no option; martlet run --help lists the options"
    case .optionGivenTwice(let option):
      return "Option --\(option) is given twice; leave one out"
    case .keyGivenTwice(let option, let key):
      return "Key '\(key)' is given twice in one --\(option); leave one out"
    case .missingKey(let option, let key, let example):
      return "Option --\(option) lacks '\(key)='; write for example \(example)"
    case .missingOption(let option, let example):
      return "Option --\(option) is missing; write for example \(example)"
    case .badValue(let place, let value, let expected):
      return "Value '\(value)' does not fit \(place); it wants \(expected)"
    case .conflict(let first, let second, let remedy):
      return "\(first) and \(second) exclude each other; \(remedy)"
    case .unbalanced(let option, let text):
      return "A quote or bracket is not closed in --\(option) '\(text)'; close it"
    case .duplicateID(let id, let first, let second):
      return "Two devices have the id '\(id)' (\(first) and \(second)); give one of them another id="
    case .tooMany(let what, let count, let limit):
      return "\(count) \(what) are more than the \(limit) that a VM can have; leave some out"
    }
  }
}
