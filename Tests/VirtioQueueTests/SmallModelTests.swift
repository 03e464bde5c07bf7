import Testing
import TestSupport
import VMMemory
import VirtioQueue
import VirtioSpec

/// Every ring of four descriptors that can be made of a few telling variants, against a model that knows the rules and
/// nothing of the implementation.
@Suite("All small rings")
struct SmallModelTests {
  private struct Entry {
    var flags: UInt16
    var next: UInt16
    var kind = Buffer.fine
  }

  /// Kinds of buffer: address and length at and around the borders.
  private enum Buffer: CaseIterable {
    case fine, empty, emptyNowhere, lastByte, pastEnd, nowhere, beforeStart, wrapping, acrossRegions, intoHole

    var range: (address: UInt64, length: UInt32) {
      switch self {
      case .fine: (GuestFixture.buffers, 64)
      case .empty: (GuestFixture.buffers, 0)
      case .emptyNowhere: (.max, 0)
      case .lastByte: (GuestFixture.end - 1, 1)
      case .pastEnd: (GuestFixture.end - 1, 2)
      case .nowhere: (GuestFixture.end, 1)
      case .beforeStart: (GuestFixture.start - 1, 2)
      case .wrapping: (.max - 15, 0xFFFF_FFFF)
      case .acrossRegions: (GuestFixture.border - 1, 2)
      case .intoHole: (GuestFixture.farStart - 1, 1)
      }
    }
    var isMemory: Bool {
      switch self {
      case .fine, .empty, .emptyNowhere, .lastByte, .acrossRegions: true
      default: false
      }
    }
    var pieces: Int { self == .acrossRegions ? 2 : self == .empty || self == .emptyNowhere ? 0 : 1 }
  }

  private enum Verdict: Equatable {
    case chain(readable: Int, writable: Int, pieces: Int)
    case broken(BrokenRing)
  }

  private static func modelSplit(_ entries: [Entry], head: UInt16) -> Verdict {
    guard head < 4 else { return .broken(.head) }
    var index = Int(head)
    var sums = (readable: 0, writable: 0, pieces: 0)
    for _ in 0..<4 {
      let entry = entries[index]
      if entry.flags & 4 != 0 { return .broken(entry.flags & 1 != 0 ? .indirectNesting : .indirectNotNegotiated) }
      let (_, length) = entry.kind.range
      let isWritable = entry.flags & 2 != 0
      if !isWritable && sums.writable > 0 { return .broken(.order) }
      if !entry.kind.isMemory { return .broken(.notMemory) }
      if isWritable { sums.writable += Int(length) } else { sums.readable += Int(length) }
      sums.pieces += entry.kind.pieces
      if entry.flags & 1 == 0 { return .chain(readable: sums.readable, writable: sums.writable, pieces: sums.pieces) }
      guard entry.next < 4 else { return .broken(.next) }
      index = Int(entry.next)
    }
    return .broken(.tooManyDescriptors)
  }

  /// What the device makes of it; the queue is used again as long as it is whole.
  private static func verdict(_ pair: inout QueuePair?, features: FeatureSet, memory: GuestMemory, _ prepare: (inout DriverQueue) -> Void)
    throws -> Verdict
  {
    if pair == nil { pair = try QueuePair(size: 4, features, memory: memory) }
    var current = try unwrap(pair.take())
    prepare(&current.driver)
    let outcome = current.next()
    switch outcome {
    case .empty: return .chain(readable: -1, writable: -1, pieces: -1)
    case .broken(let reason): return .broken(reason)
    case .chain:
      let pieces = current.chain.pieces().count
      let result = Verdict.chain(readable: current.chain.readableByteCount, writable: current.chain.writableByteCount, pieces: pieces)
      current.device.complete(current.chain.token, written: 0)
      _ = current.device.publish()
      if !features.contains(.packedRing) { pair = consume current }
      return result
    }
  }

  @Test func splitRingsOfEveryShape() throws {
    // Without NEXT the link means nothing; with it, it leads to each place and outside.
    var variants = [Entry(flags: 0, next: 9), Entry(flags: 2, next: 9), Entry(flags: 4, next: 0), Entry(flags: 5, next: 0)]
    for flags in [1, 3] as [UInt16] { for next in 0...4 as ClosedRange<UInt16> { variants.append(Entry(flags: flags, next: next)) } }
    let memory = try GuestFixture.memory()
    var pair: QueuePair?
    var differences = 0
    var shapes = 0
    let count = variants.count
    for number in 0..<(count * count * count * count) {
      let entries = [
        variants[number % count], variants[number / count % count], variants[number / count / count % count],
        variants[number / count / count / count],
      ]
      for head in 0...4 as ClosedRange<UInt16> {
        let expected = Self.modelSplit(entries, head: head)
        let actual = try Self.verdict(&pair, features: .version1, memory: memory) { driver in
          for (index, entry) in entries.enumerated() {
            driver.writeDescriptor(
              UInt16(index), address: entry.kind.range.address, length: entry.kind.range.length, third: entry.flags, fourth: entry.next)
          }
          driver.publishHead(head)
        }
        shapes += 1
        if actual != expected {
          differences += 1
          if differences < 5 { Issue.record("\(entries), head \(head): \(actual) instead of \(expected)") }
        }
      }
    }
    #expect(differences == 0)
    #expect(shapes == 5 * 38416)
  }

