/// Something that is worth trying as long as it succeeds: each failure in a row doubles how many times it is left out.
struct Trial {
  private var leftOut = 0
  private var penalty = 0

  /// The last one was in vain.
  var isFailing: Bool { penalty > 0 }

  /// Whether it will be due when it is asked for the next time.
  var isNext: Bool { leftOut == 0 }

  /// Whether to try now.
  @inline(__always)
  mutating func isDue() -> Bool {
    if leftOut == 0 { return true }
    leftOut -= 1
    return false
  }

  /// How the trial went.
  @inline(__always)
  mutating func ended(well: Bool) {
    penalty = well ? 0 : min(2 * penalty + 1, 63)
    leftOut = penalty
  }
}
