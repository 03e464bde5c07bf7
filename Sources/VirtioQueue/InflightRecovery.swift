import VirtioSpec

/// What a region says of the ring it belongs to, read once and checked as a whole.
struct InflightRecovery {
  /// One chain to be done again.
  struct Replay {
    var counter: UInt64
    /// Head, or buffer id.
    var head: UInt16
    var entryCount: UInt16
    /// Where it is recorded.
    var entry: UInt16
    /// How often it was begun again before.
    var count: UInt8
  }

  /// Nothing was ever recorded.
  var isFresh = false
  var replays: [Replay] = []
  var nextCounter: UInt64 = 0
  /// Entries that must no longer be marked.
  var cleared: [UInt16] = []
  var lastBatchHead: UInt16 = 0
  // Packed.
  var usedIndex: UInt16 = 0
  var usedWrap = true
  var freeHead: UInt16 = 0
  var next: [UInt16] = []
  var last: [UInt16] = []

  /// Ring entries that the chains to be replayed stand for.
  var entryCount: Int { replays.reduce(0) { $0 + Int($1.entryCount) } }

  private static func isFresh(_ region: InflightRegion, size: UInt16) throws(VirtqueueError) -> Bool {
    let version = region.load16(InflightLayout.versionOffset)
    guard version != 0 else { return true }
    guard version == InflightLayout.version else { throw .inflight("its version is \(version)") }
    let recorded = region.load16(InflightLayout.sizeOffset)
    guard recorded == size else { throw .inflight("it was made for \(recorded) entries, not \(size)") }
    return false
  }

  /// In the order in which they were taken; a hostile region's ties are in the order of its entries.
  private mutating func sort() {
    replays.sort { ($0.counter, $0.entry) < ($1.counter, $1.entry) }
    nextCounter = replays.last.map { $0.counter &+ 1 } ?? 0
  }

  /// - Parameter usedIndex: the driver's view of what was answered.
  static func split(_ region: InflightRegion, size: UInt16, usedIndex: UInt16) throws(VirtqueueError) -> InflightRecovery {
    var result = InflightRecovery()
    guard try !isFresh(region, size: size) else {
      result.isFresh = true
      return result
    }
    // Published, but perhaps not cleared: as many as the ring is ahead, from the last one back.
    let published = usedIndex &- region.load16(InflightLayout.Split.usedIndex)
    guard published <= size else { throw .inflight("its used index is not near the ring's") }
    var isCleared = [Bool](repeating: false, count: Int(size))
    var head = region.load16(InflightLayout.Split.lastBatchHead)
    result.lastBatchHead = head < size ? head : 0
    for _ in 0..<published {
      guard head < size else { throw .inflight("its list of answered chains leads outside") }
      isCleared[Int(head)] = true
      head = region.load16(InflightLayout.Split.entry(Int(head)) + InflightLayout.Split.next)
    }
    for index in 0..<size {
      let entry = InflightLayout.Split.entry(Int(index))
      let state = region.load16(entry + InflightLayout.Split.state)
      guard state & 0xFF <= 1 else { throw .inflight("entry \(index) is neither in flight nor not") }
      guard state & 0xFF == 1 else { continue }
      guard !isCleared[Int(index)] else {
        result.cleared.append(index)
        continue
      }
      result.replays.append(
        Replay(
          counter: region.load64(entry + InflightLayout.Split.counter), head: index, entryCount: 1, entry: index,
          count: UInt8(truncatingIfNeeded: state >> 8)))
    }
    result.sort()
    return result
  }

  /// - Parameter isPublished: whether the ring's descriptor at a slot is no longer what the driver made available in the
  ///   turn with that wrap counter, so that a batch that began there was published.
  static func packed(
    _ region: InflightRegion, size: UInt16, base: VringBase, isPublished: (_ slot: UInt16, _ wrap: Bool) -> Bool
  ) throws(VirtqueueError) -> InflightRecovery {
    var result = InflightRecovery()
    guard try !isFresh(region, size: size) else {
      result.isFresh = true
      result.usedIndex = base.usedSlot
      result.usedWrap = base.usedWrap
      result.next = (0..<size).map { $0 + 1 }
      result.last = [UInt16](repeating: 0, count: Int(size))
      return result
    }
    let heads = region.load32(InflightLayout.Packed.freeHead)
    let used = region.load64(InflightLayout.Packed.used)
    let current = (UInt16(truncatingIfNeeded: used), used >> 32 & 0xFF)
    let committed = (UInt16(truncatingIfNeeded: used >> 16), used >> 40 & 0xFF)
    guard current.0 < size, committed.0 < size, current.1 <= 1, committed.1 <= 1 else {
      throw .inflight("its used position is outside the ring")
    }
    let wasPublished = current != committed && isPublished(committed.0, committed.1 == 1)
    result.usedIndex = wasPublished ? current.0 : committed.0
    result.usedWrap = (wasPublished ? current.1 : committed.1) == 1
    result.freeHead = UInt16(truncatingIfNeeded: wasPublished ? heads : heads >> 16)
    try result.readLists(region, size)
    result.sort()
    return result
  }

