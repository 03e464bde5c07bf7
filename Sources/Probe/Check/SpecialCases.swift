import Glibc
import HostSystem
import VMMemory
import VhostUser
import VirtioQueue
import VirtioSpec

/// Messages that few back ends offer, and the inflight area byte by byte.
enum SpecialCases {
  static let all: [CheckCase] = messages + inflight + configuration

  private static let messages: [CheckCase] = [
    CheckCase("rarp.accepted", "SEND_RARP is done", "vhost-user, SEND_RARP") { context in
      try context.needs(.rarp)
      var link = try context.negotiated(Link.wanted.union(.rarp))
      try link.send(.sendRARP(0x0100_0000_0002))
    },
    CheckCase("mtu.accepted", "NET_SET_MTU of 1500 is done", "vhost-user, NET_SET_MTU") { context in
      try context.needs(ProtocolFeatures.netMTU)
      var link = try context.negotiated(Link.wanted.union(.netMTU))
      try link.accept(context.offer.features.intersection([.version1, .netMTU]))
      try link.send(.netSetMTU(1500))
    },
    CheckCase("iotlb.update", "With ACCESS_PLATFORM an IOTLB entry is taken and can be taken back", "vhost-user, IOTLB") { context in
      try context.needs(.backEndRequests)
      try context.needs(.accessPlatform)
      var link = try context.negotiated(Link.wanted.union(.backEndRequests))
      let pair = try UnixSocket.pair(.stream)
      try pair.split { (_, theirs) throws in try link.send(.setBackEndRequestFD, descriptors: [theirs.rawValue]) }
      try link.accept(context.offer.features.intersection([.version1, .accessPlatform]))
      let arena = try Arena(byteCount: 1 << 20)
      try link.share(arena)
      for kind in [IOTLBMessage.Kind.update, .invalidate] {
        try link.send(.iotlb(IOTLBMessage(iova: 0, size: 1 << 20, userAddress: Arena.userBase, permission: 3, kind: kind)))
      }
    },
    CheckCase("endian.little", "SET_VRING_ENDIAN to little-endian is done", "vhost-user, SET_VRING_ENDIAN") { context in
      try context.needs(.crossEndian)
      var link = try context.negotiated(Link.wanted.union(.crossEndian))
      try link.accept(context.offer.features.intersection(.version1))
      try link.send(.setVringEndian(VringState(index: 0, number: 0)))
    },
    CheckCase("postcopy.advise", "POSTCOPY_ADVISE is answered with a descriptor", "vhost-user, POSTCOPY_ADVISE") { context in
      try context.needs(.pageFault)
      var link = try context.negotiated(Link.wanted.union(.pageFault))
      _ = try link.ask(.postcopyAdvise)
    },
    CheckCase("postcopy.end", "POSTCOPY_END is answered with 0", "vhost-user, POSTCOPY_END") { context in
      try context.needs(.pageFault)
      var link = try context.negotiated(Link.wanted.union(.pageFault))
      _ = try link.ask(.postcopyAdvise)
      let code = try link.number(.postcopyEnd)
      try context.expect(code == 0, "it is answered with \(code)")
    },
    CheckCase("shared-object.unknown", "An object that nobody has is not given", "vhost-user, GET_SHARED_OBJECT") { context in
      try context.needs(.sharedObject)
      var link = try context.negotiated(Link.wanted.union([.sharedObject, .backEndRequests, .backEndSendsFD]))
      try link.tell(.getSharedObject(SharedObjectName((1...16).map { UInt8($0) })))
      guard let answer = try link.hear() else { throw CaseStop.fail("no answer came") }
      try context.expect(answer.descriptors.isEmpty, "a descriptor came along")
      try context.expect(
        answer.payload.count != 8 || answer.payload.contains { $0 != 0 }, "the answer says that it was given: \(answer.payload.hexText())")
    },
    CheckCase(
      "shared-memory.regions", "GET_SHMEM_CONFIG is answered with as many regions as it counts, of whole pages",
      "vhost-user, GET_SHMEM_CONFIG"
    ) { context in
      try context.needs(.sharedMemory)
      var link = try context.negotiated(Link.wanted.union([.sharedMemory, .backEndRequests, .backEndSendsFD]))
      try link.tell(.getShmemConfig)
      guard let answer = try link.hear() else { throw CaseStop.fail("no answer came") }
      try context.expect(answer.payload.count == 2056, "it has \(answer.payload.count) bytes instead of 2056")
      let sizes = (0..<256).map { answer.payload.number(at: 8 + 8 * $0, 8) }
      let count = answer.payload.number(at: 0, 4)
      try context.expect(
        count == UInt64(sizes.count { $0 != 0 }), "it counts \(count) regions, and \(sizes.count { $0 != 0 }) have a size")
      try context.expect(sizes.allSatisfy { $0 % 4096 == 0 }, "a region is no multiple of 4096 bytes long")
    },
  ]

