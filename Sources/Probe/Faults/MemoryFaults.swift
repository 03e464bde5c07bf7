import CLinux
import Glibc
import HostSystem
import VMMemory
import VhostUser
import VirtioQueue
import VirtioSpec

/// Memory tables and ring places that cannot be.
enum MemoryFaults {
  static let all: [FaultCase] = tables + places + order

  private static func region(_ guest: UInt64, _ size: UInt64, _ user: UInt64 = Arena.userBase, _ offset: UInt64 = 0) -> RegionDescription {
    RegionDescription(guestAddress: guest, size: size, userAddress: user, mapOffset: offset)
  }

  private static func table(
    _ id: String, _ sentence: String, _ regions: [RegionDescription], descriptorCount: Int? = nil, file: UInt64 = 1 << 20
  ) -> FaultCase {
    FaultCase("memory.\(id)", sentence) { context in
      var link = try context.negotiated()
      let fd = try SharedMemory.sealed(name: "probe-fault", byteCount: file)
      try link.tell(
        .setMemTable(RegionTable(regions: regions)), descriptors: [CInt](repeating: fd.rawValue, count: descriptorCount ?? regions.count),
        needsReply: link.hasAcknowledgements)
      try MessageFaults.barrier(&link)
      try startAnyway(&link)
    }
  }

  /// Goes on as if the table had been taken.
  private static func startAnyway(_ link: inout Link) throws(ProbeError) {
    let event = try wrapping { () throws(SystemError) in try EventFD() }
    link.frontEnd.timeout = .milliseconds(50)
    try link.tell(.setVringNum(VringState(index: 0, number: 16)))
    try link.tell(.setVringBase(VringState(index: 0, number: 0)))
    try link.tell(
      .setVringAddr(
        VringAddress(index: 0, descriptorTable: Arena.userBase, availableRing: Arena.userBase + 0x1000, usedRing: Arena.userBase + 0x2000)))
    try link.tell(.setVringCall(VringEvent(index: 0, carriesDescriptor: true)), descriptors: [event.fd.rawValue])
    try link.tell(.setVringKick(VringEvent(index: 0, carriesDescriptor: true)), descriptors: [event.fd.rawValue])
    try link.tell(.setVringEnable(VringState(index: 0, number: 1)))
    event.signal()
    try MessageFaults.barrier(&link)
  }

  private static func descriptor(_ id: String, _ sentence: String, _ make: @escaping @Sendable () throws -> OwnedFD) -> FaultCase {
    FaultCase("memory.\(id)", sentence) { context in
      var link = try context.negotiated()
      let fd = try make()
      try link.tell(
        .setMemTable(RegionTable(regions: [region(0, 1 << 20)])), descriptors: [fd.rawValue], needsReply: link.hasAcknowledgements)
      try MessageFaults.barrier(&link)
      try startAnyway(&link)
    }
  }

