import CLinux
import Glibc
import HostSystem
import Synchronization
import VMMemory
import VhostUser
import VirtioQueue
import VirtioSpec

/// What no honest driver puts into a ring.
enum RingFaults {
  static let all: [FaultCase] = split + packed + races

  /// A running split ring of 16 entries, and free memory.
  private struct Bench {
    let client: RingClient
    let memory: GuestAddress
  }

  private static func ring(
    _ id: String, _ sentence: String, _ features: FeatureSet = [], _ body: @escaping @Sendable (RingClient, GuestAddress) throws -> Void
  ) -> FaultCase {
    FaultCase("ring.\(id)", sentence) { context in
      let client = try context.client(features)
      let memory = try client.arena.allocate(65536, alignment: 4096)
      _ = client.arena.memory.copyIn(BlockWire.header(.read, 0), at: memory)
      try body(client, memory)
      client.ring.kick.signal()
      // Time to stumble; no answer is due.
      usleep(3000)
      client.ring.kick.signal()
      try MessageFaults.barrier(&client.link)
    }
  }

  private static let next: UInt16 = 1
  private static let write: UInt16 = 2
  private static let indirect: UInt16 = 4

  /// A read request whose second descriptor is as given.
  private static func data(_ id: String, _ sentence: String, address: UInt64?, length: UInt32, flags: UInt16 = 3, third: UInt16 = 2)
    -> FaultCase
  {
    ring(id, sentence) { client, memory in
      client.ring.queue.writeDescriptor(0, address: memory.rawValue, length: 16, third: next, fourth: 1)
      client.ring.queue.writeDescriptor(1, address: address ?? memory.rawValue + 4096, length: length, third: flags, fourth: third)
      client.ring.queue.writeDescriptor(2, address: memory.rawValue + 32, length: 1, third: write, fourth: 0)
      client.ring.queue.publishHead(0)
    }
  }

  /// One descriptor that points to a table of entries.
  private static func table(
    _ id: String, _ sentence: String, length: UInt32, flags: UInt16 = 4, features: FeatureSet = .indirectDescriptors,
    _ entries: [(UInt64?, UInt32, UInt16, UInt16)] = []
  ) -> FaultCase {
    ring(id, sentence, features) { client, memory in
      let place = memory.rawValue + 8192
      var bytes: [UInt8] = []
      for entry in entries {
        bytes += BlockWire.bytes(entry.0 ?? place, 8) + BlockWire.bytes(UInt64(entry.1), 4) + BlockWire.bytes(UInt64(entry.2), 2)
        bytes += BlockWire.bytes(UInt64(entry.3), 2)
      }
      _ = client.arena.memory.copyIn(bytes, at: GuestAddress(place))
      client.ring.queue.writeDescriptor(0, address: place, length: length, third: flags, fourth: 1)
      client.ring.queue.publishHead(0)
    }
  }

