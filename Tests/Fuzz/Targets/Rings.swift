import CFuzz
import Glibc
import HostSystem
import Synchronization
import VMMemory
import VirtioQueue
import VirtioSpec

private let room = GuestRoom()

let splitRing = Target(
  name: "split-ring", about: "walking and answering a split ring, honest and hostile drivers by turns", seeds: { ringSeeds(packed: false) },
  run: { ringTurns(&$0, packed: false) })

let packedRing = Target(
  name: "packed-ring", about: "the same with a packed ring", seeds: { ringSeeds(packed: true) }, run: { ringTurns(&$0, packed: true) })

let racedRings = Target(
  name: "raced-rings", about: "both rings while a thread rewrites descriptors, indices and tables",
  seeds: { ringSeeds(packed: false).map { [0] + $0 } + ringSeeds(packed: true).map { [1] + $0 } }, isRacy: true, run: raced)

private func ringSeeds(packed: Bool) -> [[UInt8]] {
  var seeds: [[UInt8]] = []
  for shape in [0x18, 0x20, 0x1A, 0x1C, 0x58] as [UInt8] {
    var seed: [UInt8] = [shape]
    for round in 0..<6 as Range<UInt8> { seed += [0, round & 3 | 0x20, 5, 9, 7, 2, 2, 3, 0, 4, 4] }
    seeds.append(seed)
    // A table, a chain given back, then a rule broken.
    seeds.append([shape, 0, 0x43, 8, 8, 8, 8, 2, 5, 2, 3, 0, 4, 6, 1, 2, 1, 1, 2, 2, 3, 0, 4])
    seeds.append([shape, 0, 0x31, 9, 0, 3, 200, 1, 4, 0, 2, 2, 0, 1, 2, 0, 3, 7, 0, 2, 3, 0, 4, 4])
  }
  return seeds
}

/// Device and driver by turns, as the script has it.
private func ringTurns(_ script: inout Script, packed: Bool) {
  let (size, features) = RingDriver.shape(&script, packed: packed)
  var driver = RingDriver(room, size: size, features)
  let configuration = driver.configuration
  let memory = room.memory
  var device = sure { try Virtqueue(configuration, memory: memory) }
  var chain = DescriptorChain(for: device)
  var taken: [ChainToken] = []
  var takenCount = 0
  var completedCount = 0
  var lastCanGoBack = false

  while !script.isOver {
    switch script.byte() % 9 {
    case 0, 1: driver.offerAny(&script)
    case 2:
      let wasBroken = device.brokenReason
      switch device.next(&chain) {
      case .empty: demand(wasBroken == nil, "a broken ring is only empty")
      case .broken(let why):
        demand(!driver.isHonest, "an honest driver's ring broke: \(why)")
        demand(wasBroken == nil || wasBroken == why, "a ring broke twice")
        demand(device.brokenReason == why, "a broken ring forgets it")
      case .chain:
        demand(wasBroken == nil, "a broken ring goes on")
        room.check(chain)
        let token = chain.token
        demand(token.head < size, "a head outside the ring")
        demand(!taken.contains { $0.head == token.head }, "a head is in flight twice")
        demand(taken.count < Int(size), "more is in flight than the ring has entries")
        taken.append(token)
        takenCount += 1
        lastCanGoBack = true
        if driver.isHonest { demand(takenCount <= driver.offered, "more was taken than was made available") }
        useUp(&chain, &script)
      }
    case 3:
      guard !taken.isEmpty else { break }
      // In order means in order; else any of them.
      let index = features.contains(.inOrder) ? 0 : script.below(taken.count)
      if features.contains(.inOrder), taken.count > 1, script.bool() {
        device.coalesce(taken.removeFirst())
        completedCount += 1
      }
      let token = taken.remove(at: min(index, taken.count - 1))
      device.complete(token, written: UInt32(script.byte()))
      completedCount += 1
      lastCanGoBack = false
    case 4:
      let before = deviceArea(configuration)
      _ = device.publish()
      if device.brokenReason != nil {
        demand(deviceArea(configuration) == before, "a broken ring is written to")
      } else if !packed, driver.isHonest {
        let used = memory.load(UInt16.self, at: GuestAddress(configuration.device.rawValue + 2))
        demand(used == UInt16(truncatingIfNeeded: completedCount), "the used index is not what was completed")
      }
      driver.collect()
    case 5:
      // What was taken last goes back, and comes again.
      guard lastCanGoBack, let token = taken.popLast() else { break }
      device.giveBack(token)
      takenCount -= 1
      lastCanGoBack = false
      if driver.isHonest {
        demand(device.next(&chain) == .chain && chain.token == token, "a chain that went back does not come again")
        taken.append(token)
        takenCount += 1
      }
    case 6: driver.misbehave(&script)
    case 7:
      if script.bool() { device.disableKicks() } else { _ = device.enableKicks() }
      _ = device.hasAvailable()
    default:
      if script.bool() { driver.queue.disableCalls() } else { _ = driver.queue.enableCalls() }
    }
    checkFlight(device, taken.count)
    demand(completedCount <= takenCount, "more was completed than was taken")
  }
  // A stopped ring goes on from where it stands.
  for token in taken { device.complete(token, written: 0) }
  _ = device.publish()
  driver.collect()
  if driver.isHonest {
    var continued = configuration
    continued.base = device.base
    demand((try? Virtqueue(continued, memory: memory)) != nil, "a ring cannot go on from its own base")
    demand(driver.collected == takenCount, "\(takenCount) chains were answered and \(driver.collected) seen")
  }
}