  private static let tables: [FaultCase] = [
    table("wraps", "A region beyond the end of the guest's address space", [region(.max - 0xFFF, 1 << 20)]),
    table("user-wraps", "A region beyond the end of the front end's address space", [region(0, 1 << 20, .max - 0xFFF)]),
    table("offset-wraps", "A region whose file offset wraps around", [region(0, 1 << 20, Arena.userBase, .max - 0xFFF)]),
    table("empty", "A region of no bytes", [region(0, 0)]),
    table("huge", "A region of 2^60 bytes", [region(0, 1 << 60)]),
    table("overlap", "Two regions that overlap", [region(0, 1 << 20), region(1 << 19, 1 << 20, Arena.userBase + 1 << 20)]),
    table("beyond-file", "A region larger than its file", [region(0, 1 << 20)], file: 4096),
    table("offset-beyond-file", "A region behind the end of its file", [region(0, 1 << 20, Arena.userBase, 1 << 30)], file: 1 << 20),
    table("odd-offset", "A region at an odd offset", [region(0, 1 << 16, Arena.userBase, 0x123)]),
    table("odd-address", "A region at an odd address", [region(0x123, 1 << 16, Arena.userBase + 0x77)]),
    table("no-descriptor", "Regions without descriptors", [region(0, 1 << 20)], descriptorCount: 0),
    table(
      "few-descriptors", "More regions than descriptors", [region(0, 1 << 19), region(1 << 20, 1 << 19, Arena.userBase + 1 << 20)],
      descriptorCount: 1),
    table("many-descriptors", "More descriptors than regions", [region(0, 1 << 20)], descriptorCount: 5),
    table(
      "nine", "Nine regions", (0..<9).map { region(UInt64($0) << 20, 4096, Arena.userBase + UInt64($0) << 20) }),
    table(
      "sixty", "Sixty regions", (0..<60).map { region(UInt64($0) << 20, 4096, Arena.userBase + UInt64($0) << 20) }),
    FaultCase("memory.count", "A table that announces 4 billion regions") { context in
      var link = try context.negotiated()
      let payload = [UInt8](repeating: 0xFF, count: 4) + [0, 0, 0, 0] + [UInt8](repeating: 0, count: 32)
      try link.tell(MessageHeader(request: 5, flags: .version1, size: 40), payload)
      try MessageFaults.barrier(&link)
    },
    descriptor("eventfd", "An eventfd as memory") { try EventFD().fd.duplicate() },
    descriptor("socket", "A socket as memory") { try UnixSocket.pair(.stream).split { (a, _) in a } },
    descriptor("directory", "A directory as memory") { try OwnedFD.open("/", O_RDONLY) },
    descriptor("null", "/dev/null as memory") { try OwnedFD.open("/dev/null", O_RDWR) },
    descriptor("read-only", "A read-only file as memory") { try OwnedFD.open("/proc/self/exe", O_RDONLY) },
    FaultCase("memory.truncated", "Memory that is cut off while the ring runs") { context in
      let client = try cuttable(context)
      try client.ping()
      // Without seals this works, and whoever touches the pages next gets SIGBUS.
      guard ftruncate(client.arena.fd.rawValue, 0) == 0 else { throw NotPossible(why: "the memory cannot be cut") }
      client.ring.kick.signal()
      try MessageFaults.barrier(&client.link)
    },
    FaultCase("memory.taken", "The table is replaced by another one under a running ring") { context in
      let client = try context.client()
      let other = try Arena(byteCount: 1 << 20, guestStart: 1 << 40)
      try client.link.tell(.setMemTable(RegionTable(regions: other.descriptions)), descriptors: other.descriptors)
      client.ring.kick.signal()
      _ = try? client.tryPing(within: .milliseconds(30))
      try MessageFaults.barrier(&client.link)
    },
    FaultCase("memory.removed", "The region that holds the running ring is removed") { context in
      guard context.offer.protocolFeatures.contains(.configureMemSlots) else {
        throw NotPossible(why: "CONFIGURE_MEM_SLOTS is not offered")
      }
      let client = try context.client()
      try client.link.tell(.remMemReg(SingleRegion(client.arena.descriptions[0])))
      client.ring.kick.signal()
      _ = try? client.tryPing(within: .milliseconds(30))
      try MessageFaults.barrier(&client.link)
    },
    FaultCase("memory.add-many", "Regions added until the back end says no, and beyond") { context in
      guard context.offer.protocolFeatures.contains(.configureMemSlots) else {
        throw NotPossible(why: "CONFIGURE_MEM_SLOTS is not offered")
      }
      var link = try context.negotiated()
      let fd = try SharedMemory.sealed(name: "probe-fault", byteCount: 4096)
      let count = min(600, (context.offer.memorySlots ?? 8) + 8)
      for index in 0..<count {
        let piece = region(index << 20, 4096, Arena.userBase + index << 20)
        if try link.refusal(.addMemReg(SingleRegion(piece)), descriptors: [fd.rawValue]) != nil { break }
      }
    },
  ]

  /// Memory without seals, so that it can be cut off.
  private static func cuttable(_ context: FaultContext) throws -> RingClient {
    guard RingClient.ping(context.device) != nil else { throw NotPossible(why: "no request is known") }
    return try RingClient(context.target, context.device, RingClient.Setup(ringSize: 16, isSealed: false), trace: context.trace)
  }

  // MARK: Ring places