  private static let split: [FaultCase] = [
    ring("head", "An available head beyond the ring") { client, _ in client.ring.queue.publishHead(0x7FFF) },
    ring("head-edge", "An available head just beyond the ring") { client, _ in client.ring.queue.publishHead(16) },
    ring("index-jump", "An available index further ahead than the ring is long") { client, _ in client.ring.queue.setAvailableIndex(1000) },
    ring("index-back", "An available index that goes back") { client, _ in client.ring.queue.setAvailableIndex(0xFFFF) },
    ring("next", "A chain that goes on beyond the table") { client, memory in
      client.ring.queue.writeDescriptor(0, address: memory.rawValue, length: 16, third: next, fourth: 0x4000)
      client.ring.queue.publishHead(0)
    },
    ring("self", "A descriptor that follows itself") { client, memory in
      client.ring.queue.writeDescriptor(0, address: memory.rawValue, length: 16, third: next, fourth: 0)
      client.ring.queue.publishHead(0)
    },
    ring("loop", "A chain that bites its tail") { client, memory in
      for index in 0..<16 as Range<UInt16> {
        client.ring.queue.writeDescriptor(index, address: memory.rawValue, length: 16, third: next, fourth: (index + 1) % 16)
      }
      client.ring.queue.publishHead(3)
    },
    ring("loop-writable", "A loop of writable descriptors") { client, memory in
      client.ring.queue.writeDescriptor(0, address: memory.rawValue, length: 16, third: next, fourth: 1)
      client.ring.queue.writeDescriptor(1, address: memory.rawValue + 4096, length: 512, third: next | write, fourth: 2)
      client.ring.queue.writeDescriptor(2, address: memory.rawValue + 8192, length: 512, third: next | write, fourth: 1)
      client.ring.queue.publishHead(0)
    },
    ring("same-head", "The same head made available sixteen times at once") { client, memory in
      client.ring.queue.writeDescriptor(0, address: memory.rawValue, length: 16, third: next, fourth: 1)
      client.ring.queue.writeDescriptor(1, address: memory.rawValue + 4096, length: 513, third: write, fourth: 0)
      for _ in 0..<16 { client.ring.queue.publishHead(0) }
    },
    ring("order", "Writable descriptors before readable ones") { client, memory in
      client.ring.queue.writeDescriptor(0, address: memory.rawValue + 4096, length: 513, third: next | write, fourth: 1)
      client.ring.queue.writeDescriptor(1, address: memory.rawValue, length: 16, third: 0, fourth: 0)
      client.ring.queue.publishHead(0)
    },
    ring("all-writable", "A request of writable descriptors only") { client, memory in
      client.ring.queue.writeDescriptor(0, address: memory.rawValue + 4096, length: 513, third: write, fourth: 0)
      client.ring.queue.publishHead(0)
    },
    ring("all-readable", "A request of readable descriptors only") { client, memory in
      client.ring.queue.writeDescriptor(0, address: memory.rawValue, length: 16, third: 0, fourth: 0)
      client.ring.queue.publishHead(0)
    },
    ring("all-empty", "A request of descriptors of no bytes") { client, memory in
      client.ring.queue.writeDescriptor(0, address: memory.rawValue, length: 0, third: next, fourth: 1)
      client.ring.queue.writeDescriptor(1, address: memory.rawValue, length: 0, third: write, fourth: 0)
      client.ring.queue.publishHead(0)
    },
    ring("flags", "Descriptor flags that do not exist") { client, memory in
      client.ring.queue.writeDescriptor(0, address: memory.rawValue, length: 16, third: 0xFFF8, fourth: 0)
      client.ring.queue.publishHead(0)
    },
    ring("own-ring", "Buffers that lie in the ring itself") { client, _ in
      let ring = client.ring.queue.configuration
      client.ring.queue.writeDescriptor(0, address: ring.descriptors.rawValue, length: 16, third: next, fourth: 1)
      client.ring.queue.writeDescriptor(1, address: ring.device.rawValue, length: 513, third: write, fourth: 0)
      client.ring.queue.publishHead(0)
    },
    data("data-outside", "A buffer outside the memory", address: 1 << 45, length: 512),
    data("data-end", "A buffer across the end of the memory", address: 0x44_0000, length: 1 << 26),
    data("data-top", "A buffer at the top of the address space", address: .max - 100, length: 512),
    data("data-4g", "A buffer of 4 GiB less one", address: nil, length: .max),
    data("data-2g", "A buffer of 2 GiB", address: nil, length: 1 << 31),
    data("data-empty", "A buffer of no bytes", address: nil, length: 0),
    data("data-empty-outside", "A buffer of no bytes outside the memory", address: 1 << 45, length: 0),
    data("data-lengths", "Lengths whose sum wraps around", address: nil, length: 0xFFFF_FFF0),
    ring("header-outside", "A request header outside the memory") { client, memory in
      client.ring.queue.writeDescriptor(0, address: 1 << 45, length: 16, third: next, fourth: 1)
      client.ring.queue.writeDescriptor(1, address: memory.rawValue, length: 513, third: write, fourth: 0)
      client.ring.queue.publishHead(0)
    },
    ring("status-outside", "A status byte outside the memory") { client, memory in
      client.ring.queue.writeDescriptor(0, address: memory.rawValue, length: 16, third: next, fourth: 1)
      client.ring.queue.writeDescriptor(1, address: memory.rawValue + 4096, length: 512, third: next | write, fourth: 2)
      client.ring.queue.writeDescriptor(2, address: 1 << 45, length: 1, third: write, fourth: 0)
      client.ring.queue.publishHead(0)
    },
    table("indirect-not-agreed", "An indirect descriptor that was not agreed on", length: 32, features: []),
    table("indirect-empty", "An indirect table of no bytes", length: 0),
    table("indirect-odd", "An indirect table whose length is no multiple of 16", length: 17, [(nil, 16, 0, 0)]),
    table("indirect-huge", "An indirect table of 4 GiB", length: 0xFFFF_FFF0),
    table("indirect-long", "An indirect table of 64 Ki entries", length: 1 << 20),
    table("indirect-nested", "An indirect table in an indirect table", length: 32, [(nil, 32, 4, 0), (nil, 32, 4, 0)]),
    table("indirect-loop", "An indirect table whose entries form a loop", length: 32, [(nil, 16, 1, 1), (nil, 16, 1, 0)]),
    table("indirect-next", "An indirect table whose chain leaves it", length: 32, [(nil, 16, 1, 0x100), (nil, 16, 0, 0)]),
    table("indirect-and-next", "A descriptor that is indirect and goes on", length: 32, flags: 5, [(nil, 16, 1, 1), (nil, 513, 2, 0)]),
    ring("indirect-outside", "An indirect table outside the memory", .indirectDescriptors) { client, _ in
      client.ring.queue.writeDescriptor(0, address: 1 << 45, length: 32, third: indirect, fourth: 0)
      client.ring.queue.publishHead(0)
    },
    ring("types", "Requests of two hundred types") { client, memory in
      for type in 0..<200 as Range<UInt32> {
        _ = client.arena.memory.copyIn(BlockWire.header(BlockRequestType(rawValue: type &* 0x0101_0101), .max - UInt64(type)), at: memory)
        client.ring.queue.writeDescriptor(0, address: memory.rawValue, length: 16, third: next, fourth: 1)
        client.ring.queue.writeDescriptor(1, address: memory.rawValue + 4096, length: 513, third: write, fourth: 0)
        client.ring.queue.publishHead(0)
        client.ring.kick.signal()
        usleep(50)
      }
    },
  ]