  @Test func buffersOfEveryKindInEveryPlace() throws {
    let memory = try GuestFixture.memory()
    var pair: QueuePair?
    var differences = 0
    let kinds = Buffer.allCases
    for number in 0..<(kinds.count * kinds.count * kinds.count * 8) {
      let chosen = [
        kinds[number % kinds.count], kinds[number / kinds.count % kinds.count], kinds[number / kinds.count / kinds.count % kinds.count],
      ]
      let writes = number / kinds.count / kinds.count / kinds.count
      var entries: [Entry] = []
      for position in 0..<3 {
        let more: UInt16 = position < 2 ? 1 : 0
        let write: UInt16 = writes >> position & 1 == 1 ? 2 : 0
        entries.append(Entry(flags: more | write, next: UInt16(position + 1), kind: chosen[position]))
      }
      entries.append(Entry(flags: 0, next: 0))
      let expected = Self.modelSplit(entries, head: 0)
      let actual = try Self.verdict(&pair, features: .version1, memory: memory) { driver in
        for (index, entry) in entries.enumerated() {
          driver.writeDescriptor(
            UInt16(index), address: entry.kind.range.address, length: entry.kind.range.length, third: entry.flags, fourth: entry.next)
        }
        driver.publishHead(0)
      }
      if actual != expected {
        differences += 1
        if differences < 5 { Issue.record("\(entries): \(actual) instead of \(expected)") }
      }
    }
    #expect(differences == 0)
  }

  private static func modelPacked(_ entries: [Entry]) -> Verdict {
    var sums = (readable: 0, writable: 0, pieces: 0)
    for (position, entry) in entries.enumerated() {
      if entry.flags & 4 != 0 { return .broken(position == 0 && entry.flags & 1 == 0 ? .indirectNotNegotiated : .indirectNesting) }
      let (_, length) = entry.kind.range
      let isWritable = entry.flags & 2 != 0
      if !isWritable && sums.writable > 0 { return .broken(.order) }
      if !entry.kind.isMemory { return .broken(.notMemory) }
      if isWritable { sums.writable += Int(length) } else { sums.readable += Int(length) }
      sums.pieces += entry.kind.pieces
      if entry.flags & 1 == 0 {
        return entry.next < 4 ? .chain(readable: sums.readable, writable: sums.writable, pieces: sums.pieces) : .broken(.head)
      }
    }
    return .broken(.tooManyDescriptors)
  }

  /// In a packed ring the list is the following descriptors; `next` of an entry stands for the buffer id.
  @Test func packedRingsOfEveryShape() throws {
    var variants: [Entry] = []
    for flags in 0..<8 as Range<UInt16> {
      for id in [0, 3, 4] as [UInt16] where flags & 1 == 0 || id == 0 { variants.append(Entry(flags: flags, next: id)) }
    }
    let memory = try GuestFixture.memory()
    var differences = 0
    let count = variants.count
    for number in 0..<(count * count * count * count) {
      let entries = [
        variants[number % count], variants[number / count % count], variants[number / count / count % count],
        variants[number / count / count / count],
      ]
      let expected = Self.modelPacked(entries)
      var pair: QueuePair?
      let actual = try Self.verdict(&pair, features: [.version1, .packedRing], memory: memory) { driver in
        for (index, entry) in entries.enumerated() {
          driver.writeDescriptor(
            UInt16(index), address: entry.kind.range.address, length: entry.kind.range.length, third: entry.next,
            fourth: entry.flags | (index == 0 ? driver.availableMark : 0))
        }
      }
      if actual != expected {
        differences += 1
        if differences < 5 { Issue.record("\(entries): \(actual) instead of \(expected)") }
      }
    }
    #expect(differences == 0)
  }

  /// Whatever the four wrap bits of a descriptor say, only one combination is available at each turn.
  @Test func packedDescriptorIsAvailableOnlyAtItsTurn() throws {
    for wrap in [true, false] {
      for bits in 0..<4 as Range<UInt16> {
        let memory = try GuestFixture.memory()
        var configuration = VirtqueueConfiguration.contiguous(size: 4, features: packed, at: GuestFixture.ring)
        configuration.base = VringBase(availableSlot: 0, availableWrap: wrap, usedSlot: 0, usedWrap: wrap)
        var driver = try DriverQueue(configuration, memory: memory)
        var device = try Virtqueue(configuration, memory: memory)
        var chain = DescriptorChain(for: device)
        let flags = (bits & 1) * PackedRing.available | (bits >> 1) * PackedRing.used
        driver.writeDescriptor(0, address: GuestFixture.buffers, length: 1, third: 0, fourth: flags)
        let expected = bits == (wrap ? 1 : 2)
        checkEqual(device.hasAvailable(), expected)
        checkEqual(device.next(&chain), expected ? .chain : .empty)
      }
    }
  }
}