  private static func place(_ id: String, _ sentence: String, _ change: @escaping @Sendable (inout VringAddress) -> Void) -> FaultCase {
    FaultCase("place.\(id)", sentence) { context in
      var link = try context.negotiated()
      let arena = try Arena(byteCount: 1 << 20)
      let ring = try ProbeRing(0, size: 256, features: .version1, arena: arena)
      try link.share(arena)
      var address = try ring.address()
      change(&address)
      link.frontEnd.timeout = .milliseconds(100)
      try link.send(.setVringNum(VringState(index: 0, number: 256)))
      try link.send(.setVringBase(VringState(index: 0, number: 0)))
      let event = VringEvent(index: 0, carriesDescriptor: true)
      let first = try link.refusal(.setVringAddr(address))
      _ = try link.refusal(.setVringCall(event), descriptors: [ring.call.fd.rawValue])
      let second = try link.refusal(.setVringKick(event), descriptors: [ring.kick.fd.rawValue])
      _ = try? link.enable(0, true)
      ring.kick.signal()
      usleep(5000)
      try MessageFaults.barrier(&link)
      if let why = first ?? second { throw ProbeError.protocolError("set", .peerRefused(request: why, code: 22)) }
    }
  }

  private static let places: [FaultCase] = [
    place("descriptors-outside", "A descriptor table outside the memory") { $0.descriptorTable = 0x1000 },
    place("available-outside", "An available ring outside the memory") { $0.availableRing = 0x1000 },
    place("used-outside", "A used ring outside the memory") { $0.usedRing = 0x1000 },
    place("descriptors-end", "A descriptor table across the end of the memory") { $0.descriptorTable = Arena.userBase + (1 << 20) - 64 },
    place("available-end", "An available ring across the end of the memory") { $0.availableRing = Arena.userBase + (1 << 20) - 64 },
    place("used-end", "A used ring across the end of the memory") { $0.usedRing = Arena.userBase + (1 << 20) - 64 },
    place("descriptors-top", "A descriptor table at the top of the address space") { $0.descriptorTable = .max - 15 },
    place("used-top", "A used ring at the top of the address space") { $0.usedRing = .max - 3 },
    place("descriptors-odd", "A descriptor table at an odd address") { $0.descriptorTable += 1 },
    place("available-odd", "An available ring at an odd address") { $0.availableRing += 1 },
    place("used-odd", "A used ring at an odd address") { $0.usedRing += 1 },
    place("zero", "A ring at address zero") {
      $0.descriptorTable = 0
      $0.availableRing = 0
      $0.usedRing = 0
    },
    place("flags", "Ring address flags that do not exist") { $0.flags = 0xFFFF_FFFE },
    place("log", "A log address at the top of the address space") {
      $0.flags = 1
      $0.log = .max - 8
    },
    place("one", "All three areas at the same place") {
      $0.availableRing = $0.descriptorTable
      $0.usedRing = $0.descriptorTable
    },
  ]

  // MARK: Wrong order

  private static func sequence(
    _ id: String, _ sentence: String, _ body: @escaping @Sendable (inout Link, borrowing ProbeRing, Arena) throws -> Void
  ) -> FaultCase {
    FaultCase("order.\(id)", sentence) { context in
      var link = try context.negotiated()
      let arena = try Arena(byteCount: 1 << 20)
      let ring = try ProbeRing(0, size: 64, features: .version1, arena: arena)
      link.frontEnd.timeout = .milliseconds(200)
      try body(&link, ring, arena)
      ring.kick.signal()
      usleep(3000)
      try MessageFaults.barrier(&link)
    }
  }

  private static let event = VringEvent(index: 0, carriesDescriptor: true)

