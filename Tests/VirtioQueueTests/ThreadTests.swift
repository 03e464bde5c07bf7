import CLinux
import Glibc
import Synchronization
import Testing
import TestSupport
import VMMemory
import VirtioQueue
import VirtioSpec

/// What two threads share besides the ring: bells, and the word to stop.
final class Bells: Sendable {
  let kick = Atomic<Int>(0)
  let call = Atomic<Int>(0)
  let isOver = Atomic<Bool>(false)
  /// Completed rounds of the second thread, or what it has to say.
  let count = Atomic<Int>(0)
  let failed = Atomic<Int>(0)

  /// Waits until a bell has rung since `seen`; false when it is all over or nothing comes for two seconds.
  func wait(_ bell: borrowing Atomic<Int>, past seen: Int) -> Bool {
    let start = Self.now()
    while bell.load(ordering: .acquiring) == seen {
      if isOver.load(ordering: .acquiring) || Self.now() - start > 2_000_000_000 { return false }
      sched_yield()
    }
    return true
  }

  static func now() -> UInt64 {
    var time = timespec()
    clock_gettime(CLOCK_MONOTONIC, &time)
    return UInt64(time.tv_sec) * 1_000_000_000 + UInt64(time.tv_nsec)
  }
}

/// Runs `body` in a thread of its own.
private func inThread(_ body: @escaping @Sendable () -> Void) -> pthread_t {
  final class Box { let body: @Sendable () -> Void; init(_ body: @escaping @Sendable () -> Void) { self.body = body } }
  var thread = pthread_t()
  let box = Unmanaged.passRetained(Box(body)).toOpaque()
  pthread_create(
    &thread, nil,
    { argument in
      if let argument { Unmanaged<Box>.fromOpaque(argument).takeRetainedValue().body() }
      return nil
    }, box)
  return thread
}

@Suite("Two threads", .serialized)
struct ThreadTests {
  /// Driver and device on two processors for a while, both sleeping until they are notified. A missing fence or a wrong
  /// decision ends in a bell that never rings.
  @Test(arguments: [split, packed, split.union(.eventIndex), packed.union(.eventIndex)])
  func noNotificationIsLostBetweenTwoProcessors(features: FeatureSet) throws {
    let memory = try GuestFixture.memory()
    let configuration = VirtqueueConfiguration.contiguous(size: 16, features: features, at: GuestFixture.ring)
    var driver = try DriverQueue(configuration, memory: memory)
    let bells = Bells()
    let thread = inThread { Self.serve(configuration, memory, bells) }
    var used = 0
    var offered = 0
    var lengths = [UInt32](repeating: 0, count: 16)
    var wrong = 0
    let end = Bells.now() + 400_000_000
    var isLost = false
    conversation: while Bells.now() < end || used < offered {
      while Bells.now() < end, offered < used + 5,
        let head = driver.add([writable(GuestFixture.buffers + UInt64(offered % 4) * 64, 64)].span)
      {
        lengths[Int(head)] = UInt32(offered % 4)
        offered += 1
      }
      if driver.publish() { bells.kick.wrappingAdd(1, ordering: .releasing) }
      let seen = bells.call.load(ordering: .acquiring)
      while case .used(let head, let written) = driver.nextUsed() {
        used += 1
        // The device reports what it wrote, and the data must be there before the report.
        let byte = memory.load(UInt8.self, at: GuestAddress(GuestFixture.buffers + UInt64(lengths[Int(head)]) * 64))
        if written != 64 || byte != 0xA5 { wrong += 1 }
      }
      guard used < offered, !driver.enableCalls() else { continue }
      if !bells.wait(bells.call, past: seen) {
        isLost = true
        break conversation
      }
      driver.disableCalls()
    }
    bells.isOver.store(true, ordering: .releasing)
    pthread_join(thread, nil)
    checkEqual(isLost, false)
    checkEqual(wrong, 0)
    checkEqual(bells.failed.load(ordering: .acquiring), 0)
    check(used == offered && used > 20, "\(used) of \(offered)")
  }

  private static func serve(_ configuration: VirtqueueConfiguration, _ memory: GuestMemory, _ bells: Bells) {
    guard var device = try? Virtqueue(configuration, memory: memory) else {
      bells.failed.store(1, ordering: .releasing)
      return
    }
    var chain = DescriptorChain(for: device)
    let data = [UInt8](repeating: 0xA5, count: 64)
    while !bells.isOver.load(ordering: .acquiring) {
      let seen = bells.kick.load(ordering: .acquiring)
      device.disableKicks()
      while device.next(&chain) == .chain {
        let count = data.withUnsafeBytes { chain.put($0) }
        device.complete(chain.token, written: UInt32(count))
        if device.publish() { bells.call.wrappingAdd(1, ordering: .releasing) }
      }
      if device.brokenReason != nil { return bells.failed.store(2, ordering: .releasing) }
      if device.enableKicks() { continue }
      if !bells.wait(bells.kick, past: seen), !bells.isOver.load(ordering: .acquiring) {
        return bells.failed.store(3, ordering: .releasing)
      }
    }
  }

