import Glibc
import HostSystem

/// A back end of habit: what its first two front ends did is all it can stand. With `fragile` it dies of anything else, with
/// `fragile-hang` it stops, with `fragile-leak` it loses descriptors. So every attack of the probe must be able to harm it,
/// and do so by what it does, not by how it is set up.
enum Habits {
  nonisolated(unsafe) private static var known: [[String]] = []
  nonisolated(unsafe) private static var trail: [String] = []
  nonisolated(unsafe) private static var sessions = 0
  nonisolated(unsafe) private static var lost: [CInt] = []

  private static let isOn = has("fragile") || has("fragile-hang") || has("fragile-leak")
  private static let lessons = 2

  static func begin() {
    sessions += 1
    trail = []
  }

  /// Something the front end did.
  static func note(_ what: @autoclosure () -> String) {
    guard isOn else { return }
    trail.append(what())
    guard sessions > lessons else { return }
    if !known.contains(where: { $0.starts(with: trail) }) { stray() }
  }

  /// The session is over.
  static func end() {
    guard isOn else { return }
    if sessions <= lessons { known.append(trail) } else if !known.contains(trail) { stray() }
  }

  /// Something unheard of.
  static func stray() {
    guard isOn, sessions > lessons else { return }
    if has("fragile") { abort() }
    if has("fragile-hang") { while true { pause() } }
    for _ in 0..<8 { lost.append(dup(0)) }
  }

  static func digest(_ bytes: [UInt8]) -> UInt64 { bytes.reduce(0xCBF2_9CE4_8422_2325) { ($0 ^ UInt64($1)) &* 0x100_0000_01B3 } }
}
