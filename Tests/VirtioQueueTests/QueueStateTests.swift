import Testing
import TestSupport
import VMMemory
import VirtioQueue
import VirtioSpec

@Suite("State of a queue")
struct QueueStateTests {
  /// The device side is replaced by a new one from its base after every few chains; the driver notices nothing.
  @Test(arguments: [split, packed, split.union(.eventIndex), packed.union(.eventIndex)])
  func queueGoesOnFromItsBase(features: FeatureSet) throws {
    var pair = try QueuePair(size: 8, features)
    var configuration = pair.device.configuration
    for round in 0..<20_000 {
      for _ in 0..<(round % 5) {
        _ = try unwrap(pair.offer([readable(GuestFixture.buffers, 8), writable(GuestFixture.buffers, 8)]))
      }
      if round % 2 == 0 {
        configuration.base = pair.device.base
        pair.device = try Virtqueue(configuration, memory: pair.memory)
      }
      var taken = 0
      while pair.next() == .chain {
        pair.device.complete(pair.chain.token, written: 8)
        taken += 1
      }
      if taken != round % 5 {
        Issue.record("Round \(round): \(taken) chains")
        return
      }
      if taken > 0 { check(pair.device.publish() || !features.isDisjoint(with: .eventIndex)) }
      var used = 0
      while case .used = pair.driver.nextUsed() { used += 1 }
      if used != taken {
        Issue.record("Round \(round): \(used) used")
        return
      }
    }
  }

  @Test func basesHaveTheFormsOfTheProtocol() throws {
    var pair = try QueuePair(size: 8, split)
    for _ in 0..<3 {
      _ = pair.offer([readable(GuestFixture.buffers, 8)])
      _ = pair.next()
    }
    checkEqual(pair.device.base.rawValue, 3)
    var ring = try QueuePair(size: 3, packed)
    checkEqual(ring.device.base.rawValue, 0x8000_8000)
    for _ in 0..<2 { _ = ring.offer([readable(GuestFixture.buffers, 8)]) }
    checkEqual(ring.next(), .chain)
    let token = ring.chain.token
    checkEqual(ring.next(), .chain)
    ring.device.complete(token, written: 0)
    checkEqual(ring.device.base.rawValue, 0x8001_8002)
    ring.device.complete(ring.chain.token, written: 0)
    _ = ring.device.publish()
    while case .used = ring.driver.nextUsed() {}
    _ = ring.offer([readable(GuestFixture.buffers, 8), readable(GuestFixture.buffers, 8)])
    checkEqual(ring.next(), .chain)
    checkEqual(ring.device.base.rawValue, 0x8002_0001)
  }

  @Test func givenBackChainsComeAgain() throws {
    for features in [split, packed] {
      var pair = try QueuePair(size: 5 - (features.contains(.packedRing) ? 0 : 1), features)
      for _ in 0..<1000 {
        let first = try unwrap(pair.offer([readable(GuestFixture.buffers, 8)]))
        let second = try unwrap(pair.offer([readable(GuestFixture.buffers, 8), readable(GuestFixture.buffers, 8)]))
        checkEqual(pair.next(), .chain)
        let a = pair.chain.token
        checkEqual(pair.next(), .chain)
        let b = pair.chain.token
        checkEqual(pair.next(), .empty)
        pair.device.giveBack(b)
        pair.device.giveBack(a)
        checkEqual(pair.device.inFlightCount, 0)
        check(pair.device.hasAvailable())
        for expected in [first, second] {
          checkEqual(pair.next(), .chain)
          checkEqual(pair.chain.token.head, expected)
          pair.device.complete(pair.chain.token, written: 0)
        }
        _ = pair.device.publish()
        while case .used = pair.driver.nextUsed() {}
      }
    }
  }

  @Test func publishedBatchIsSeenAsAWhole() throws {
    for features in [split, packed] {
      var pair = try QueuePair(size: 8, features)
      for _ in 0..<4 { _ = pair.offer([writable(GuestFixture.buffers, 8)]) }
      for _ in 0..<4 {
        checkEqual(pair.next(), .chain)
        pair.device.complete(pair.chain.token, written: 8)
        checkEqual(pair.driver.nextUsed(), .empty)
      }
      _ = pair.device.publish()
      for _ in 0..<4 { check(pair.driver.nextUsed() != .empty) }
      checkEqual(pair.driver.nextUsed(), .empty)
    }
  }

  @Test func queueMovesToAnotherMemoryTable() throws {
    for features in [split, packed] {
      var pair = try QueuePair(size: 8, features)
      for _ in 0..<3 {
        _ = pair.offer([writable(GuestFixture.buffers, 8)])
        checkEqual(pair.next(), .chain)
        pair.device.complete(pair.chain.token, written: 8)
        _ = pair.device.publish()
        while case .used = pair.driver.nextUsed() {}
      }
      _ = pair.offer([writable(GuestFixture.buffers, 8)])
      // Another mapping of other memory with the same content, as after a hot-plug with new mappings.
      let other = try GuestFixture.memory()
      let count = Int(GuestFixture.border - GuestFixture.start)
      let copied = try unwrap(pair.memory.bytes(at: GuestAddress(GuestFixture.start), count: count))
      check(other.copyIn(copied, at: GuestAddress(GuestFixture.start)))
      try pair.device.replaceMemory(other)
      checkEqual(pair.next(), .chain)
      checkEqual(pair.chain.pieces(), other.expectedPieces([writable(GuestFixture.buffers, 8)]))
      let far = try GuestMemory(regions: [other.regions[2]])
      do {
        try pair.device.replaceMemory(far)
        Issue.record("A ring outside the memory was accepted")
      } catch {}
      checkEqual(pair.next(), .empty)
    }
  }
}