  /// The two moments that need a full fence, thousands of times on two processors at once: one publishes while the other
  /// asks to be notified. If neither sees the other, somebody would sleep for ever.
  @Test(arguments: [split, packed, split.union(.eventIndex), packed.union(.eventIndex)])
  func publishingAndAskingNeverMissEachOther(features: FeatureSet) throws {
    let memory = try GuestFixture.memory()
    let configuration = VirtqueueConfiguration.contiguous(size: 16, features: features, at: GuestFixture.ring)
    var driver = try DriverQueue(configuration, memory: memory)
    let bells = Bells()
    let thread = inThread { Self.answer(configuration, memory, bells) }
    var step = 0
    var lost = (kicks: 0, calls: 0)
    var rounds = 0
    let end = Bells.now() + 300_000_000
    while Bells.now() < end {
      _ = driver.add([writable(GuestFixture.buffers, 64)].span)
      step += 1
      guard Self.meet(bells, bells.kick, bells.call, step) else { break }
      Self.dawdle(rounds)
      let kick = driver.publish()
      step += 1
      guard Self.meet(bells, bells.kick, bells.call, step) else { break }
      if !kick && bells.count.load(ordering: .acquiring) == 0 { lost.kicks += 1 }
      step += 1
      guard Self.meet(bells, bells.kick, bells.call, step) else { break }
      Self.dawdle(rounds)
      let more = driver.enableCalls()
      step += 1
      guard Self.meet(bells, bells.kick, bells.call, step) else { break }
      if !more && bells.count.load(ordering: .acquiring) == 0 { lost.calls += 1 }
      driver.disableCalls()
      if case .used = driver.nextUsed() { rounds += 1 }
    }
    bells.isOver.store(true, ordering: .releasing)
    pthread_join(thread, nil)
    check(rounds > 10, "\(rounds) rounds")
    checkEqual(bells.failed.load(ordering: .acquiring), 0)
    check(lost == (0, 0), "\(lost) of \(rounds) rounds")
  }

  /// Says that step `step` is reached and spins until the other has said so too.
  private static func meet(_ bells: Bells, _ mine: borrowing Atomic<Int>, _ other: borrowing Atomic<Int>, _ step: Int) -> Bool {
    mine.store(step, ordering: .sequentiallyConsistent)
    var spins = 0
    while other.load(ordering: .acquiring) < step {
      spins += 1
      if spins & 0x3FF == 0 {
        if bells.isOver.load(ordering: .acquiring) { return false }
        sched_yield()
      }
    }
    return true
  }

  /// A different short time in each round, so that the two meet at every distance.
  private static func dawdle(_ round: Int) {
    for _ in 0..<(round & 15) { clinux_pause() }
  }

  /// The device of the test above.
  private static func answer(_ configuration: VirtqueueConfiguration, _ memory: GuestMemory, _ bells: Bells) {
    guard var device = try? Virtqueue(configuration, memory: memory) else { return bells.isOver.store(true, ordering: .releasing) }
    var chain = DescriptorChain(for: device)
    var step = 0
    var rounds = 0
    while true {
      step += 1
      guard meet(bells, bells.call, bells.kick, step) else { return }
      dawdle(rounds >> 4)
      let more = device.enableKicks()
      bells.count.store(more ? 1 : 0, ordering: .releasing)
      step += 1
      guard meet(bells, bells.call, bells.kick, step) else { return }
      device.disableKicks()
      guard device.next(&chain) == .chain else {
        bells.failed.store(2, ordering: .releasing)
        return bells.isOver.store(true, ordering: .releasing)
      }
      device.complete(chain.token, written: 0)
      step += 1
      guard meet(bells, bells.call, bells.kick, step) else { return }
      dawdle(rounds >> 4)
      let call = device.publish()
      bells.count.store(call ? 1 : 0, ordering: .releasing)
      step += 1
      guard meet(bells, bells.call, bells.kick, step) else { return }
      rounds += 1
    }
  }

