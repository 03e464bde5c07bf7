import Testing
import TestSupport
import VMMemory
import VirtioQueue
import VirtioSpec

@Suite("What a device must validate")
struct ValidationTests {
  /// Seen when the fuzz target was written: a batch in order that is under way when the driver breaks the ring can never be completed.
  @Test(arguments: [split, packed]) func aRingThatBreaksWithinABatchTakesTheRestOfIt(features: FeatureSet) throws {
    var pair = try QueuePair(size: 4, features.union(.inOrder))
    for _ in 0..<2 { check(pair.offer([readable(GuestFixture.buffers, 8)]) != nil) }
    var tokens: [ChainToken] = []
    while case .chain = pair.next() { tokens.append(pair.chain.token) }
    #expect(tokens.count == 2)
    pair.device.coalesce(tokens[0])
    // A chain that leads nowhere.
    _ = pair.offer([readable(.max - 4, 8)])
    guard case .broken = pair.next() else { return check(false, "The ring did not break") }
    pair.device.complete(tokens[1], written: 0)
    check(!pair.device.publish())
  }

  // MARK: Set-up

  private func refusal(_ configuration: VirtqueueConfiguration) throws -> VirtqueueError? {
    let memory = try GuestFixture.memory()
    do throws(VirtqueueError) {
      _ = try Virtqueue(configuration, memory: memory)
      return nil
    } catch {
      return error
    }
  }

  @Test(arguments: [0, 3, 0x8001, 0xFFFF] as [UInt16])
  func impossibleSplitSizesAreRefused(size: UInt16) throws {
    var configuration = VirtqueueConfiguration.contiguous(size: 4, features: split, at: GuestFixture.ring)
    configuration.size = size
    #expect(try refusal(configuration) == .size(size))
  }

  @Test func packedRingsMayHaveAnySizeUpToTheLimit() throws {
    var configuration = VirtqueueConfiguration.contiguous(size: 3, features: packed, at: GuestFixture.ring)
    #expect(try refusal(configuration) == nil)
    configuration.size = 0x8001
    #expect(try refusal(configuration) == .size(0x8001))
  }

  @Test func areasMustBeAlignedAndWhollyInOneRegion() throws {
    let good = VirtqueueConfiguration.contiguous(size: 16, features: split, at: GuestFixture.ring)
    #expect(try refusal(good) == nil)
    var configuration = good
    configuration.descriptors = GuestAddress(GuestFixture.start + 8)
    #expect(try refusal(configuration) == .misaligned(.descriptors, GuestAddress(GuestFixture.start + 8)))
    configuration = good
    configuration.driver = GuestAddress(GuestFixture.start + 1)
    #expect(try refusal(configuration) == .misaligned(.driver, GuestAddress(GuestFixture.start + 1)))
    configuration = good
    configuration.device = GuestAddress(GuestFixture.start + 2)
    #expect(try refusal(configuration) == .misaligned(.device, GuestAddress(GuestFixture.start + 2)))
    // The last two bytes, the event fields, count as well; and a ring may not cross from one region into the next.
    for address in [GuestFixture.end - 128, GuestFixture.border - 128, GuestFixture.end, 0, .max - 15, .max - 127] as [UInt64] {
      configuration = good
      configuration.device = GuestAddress(address & ~15)
      #expect(try refusal(configuration) == .notMemory(.device, configuration.device, byteCount: 134))
    }
    configuration = good
    configuration.device = GuestAddress(GuestFixture.end - 136)
    #expect(try refusal(configuration) == nil)
  }

  @Test func aSplitRingThatCannotBeWhereItIsSaidToBeIsWhereItsAnswersEnd() throws {
    let memory = try GuestFixture.memory()
    var configuration = VirtqueueConfiguration.contiguous(size: 16, features: split, at: GuestFixture.ring)
    check(memory.copyIn([100, 0], at: GuestAddress(configuration.device.rawValue + 2)))
    for (base, used) in [(0, 100), (99, 100), (117, 100), (0x10064, 100), (100, nil), (116, nil)] as [(UInt32, UInt16?)] {
      configuration.base = VringBase(rawValue: base)
      #expect(try Virtqueue.usedIndex(misplaced: configuration, memory) == used, "\(base)")
    }
    configuration = .contiguous(size: 16, features: packed, at: GuestFixture.ring)
    configuration.base = VringBase(rawValue: 0x1234)
    #expect(try Virtqueue.usedIndex(misplaced: configuration, memory) == nil)
  }

