import HostSystem
import TestSupport
import Testing
import VMMemory
import VirtioQueue
import VirtioSpec

/// A device that is killed between any two stores, and its successors, against a driver that counts answers.
@Suite("The record of chains in flight")
struct InflightTests {
  /// A driver with buffers of its own for every chain, and the processes that serve it one after another.
  private struct Bench: ~Copyable {
    let configuration: VirtqueueConfiguration
    let memory: GuestMemory
    var driver: DriverQueue
    var device: Virtqueue
    var chain: DescriptorChain
    let mapping: MemoryMapping
    let region: InflightRegion
    /// Chains that the driver waits for, by head, with the number in their buffer.
    var outstanding: [UInt16: UInt64] = [:]
    var nextNumber: UInt64 = 1
    /// Taken by the present process and not answered, in any order.
    var taken: [(token: ChainToken, number: UInt64)] = []
    /// What the ring gave last, unless it went back.
    var lastTaken: UInt64?
    /// How often each chain was begun; by all processes.
    var begun: [UInt64: Int] = [:]
    /// Numbers in the order in which they were first begun.
    var order: [UInt64] = []

    init(size: UInt16, packed isPacked: Bool) throws {
      let features: FeatureSet = isPacked ? [.version1, .packedRing] : [.version1]
      let configuration = VirtqueueConfiguration.contiguous(size: size, features: features, at: GuestFixture.ring)
      let memory = try GuestFixture.memory()
      let driver = try DriverQueue(configuration, memory: memory)
      let mapping = try MemoryMapping.anonymous(byteCount: 4096)
      let region = try unwrap(
        InflightRegion(mapping, offset: 64, byteCount: InflightRegion.byteCount(size: size, packed: isPacked)))
      let device = try Virtqueue(configuration, memory: memory, inflight: region)
      self.configuration = configuration
      self.memory = memory
      self.mapping = mapping
      self.region = region
      self.driver = driver
      chain = DescriptorChain(for: device)
      self.device = device
    }

    /// Offers a chain of `count` buffers; its number is in the first.
    mutating func offer(_ count: Int) {
      let number = nextNumber
      let place = GuestFixture.buffers + (number % 1024) * 64
      var buffers = [readable(place, 8)]
      for extra in 1..<max(2, count) where count > 1 { buffers.append(writable(place + 8 * UInt64(extra), 8)) }
      _ = memory.store(number, at: GuestAddress(place))
      guard let head = driver.add(buffers.span) else { return }
      _ = driver.publish()
      nextNumber += 1
      checkEqual(outstanding.updateValue(number, forKey: head), nil)
    }

    mutating func take() throws -> Bool {
      switch device.next(&chain) {
      case .empty: return false
      case .broken(let reason): throw TestFailure("the ring is broken: \(reason)")
      case .chain:
        // A hostile record may name any buffers.
        let number = chain.takeReadable(UInt64.self) ?? 0
        if begun.updateValue(begun[number, default: 0] + 1, forKey: number) == nil { order.append(number) }
        taken.append((chain.token, number))
        lastTaken = number
        return true
      }
    }

    mutating func answer(at index: Int) {
      let entry = taken.remove(at: index)
      device.complete(entry.token, written: 0)
    }

    /// What the driver finds used: each was waited for, once.
    mutating func collect() throws {
      while true {
        switch driver.nextUsed() {
        case .empty: return
        case .broken: throw TestFailure("the driver was told of something that was not outstanding")
        case .used(let head, _):
          guard outstanding.removeValue(forKey: head) != nil else { throw TestFailure("head \(head) was answered twice") }
        }
      }
    }

    /// The process is gone; another one serves ring and record.
    mutating func restart() throws {
      taken = []
      lastTaken = nil
      device = try Virtqueue(configuration, memory: memory, inflight: region)
    }

    /// Serves everything to its end.
    mutating func finish() throws {
      for _ in 0..<64 where !outstanding.isEmpty {
        while try take() {}
        while !taken.isEmpty { answer(at: 0) }
        _ = device.publish()
        try collect()
      }
      guard outstanding.isEmpty else { throw TestFailure("lost: \(outstanding)") }
    }
  }

  /// One life: chains are offered, taken, answered and given back in an order that a seed decides.
  private func live(_ bench: inout Bench, _ random: inout SeededGenerator, steps: Int) throws {
    for _ in 0..<steps where !bench.device.isDead {
      switch random.next() % 8 {
      case 0, 1: bench.offer(Int(random.next() % 3) + 1)
      case 2, 3, 4: _ = try bench.take()
      case 5:
        if !bench.taken.isEmpty { bench.answer(at: Int(random.next() % UInt64(bench.taken.count))) }
      case 6:
        _ = bench.device.publish()
        try bench.collect()
      default:
        // Only what was taken last may go back.
        if let last = bench.taken.last, last.number == bench.lastTaken {
          bench.device.giveBack(last.token)
          bench.taken.removeLast()
          bench.lastTaken = nil
        }
      }
    }
  }

  @Test("Killed between any two stores: nothing is lost, nothing is answered twice", arguments: [false, true])
  func everyStore(isPacked: Bool) throws {
    var kills = 0
    for seed in 1...60 as ClosedRange<UInt64> {
      // The number of stores a life makes is found by living it once.
      for stores in 1...120 {
        var random = SeededGenerator(state: seed)
        var bench = try Bench(size: 8, packed: isPacked)
        bench.device.die(afterStores: stores)
        try live(&bench, &random, steps: 120)
        guard bench.device.isDead else { break }
        kills += 1
        try bench.collect()
        try bench.restart()
        try bench.finish()
      }
    }
    #expect(kills > 3000)
  }

