// Checks for values that cannot be copied: the testing library's macros capture their operands, so these take plain
// results instead.

import Testing

public struct MissingValue: Error {}

/// Records a failure when `condition` is false.
public func check(_ condition: Bool, _ comment: String = "", at location: SourceLocation = #_sourceLocation) {
  if !condition { Issue.record(Comment(rawValue: comment.isEmpty ? "Expectation failed" : comment), sourceLocation: location) }
}

/// Records a failure that shows both values when they differ.
public func checkEqual<T: Equatable>(_ a: T, _ b: T, at location: SourceLocation = #_sourceLocation) {
  if a != b { Issue.record(Comment(rawValue: "\(a) is not \(b)"), sourceLocation: location) }
}

/// The value, or a recorded failure and an error.
public func unwrap<T: ~Copyable>(_ value: consuming T?, at location: SourceLocation = #_sourceLocation) throws -> T {
  guard let value else {
    Issue.record("Value is missing", sourceLocation: location)
    throw MissingValue()
  }
  return value
}