  @Test func impossibleStatesAreRefused() throws {
    var configuration = VirtqueueConfiguration.contiguous(size: 16, features: split, at: GuestFixture.ring)
    configuration.base = VringBase(availableIndex: 16)
    #expect(try refusal(configuration) == nil)
    configuration.base = VringBase(availableIndex: 17)
    #expect(try refusal(configuration) == .base(VringBase(availableIndex: 17)))
    configuration.base = VringBase(rawValue: 0x10000)
    #expect(try refusal(configuration) == .base(VringBase(rawValue: 0x10000)))
    configuration = .contiguous(size: 5, features: packed, at: GuestFixture.ring)
    for base in [
      VringBase(availableSlot: 5, availableWrap: true, usedSlot: 0, usedWrap: true),
      VringBase(availableSlot: 0, availableWrap: true, usedSlot: 5, usedWrap: true),
    ] {
      configuration.base = base
      #expect(try refusal(configuration) == .base(base))
    }
  }

  // MARK: Split rings

  /// What comes of one chain written by hand, with its first descriptor as head.
  private func outcome(
    _ descriptors: [(address: UInt64, length: UInt32, flags: UInt16, next: UInt16)], size: UInt16 = 4, features: FeatureSet = split
  ) throws -> ChainOutcome {
    var pair = try QueuePair(size: size, features)
    for (index, entry) in descriptors.enumerated() {
      pair.driver.writeDescriptor(UInt16(index), address: entry.address, length: entry.length, third: entry.flags, fourth: entry.next)
    }
    pair.driver.publishHead(0)
    return pair.next()
  }

  private let next = SplitRing.next
  private let write = SplitRing.write
  private let indirect = SplitRing.indirect
  private let place = GuestFixture.buffers

  @Test func availableIndexBeyondTheRingBreaksIt() throws {
    var pair = try QueuePair(size: 4, split)
    pair.driver.setAvailableIndex(5)
    checkEqual(pair.next(), .broken(.availableIndex))
    pair.driver.setAvailableIndex(1)
    checkEqual(pair.next(), .broken(.availableIndex))
    checkEqual(pair.device.brokenReason, .availableIndex)
    var backwards = try QueuePair(size: 4, split)
    backwards.driver.setAvailableIndex(0xFFFF)
    checkEqual(backwards.next(), .broken(.availableIndex))
  }

  @Test(arguments: [4, 5, 0x7FFF, 0x8000, 0xFFFF] as [UInt16])
  func headOutsideTheRingBreaksIt(head: UInt16) throws {
    var pair = try QueuePair(size: 4, split)
    pair.driver.publishHead(head)
    checkEqual(pair.next(), .broken(.head))
  }

  @Test func headMadeAvailableTwiceBreaksTheRing() throws {
    var pair = try QueuePair(size: 4, split)
    pair.driver.writeDescriptor(2, address: place, length: 16, third: 0, fourth: 0)
    pair.driver.publishHead(2)
    pair.driver.publishHead(2)
    checkEqual(pair.next(), .chain)
    checkEqual(pair.next(), .broken(.headInFlight))
  }

  @Test func nextOutsideTheTableBreaksTheRing() throws {
    for target in [4, 0xFFFF] as [UInt16] {
      #expect(try outcome([(place, 16, next, target)]) == .broken(.next))
    }
  }

  @Test func loopsAreFoundAfterOneTurn() throws {
    #expect(try outcome([(place, 16, next, 0)]) == .broken(.tooManyDescriptors))
    #expect(try outcome([(place, 16, next, 1), (place, 16, next, 0)]) == .broken(.tooManyDescriptors))
    let whole: [(UInt64, UInt32, UInt16, UInt16)] = [(place, 1, next, 1), (place, 1, next, 2), (place, 1, next, 3), (place, 1, 0, 0)]
    #expect(try outcome(whole) == .chain)
  }