  private static let packed: [FaultCase] = [
    ring("packed-loop", "A packed ring in which every descriptor goes on", .packedRing) { client, memory in
      let mark = client.ring.queue.availableMark
      for index in (0..<16 as Range<UInt16>).reversed() {
        client.ring.queue.writeDescriptor(index, address: memory.rawValue, length: 16, third: index, fourth: mark | next)
      }
    },
    ring("packed-id", "A buffer id beyond the packed ring", .packedRing) { client, memory in
      client.ring.queue.writeDescriptor(0, address: memory.rawValue, length: 16, third: 0xFFFF, fourth: client.ring.queue.availableMark)
    },
    ring("packed-same-id", "The same buffer id many times", .packedRing) { client, memory in
      for index in (0..<16 as Range<UInt16>).reversed() {
        client.ring.queue.writeDescriptor(index, address: memory.rawValue, length: 16, third: 3, fourth: client.ring.queue.availableMark)
      }
    },
    ring("packed-flags", "All flags of a packed descriptor", .packedRing) { client, memory in
      client.ring.queue.writeDescriptor(0, address: memory.rawValue, length: 16, third: 0, fourth: 0x7FFF)
    },
    ring("packed-indirect-next", "A packed descriptor that is indirect and goes on", [.packedRing, .indirectDescriptors]) {
      client, memory in
      client.ring.queue.writeDescriptor(1, address: memory.rawValue, length: 32, third: 0, fourth: client.ring.queue.availableMark)
      client.ring.queue.writeDescriptor(
        0, address: memory.rawValue, length: 32, third: 0, fourth: client.ring.queue.availableMark | indirect | next)
    },
    ring("packed-indirect-huge", "A packed indirect table of 4 GiB", [.packedRing, .indirectDescriptors]) { client, memory in
      client.ring.queue.writeDescriptor(
        0, address: memory.rawValue, length: 0xFFFF_FFF0, third: 0, fourth: client.ring.queue.availableMark | indirect)
    },
    ring("packed-outside", "A packed descriptor outside the memory", .packedRing) { client, _ in
      client.ring.queue.writeDescriptor(0, address: 1 << 45, length: 4096, third: 0, fourth: client.ring.queue.availableMark | write)
    },
  ]

  // MARK: Memory that changes while it is looked at

  private static let races: [FaultCase] = [
    race("race-length", "Lengths and addresses rewritten while requests are processed", .descriptors),
    race("race-header", "Request headers rewritten while requests are processed", .header),
    race("race-index", "The available index rewritten while the ring is processed", .index),
  ]

  private enum Prey { case descriptors, header, index }

  private static func race(_ id: String, _ sentence: String, _ prey: Prey) -> FaultCase {
    ring(id, sentence) { client, memory in
      let layout = client.ring.queue.configuration
      let address: GuestAddress
      let count: Int
      switch prey {
      case .descriptors: (address, count) = (layout.descriptors, 48)
      case .header: (address, count) = (memory, 16)
      case .index: (address, count) = (GuestAddress(layout.driver.rawValue + 2), 2)
      }
      client.ring.queue.writeDescriptor(0, address: memory.rawValue, length: 16, third: next, fourth: 1)
      client.ring.queue.writeDescriptor(1, address: memory.rawValue + 4096, length: 512, third: next | write, fourth: 2)
      client.ring.queue.writeDescriptor(2, address: memory.rawValue + 32, length: 1, third: write, fourth: 0)
      let good = client.arena.memory.bytes(at: address, count: count) ?? []
      let isOver = Flag()
      let guest = client.arena.memory
      let thread = try HostThread.start(name: "rewriter") {
        var random: UInt64 = 88_172_645_463_325_252
        var bad = good
        while !isOver.isRaised {
          random ^= random << 13
          random ^= random >> 7
          random ^= random << 17
          bad = good
          bad[Int(random % UInt64(count))] = UInt8(truncatingIfNeeded: random >> 32)
          _ = guest.copyIn(bad, at: address)
          _ = guest.copyIn(good, at: address)
        }
      }
      let end = MonotonicTime.now.advanced(by: .milliseconds(250))
      while MonotonicTime.now < end {
        if prey == .index { client.ring.kick.signal() } else { client.ring.queue.publishHead(0) }
        client.ring.kick.signal()
        usleep(20)
      }
      isOver.raise()
      thread.join()
    }
  }

  final class Flag: Sendable {
    private let value = Atomic<Bool>(false)
    var isRaised: Bool { value.load(ordering: .relaxed) }
    func raise() { value.store(true, ordering: .relaxed) }
  }
}
