// Checks for values that cannot be copied: the testing library's macros capture their operands, so these take plain
// results instead.

import Glibc
import Testing

public struct MissingValue: Error {}

/// Records a failure when `condition` is false.
public func check(_ condition: Bool, _ comment: String = "", at location: SourceLocation = #_sourceLocation) {
  if !condition { Issue.record(Comment(rawValue: comment.isEmpty ? "Expectation failed" : comment), sourceLocation: location) }
}

/// Waits as long as something is so, at most two minutes: what comes of it is for the test to look at.
public func waitWhile(_ condition: () throws -> Bool) rethrows {
  let end = ContinuousClock.now + .seconds(120)
  while try condition(), ContinuousClock.now < end { usleep(5000) }
}

/// The value once it has stood still for a moment, when what is on its way out is gone.
public func settled<T: Equatable>(_ value: () throws -> T) rethrows -> T {
  var last = try value()
  for _ in 0..<50 {
    usleep(50_000)
    let now = try value()
    if now == last { break }
    last = now
  }
  return last
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

/// How many of this process's descriptors lead to an object whose `/proc/self/fd` link contains `name` (a memfd with a
/// name of its own, say). Other tests run in the same process at the same time, so a count of all descriptors says nothing.
public func descriptorCount(linkContaining name: String) -> Int {
  guard let directory = opendir("/proc/self/fd") else { return -1 }
  defer { closedir(directory) }
  var count = 0
  while let entry = readdir(directory) {
    let number = withUnsafePointer(to: &entry.pointee.d_name) { String(cString: UnsafeRawPointer($0).assumingMemoryBound(to: CChar.self)) }
    var target = [CChar](repeating: 0, count: 256)
    let length = readlink("/proc/self/fd/" + number, &target, 255)
    guard length > 0 else { continue }
    let text = String(decoding: target[..<length].map { UInt8(bitPattern: $0) }, as: UTF8.self)
    if text.contains(name) { count += 1 }
  }
  return count
}