  /// A second thread rewrites ring, tables and indices all the time while a device works. Whatever it reads, what the
  /// device is given lies in guest memory, and its sums are right.
  @Test(arguments: [split, packed.union(.eventIndex)])
  func memoryThatChangesUnderTheWalkHarmsNobody(features: FeatureSet) throws {
    let memory = try GuestFixture.memory()
    let size: UInt16 = 16
    let configuration = VirtqueueConfiguration.contiguous(size: size, features: features, at: GuestFixture.ring)
    let bells = Bells()
    let thread = inThread { Self.scribble(configuration, memory, bells) }
    let ranges = memory.regions.map { region -> ClosedRange<UInt> in
      let base = UInt(bitPattern: memory.translate(region.guestAddress, byteCount: region.byteCount))
      return base...(base + UInt(region.byteCount))
    }
    var random = SeededGenerator(state: 7)
    var chains = 0
    var breaks: [BrokenRing: Int] = [:]
    var complaint: String?
    let end = Bells.now() + 700_000_000
    var fresh = configuration
    while Bells.now() < end, complaint == nil {
      // A broken ring is reset, as its driver would do; the used index is whatever lies there now.
      fresh.base =
        features.contains(.packedRing)
        ? VringBase(
          availableSlot: UInt16.random(in: 0..<size, using: &random), availableWrap: .random(using: &random), usedSlot: 0, usedWrap: true)
        : VringBase(availableIndex: memory.load(UInt16.self, at: GuestAddress(configuration.device.rawValue + 2)) ?? 0)
      guard var device = try? Virtqueue(fresh, memory: memory) else { continue }
      var chain = DescriptorChain(for: device)
      var held: [ChainToken] = []
      serving: for _ in 0..<2000 {
        device.disableKicks()
        switch device.next(&chain) {
        case .empty: _ = device.enableKicks()
        case .broken(let reason):
          breaks[reason, default: 0] += 1
          break serving
        case .chain:
          chains += 1
          complaint = complaint ?? Self.complaint(about: chain, ranges)
          if chain.token.head >= size || held.contains(chain.token) { complaint = "Head \(chain.token.head) twice or outside" }
          _ = chain.takeReadable(BlockRequestHeader.self)
          _ = chain.put(UInt32(chains))
          held.append(chain.token)
          if held.count > 3 { device.complete(held.removeFirst(), written: 4) }
          if Bool.random(using: &random) { _ = device.publish() }
          if held.count > Int(size) { complaint = "More in flight than the ring has entries" }
        }
      }
    }
    bells.isOver.store(true, ordering: .releasing)
    pthread_join(thread, nil)
    checkEqual(complaint, nil)
    check(chains > 50, "\(chains) chains")
    check(breaks.count >= 2, "only \(breaks)")
  }

  private static func complaint(about chain: borrowing DescriptorChain, _ ranges: [ClosedRange<UInt>]) -> String? {
    var sums = (readable: 0, writable: 0)
    for piece in chain.pieces() {
      if piece.isWritable { sums.writable += piece.count } else { sums.readable += piece.count }
      guard piece.count > 0, ranges.contains(where: { $0.contains(piece.address) && $0.contains(piece.address + UInt(piece.count)) }) else {
        return "A piece of \(piece.count) bytes is outside guest memory"
      }
    }
    return sums == (chain.readableByteCount, chain.writableByteCount) ? nil : "Sums are wrong"
  }

  /// Writes what is nearly right, so that walks get far.
  private static func scribble(_ configuration: VirtqueueConfiguration, _ memory: GuestMemory, _ bells: Bells) {
    var random = SeededGenerator(state: 42)
    let isPacked = configuration.isPacked
    let addresses = [
      GuestFixture.buffers, GuestFixture.border - 64, GuestFixture.end - 128, GuestFixture.farStart, GuestFixture.buffers + 4096,
    ]
    var available: UInt16 = 0
    while !bells.isOver.load(ordering: .relaxed) {
      let table = Int.random(in: 0..<3, using: &random) == 0
      let slot = UInt64(Int.random(in: 0..<16, using: &random))
      let at = (table ? GuestFixture.buffers + 4096 : configuration.descriptors.rawValue) + 16 * slot
      let isBad = Int.random(in: 0..<200, using: &random) == 0
      let indirect = !table && Int.random(in: 0..<4, using: &random) == 0
      let address = indirect ? GuestFixture.buffers + 4096 : isBad ? random.next() : addresses.randomElement(using: &random) ?? 0
      let length =
        isBad
        ? UInt32(truncatingIfNeeded: random.next())
        : indirect ? 16 * UInt32.random(in: 1...8, using: &random) : UInt32.random(in: 0...128, using: &random)
      let direction: UInt16 = slot < 8 ? 0 : 2
      let next: UInt16 = !indirect && Int.random(in: 0..<3, using: &random) != 0 ? 1 : 0
      let flags = direction | next | (indirect ? 4 : 0)
      let link = UInt16(truncatingIfNeeded: slot + 1)
      let mark: UInt16 = Bool.random(using: &random) ? PackedRing.available : PackedRing.used
      _ = memory.store(address, at: GuestAddress(at))
      _ = memory.store(length, at: GuestAddress(at + 8))
      _ = memory.store(isPacked ? UInt16.random(in: 0..<16, using: &random) : flags, at: GuestAddress(at + 12))
      _ = memory.store(isPacked ? flags | mark : link, at: GuestAddress(at + 14))
      if !isPacked {
        let ring = configuration.driver.rawValue
        _ = memory.store(UInt16.random(in: 0..<(isBad ? 20 : 16), using: &random), at: GuestAddress(ring + 4 + 2 * UInt64(available & 15)))
        // Run behind what the device has used, so that the distance stays plausible most of the time.
        let used = memory.load(UInt16.self, at: GuestAddress(configuration.device.rawValue + 2)) ?? 0
        available = isBad ? UInt16(truncatingIfNeeded: random.next()) : used &+ UInt16.random(in: 4...12, using: &random)
        _ = memory.store(available, at: GuestAddress(ring + 2))
      } else {
        _ = memory.store(UInt32(truncatingIfNeeded: random.next()), at: configuration.driver)
      }
    }
  }
}
