import CLinux
import Glibc
import HostSystem
import VMMemory
import VhostUser
import VirtioQueue
import VirtioSpec

/// Rings of both layouts, whatever the device: each case does the device's smallest request.
enum RingCases {
  static let all: [CheckCase] = flavours.flatMap(cases) + shapes + states + memory

  /// The combinations of ring features that change how a ring is used.
  private struct Flavour: Sendable {
    let name: String
    let features: FeatureSet
    var isIndirect = false
  }

  private static let flavours: [Flavour] = [
    Flavour(name: "split", features: []), Flavour(name: "split-event-idx", features: .eventIndex),
    Flavour(name: "split-indirect", features: [.indirectDescriptors], isIndirect: true),
    Flavour(name: "packed", features: .packedRing), Flavour(name: "packed-event-idx", features: [.packedRing, .eventIndex]),
    Flavour(name: "packed-indirect", features: [.packedRing, .indirectDescriptors], isIndirect: true),
  ]

  private static func cases(_ flavour: Flavour) -> [CheckCase] {
    let section = flavour.features.contains(.packedRing) ? "virtio 1.4, 2.8" : "virtio 1.4, 2.7"
    let shape = RingClient.Shape(name: flavour.name, isIndirect: flavour.isIndirect)
    return [
      CheckCase("ring.\(flavour.name).request", "A request through a ring of this kind is completed", section) { context in
        try context.needs(flavour.features)
        try context.client(RingClient.Setup(features: flavour.features)).ping(shape: shape)
      },
      CheckCase("ring.\(flavour.name).wrap", "Requests go on when the ring, and the 16-bit index, begin anew", section) { context in
        try context.needs(flavour.features)
        let client = try context.client(RingClient.Setup(features: flavour.features, ringSize: 4))
        // Four entries wrap at once; the index needs 65536 requests, which only a quick device does in time.
        let end = MonotonicTime.now.advanced(by: context.endurance)
        var count = 0
        while count < 40 || (count < 66_000 && MonotonicTime.now < end) {
          try client.ping(shape: shape)
          count += 1
        }
      },
      CheckCase("ring.\(flavour.name).call", "A completion is signalled when the driver asks for it", section) { context in
        try context.needs(flavour.features)
        let client = try context.client(RingClient.Setup(features: flavour.features))
        guard let ping = RingClient.ping(client.device) else { return }
        for _ in 0..<3 {
          client.ring.call.drain()
          _ = client.ring.queue.enableCalls()
          _ = try client.offer(ping.request, answerByteCount: ping.answerByteCount, shape: shape)
          let signalled = try client.ring.call.fd.waitUntil(.readable, timeout: context.patience)
          try context.expect(signalled, "no call came")
          // A device may call without a reason: then the completion is still to come.
          guard try client.takeUsed() != nil else { throw CaseStop.fail("a call came, and nothing was used") }
        }
      },
      CheckCase("ring.\(flavour.name).no-call", "Without being asked the device may call, but goes on working", section) { context in
        try context.needs(flavour.features)
        let client = try context.client(RingClient.Setup(features: flavour.features))
        for _ in 0..<8 {
          client.ring.queue.disableCalls()
          try client.ping(shape: shape)
        }
      },
    ]
  }

  private static let shapes: [CheckCase] = [
    shape(
      "layout.bytes", "A request may be cut into descriptors of one byte",
      RingClient.Shape(name: "single bytes", readable: [Int](repeating: 1, count: 20), writable: [1, 1, 1])),
    shape("layout.odd", "A request may be cut anywhere", RingClient.Shape(name: "odd pieces", readable: [7, 3], writable: [509, 2])),
    shape(
      "layout.indirect-bytes", "An indirect table may hold pieces of one byte",
      RingClient.Shape(name: "indirect single bytes", readable: [Int](repeating: 1, count: 15), writable: [1, 100], isIndirect: true)),
  ]

  private static func shape(_ id: String, _ sentence: String, _ shape: RingClient.Shape) -> CheckCase {
    CheckCase(id, sentence, "virtio 1.4, 2.7.4 (message framing)") { context in
      if shape.isIndirect { try context.needs(.indirectDescriptors) }
      let client = try context.client(RingClient.Setup(features: shape.isIndirect ? .indirectDescriptors : []))
      try client.ping(shape: shape)
      try client.ping()
    }
  }

