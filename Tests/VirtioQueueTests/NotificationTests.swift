import Testing
import TestSupport
import VMMemory
import VirtioQueue
import VirtioSpec

@Suite("Notifications")
struct NotificationTests {
  private let buffer = writable(GuestFixture.buffers, 64)

  /// One chain from offer to use; true if the driver has to be called.
  private func roundTrip(_ pair: inout QueuePair) throws -> Bool {
    _ = try unwrap(pair.offer([buffer]))
    checkEqual(pair.next(), .chain)
    pair.device.complete(pair.chain.token, written: 1)
    let call = pair.device.publish()
    guard case .used = pair.driver.nextUsed() else {
      Issue.record("Not used")
      return call
    }
    return call
  }

  @Test func nothingPublishedMeansNoCallAndNoKick() throws {
    for features in [split, packed] {
      var pair = try QueuePair(size: 8, features)
      check(!pair.device.publish())
      check(!pair.driver.publish())
    }
  }

  @Test func flagsSuppressCallsWithoutEventIndices() throws {
    for features in [split, packed] {
      var pair = try QueuePair(size: 8, features)
      check(try roundTrip(&pair))
      pair.driver.disableCalls()
      for _ in 0..<20 { check(try !roundTrip(&pair)) }
      check(!pair.driver.enableCalls())
      check(try roundTrip(&pair))
    }
  }

  @Test func flagsSuppressKicksWithoutEventIndices() throws {
    for features in [split, packed] {
      var pair = try QueuePair(size: 8, features)
      _ = pair.driver.add([buffer].span)
      check(pair.driver.publish())
      pair.device.disableKicks()
      _ = pair.driver.add([buffer].span)
      check(!pair.driver.publish())
      check(pair.device.enableKicks(), "Something is available already")
      checkEqual(pair.next(), .chain)
      checkEqual(pair.next(), .chain)
      check(!pair.device.enableKicks())
      _ = pair.driver.add([buffer].span)
      check(pair.driver.publish())
    }
  }

  @Test(arguments: [split, packed, split.union(.eventIndex), packed.union(.eventIndex)])
  func aKickThatWasAskedForIsTakenBack(features: FeatureSet) throws {
    var pair = try QueuePair(size: 8, features)
    func add() throws -> Bool {
      _ = try unwrap(pair.driver.add([buffer].span))
      return pair.driver.publish()
    }
    func serve(_ count: Int) {
      for _ in 0..<count {
        checkEqual(pair.next(), .chain)
        pair.device.complete(pair.chain.token, written: 1)
        _ = pair.device.publish()
        guard case .used = pair.driver.nextUsed() else {
          Issue.record("Not used")
          return
        }
      }
    }
    // Through all wraps.
    for turn in 0..<20_000 {
      let count = 1 + turn % 7
      check(!pair.device.enableKicks())
      pair.device.withdrawKicks()
      for _ in 0..<count { check(try !add(), "Turn \(turn)") }
      check(pair.device.enableKicks(), "Something is available already")
      serve(count)
      check(!pair.device.enableKicks())
      check(try add(), "Turn \(turn)")
      serve(1)
    }
  }

  @Test func firstUseAfterStartCallsAlways() throws {
    for features in [split.union(.eventIndex), packed.union(.eventIndex)] {
      var pair = try QueuePair(size: 8, features)
      pair.driver.disableCalls()
      if features.contains(.packedRing) {
        // A packed driver's "no" is no event index and holds from the first moment on.
        check(try !roundTrip(&pair))
        _ = pair.driver.enableCalls()
      }
      check(try roundTrip(&pair))
    }
  }

  /// A driver that asks to be called at every tenth use is called then and only then, through all wraps.
  @Test(arguments: [split.union(.eventIndex), packed.union(.eventIndex)], [8, 64] as [UInt16])
  func eventIndexCallsExactlyWhereAsked(features: FeatureSet, size: UInt16) throws {
    var pair = try QueuePair(size: size, features)
    _ = pair.driver.enableCalls()
    var calls = 0
    for turn in 0..<140_000 {
      let call = try roundTrip(&pair)
      if turn == 0 {
        check(call)
        _ = pair.driver.enableCalls()
        continue
      }
      // Asked for one use ahead at turns 10, 20, ...; the driver stays silent in between.
      let expected = turn % 10 == 1
      if call != expected {
        Issue.record("Turn \(turn): call \(call)")
        return
      }
      if call { calls += 1 }
      if turn % 10 == 0 { _ = pair.driver.enableCalls() } else if features.contains(.packedRing) { pair.driver.disableCalls() }
    }
    checkEqual(calls, 14_000)
  }

  @Test(arguments: [split.union(.eventIndex), packed.union(.eventIndex)])
  func eventIndexKicksOnlyOnceAfterEnabling(features: FeatureSet) throws {
    var pair = try QueuePair(size: 8, features)
    for turn in 0..<20_000 {
      check(!pair.device.enableKicks())
      var kicks = 0
      for _ in 0..<3 {
        _ = pair.driver.add([buffer].span)
        if pair.driver.publish() { kicks += 1 }
      }
      if kicks != 1 {
        Issue.record("Turn \(turn): \(kicks) kicks")
        return
      }
      for _ in 0..<3 {
        checkEqual(pair.next(), .chain)
        pair.device.complete(pair.chain.token, written: 0)
      }
      _ = pair.device.publish()
      while case .used = pair.driver.nextUsed() {}
    }
  }

  @Test func reservedEventFlagsOfAPackedDriverAreAnsweredWithACall() throws {
    var pair = try QueuePair(size: 8, packed)
    for flags in [0, 2, 3, 0xFFFC] as [UInt16] {
      _ = pair.memory.store(flags, at: GuestAddress(pair.driver.configuration.driver.rawValue + 2))
      check(try roundTrip(&pair), "flags \(flags)")
      check(try roundTrip(&pair), "flags \(flags)")
    }
  }

  @Test func availabilityIsFoundBetweenEnablingAndSleeping() throws {
    for features in [split, packed, split.union(.eventIndex), packed.union(.eventIndex)] {
      var pair = try QueuePair(size: 8, features)
      check(!pair.device.hasAvailable())
      _ = pair.offer([buffer])
      check(pair.device.hasAvailable())
      check(pair.device.enableKicks())
      checkEqual(pair.next(), .chain)
      check(!pair.device.hasAvailable())
    }
  }
}