/// What is in flight is what was taken, and the chain over which the ring broke.
func checkFlight(_ ring: borrowing Virtqueue, _ count: Int) {
  let inFlight = ring.inFlightCount
  demand(inFlight == count || ring.brokenReason != nil && inFlight == count + 1, "\(count) chains are in flight, not \(inFlight)")
}

private func deviceArea(_ configuration: VirtqueueConfiguration) -> [UInt8]? {
  let count = configuration.isPacked ? 4 : SplitRing.usedRingByteCount(queueSize: configuration.size)
  return room.memory.bytes(at: configuration.device, count: count)
}

/// Takes out of a chain and puts into it in ways of the script's choice.
private func useUp(_ chain: inout DescriptorChain, _ script: inout Script) {
  let how = script.byte()
  let readable = chain.readableByteCount
  let writable = chain.writableByteCount
  if how & 1 != 0 {
    let bytes = chain.takeReadableBytes(atMost: Int(how))
    demand(chain.readableByteCount == readable - bytes.count, "taking miscounts")
  }
  if how & 2 != 0 {
    let before = chain.readableByteCount
    let value = chain.takeReadable(UInt64.self)
    demand(
      value == nil ? before < 8 && chain.readableByteCount == before : chain.readableByteCount == before - 8, "taking a value miscounts")
  }
  if how & 4 != 0, writable > 0 {
    demand(room.contains(chain.takeLastWritableByte(), 1), "the last byte is not guest memory")
    demand(chain.writableByteCount == writable - 1, "taking the last byte miscounts")
  }
  if how & 8 != 0 {
    let before = chain.writableByteCount
    let written = chain.put([UInt8](repeating: how, count: Int(how)))
    demand(written == min(before, Int(how)) && chain.writableByteCount == before - written, "putting miscounts")
  }
  if how & 16 != 0 { chain.dropReadable(Int(script.u16())) }
  if how & 32 != 0 { chain.dropWritable(Int(script.u16())) }
  room.check(chain)
}

// MARK: Raced

/// A thread that rewrites what a driver owns while the device looks at it. It runs as long as the process.
private final class Rewriter: Sendable {
  /// Even: it rests. Odd: it writes; the bits above say how.
  let mode = Atomic<UInt64>(0)

  static let shared = Rewriter()

  private init() {
    let thread = sure { try HostThread.start(name: "rewriter") { [self] in run() } }
    _ = thread
  }

