import CLinux
import Glibc
import HostSystem
import VMMemory
import VhostUser
import VirtioQueue
import VirtioSpec

/// Too much of everything, and ends at every moment.
enum FloodFaults {
  static let all: [FaultCase] = floods + repetitions + departures

  private static let floods: [FaultCase] = [
    FaultCase("flood.unread", "Requests without end whose replies are not read") { context in
      let link = try context.open()
      let message = FrontEndMessage.getFeatures.header().encoded
      var block: [UInt8] = []
      for _ in 0..<300 { block += message }
      // Until the socket takes no more.
      for _ in 0..<2000 { guard case .bytes = link.frontEnd.sendRawOnce(block) else { break } }
      usleep(50_000)
    },
    FaultCase("flood.kicks", "A hundred thousand kicks") { context in
      let client = try context.client()
      for _ in 0..<100_000 { client.ring.kick.signal() }
      try client.ping()
    },
    FaultCase("flood.kick-value", "A kick counter filled to the brim") { context in
      let client = try context.client()
      var value: UInt64 = .max - 1
      // SAFETY: eight bytes of ours.
      _ = unsafe Glibc.write(client.ring.kick.fd.rawValue, &value, 8)
      usleep(5_000)
      try client.ping()
    },
    FaultCase("flood.call-full", "A call counter that is full, so that signalling would block") { context in
      let client = try context.client()
      var value: UInt64 = .max - 1
      client.ring.call.drain()
      // Filled without blocking ourselves; whoever signals after that would block.
      // SAFETY: eight bytes of ours.
      _ = unsafe Glibc.write(client.ring.call.fd.rawValue, &value, 8)
      try client.ring.call.fd.setNonBlocking(false)
      _ = client.ring.queue.enableCalls()
      guard let ping = RingClient.ping(context.device) else { return }
      _ = try client.offer(ping.request, answerByteCount: ping.answerByteCount)
      usleep(20_000)
      // A back end that blocks here serves nobody; the judgement sees it. Nothing is drained.
    },
    FaultCase("flood.connections", "Two hundred connections, each closed at once") { context in
      for _ in 0..<200 { _ = try context.open() }
    },
    FaultCase("flood.connections-open", "Thirty connections that say nothing, all open at once") { context in
      guard case .path(let path) = context.target.address else { throw NotPossible(why: "no path") }
      var links: [CInt] = []
      defer { for number in links { _ = close(number) } }
      for _ in 0..<30 {
        guard let fd = try? UnixSocket.connect(to: path, timeout: .milliseconds(20)) else { break }
        links.append(fd.release())
      }
      usleep(5_000)
    },
  ]

  private static func repeated(
    _ id: String, _ sentence: String, _ count: Int, _ body: @escaping @Sendable (inout Link, CInt) throws -> Void
  ) -> FaultCase {
    FaultCase("repeat.\(id)", "\(sentence), \(count) times") { context in
      var link = try context.negotiated()
      let event = try EventFD()
      for _ in 0..<count { try body(&link, event.fd.rawValue) }
      try MessageFaults.barrier(&link)
      // While the connection stands: what was replaced must be gone now, not only at its end.
      if let process = context.target.processID {
        let open = SystemCallCounter.entries(of: "/proc/\(process)/fd").count
        if open > 400 { context.openDescriptorsSeen = open }
      }
    }
  }

  private static let event = VringEvent(index: 0, carriesDescriptor: true)

