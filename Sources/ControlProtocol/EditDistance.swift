/// Finds the word that was probably meant: insertions, deletions, replacements and swaps of neighbours cost one each.
package enum EditDistance {
  /// Words longer than this are not compared; nobody mistypes a path into an option name.
  static let longestWord = 64

  /// The optimal string alignment distance, counted in bytes.
  package static func between(_ first: String, _ second: String) -> Int {
    let a = Array(first.utf8)
    let b = Array(second.utf8)
    if a.isEmpty || b.isEmpty { return max(a.count, b.count) }
    var beforePrevious = [Int](repeating: 0, count: b.count + 1)
    var previous = Array(0...b.count)
    var current = previous
    for i in 1...a.count {
      current[0] = i
      for j in 1...b.count {
        let replaced = previous[j - 1] + (a[i - 1] == b[j - 1] ? 0 : 1)
        current[j] = min(replaced, previous[j] + 1, current[j - 1] + 1)
        if i > 1, j > 1, a[i - 1] == b[j - 2], a[i - 2] == b[j - 1] {
          current[j] = min(current[j], beforePrevious[j - 2] + 1)
        }
      }
      (beforePrevious, previous, current) = (previous, current, beforePrevious)
    }
    return previous[b.count]
  }

  /// The nearest of `candidates`, or nil when nothing is so near that it could have been meant: one begins with the other,
  /// more than half of the word begins alike, or at most half of it needs changing.
  package static func nearest(to word: String, in candidates: [String]) -> String? {
    guard !word.isEmpty, word.utf8.count <= longestWord else { return nil }
    let folded = word.lowercased().split(separator: "_").joined(separator: "-")
    var best: (candidate: String, distance: Int)?
    for candidate in candidates {
      let plain = candidate.split(separator: "_").joined(separator: "-")
      var distance = between(folded, plain)
      if plain.hasPrefix(folded) || folded.hasPrefix(plain) { distance = min(distance, 1) }
      let alike = zip(plain.utf8, folded.utf8).prefix { $0 == $1 }.count
      if alike * 2 > folded.utf8.count { distance = min(distance, folded.utf8.count / 2) }
      if best.map({ distance < $0.distance }) ?? true { best = (candidate, distance) }
    }
    guard let best, best.distance * 2 <= max(word.utf8.count, 2) else { return nil }
    return best.candidate
  }
}