  private func run() {
    var dice = Dice(state: 0x1234_5678_9ABC_DEF1)
    let memory = room.memory
    while true {
      let mode = mode.load(ordering: .acquiring)
      guard mode & 1 == 1 else {
        usleep(20)
        continue
      }
      let packed = mode & 2 != 0
      let size = UInt64(mode >> 8 & 0xFF)
      for _ in 0..<32 {
        let random = dice.next()
        let entry = (random >> 8) % (random & 1 == 0 ? size : 32)
        let table = random & 1 == 0 ? GuestRoom.ring : GuestRoom.tables
        let field = table + 16 * entry
        switch random >> 1 & 7 {
        // Length, flags and next (or id and flags), address, index.
        case 0: _ = memory.store(UInt32(truncatingIfNeeded: random >> 20) & 0x3FFF, at: GuestAddress(field + 8))
        case 1: _ = memory.store(UInt32(truncatingIfNeeded: random >> 20), at: GuestAddress(field + 8))
        case 2:
          _ = memory.store(UInt16(truncatingIfNeeded: random >> 20) & (packed ? 0xFFFF : 7), at: GuestAddress(field + (packed ? 14 : 12)))
        case 3: _ = memory.store(UInt16(truncatingIfNeeded: random >> 20) % UInt16(size + 2), at: GuestAddress(field + (packed ? 12 : 14)))
        case 4: _ = memory.store(GuestRoom.buffers + (random >> 20) % 0x5000, at: GuestAddress(field))
        case 5: _ = memory.store(random, at: GuestAddress(field))
        case 6:
          let layout = VirtqueueConfiguration.contiguous(
            size: UInt16(size), features: packed ? [.packedRing] : [], at: GuestAddress(GuestRoom.ring))
          // The index mostly moves on as an honest one would, or nothing else were ever looked at.
          let place = GuestAddress(layout.driver.rawValue + (random >> 40) % 8 & ~1)
          let now = memory.load(UInt16.self, at: place) ?? 0
          let isWild = random >> 50 & 15 == 0
          _ = memory.store(isWild ? UInt16(truncatingIfNeeded: random >> 20) : now &+ UInt16(random >> 20 & 3), at: place)
        default: _ = memory.store(UInt64(GuestRoom.tables + (random >> 20) % 512), at: GuestAddress(field))
        }
      }
    }
  }
}

/// The device serves a ring that changes under its eyes. Nothing can be said of what comes, but where it lies and how much.
private func raced(_ script: inout Script) {
  let packed = script.byte() & 1 == 1
  let (size, features) = RingDriver.shape(&script, packed: packed)
  let rewriter = Rewriter.shared
  var driver = RingDriver(room, size: size, features)
  driver.isHonest = false
  let configuration = driver.configuration
  let memory = room.memory
  rewriter.mode.store(1 | (packed ? 2 : 0) | UInt64(size) << 8, ordering: .releasing)
  defer { rewriter.mode.store(0, ordering: .releasing) }
  var broken = 0
  // A broken ring is set up again, for the next way to break it.
  while broken < 8, !script.isOver {
    guard var device = try? Virtqueue(configuration, memory: memory) else { break }
    var chain = DescriptorChain(for: device)
    var taken: [ChainToken] = []
    rounds: for _ in 0..<64 {
      driver.offerAny(&script)
      for _ in 0..<4 {
        switch device.next(&chain) {
        case .chain:
          check(raced: chain)
          demand(chain.token.head < size && taken.count < Int(size), "more is in flight than a ring can hold")
          taken.append(chain.token)
          var copied = 0
          while chain.readableByteCount > 0, copied < 4096 { copied += max(1, chain.takeReadableBytes(atMost: 64).count) }
          _ = chain.takeLastWritableByte()
          _ = chain.put([1, 2, 3, 4])
        case .empty: break
        case .broken: break rounds
        }
      }
      if script.bool(), !taken.isEmpty { device.complete(taken.removeFirst(), written: 1) }
      _ = device.publish()
      if script.isOver { break }
    }
    for token in taken { device.complete(token, written: 0) }
    _ = device.publish()
    _ = device.enableKicks()
    broken += 1
  }
}

private func check(raced chain: borrowing DescriptorChain) { room.check(chain) }
