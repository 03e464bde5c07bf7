import Glibc
import HostSystem
import Testing
import TestSupport
import VMMemory
import VirtioQueue
import VirtioSpec

/// Figures, not judgements: what each side costs per chain of three buffers (the shape of a block request), 32 chains at
/// a time, single thread, warm. Also the place that would notice a lost inlining annotation: it lives in another module.
@Suite("Ring speed", .serialized)
struct RingSpeedTests {
  struct Figures {
    var offer: UInt64 = 0
    var take: UInt64 = 0
    var complete: UInt64 = 0
    var collect: UInt64 = 0
    var chains: UInt64 = 0
  }

  @inline(__always)
  private func now() -> UInt64 {
    var time = timespec()
    clock_gettime(CLOCK_MONOTONIC, &time)
    return UInt64(time.tv_sec) * 1_000_000_000 + UInt64(time.tv_nsec)
  }

  private func measure(_ features: FeatureSet, indirect: Bool, recorded: Bool, rounds: Int) throws -> Figures {
    var pair = try QueuePair(size: 256, features)
    if recorded {
      let count = InflightRegion.byteCount(size: 256, packed: features.contains(.packedRing))
      let region = try unwrap(InflightRegion(MemoryMapping.anonymous(byteCount: count), offset: 0, byteCount: count))
      pair.device = try Virtqueue(pair.device.configuration, memory: pair.memory, inflight: region)
    }
    let place = GuestFixture.buffers
    let buffers: InlineArray<3, DriverBuffer> = [readable(place, 16), writable(place + 4096, 4096), writable(place + 512, 1)]
    var figures = Figures()
    var tokens = InlineArray<32, ChainToken?>(repeating: nil)
    var bytes = 0
    for _ in 0..<rounds {
      let a = now()
      for index in 0..<32 {
        if indirect {
          _ = pair.driver.addIndirect(buffers.span, table: GuestAddress(0x3_0000 + UInt64(64 * index)))
        } else {
          _ = pair.driver.add(buffers.span)
        }
      }
      _ = pair.driver.publish()
      let b = now()
      var taken = 0
      while case .chain = pair.device.next(&pair.chain) {
        bytes &+= pair.chain.writableByteCount
        if taken < 32 { tokens[taken] = pair.chain.token }
        taken += 1
      }
      let c = now()
      for index in 0..<taken { if let token = tokens[index] { pair.device.complete(token, written: 4097) } }
      _ = pair.device.publish()
      let d = now()
      var collected = 0
      while case .used = pair.driver.nextUsed() { collected += 1 }
      let e = now()
      figures.offer += b - a
      figures.take += c - b
      figures.complete += d - c
      figures.collect += e - d
      figures.chains += UInt64(collected)
    }
    checkEqual(figures.chains, UInt64(32 * rounds))
    checkEqual(bytes, 32 * rounds * 4097)
    return figures
  }

  @Test func figures() throws {
    let kinds: [(String, FeatureSet, Bool)] = [
      ("split", [.version1, .eventIndex], false), ("split indirect", [.version1, .eventIndex, .indirectDescriptors], true),
      ("packed", [.version1, .eventIndex, .packedRing], false),
      ("packed indirect", [.version1, .eventIndex, .packedRing, .indirectDescriptors], true),
    ]
    let all = kinds.map { ($0.0, $0.1, $0.2, false) } + kinds.map { ($0.0 + " recorded", $0.1, $0.2, true) }
    for (name, features, indirect, recorded) in all {
      _ = try measure(features, indirect: indirect, recorded: recorded, rounds: 200)
      var best = Figures(offer: .max, take: .max, complete: .max, collect: .max, chains: 0)
      for _ in 0..<5 {
        let run = try measure(features, indirect: indirect, recorded: recorded, rounds: 2000)
        best = Figures(
          offer: min(best.offer, run.offer), take: min(best.take, run.take), complete: min(best.complete, run.complete),
          collect: min(best.collect, run.collect), chains: run.chains)
      }
      func perChain(_ total: UInt64) -> String {
        let tenths = total * 10 / best.chains
        return "\(tenths / 10).\(tenths % 10)"
      }
      print(
        "ring speed, \(name): device takes \(perChain(best.take)) ns, completes \(perChain(best.complete)) ns; "
          + "driver offers \(perChain(best.offer)) ns, collects \(perChain(best.collect)) ns a chain")
    }
  }
}