  private static let repetitions: [FaultCase] = [
    repeated("call", "SET_VRING_CALL", 500) { link, fd in try link.send(.setVringCall(event), descriptors: [fd]) },
    repeated("kick", "SET_VRING_KICK", 500) { link, fd in try link.send(.setVringKick(event), descriptors: [fd]) },
    repeated("err", "SET_VRING_ERR", 500) { link, fd in try link.send(.setVringErr(event), descriptors: [fd]) },
    repeated("size", "SET_VRING_NUM", 500) { link, _ in try link.send(.setVringNum(VringState(index: 0, number: 256))) },
    repeated("channel", "SET_BACKEND_REQ_FD", 300) { link, _ in
      guard link.offer.protocolFeatures.contains(.backEndRequests) else { throw NotPossible(why: "BACKEND_REQ is not offered") }
      try UnixSocket.pair(.stream).split { (_, theirs) throws in try link.tell(.setBackEndRequestFD, descriptors: [theirs.rawValue]) }
      _ = try link.number(.getFeatures)
    },
    repeated("memory", "SET_MEM_TABLE", 300) { link, _ in
      let arena = try Arena(byteCount: 1 << 20)
      try link.share(arena)
    },
    repeated("inflight", "GET_INFLIGHT_FD", 200) { link, _ in
      guard link.agreed.contains(.inflightShmFD) else { throw NotPossible(why: "INFLIGHT_SHMFD is not offered") }
      try link.send(.getInflightFD(InflightDescription(queueCount: 1, queueSize: 128)))
    },
    repeated("log", "SET_LOG_BASE", 300) { link, _ in
      guard link.agreed.contains(.logShmFD) else { throw NotPossible(why: "LOG_SHMFD is not offered") }
      let fd = try SharedMemory.sealed(name: "probe-log", byteCount: 65536)
      try link.send(.setLogBase(LogDescription(size: 65536, mapOffset: 0)), descriptors: [fd.rawValue])
    },
    FaultCase("repeat.start-stop", "A ring is started and stopped two hundred times") { context in
      let client = try context.client()
      for _ in 0..<200 {
        let base = try client.link.stop(client.ring.index)
        try client.link.start(client.ring, base: base)
      }
      client.ring.kick.signal()
      try client.ping()
    },
    FaultCase("repeat.enable", "A ring is enabled and disabled two hundred times") { context in
      let client = try context.client()
      for _ in 0..<200 {
        try client.link.enable(client.ring.index, false)
        try client.link.enable(client.ring.index, true)
      }
      client.ring.kick.signal()
      try client.ping()
    },
    FaultCase("repeat.sessions", "Forty whole sessions") { context in
      for _ in 0..<40 { try context.client().ping() }
    },
  ]

  private static let steps = 14

  private static let departures: [FaultCase] =
    (0...steps).map { count in
      FaultCase("leave.after-\(count)", "The front end leaves after \(count) messages of a session") { context in
        try session(context, count)
      }
    } + [
      FaultCase("leave.in-flight", "The front end leaves with thirty requests in flight") { context in
        let client = try context.client([], ringSize: 128)
        guard let ping = RingClient.ping(context.device) else { throw NotPossible(why: "no request is known") }
        for _ in 0..<30 { _ = try client.offer(ping.request, answerByteCount: ping.answerByteCount) }
      },
      FaultCase("leave.in-flight-often", "The same, twenty times") { context in
        guard let ping = RingClient.ping(context.device) else { throw NotPossible(why: "no request is known") }
        for _ in 0..<20 {
          let client = try context.client([], ringSize: 128)
          for _ in 0..<30 { _ = try client.offer(ping.request, answerByteCount: ping.answerByteCount) }
        }
      },
    ]

  /// The messages of an ordinary session, as many as asked for, without waiting for their acknowledgements.
  private static func session(_ context: FaultContext, _ count: Int) throws {
    var link = try context.open()
    let arena = try Arena(byteCount: 1 << 20)
    let ring = try ProbeRing(0, size: 64, features: .version1, arena: arena)
    let bit30: FeatureSet = context.offer.hasProtocolFeatures ? .vhostUserProtocolFeatures : []
    let messages: [(FrontEndMessage, [CInt])] = [
      (.setOwner, []), (.getFeatures, []), (.getProtocolFeatures, []),
      (.setProtocolFeatures(context.offer.protocolFeatures.intersection([.mq, .replyAck, .config])), []),
      (.setFeatures(context.offer.features.intersection(.version1).union(bit30)), []),
      (.setMemTable(RegionTable(regions: arena.descriptions)), arena.descriptors), (.setVringNum(VringState(index: 0, number: 64)), []),
      (.setVringBase(VringState(index: 0, number: 0)), []), (.setVringAddr(try ring.address()), []),
      (.setVringCall(event), [ring.call.fd.rawValue]), (.setVringErr(event), [ring.call.fd.rawValue]),
      (.setVringKick(event), [ring.kick.fd.rawValue]), (.setVringEnable(VringState(index: 0, number: 1)), []),
      (.getVringBase(VringState(index: 0, number: 0)), []),
    ]
    for (message, descriptors) in messages.prefix(count) { try link.tell(message, descriptors: descriptors) }
  }
}

extension BlockingFrontEnd {
  /// One attempt; part of it may have been sent.
  borrowing func sendRawOnce(_ bytes: [UInt8]) -> Transfer {
    // SAFETY: the array is not changed during the call.
    let count = unsafe bytes.withUnsafeBytes {
      unsafe Glibc.send(socketNumber, $0.baseAddress, $0.count, CInt(MSG_NOSIGNAL | MSG_DONTWAIT))
    }
    return count == bytes.count ? .bytes(count) : .wouldBlock
  }
}
