/// Which target answers at an address: disjoint ranges, found by binary search.
struct AddressTable<Target: Sendable>: Sendable {
  private struct Entry {
    var range: Range<UInt64>
    var target: Target
  }

  /// In rising order of address.
  private var entries: [Entry] = []

  /// Index of the first entry that ends above `address`.
  private func position(of address: UInt64) -> Int {
    var low = 0
    var high = entries.count
    while low < high {
      let middle = (low + high) / 2
      if entries[middle].range.upperBound <= address { low = middle + 1 } else { high = middle }
    }
    return low
  }

  /// False, and nothing changed, when the range is empty or overlaps another.
  @discardableResult
  mutating func insert(_ range: Range<UInt64>, _ target: Target) -> Bool {
    let at = position(of: range.lowerBound)
    guard !range.isEmpty, at == entries.count || entries[at].range.lowerBound >= range.upperBound else { return false }
    entries.insert(Entry(range: range, target: target), at: at)
    return true
  }

  /// Removes the range that starts exactly here.
  mutating func remove(startingAt address: UInt64) {
    let at = position(of: address)
    if at < entries.count, entries[at].range.lowerBound == address { entries.remove(at: at) }
  }

  func find(_ address: UInt64) -> (target: Target, offset: UInt64)? {
    let at = position(of: address)
    guard at < entries.count, entries[at].range.contains(address) else { return nil }
    return (entries[at].target, address - entries[at].range.lowerBound)
  }
}