  @Test("Killed again and again, also while making good for the last time", arguments: [false, true])
  func repeatedly(isPacked: Bool) throws {
    for seed in 1...300 as ClosedRange<UInt64> {
      var random = SeededGenerator(state: seed &* 0x9E37)
      var bench = try Bench(size: 16, packed: isPacked)
      for _ in 0..<20 {
        bench.device.die(afterStores: Int(random.next() % 90) + 1)
        try live(&bench, &random, steps: 60)
        try bench.collect()
        try bench.restart()
      }
      try bench.finish()
    }
  }

  @Test("What was in flight comes again in the order it first came in, before anything new", arguments: [false, true])
  func order(isPacked: Bool) throws {
    var bench = try Bench(size: 16, packed: isPacked)
    for count in [1, 3, 2, 1, 2] { bench.offer(count) }
    for _ in 0..<4 { #expect(try bench.take()) }
    bench.answer(at: 1)
    _ = bench.device.publish()
    try bench.collect()
    try bench.restart()
    let before = bench.device.replayCount
    #expect(before == 3)
    bench.order = []
    bench.begun = [:]
    while try bench.take() {}
    #expect(bench.order == [1, 3, 4, 5])
    try bench.finish()
  }

  @Test("A chain that is never answered is poisoned after three replays, and the others are not", arguments: [false, true])
  func poison(isPacked: Bool) throws {
    var bench = try Bench(size: 8, packed: isPacked)
    bench.offer(2)
    _ = try bench.take()
    for round in 1...5 {
      try bench.restart()
      bench.offer(1)
      _ = try bench.take()
      let poisoned = bench.chain.isPoisoned
      #expect(poisoned == (round > Virtqueue.replayLimit), "round \(round)")
      _ = try bench.take()
      let other = bench.chain.isPoisoned
      #expect(!other)
      bench.answer(at: 1)
      _ = bench.device.publish()
      try bench.collect()
    }
  }

  @Test("A replayed chain that is given back comes again first, and counts once", arguments: [false, true])
  func giveBackOfReplay(isPacked: Bool) throws {
    var bench = try Bench(size: 8, packed: isPacked)
    bench.offer(1)
    bench.offer(2)
    _ = try bench.take()
    _ = try bench.take()
    try bench.restart()
    bench.order = []
    bench.begun = [:]
    for _ in 0..<10 {
      _ = try bench.take()
      let last = try unwrap(bench.taken.popLast())
      #expect(last.number == 1)
      bench.device.giveBack(last.token)
    }
    _ = try bench.take()
    let poisoned = bench.chain.isPoisoned
    #expect(!poisoned)
    try bench.finish()
  }

  @Test("A region full of random bytes is refused or bounded, never followed outside", arguments: [false, true])
  func randomRegions(isPacked: Bool) throws {
    var random = SeededGenerator(state: 7)
    var refused = 0
    for round in 0..<4000 {
      var bench = try Bench(size: 8, packed: isPacked)
      for count in [1, 2, 1] { bench.offer(count) }
      _ = try bench.take()
      _ = try bench.take()
      // Mostly valid, with some numbers of somebody else's.
      let count = InflightRegion.byteCount(size: 8, packed: isPacked)
      let changes = round % 4 == 0 ? count : Int(random.next() % 6) + 1
      for change in 0..<changes {
        let offset = changes == count ? change : Int(random.next() % UInt64(count))
        // Version and size stay right in most rounds, or nothing behind them would be looked at.
        if (8..<12).contains(offset), round % 8 != 0 { continue }
        let value = UInt8(truncatingIfNeeded: random.next() % 3 == 0 ? random.next() : random.next() % 9)
        unsafe bench.mapping.baseAddress.storeBytes(of: value, toByteOffset: 64 + offset, as: UInt8.self)
      }
      do {
        try bench.restart()
        // Whatever it was taken for: taking ends, and the ring may break, but nothing traps.
        for _ in 0..<64 { guard (try? bench.take()) == true else { break } }
        while !bench.taken.isEmpty { bench.answer(at: 0) }
        _ = bench.device.publish()
      } catch is VirtqueueError { refused += 1 }
    }
    #expect(refused > 200)
  }

  @Test("A region of another size, version or place is refused", arguments: [false, true])
  func wrongRegions(isPacked: Bool) throws {
    var bench = try Bench(size: 8, packed: isPacked)
    bench.offer(1)
    _ = try bench.take()
    #expect(InflightRegion(bench.mapping, offset: 64, byteCount: 4096) == nil)
    #expect(InflightRegion(bench.mapping, offset: 63, byteCount: 64) == nil)
    #expect(InflightRegion(bench.mapping, offset: -64, byteCount: 64) == nil)
    var larger = VirtqueueConfiguration.contiguous(size: 16, features: bench.configuration.features, at: GuestFixture.ring)
    larger.base = bench.configuration.base
    let memory = bench.memory
    let short = bench.region
    #expect(throws: VirtqueueError.self) { _ = try Virtqueue(larger, memory: memory, inflight: short) }
    let wide = try unwrap(
      InflightRegion(bench.mapping, offset: 64, byteCount: InflightRegion.byteCount(size: 16, packed: isPacked)))
    #expect(throws: VirtqueueError.inflight("it was made for 8 entries, not 16")) {
      _ = try Virtqueue(larger, memory: memory, inflight: wide)
    }
    unsafe bench.mapping.baseAddress.storeBytes(of: 2, toByteOffset: 64 + 8, as: UInt16.self)
    let configuration = bench.configuration
    #expect(throws: VirtqueueError.inflight("its version is 2")) {
      _ = try Virtqueue(configuration, memory: memory, inflight: short)
    }
  }
}