  /// Every entry is in the free list or in one list in flight, and in no other: nothing is lost, nothing twice.
  private mutating func readLists(_ region: InflightRegion, _ size: UInt16) throws(VirtqueueError) {
    let count = Int(size)
    next = (0..<count).map { region.load16(InflightLayout.Packed.entry($0) + InflightLayout.Packed.next) }
    last = [UInt16](repeating: 0, count: count)
    var isSeen = [Bool](repeating: false, count: count)
    var seen = 0
    var here = freeHead
    // Bounded: no entry is visited twice. The last one leads outside.
    while here < size {
      guard !isSeen[Int(here)] else { throw .inflight("its free list is a loop") }
      isSeen[Int(here)] = true
      seen += 1
      if region.load16(InflightLayout.Packed.entry(Int(here))) & 0xFF != 0 { cleared.append(here) }
      here = next[Int(here)]
    }
    var isUsedID = [Bool](repeating: false, count: count)
    for first in 0..<size where !isSeen[Int(first)] {
      let entry = InflightLayout.Packed.entry(Int(first))
      let state = region.load16(entry)
      guard state & 0xFF == 1 else { continue }
      let extent = region.load32(entry + InflightLayout.Packed.extent)
      let length = UInt16(truncatingIfNeeded: extent >> 16)
      guard (1...size).contains(length) else { throw .inflight("a list has \(length) entries") }
      var final = first
      for step in 0..<length {
        if step > 0 { final = next[Int(final)] }
        guard final < size, !isSeen[Int(final)] else { throw .inflight("a list leads outside or into another") }
        isSeen[Int(final)] = true
        seen += 1
      }
      guard final == UInt16(truncatingIfNeeded: extent) else { throw .inflight("a list ends elsewhere than it says") }
      last[Int(first)] = final
      // As in the ring: the id of a list is in its last descriptor.
      let id = UInt16(
        truncatingIfNeeded: region.load64(InflightLayout.Packed.entry(Int(final)) + InflightLayout.Packed.idFlagsLength))
      guard id < size, !isUsedID[Int(id)] else { throw .inflight("a buffer id is impossible or recorded twice") }
      isUsedID[Int(id)] = true
      replays.append(
        Replay(
          counter: region.load64(entry + InflightLayout.Packed.counter), head: id, entryCount: length, entry: first,
          count: UInt8(truncatingIfNeeded: state >> 8)))
    }
    guard seen == count else { throw .inflight("\(count - seen) of its entries are in no list") }
  }
}

extension InflightRecorder {
  /// Begins a record with what was found: the region says afterwards what the recovery decided.
  mutating func begin(_ recovery: InflightRecovery, usedIndex: UInt16, usedWrap: Bool) {
    nextCounter = recovery.nextCounter
    if isPacked {
      freeHead = recovery.freeHead
      // SAFETY: the recovery's lists have `size` numbers, and its heads are below size.
      for index in 0..<size {
        unsafe next[index] = recovery.next[index]
        unsafe last[index] = recovery.last[index]
      }
      for replay in recovery.replays { unsafe entryOfID[Int(replay.head)] = replay.entry }
    } else {
      lastBatchHead = recovery.lastBatchHead
    }
    var stores = AllStores()
    if recovery.isFresh {
      store16(InflightLayout.sizeOffset, UInt16(size), &stores)
      if isPacked {
        for index in 0..<size {
          store16(InflightLayout.Packed.entry(index) + InflightLayout.Packed.next, UInt16(index + 1), &stores)
        }
      }
    }
    let unit = isPacked ? InflightLayout.Packed.unit : InflightLayout.Split.unit
    for entry in recovery.cleared { store16(unit * (Int(entry) + 1), 0, &stores) }
    if isPacked {
      storeFreeHead(&stores)
      storeUsed(usedIndex, usedWrap, &stores)
    } else {
      store16(InflightLayout.Split.usedIndex, usedIndex, &stores)
    }
    if recovery.isFresh { store16(InflightLayout.versionOffset, InflightLayout.version, &stores) }
  }
}