  private static let states: [CheckCase] = [
    CheckCase(
      "start.waiting", "Requests that lie in the ring before it starts are done, by one kick at the latest", "vhost-user, ring states"
    ) { context in
      let client = try context.client(RingClient.Setup(starts: false))
      guard let ping = RingClient.ping(client.device) else { return }
      _ = try client.offer(ping.request, answerByteCount: ping.answerByteCount, kick: false)
      try client.start()
      if try client.takeUsed(within: .milliseconds(100)) != nil { return }
      client.ring.kick.signal()
      guard try client.takeUsed() != nil else { throw CaseStop.fail("the request was not done") }
    },
    CheckCase("enable.off", "A ring that is not enabled is not processed, and is once it is enabled", "vhost-user, ring states") {
      context in
      guard context.offer.hasProtocolFeatures else { throw CaseStop.notOffered("PROTOCOL_FEATURES") }
      // Network cards consume and drop what a disabled ring sends.
      if context.device == .net { throw CaseStop.notApplicable("a network card may drop instead") }
      let client = try context.client()
      try client.link.enable(client.ring.index, false)
      try context.expect(try client.tryPing(within: .milliseconds(150)) == nil, "a request of a disabled ring was completed")
      try client.link.enable(client.ring.index, true)
      client.ring.kick.signal()
      try context.expect(try client.takeUsed() != nil, "it was not completed after the ring was enabled")
    },
    CheckCase("enable.implicit", "Without PROTOCOL_FEATURES in SET_FEATURES rings are enabled from the start", "vhost-user, ring states") {
      context in
      guard RingClient.ping(context.device) != nil else { throw CaseStop.notApplicable("the probe knows no request for this device") }
      let client = try RingClient(
        context.target, context.device, RingClient.Setup(starts: false, protocolFeatures: []), trace: context.trace)
      client.link.offer.features.remove(.vhostUserProtocolFeatures)
      try client.link.accept(client.features)
      try client.start()
      try client.ping()
    },
    CheckCase("stop.base", "GET_VRING_BASE answers with the index after the requests that were done", "vhost-user, GET_VRING_BASE") {
      context in
      let client = try context.client()
      for _ in 0..<5 { try client.ping() }
      let base = try client.link.stop(client.ring.index)
      try context.expect(base == 5, "base \(base) after 5 requests")
    },
    CheckCase(
      "stop.packed-base", "GET_VRING_BASE of a packed ring answers with both indices and wrap counters", "vhost-user, GET_VRING_BASE"
    ) { context in
      try context.needs(.packedRing)
      let client = try context.client(RingClient.Setup(features: [.packedRing, .indirectDescriptors], ringSize: 4))
      try context.needs(.indirectDescriptors)
      for _ in 0..<5 { try client.ping(shape: RingClient.Shape(name: "indirect", isIndirect: true)) }
      let base = try client.link.stop(client.ring.index)
      let expected = VringBase(availableSlot: 1, availableWrap: false, usedSlot: 1, usedWrap: false).rawValue
      try context.expect(
        base == expected, "base 0x\(String(base, radix: 16)) instead of 0x\(String(expected, radix: 16)) after 5 descriptors in a ring of 4"
      )
    },
    CheckCase("stop.stops", "After GET_VRING_BASE the ring is not processed", "vhost-user, ring states") { context in
      let client = try context.client()
      try client.ping()
      _ = try client.link.stop(client.ring.index)
      try context.expect(try client.tryPing(within: .milliseconds(150)) == nil, "a request of a stopped ring was completed")
    },
    CheckCase(
      "stop.at-rest", "What was taken from a ring is finished before GET_VRING_BASE is answered, and nothing after it",
      "vhost-user, GET_VRING_BASE"
    ) { context in
      let client = try context.client()
      let isLarge = context.device == .block && context.block.capacity * 512 >= 32768
      for _ in 0..<16 {
        // Something that takes a moment, where there is such a thing.
        if isLarge {
          _ = try client.offer(BlockWire.header(.read, 0), answerByteCount: 32769, kick: false)
        } else {
          _ = try client.offerPing(kick: false)
        }
      }
      client.ring.kick.signal()
      let base = try client.link.stop(client.ring.index)
      func finished() throws -> Int {
        var count = 0
        while try client.takeUsed(within: .zero) != nil { count += 1 }
        return count
      }
      let before = try finished()
      usleep(250_000)
      let after = try finished()
      try context.expect(
        after == 0 && Int(base) == before,
        "base \(base) with \(before) requests finished; \(after) were finished after the answer")
    },
    CheckCase("stop.resume", "A stopped ring goes on at the base it was stopped at", "vhost-user, GET_VRING_BASE") { context in
      let client = try context.client()
      for _ in 0..<3 { try client.ping() }
      let base = try client.link.stop(client.ring.index)
      _ = try client.tryPing(within: .milliseconds(20))
      try client.link.start(client.ring, base: base)
      client.ring.kick.signal()
      guard let used = try client.takeUsed() else { throw CaseStop.fail("the request made while it was stopped was not done") }
      _ = used
      try client.ping()
    },
    CheckCase("stop.twice", "GET_VRING_BASE of a stopped ring answers the same again", "vhost-user, GET_VRING_BASE") { context in
      let client = try context.client()
      for _ in 0..<3 { try client.ping() }
      let first = try client.link.stop(client.ring.index)
      let second = try client.link.stop(client.ring.index)
      try context.expect(first == second, "\(first), then \(second)")
    },
    CheckCase("call.replace", "A new call descriptor is used, and the old one is not", "vhost-user, SET_VRING_CALL") { context in
      let client = try context.client()
      let other = try EventFD()
      try client.link.send(
        .setVringCall(VringEvent(index: UInt8(client.ring.index), carriesDescriptor: true)), descriptors: [other.fd.rawValue])
      client.ring.call.drain()
      other.drain()
      _ = client.ring.queue.enableCalls()
      guard let ping = RingClient.ping(client.device) else { return }
      _ = try client.offer(ping.request, answerByteCount: ping.answerByteCount)
      try context.expect(try other.fd.waitUntil(.readable, timeout: context.patience), "the new descriptor was not signalled")
      try context.expect(!client.ring.call.isSignalledNow(), "the old descriptor was signalled")
    },
    CheckCase("kick.replace", "A new kick descriptor is listened to", "vhost-user, SET_VRING_KICK") { context in
      let client = try context.client()
      try client.ping()
      let other = try EventFD()
      try client.link.send(
        .setVringKick(VringEvent(index: UInt8(client.ring.index), carriesDescriptor: true)), descriptors: [other.fd.rawValue])
      usleep(20_000)
      guard let ping = RingClient.ping(client.device) else { return }
      _ = try client.offer(ping.request, answerByteCount: ping.answerByteCount, kick: false)
      other.signal()
      try context.expect(try client.takeUsed() != nil, "a kick through it had no effect")
    },
    CheckCase("kick.spurious", "Kicks without requests are harmless", "virtio 1.4, 2.7.13") { context in
      let client = try context.client()
      for _ in 0..<50 { client.ring.kick.signal() }
      usleep(5_000)
      try client.ping()
    },
    CheckCase("queues.last", "The last queue of the device can be used", "vhost-user, multiple queue support") { context in
      guard context.device == .block else { throw CaseStop.notApplicable("queues of this device have different tasks") }
      try context.needs(.mq)
      let last = Int(clamping: (context.offer.queueCount ?? 1) - 1)
      guard last > 0 else { throw CaseStop.notApplicable("there is one queue") }
      guard last < 256 else { throw CaseStop.notApplicable("its index does not fit a message") }
      try context.client(RingClient.Setup(queue: last)).ping()
    },
  ]

