import HostSystem
import VMMemory
import VirtioQueue
import VirtioSpec

// The record of requests in flight, which a former process or a hostile front end has written.

let inflightRecords = Target(
  name: "inflight", about: "replaying a foreign record of requests in flight, split and packed, and dying over it again",
  seeds: {
    var dice = Dice(state: 77)
    return (0..<8).map { index in
      // Honest lives of various shapes, then deaths; and one record full of noise.
      [UInt8(index), index < 6 ? 0 : 1] + (0..<60).map { _ in UInt8(truncatingIfNeeded: dice.next() >> 30) }
    }
  }, run: replay)

private let room = GuestRoom()
private let record = sure { try MemoryMapping.anonymous(byteCount: 8192) }

private func replay(_ script: inout Script) {
  let shape = script.byte()
  let packed = shape & 1 == 1
  let size: UInt16 = 1 << UInt16(shape >> 1 & 3 + 1)
  let features: FeatureSet = packed ? [.version1, .packedRing, .indirectDescriptors] : [.version1, .indirectDescriptors]
  var driver = RingDriver(room, size: size, features)
  let count = InflightRegion.byteCount(size: size, packed: packed)
  let content = UnsafeMutableRawBufferPointer(start: record.baseAddress, count: record.byteCount)
  content.initializeMemory(as: UInt8.self, repeating: 0)
  guard let region = InflightRegion(record, offset: 64, byteCount: count) else { return demand(false, "no region") }
  let area = UnsafeMutableRawBufferPointer(rebasing: content[64..<64 + count])

  if script.byte() & 1 == 1 {
    // Anything may stand there; mostly with a head that lets the rest be looked at.
    driver.isHonest = false
    if script.bool() {
      area.storeBytes(of: 1, toByteOffset: 8, as: UInt16.self)
      area.storeBytes(of: size, toByteOffset: 10, as: UInt16.self)
    }
    for _ in 0..<Int(script.byte()) where !script.isOver {
      let at = script.below(count - 8)
      switch script.byte() & 3 {
      case 0: area[at] = script.byte()
      case 1: area.storeBytes(of: UInt16(script.byte() & 15), toByteOffset: at & ~1, as: UInt16.self)
      case 2: area.storeBytes(of: script.u64(), toByteOffset: at & ~7, as: UInt64.self)
      default:
        let unit = packed ? 32 : 16
        area.storeBytes(of: 1, toByteOffset: unit * (1 + script.below(Int(size))), as: UInt8.self)
      }
    }
    for _ in 0..<Int(script.byte() & 7) { driver.misbehave(&script) }
  }

  var answered = 0
  // Processes that serve the ring one after another, each killed somewhere.
  for life in 0..<8 where !script.isOver || life == 0 {
    guard var device = try? Virtqueue(driver.configuration, memory: room.memory, inflight: region) else {
      return demand(!driver.isHonest, "an honest record is refused")
    }
    demand(device.replayCount <= Int(size), "more to do again than a ring can hold")
    var chain = DescriptorChain(for: device)
    var taken: [ChainToken] = []
    if script.bool() { device.die(afterStores: Int(script.byte()) + 1) }
    for _ in 0..<40 where !script.isOver && !device.isDead {
      switch script.byte() % 6 {
      case 0, 1: driver.offerAny(&script)
      case 2, 3:
        guard case .chain = device.next(&chain) else { break }
        room.check(chain)
        demand(chain.token.head < size && !taken.contains { $0.head == chain.token.head }, "a head is in flight twice")
        taken.append(chain.token)
        demand(taken.count <= Int(size), "more is in flight than a ring can hold")
      case 4:
        guard !taken.isEmpty else { break }
        device.complete(taken.remove(at: script.below(taken.count)), written: 0)
      default:
        _ = device.publish()
        driver.collect()
      }
    }
    driver.collect()
    answered = driver.collected
  }
  // The last process lives: what an honest driver waits for is answered, each once.
  guard var device = try? Virtqueue(driver.configuration, memory: room.memory, inflight: region) else {
    return demand(!driver.isHonest, "an honest record is refused at the end")
  }
  var chain = DescriptorChain(for: device)
  for _ in 0..<3 * Int(size) + 3 {
    guard case .chain = device.next(&chain) else { break }
    room.check(chain)
    device.complete(chain.token, written: 0)
  }
  _ = device.publish()
  driver.collect()
  demand(driver.collected >= answered, "answers were taken back")
  if driver.isHonest { demand(driver.collected == driver.offered, "\(driver.offered) chains were offered, \(driver.collected) answered") }
}