  private static let order: [FaultCase] = [
    sequence("kick-first", "A ring is kicked to life before anything is known of it") { link, ring, _ in
      try link.tell(.setVringKick(event), descriptors: [ring.kick.fd.rawValue])
      try link.tell(.setVringEnable(VringState(index: 0, number: 1)))
    },
    sequence("no-memory", "A ring is started without memory") { link, ring, _ in try link.start(ring) },
    sequence("no-size", "A ring is started without a size") { link, ring, arena in
      try link.share(arena)
      try link.tell(.setVringAddr(try ring.address()))
      try link.tell(.setVringKick(event), descriptors: [ring.kick.fd.rawValue])
      try link.tell(.setVringEnable(VringState(index: 0, number: 1)))
    },
    sequence("no-address", "A ring is started without a place") { link, ring, arena in
      try link.share(arena)
      try link.tell(.setVringNum(VringState(index: 0, number: 64)))
      try link.tell(.setVringKick(event), descriptors: [ring.kick.fd.rawValue])
      try link.tell(.setVringEnable(VringState(index: 0, number: 1)))
    },
    sequence("base-huge", "A base that no ring has") { link, ring, arena in
      try link.share(arena)
      try link.start(ring, base: 0xFFFF_FFFF)
    },
    sequence("base-far", "A base far from the used index") { link, ring, arena in
      try link.share(arena)
      try link.start(ring, base: 40_000)
    },
    sequence("size-running", "The size changes while the ring runs") { link, ring, arena in
      try link.share(arena)
      try link.start(ring)
      try link.tell(.setVringNum(VringState(index: 0, number: 32768)))
    },
    sequence("features-running", "Features change while the ring runs") { link, ring, arena in
      try link.share(arena)
      try link.start(ring)
      try link.tell(.setFeatures([.version1, .packedRing, .vhostUserProtocolFeatures]))
    },
    sequence("address-running", "The place changes while the ring runs") { link, ring, arena in
      try link.share(arena)
      try link.start(ring)
      var address = try ring.address()
      address.descriptorTable += 0x8000
      try link.tell(.setVringAddr(address))
    },
    sequence("owner-twice", "SET_OWNER again and again") { link, _, _ in for _ in 0..<10 { try link.tell(.setOwner) } },
    sequence("reset-running", "RESET_OWNER and RESET_DEVICE while the ring runs") { link, ring, arena in
      try link.share(arena)
      try link.start(ring)
      try link.tell(.resetOwner)
      try link.tell(.resetDevice)
    },
    sequence("inflight-garbage", "An inflight area of random bytes") { link, ring, arena in
      try link.share(arena)
      let fd = try SharedMemory.sealed(name: "probe-inflight", byteCount: 65536)
      let map = try MemoryMapping.shared(fd, offset: 0, byteCount: 65536)
      // SAFETY: the mapping has 65536 bytes.
      for index in 0..<65536 {
        unsafe map.baseAddress.storeBytes(of: UInt8(truncatingIfNeeded: index &* 2654435761 >> 7), toByteOffset: index, as: UInt8.self)
      }
      try link.tell(
        .setInflightFD(InflightDescription(size: 65536, mapOffset: 0, queueCount: 1, queueSize: 64)), descriptors: [fd.rawValue])
      try link.start(ring)
    },
    sequence("inflight-small", "An inflight area too small for its queues") { link, ring, arena in
      try link.share(arena)
      let fd = try SharedMemory.sealed(name: "probe-inflight", byteCount: 64)
      try link.tell(
        .setInflightFD(InflightDescription(size: 64, mapOffset: 0, queueCount: 0xFFFF, queueSize: 0xFFFF)), descriptors: [fd.rawValue])
      try link.start(ring)
    },
    sequence("inflight-absurd", "An inflight area for 65535 queues of 65535") { link, _, _ in
      try link.tell(.getInflightFD(InflightDescription(queueCount: 0xFFFF, queueSize: 0xFFFF)))
    },
    sequence("log-small", "A log too small for the memory, with LOG_ALL") { link, ring, arena in
      try link.share(arena)
      let fd = try SharedMemory.sealed(name: "probe-log", byteCount: 4096)
      try link.tell(.setLogBase(LogDescription(size: 1, mapOffset: 0)), descriptors: [fd.rawValue])
      try link.tell(.setFeatures([.version1, .vhostLogAll, .vhostUserProtocolFeatures]))
      try link.start(ring)
    },
    sequence("log-beyond", "A log that lies beyond its file") { link, _, _ in
      let fd = try SharedMemory.sealed(name: "probe-log", byteCount: 4096)
      try link.tell(.setLogBase(LogDescription(size: 1 << 20, mapOffset: 1 << 30)), descriptors: [fd.rawValue])
    },
  ]
}