  private static let memory: [CheckCase] = [
    CheckCase("memory.regions", "A table of 8 regions is taken, and all of them are reached", "vhost-user, SET_MEM_TABLE") { context in
      try context.client(RingClient.Setup(regionCount: 8)).ping()
    },
    CheckCase("memory.high", "Guest memory above 4 GiB is reached", "vhost-user, memory region description") { context in
      try context.client(RingClient.Setup(guestStart: 5 << 30)).ping()
    },
    CheckCase("memory.replace", "The memory table can be replaced while the ring stands still", "vhost-user, SET_MEM_TABLE") { context in
      let client = try context.client()
      try client.ping()
      let base = try client.link.stop(client.ring.index)
      try client.link.share(client.arena)
      try client.link.start(client.ring, base: base)
      try client.ping()
    },
    CheckCase("memory.replace-running", "The memory table can be replaced while the ring runs", "vhost-user, SET_MEM_TABLE") { context in
      let client = try context.client()
      try client.ping()
      for _ in 0..<3 {
        try client.link.share(client.arena)
        try client.ping()
      }
    },
    CheckCase("memory.add-remove", "A region can be added, used, removed, and added again", "vhost-user, ADD_MEM_REG, REM_MEM_REG") {
      context in
      try context.needs(.configureMemSlots)
      guard context.device == .block else { throw CaseStop.notApplicable("it needs a disk") }
      try context.needsRoom(4096)
      let client = try context.client()
      let extra = try Arena(byteCount: 1 << 20, guestStart: 1 << 36)
      let description = RegionDescription(
        guestAddress: 1 << 36, size: extra.descriptions[0].size, userAddress: Arena.userBase + 1 << 36, mapOffset: 0)
      for _ in 0..<3 {
        try client.link.send(.addMemReg(SingleRegion(description)), descriptors: extra.descriptors)
        let status = try read(client, into: GuestAddress(1 << 36))
        try context.expect(status == 0, "a read into the added region ends with status \(status)")
        try client.link.send(.remMemReg(SingleRegion(description)))
      }
    },
    CheckCase("memory.remove-unknown", "Removing a region that is not there is refused", "vhost-user, REM_MEM_REG") { context in
      try context.needs([.configureMemSlots, .replyAck])
      var link = try context.negotiated()
      let region = RegionDescription(guestAddress: 1 << 40, size: 1 << 20, userAddress: 1 << 41, mapOffset: 0)
      try context.expect(try link.refusal(.remMemReg(SingleRegion(region))) != nil, "it was accepted")
    },
    CheckCase("log.pages", "With LOG_ALL every page that is written is marked in the log, and no page far away", "vhost-user, migration") {
      context in
      try context.needs([.logShmFD, .replyAck])
      try context.needs(.vhostLogAll)
      guard context.device == .block else { throw CaseStop.notApplicable("it needs a disk") }
      let client = try context.client()
      let log = try SharedMemory.sealed(name: "probe-log", byteCount: 65536)
      let map = try MemoryMapping.shared(log, offset: 0, byteCount: 65536)
      try client.link.send(.setLogBase(LogDescription(size: 65536, mapOffset: 0)), descriptors: [log.rawValue])
      let bit30: FeatureSet = context.offer.hasProtocolFeatures ? .vhostUserProtocolFeatures : []
      try client.link.send(.setFeatures(client.features.union(.vhostLogAll).union(bit30)))
      let target = try client.arena.allocate(8192, alignment: 4096)
      let status = try read(client, into: target)
      try context.expect(status == 0, "the read ends with status \(status)")
      let page = Int(target.rawValue / 4096)
      try context.expect(map.byte(at: page / 8) >> UInt8(page % 8) & 1 == 1, "page \(page), which was written, is not marked")
      try context.expect(map.byte(at: 60_000) == 0, "a page beyond the memory is marked")
    },
    CheckCase("inflight.clear", "When nothing is in flight, the area says so", "vhost-user, inflight I/O tracking") { context in
      try context.needs(.inflightShmFD)
      let client = try context.client(RingClient.Setup(starts: false))
      let index = UInt16(client.ring.index)
      try client.link.send(.setVringNum(VringState(index: UInt32(index), number: 64)))
      var answered = try client.link.perform(.getInflightFD(InflightDescription(queueCount: index + 1, queueSize: 64)))
      guard case .inflight(let area) = answered.reply, let fd = answered.descriptors.takeFirst() else {
        throw CaseStop.fail("no area was given")
      }
      try client.link.send(.setInflightFD(area), descriptors: [fd.rawValue])
      try client.start()
      for _ in 0..<7 { try client.ping() }
      let map = try MemoryMapping.shared(fd, offset: 0, byteCount: Int(area.mapOffset + area.size))
      let stride = Int(area.size) / Int(index + 1)
      let start = Int(area.mapOffset) + stride * Int(index)
      let header = map.bytes(start..<start + 16)
      try context.expect(header.number(at: 8, 2) == 1, "version \(header.number(at: 8, 2)) instead of 1: \(header.hexText())")
      try context.expect(header.number(at: 10, 2) == 64, "\(header.number(at: 10, 2)) entries instead of 64: \(header.hexText())")
      try context.soon {
        for entry in 0..<64 where start + 32 + 16 * entry <= map.byteCount {
          try context.expect(map.byte(at: start + 16 + 16 * entry) == 0, "entry \(entry) is marked though nothing is in flight")
        }
        let used = map.bytes(start + 14..<start + 16).number(at: 0, 2)
        try context.expect(used == 7, "used_idx is \(used) after 7 requests")
      }
    },
  ]

  /// A read of sector 0 into guest memory of the caller's choice; the status.
  private static func read(_ client: RingClient, into address: GuestAddress) throws -> UInt8 {
    let header = try client.arena.allocate(64)
    guard client.arena.memory.copyIn(BlockWire.header(.read, 0) + [0xFF], at: header) else { return 0xFF }
    let buffers = [
      DriverBuffer(header, 16, isDeviceWritable: false), DriverBuffer(address, 4096, isDeviceWritable: true),
      DriverBuffer(GuestAddress(header.rawValue + 16), 1, isDeviceWritable: true),
    ]
    guard client.ring.queue.add(buffers.span) != nil else { throw CaseStop.fail("the probe's ring is full") }
    if client.ring.queue.publish() { client.ring.kick.signal() }
    guard try client.takeUsed() != nil else { throw CaseStop.fail("the read was not completed") }
    return client.arena.memory.bytes(at: GuestAddress(header.rawValue + 16), count: 1)?.first ?? 0xFF
  }
}