  @Test func readableAfterWritableBreaksTheRing() throws {
    #expect(try outcome([(place, 16, write | next, 1), (place, 16, 0, 0)]) == .broken(.order))
    // An empty writable buffer is a writable buffer all the same only if it has bytes; nothing is lost with it.
    #expect(try outcome([(place, 16, next, 1), (place, 16, write, 0)]) == .chain)
  }

  @Test func zeroLengthIsToleratedWithoutLookingAtTheAddress() throws {
    #expect(try outcome([(0, 0, next, 1), (place, 16, 0, 0)]) == .chain)
    #expect(try outcome([(.max, 0, 0, 0)]) == .chain)
  }

  @Test func everyByteMustBeMemory() throws {
    let bad: [(UInt64, UInt32)] = [
      (GuestFixture.end - 1, 2), (GuestFixture.end, 1), (GuestFixture.start - 1, 2), (0, 1), (.max, 1), (.max - 1, 2), (.max, .max),
      (GuestFixture.start, .max), (GuestFixture.farStart - 1, 2), (GuestFixture.farEnd - 16, 17), (0xFFFF_FFFF, 1),
    ]
    for (address, length) in bad {
      #expect(try outcome([(address, length, 0, 0)]) == .broken(.notMemory), "\(address), \(length)")
      #expect(try outcome([(address, length, write, 0)]) == .broken(.notMemory))
    }
    for (address, length) in [(GuestFixture.end - 1, 1), (GuestFixture.start, 1), (GuestFixture.farEnd - 16, 16)] as [(UInt64, UInt32)] {
      #expect(try outcome([(address, length, 0, 0)]) == .chain)
    }
  }

  @Test func bufferAcrossTwoRegionsBecomesTwoPieces() throws {
    for features in [split, packed] {
      var pair = try QueuePair(size: 4, features)
      let buffers = [readable(GuestFixture.border - 5, 12), writable(GuestFixture.border - 1, 2)]
      _ = pair.offer(buffers)
      checkEqual(pair.next(), .chain)
      checkEqual(pair.chain.pieces(), pair.memory.expectedPieces(buffers))
      checkEqual(pair.chain.pieces().count, 4)
      checkEqual(pair.chain.readableByteCount, 12)
      checkEqual(pair.chain.writableByteCount, 2)
    }
  }

  @Test func lengthsAreSummedWithoutWrapping() throws {
    let size: UInt64 = 0xC000_0000
    let memory = try GuestMemory(regions: [
      MemoryRegion(
        guestAddress: GuestAddress(0), byteCount: size, frontEndAddress: 0, fileOffset: 0, mapping: .anonymous(byteCount: Int(size)))
    ])
    var pair = try QueuePair(size: 4, split, memory: memory)
    _ = pair.offer([readable(0, 0xBFFF_0000), writable(0, 0x4001_0000)])
    checkEqual(pair.next(), .broken(.tooManyBytes))
    var below = try QueuePair(size: 4, split, memory: memory)
    _ = below.offer([readable(0, 0xBFFF_0000), writable(0, 0x4000_FFFF)])
    checkEqual(below.next(), .chain)
  }

  @Test func tooManyPiecesForTheDevicesRoomBreakTheRing() throws {
    var pair = try QueuePair(size: 8, split)
    var small = DescriptorChain(capacity: 3)
    _ = pair.offer((0..<4).map { readable(place + UInt64(16 * $0), 16) })
    checkEqual(pair.device.next(&small), .broken(.tooManySegments))
  }

  // MARK: Indirect tables