  // MARK: The inflight area

  /// A client whose ring has an area, and where that ring's part of it is.
  private struct Tracked {
    let client: RingClient
    let map: MemoryMapping
    let start: Int
    let byteCount: Int

    func header() -> [UInt8] { map.bytes(start..<start + 16) }
    func entry(_ index: Int) -> [UInt8] { map.bytes(start + 16 + 16 * index..<start + 32 + 16 * index) }
  }

  /// - Parameter starts: otherwise the area and the ring are as a predecessor left them, and the ring is not started.
  private static func tracked(_ context: CheckContext, starts: Bool = true) throws -> Tracked {
    try context.needs(.inflightShmFD)
    let client = try context.client(RingClient.Setup(starts: false))
    let index = UInt16(client.ring.index)
    try client.link.send(.setVringNum(VringState(index: UInt32(index), number: 64)))
    var answered = try client.link.perform(.getInflightFD(InflightDescription(queueCount: index + 1, queueSize: 64)))
    guard case .inflight(let area) = answered.reply, let fd = answered.descriptors.takeFirst() else {
      throw CaseStop.fail("no area was given")
    }
    let stride = Int(area.size) / Int(index + 1)
    guard stride >= 16 + 16 * 64, area.size < 1 << 30, area.mapOffset < 1 << 30 else {
      throw CaseStop.fail("an area of \(area.size) bytes does not hold 64 entries of 16 bytes and a header")
    }
    let map = try MemoryMapping.shared(fd, offset: 0, byteCount: Int(area.mapOffset + area.size))
    let start = Int(area.mapOffset) + stride * Int(index)
    var second: UInt16 = 0
    if !starts {
      // Two requests, of which the second was done.
      let first = try client.offerPing(kick: false)
      second = try client.offerPing(kick: false)
      try context.expect(first == 0, "the probe's first chain is \(first)")
      let used = client.ring.queue.configuration.device.rawValue
      guard client.arena.memory.store(UInt32(second), at: GuestAddress(used + 4)),
        client.arena.memory.store(UInt16(1), at: GuestAddress(used + 2))
      else { throw CaseStop.fail("the probe lost its ring") }
      leaveBehind(map, start, second: second)
      guard try client.takeUsed()?.head == second else { throw CaseStop.fail("the probe does not see its own used ring") }
    }
    try client.link.send(.setInflightFD(area), descriptors: [fd.rawValue])
    if starts { try client.start() }
    return Tracked(client: client, map: map, start: start, byteCount: stride)
  }

  /// The area as a back end leaves it that took two chains, gave back the second, and died with chain 0 in hand.
  private static func leaveBehind(_ map: MemoryMapping, _ start: Int, second: UInt16) {
    func store(_ value: UInt64, _ count: Int, _ offset: Int) {
      // SAFETY: the caller checked that the area holds the header and 64 entries.
      for index in 0..<count {
        unsafe map.baseAddress.storeBytes(
          of: UInt8(truncatingIfNeeded: value >> UInt64(8 * index)), toByteOffset: start + offset + index, as: UInt8.self)
      }
    }
    store(1, 2, 8)
    store(64, 2, 10)
    store(UInt64(second), 2, 12)
    store(1, 2, 14)
    store(1, 1, 16)
    store(1, 8, 24)
    store(2, 8, 24 + 16 * Int(second))
  }

