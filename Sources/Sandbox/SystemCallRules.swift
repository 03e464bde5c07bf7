// The system calls a role may make, as data. `protocol/system-calls/ROLE.rules` holds one list per role, a reason beside
// every entry; this file reads them.
//
//     read                                # kicks, calls and sockets
//     mmap     arg2 & 0x4 == 0            # the allocator; never executable
//     fcntl    arg1 in 1, 3, 1034         # F_GETFD, F_GETFL, F_GET_SEALS
//     tgkill   arg0 == self               # pthread_kill inside the process
//     openat   refused 2                  # comes back with this error and is not carried out, instead of killing

/// One allowed call with the arguments it may have.
package struct SystemCallRule: Equatable, Sendable {
  package struct Condition: Equatable, Sendable {
    package enum Test: Equatable, Sendable {
      /// The argument, masked, equals the value (64 bits).
      case masked(UInt64, equals: UInt64)
      case anyOf([UInt64])
      /// The argument equals the process's own id.
      case ownProcess
    }
    /// 0 to 5.
    package var argument: Int
    package var test: Test

    package init(argument: Int, test: Test) {
      self.argument = argument
      self.test = test
    }
  }

  package var number: UInt32
  /// All must hold. Several rules for one call are alternatives.
  package var conditions: [Condition]
  package var reason: String
  /// The call is not allowed: unless another rule allows it, it comes back with this error instead of killing.
  package var failure: UInt16?

  package init(number: UInt32, conditions: [Condition] = [], reason: String, failure: UInt16? = nil) {
    self.number = number
    self.conditions = conditions
    self.reason = reason
    self.failure = failure
  }
}

/// A line of a rule list that cannot be read.
package struct RuleError: Error, Equatable, Sendable, CustomStringConvertible {
  package var line: Int
  package var problem: String

  package var description: String { "Line \(line) of the system-call list: \(problem)" }
}

extension SystemCallRule {
  /// The most conditions of one rule: a comparison jumps over what is left of them, and 255 instructions are as far as it can.
  package static let mostConditions = 16
  /// The most ways in which the sets of one rule can be combined; each becomes instructions, of which the kernel takes 4096.
  package static let mostCombinations = 512

  /// Reads a list. Empty lines and lines of comment only are skipped; every rule must have a reason.
  package static func parse(_ text: String) throws(RuleError) -> [SystemCallRule] {
    var rules: [SystemCallRule] = []
    for (index, line) in text.split(separator: "\n", omittingEmptySubsequences: false).enumerated() {
      let halves = line.split(separator: "#", maxSplits: 1, omittingEmptySubsequences: false)
      let statement = trimmed(halves[0])
      if statement.isEmpty { continue }
      func wrong(_ problem: String) -> RuleError { RuleError(line: index + 1, problem: problem) }
      guard halves.count == 2, !trimmed(halves[1]).isEmpty else { throw wrong("'\(statement)' has no reason; write it behind a #") }
      let name = statement.prefix { $0 != " " }
      guard let number = SystemCall.number(String(name)) else { throw wrong("'\(name)' is no x86-64 system call") }
      var rule = SystemCallRule(number: number, reason: String(trimmed(halves[1])))
      let rest = trimmed(statement.dropFirst(name.count))
      var combinations = 1
      let words = rest.split(separator: " ")
      if words.count == 2, words[0] == "refused" {
        guard let failure = UInt16(words[1]), (1...4095).contains(failure) else { throw wrong("'\(words[1])' is no errno") }
        rule.failure = failure
      } else if !rest.isEmpty {
        for part in split(rest, at: " and ") {
          guard let condition = Condition(trimmed(part)) else {
            throw wrong("condition '\(part)' is not 'argN == V', 'argN in V, V', 'argN & M == V' or 'argN == self'")
          }
          rule.conditions.append(condition)
          guard rule.conditions.count <= mostConditions else {
            throw wrong("'\(name)' has more than \(mostConditions) conditions; make several rules of it, or one mask of several")
          }
          combinations *= condition.alternativeCount
          guard combinations <= mostCombinations else {
            throw wrong("the sets of '\(name)' can be combined in more than \(mostCombinations) ways; make several rules of it")
          }
        }
      }
      let isRefusal = rule.failure != nil
      if rules.contains(where: {
        $0.number == rule.number && $0.conditions == rule.conditions && ($0.failure != nil) == isRefusal
      }) {
        throw wrong("'\(statement)' stands here twice")
      }
      rules.append(rule)
    }
    return rules
  }

  private static func trimmed(_ text: Substring) -> Substring {
    var text = text
    while let first = text.first, first == " " || first == "\t" { text.removeFirst() }
    while let last = text.last, last == " " || last == "\t" { text.removeLast() }
    return text
  }

  /// Splits at every occurrence of a separator that is longer than a character.
  private static func split(_ text: Substring, at separator: String) -> [Substring] {
    var parts: [Substring] = []
    var start = text.startIndex
    var here = text.startIndex
    while here < text.endIndex {
      if text[here...].hasPrefix(separator) {
        parts.append(text[start..<here])
        here = text.index(here, offsetBy: separator.count)
        start = here
      } else {
        here = text.index(after: here)
      }
    }
    parts.append(text[start...])
    return parts
  }
}

extension SystemCallRule.Condition {
  /// Values that it can be true for, as far as they become instructions of their own.
  fileprivate var alternativeCount: Int {
    if case .anyOf(let values) = test { return values.count }
    return 1
  }

  fileprivate init?(_ text: Substring) {
    let words = text.split { $0 == " " || $0 == "," }
    guard words.count >= 3, words[0].hasPrefix("arg"), let argument = Int(words[0].dropFirst(3)), (0...5).contains(argument) else {
      return nil
    }
    self.argument = argument
    switch words[1] {
    case "==" where words.count == 3 && words[2] == "self": test = .ownProcess
    case "==":
      guard words.count == 3, let value = Self.number(words[2]) else { return nil }
      test = .masked(.max, equals: value)
    case "&":
      guard words.count == 5, words[3] == "==", let mask = Self.number(words[2]), let value = Self.number(words[4]), value & ~mask == 0
      else { return nil }
      test = .masked(mask, equals: value)
    case "in":
      var values: [UInt64] = []
      for word in words.dropFirst(2) {
        guard let value = Self.number(word) else { return nil }
        values.append(value)
      }
      test = .anyOf(values)
    default: return nil
    }
  }

  private static func number(_ text: Substring) -> UInt64? {
    text.hasPrefix("0x") ? UInt64(text.dropFirst(2), radix: 16) : UInt64(text)
  }
}