  private func table(
    _ entries: [(address: UInt64, length: UInt32, flags: UInt16, next: UInt16)], at address: UInt64? = nil, length: UInt32? = nil,
    flags: UInt16 = 0, features: FeatureSet = split
  ) throws -> ChainOutcome {
    var pair = try QueuePair(size: 4, features)
    let start = address ?? place
    for (index, entry) in entries.enumerated() {
      let at = start &+ UInt64(16 * index)
      _ = pair.memory.store(entry.address, at: GuestAddress(at))
      _ = pair.memory.store(entry.length, at: GuestAddress(at &+ 8))
      let isPacked = features.contains(.packedRing)
      _ = pair.memory.store(isPacked ? entry.next : entry.flags, at: GuestAddress(at &+ 12))
      _ = pair.memory.store(isPacked ? entry.flags : entry.next, at: GuestAddress(at &+ 14))
    }
    let count = length ?? UInt32(16 * entries.count)
    if features.contains(.packedRing) {
      pair.driver.writeDescriptor(0, address: start, length: count, third: 0, fourth: indirect | flags | pair.driver.availableMark)
    } else {
      pair.driver.writeDescriptor(0, address: start, length: count, third: indirect | flags, fourth: 1)
      pair.driver.publishHead(0)
    }
    return pair.next()
  }

  @Test func indirectTablesMustBeNegotiated() throws {
    #expect(try table([(place, 16, 0, 0)]) == .chain)
    #expect(try table([(place, 16, 0, 0)], features: [.version1]) == .broken(.indirectNotNegotiated))
    #expect(try table([(place, 16, 0, 0)], features: [.version1, .packedRing]) == .broken(.indirectNotNegotiated))
  }

  @Test(arguments: [0, 1, 15, 17, 16 * 1025, 0xFFFF_FFF0, 0xFFFF_FFFF] as [UInt32])
  func indirectTablesOfImpossibleSizeBreakTheRing(length: UInt32) throws {
    #expect(try table([(place, 16, 0, 0)], length: length) == .broken(.indirectByteCount))
    #expect(try table([(place, 16, 0, 0)], length: length, features: packed) == .broken(.indirectByteCount))
  }

  @Test func tableOfTheGreatestLengthIsWalkedToItsEnd() throws {
    let entries = (0..<1024).map { (address: place, length: UInt32(1), flags: $0 == 1023 ? UInt16(0) : next, next: UInt16($0 + 1)) }
    #expect(try table(entries) == .chain)
    #expect(try table(entries, features: packed) == .chain)
    var loop = entries
    loop[1023].flags = next
    loop[1023].next = 0
    #expect(try table(loop) == .broken(.tooManyDescriptors))
  }

  @Test func indirectDescriptorsDoNotNestAndAreLast() throws {
    for features in [split, packed] {
      #expect(try table([(place, 16, indirect, 0)], features: features) == .broken(.indirectNesting))
      #expect(try table([(place, 16, 0, 0)], flags: next, features: features) == .broken(.indirectNesting))
    }
  }

  @Test func writeFlagOfAnIndirectDescriptorMeansNothing() throws {
    #expect(try table([(place, 16, next, 1), (place, 16, write, 0)], flags: write) == .chain)
    #expect(try table([(place, 16, 0, 0), (place, 16, write, 0)], flags: write, features: packed) == .chain)
  }

  @Test func tableEntriesAreCheckedLikeDescriptors() throws {
    #expect(try table([(place, 16, next, 1)]) == .broken(.next))
    #expect(try table([(place, 16, next, 0)]) == .broken(.tooManyDescriptors))
    for features in [split, packed] {
      #expect(try table([(place, 16, write | next, 1), (place, 16, 0, 0)], features: features) == .broken(.order))
      #expect(try table([(GuestFixture.end, 16, 0, 0)], features: features) == .broken(.notMemory))
    }
  }

