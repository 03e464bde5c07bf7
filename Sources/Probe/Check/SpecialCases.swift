import Glibc
import HostSystem
import VMMemory
import VhostUser
import VirtioQueue
import VirtioSpec

/// Messages that few back ends offer, and configuration by device.
enum SpecialCases {
  static let all: [CheckCase] = messages + configuration

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
    CheckCase("postcopy.listen", "POSTCOPY_LISTEN after POSTCOPY_ADVISE is done", "vhost-user, POSTCOPY_LISTEN") { context in
      try context.needs(.pageFault)
      var link = try context.negotiated(Link.wanted.union(.pageFault))
      _ = try link.ask(.postcopyAdvise)
      try link.send(.postcopyListen)
      _ = try link.number(.postcopyEnd)
    },
    CheckCase("log.fd", "SET_LOG_FD with an eventfd is done", "vhost-user, SET_LOG_FD") { context in
      try context.needs(.vhostLogAll)
      var link = try context.negotiated()
      let event = try EventFD()
      try link.send(.setLogFD, descriptors: [event.fd.rawValue])
    },
    CheckCase(
      "inband.ring", "With INBAND_NOTIFICATIONS a ring without descriptors is kicked and called by messages",
      "vhost-user, VRING_KICK, BACKEND_VRING_CALL"
    ) { context in
      try context.needs([.inbandNotifications, .backEndRequests, .replyAck])
      try inband(context)
    },
    CheckCase(
      "crypto.unknown", "A session of no known kind is not created", "vhost-user, CREATE_CRYPTO_SESSION"
    ) { context in
      try context.needs(.cryptoSession)
      var link = try context.negotiated(Link.wanted.union(.cryptoSession))
      let nonsense = [UInt8](repeating: 0xFF, count: 608)
      do throws(ProbeError) {
        try link.tell(.createCryptoSession(nonsense))
        guard let answer = try link.hear() else { throw .notVhostUser("no answer and no end of the connection") }
        // The session's number is the last thing in it; a negative one is none.
        let number = Int64(bitPattern: answer.payload.suffix(8).number(at: 0, 8))
        if number >= 0 { throw .notVhostUser("session \(number) was created: \(answer.payload.hexText())") }
      } catch {
        guard case .protocolError(_, .closed) = error else { throw error }
      }
    },
    CheckCase(
      "crypto.close", "Closing a session that is not open is done or refused, and does not end the conversation",
      "vhost-user, CLOSE_CRYPTO_SESSION"
    ) { context in
      try context.needs(.cryptoSession)
      var link = try context.negotiated(Link.wanted.union(.cryptoSession))
      try context.expect(try link.refusal(.closeCryptoSession(0x7777)) != "closed", "it closes the connection")
      _ = try link.number(.getFeatures)
    },
    CheckCase("gpu.socket", "GPU_SET_SOCKET is done by a display adapter", "vhost-user, GPU_SET_SOCKET") { context in
      guard context.device == .gpu else { throw CaseStop.notApplicable("the device is no gpu") }
      var link = try context.negotiated()
      let pair = try UnixSocket.pair(.stream)
      try pair.split { (_, theirs) throws in try link.send(.gpuSetSocket, descriptors: [theirs.rawValue]) }
    },
    CheckCase("device-state.load", "The state that a device gave is taken back", "vhost-user, device state") { context in
      try context.needs(.deviceState)
      guard let state = try transfer(context, .save, []) else { throw CaseStop.fail("the end of the saved state did not come") }
      _ = try transfer(context, .load, state)
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

  /// Kick and call as messages.
  private static func inband(_ context: CheckContext) throws {
    let client = try context.client(
      RingClient.Setup(starts: false, protocolFeatures: Link.wanted.union([.inbandNotifications, .backEndRequests])))
    let index = UInt32(client.ring.index)
    let nothing = VringEvent(index: UInt8(index), carriesDescriptor: false)
    let pair = try UnixSocket.pair(.stream)
    try pair.split { ours, theirs throws in
      try client.link.send(.setBackEndRequestFD, descriptors: [theirs.rawValue])
      try client.startOthers()
      try client.link.describe(client.ring)
      try client.link.send(.setVringCall(nothing))
      try client.link.send(.setVringKick(nothing))
      try client.link.enable(Int(index), true)
      try client.link.ready()
      _ = client.ring.queue.enableCalls()
      _ = try client.offerPing(kick: false)
      try client.link.send(.vringKick(VringState(index: index, number: 0)))
      guard try client.takeUsed() != nil else { throw CaseStop.fail("a kick by message had no effect") }
      guard try ours.waitUntil(.readable, timeout: context.patience) else {
        throw CaseStop.fail("no call came on the back end's channel")
      }
      var bytes = [UInt8](repeating: 0, count: 64)
      // SAFETY: the buffer is ours.
      guard case .bytes(let count) = unsafe bytes.withUnsafeMutableBytes({ unsafe ours.read(into: $0) }) else {
        throw CaseStop.fail("the back end closed its channel")
      }
      let call = Array(bytes[..<count])
      try context.expect(
        count >= 20 && call.number(at: 0, 4) == BackEndRequest.vringCall.rawValue && call.number(at: 12, 4) == index,
        "the call is \(call.hexText())")
    }
  }

  /// The device's state to its end or from its beginning; nil when saving does not come to an end.
  private static func transfer(_ context: CheckContext, _ direction: DeviceStateTransfer.Direction, _ state: [UInt8]) throws -> [UInt8]? {
    var link = try context.negotiated()
    let pair = try UnixSocket.pair(.stream)
    return try pair.split { ours, theirs throws in
      var answered = try link.perform(.setDeviceStateFD(DeviceStateTransfer(direction: direction)), descriptors: [theirs.rawValue])
      guard case .number(let flags) = answered.reply, flags & 0xFF == 0 else { throw CaseStop.fail("the transfer was refused") }
      // What is held open here would keep the end from being seen.
      _ = theirs.release().closing()
      let own = flags & 0x100 == 0 ? answered.descriptors.takeFirst() : nil
      var saved: [UInt8]? = []
      if let own {
        saved = try carry(own, direction, state, context)
        _ = own.release().closing()
        _ = ours.release().closing()
      } else {
        saved = try carry(ours, direction, state, context)
        _ = ours.release().closing()
      }
      guard saved != nil else { return nil }
      let code = try link.number(.checkDeviceState)
      try context.expect(code == 0, "CHECK_DEVICE_STATE reports \(code)")
      return saved
    }
  }

  private static func carry(
    _ fd: borrowing OwnedFD, _ direction: DeviceStateTransfer.Direction, _ state: [UInt8], _ context: CheckContext
  ) throws -> [UInt8]? {
    if direction == .save { return try fd.readToEndWaiting(limit: 16 << 20, patience: context.target.timeout) }
    try fd.writeAll(state)
    return []
  }

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