  private static let inflight: [CheckCase] = [
    CheckCase(
      "inflight.header", "The area's header has version 1, the ring's size, and the used index after every request",
      "vhost-user, inflight I/O tracking"
    ) { context in
      let tracked = try tracked(context)
      for count in 1...3 {
        try tracked.client.ping()
        // The last step of a completion may come after its publication.
        usleep(5_000)
        let header = tracked.header()
        try context.expect(header.number(at: 8, 2) == 1, "version \(header.number(at: 8, 2)) instead of 1: \(header.hexText())")
        try context.expect(header.number(at: 10, 2) == 64, "\(header.number(at: 10, 2)) entries instead of 64: \(header.hexText())")
        try context.expect(
          header.number(at: 14, 2) == count, "used_idx is \(header.number(at: 14, 2)) after \(count) requests: \(header.hexText())")
      }
    },
    CheckCase(
      "inflight.counters", "Each request taken gets a counter greater than the one before", "vhost-user, inflight I/O tracking"
    ) { context in
      let tracked = try tracked(context)
      var last: UInt64 = 0
      for turn in 1...3 {
        let head = try tracked.client.offerPing()
        guard try tracked.client.takeUsed() != nil else { throw CaseStop.fail("request \(turn) was not completed") }
        usleep(5_000)
        let entry = tracked.entry(Int(head))
        let counter = entry.number(at: 8, 8)
        try context.expect(
          turn == 1 || counter > last, "request \(turn) has counter \(counter), the one before \(last): \(entry.hexText())")
        last = counter
      }
    },
    CheckCase(
      "inflight.resubmits", "A request that a predecessor had taken and not completed is done again, and once",
      "vhost-user, inflight I/O tracking"
    ) { context in
      let tracked = try tracked(context, starts: false)
      let client = tracked.client
      // The base is the used index, as front ends that know no better give it.
      try client.start(base: 1)
      client.ring.kick.signal()
      guard let used = try client.takeUsed() else { throw CaseStop.fail("the request was not completed") }
      try context.expect(used.head == 0, "chain \(used.head) was completed instead of 0")
      try context.expect(try client.takeUsed(within: .milliseconds(50)) == nil, "it was completed twice")
      usleep(5_000)
      try context.expect(tracked.entry(0)[0] == 0, "its entry is still marked: \(tracked.entry(0).hexText())")
      try client.ping()
    },
  ]

  // MARK: Configuration by device

  private static func device(
    _ device: DeviceID, _ id: String, _ sentence: String, _ section: String, _ feature: FeatureSet,
    _ body: @escaping @Sendable (CheckContext, [UInt8]) throws -> Void
  ) -> CheckCase {
    CheckCase(id, sentence, section) { context in
      guard context.device == device else { throw CaseStop.notApplicable("the device is no \(device.name ?? "such device")") }
      try context.needs(feature)
      guard let space = context.offer.configuration else { throw CaseStop.notApplicable("it gives no configuration") }
      try body(context, space)
    }
  }

  private static let configuration: [CheckCase] = [
    device(.net, "net.status", "The status has no unknown bits", "virtio 1.4, 5.1.4", .netStatus) { context, space in
      let status = space.number(at: 6, 2)
      try context.expect(status & ~3 == 0, "it is 0x\(String(status, radix: 16))")
    },
    device(
      .net, "net.pairs", "max_virtqueue_pairs is 1 to 32768, and the device has rings for them", "virtio 1.4, 5.1.4", .netMultipleQueues
    ) { context, space in
      let pairs = space.number(at: 8, 2)
      try context.expect((1...32768).contains(pairs), "it is \(pairs)")
      // Some tell pairs, some rings.
      if let queues = context.offer.queueCount { try context.expect(pairs <= queues, "it is \(pairs), and GET_QUEUE_NUM says \(queues)") }
    },
    device(.net, "net.mtu", "The MTU is at least 68", "virtio 1.4, 5.1.4", .netMTU) { context, space in
      try context.expect(space.number(at: 10, 2) >= 68, "it is \(space.number(at: 10, 2))")
    },
    device(.console, "console.ports", "With MULTIPORT there is at least one port", "virtio 1.4, 5.3.4", .consoleMultiplePorts) {
      context, space in
      try context.expect(space.number(at: 4, 4) >= 1, "max_nr_ports is 0")
    },
    device(.fileSystem, "fs.tag", "The tag has at least one byte, and NUL only at its end", "virtio 1.4, 5.11.4", []) { context, space in
      let tag = space.prefix(36).prefix { $0 != 0 }
      try context.expect(!tag.isEmpty, "it is empty")
      try context.expect(space.prefix(36).dropFirst(tag.count).allSatisfy { $0 == 0 }, "it is \(space.prefix(36).hexText())")
    },
    device(.fileSystem, "fs.queues", "There is at least one request queue", "virtio 1.4, 5.11.4", []) { context, space in
      try context.expect(space.number(at: 36, 4) >= 1, "num_request_queues is 0")
    },
  ]
}

extension RingClient {
  /// Makes the small request available; its head.
  func offerPing(kick: Bool = true) throws -> UInt16 {
    guard let ping = Self.ping(device) else { throw CaseStop.notApplicable("the probe knows no request for this device") }
    return try offer(ping.request, answerByteCount: ping.answerByteCount, kick: kick)
  }
}