  @Test func tableMustBeMemoryButMayCrossRegionsAndBeUnaligned() throws {
    for features in [split, packed] {
      let entries: [(UInt64, UInt32, UInt16, UInt16)] = [(place, 3, next, 1), (place + 8, 4, next, 2), (place, 5, write, 0)]
      for address in [
        GuestFixture.border - 16, GuestFixture.border - 8, GuestFixture.border - 20, GuestFixture.border - 1, place + 1, place + 4,
      ] {
        #expect(try table(entries, at: address, features: features) == .chain, "\(address)")
      }
      for address in [GuestFixture.end - 16, GuestFixture.end, 0, UInt64.max - 15, GuestFixture.farStart - 16] {
        #expect(try table([(place, 1, next, 1), (place, 1, 0, 0)], at: address, features: features) == .broken(.notMemory), "\(address)")
      }
    }
  }

  @Test func directDescriptorsBeforeAnIndirectOneAreAcceptedInSplitRingsOnly() throws {
    var pair = try QueuePair(size: 4, split)
    _ = pair.memory.store(place, at: GuestAddress(place))
    _ = pair.memory.store(UInt64(7) | UInt64(write) << 32, at: GuestAddress(place + 8))
    pair.driver.writeDescriptor(0, address: place, length: 16, third: next, fourth: 1)
    pair.driver.writeDescriptor(1, address: place, length: 16, third: indirect, fourth: 0)
    pair.driver.publishHead(0)
    checkEqual(pair.next(), .chain)
    checkEqual(pair.chain.readableByteCount, 16)
    checkEqual(pair.chain.writableByteCount, 7)
    var ring = try QueuePair(size: 4, packed)
    ring.driver.writeDescriptor(1, address: place, length: 16, third: 0, fourth: indirect | ring.driver.availableMark)
    ring.driver.writeDescriptor(0, address: place, length: 16, third: 0, fourth: next | ring.driver.availableMark)
    checkEqual(ring.next(), .broken(.indirectNesting))
  }

  // MARK: Packed rings

  @Test func packedListLongerThanTheRingBreaksIt() throws {
    var pair = try QueuePair(size: 4, packed)
    for index in 0..<4 as Range<UInt16> {
      pair.driver.writeDescriptor(index, address: place, length: 1, third: 0, fourth: next | pair.driver.availableMark)
    }
    checkEqual(pair.next(), .broken(.tooManyDescriptors))
  }

  @Test func packedListMayNotRunIntoDescriptorsInFlight() throws {
    var pair = try QueuePair(size: 4, packed)
    _ = pair.offer([readable(place, 1), readable(place, 1)])
    checkEqual(pair.next(), .chain)
    for index in 2..<4 as Range<UInt16> {
      pair.driver.writeDescriptor(index, address: place, length: 1, third: 3, fourth: next | pair.driver.availableMark)
    }
    checkEqual(pair.next(), .broken(.tooManyDescriptors))
  }

  @Test func packedBufferIdentifiersAreBelowTheSizeAndUnique() throws {
    var pair = try QueuePair(size: 4, packed)
    pair.driver.writeDescriptor(0, address: place, length: 1, third: 4, fourth: pair.driver.availableMark)
    checkEqual(pair.next(), .broken(.head))
    var twice = try QueuePair(size: 4, packed)
    for index in 0..<2 as Range<UInt16> {
      twice.driver.writeDescriptor(index, address: place, length: 1, third: 1, fourth: twice.driver.availableMark)
    }
    checkEqual(twice.next(), .chain)
    checkEqual(twice.next(), .broken(.headInFlight))
  }

  @Test func brokenRingPublishesNothingMore() throws {
    for features in [split, packed] {
      var pair = try QueuePair(size: 4, features)
      let head = try unwrap(pair.offer([writable(place, 16)]))
      checkEqual(pair.next(), .chain)
      if features.contains(.packedRing) {
        pair.driver.writeDescriptor(1, address: 0, length: 1, third: 1, fourth: pair.driver.availableMark)
      } else {
        pair.driver.publishHead(9)
      }
      guard case .broken = pair.next() else {
        Issue.record("Not broken")
        return
      }
      checkEqual(pair.chain.token.head, head)
      pair.device.complete(pair.chain.token, written: 0)
      check(!pair.device.publish())
      check(!pair.device.enableKicks())
      check(!pair.device.hasAvailable())
      checkEqual(pair.driver.nextUsed(), .empty)
    }
  }
}
