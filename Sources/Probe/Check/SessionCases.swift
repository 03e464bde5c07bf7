import Glibc
import HostSystem
import VMMemory
import VhostUser
import VirtioQueue
import VirtioSpec

/// Whole sessions in other orders than the usual one, several queues at once, and chains at the limits.
enum SessionCases {
  static let all: [CheckCase] = orders + queues + chains

  private static let orders: [CheckCase] = [
    CheckCase("ack.none", "A whole session works without REPLY_ACK", "vhost-user, REPLY_ACK") { context in
      guard context.offer.hasProtocolFeatures else { throw CaseStop.notOffered("PROTOCOL_FEATURES") }
      let client = try context.client(RingClient.Setup(protocolFeatures: Link.wanted.subtracting(.replyAck)))
      try client.ping()
      _ = try client.link.stop(client.ring.index)
    },
    CheckCase("enable.early", "A ring that was enabled before it is started is processed", "vhost-user, ring states") { context in
      guard context.offer.hasProtocolFeatures else { throw CaseStop.notOffered("PROTOCOL_FEATURES") }
      let client = try context.client(RingClient.Setup(starts: false))
      for index in 0...client.ring.index { try client.link.enable(index, true) }
      try client.startWithoutEnabling()
      try client.ping()
    },
    CheckCase("order.call-last", "A ring that is started gets its call descriptor, and uses it", "vhost-user, SET_VRING_CALL") { context in
      let client = try context.client(RingClient.Setup(starts: false))
      try client.startCallLast()
      client.ring.call.drain()
      _ = client.ring.queue.enableCalls()
      guard let ping = RingClient.ping(client.device) else { return }
      _ = try client.offer(ping.request, answerByteCount: ping.answerByteCount)
      let signalled = try client.ring.call.fd.waitUntil(.readable, timeout: context.patience)
      try context.expect(signalled, "no call came")
    },
    CheckCase("order.base-last", "Size, base and place of a ring may come in any order", "vhost-user, starting and stopping rings") {
      context in
      let client = try context.client(RingClient.Setup(starts: false))
      let index = UInt32(client.ring.index)
      let event = VringEvent(index: UInt8(index), carriesDescriptor: true)
      try client.startOthers()
      try client.link.send(.setVringCall(event), descriptors: [client.ring.call.fd.rawValue])
      try client.link.send(.setVringNum(VringState(index: index, number: UInt32(client.ring.queue.configuration.size))))
      try client.link.send(.setVringAddr(try client.ring.address()))
      try client.link.send(.setVringBase(VringState(index: index, number: 0)))
      try client.link.send(.setVringKick(event), descriptors: [client.ring.kick.fd.rawValue])
      if client.link.offer.hasProtocolFeatures { try client.link.enable(client.ring.index, true) }
      try client.link.ready()
      try client.ping()
    },
  ]

  private static let queues: [CheckCase] = [
    CheckCase("queues.together", "Several queues are served side by side, and stopped one by one", "vhost-user, multiple queue support") {
      context in
      guard context.device == .block else { throw CaseStop.notApplicable("queues of this device have different tasks") }
      try context.needs(.mq)
      let count = Int(min(context.offer.queueCount ?? 1, 4))
      guard count > 1 else { throw CaseStop.notApplicable("there is one queue") }
      let client = try context.client()
      var extra: [RingClient.RingBox] = []
      for index in 1..<count {
        let box = RingClient.RingBox(
          try ProbeRing(index, size: client.ring.queue.configuration.size, features: client.features, arena: client.arena))
        try client.link.start(box.ring)
        extra.append(box)
      }
      for _ in 0..<3 {
        try client.ping()
        for box in extra { try client.with(box) { client throws(ProbeError) in try client.ping() } }
      }
      for box in extra {
        let base = try client.link.stop(box.ring.index)
        try context.expect(base == 3, "queue \(box.ring.index) stands at \(base) after 3 requests")
        try client.ping()
      }
    }
  ]

  private static let chains: [CheckCase] = [
    CheckCase("layout.full", "A chain may be as long as the ring", "virtio 1.4, 2.7.5") { context in
      let client = try context.client(RingClient.Setup(ringSize: 8))
      guard let ping = RingClient.ping(client.device) else { return }
      // Eight pieces in all: of what is read where there is enough of it, else of what is written.
      let writable = ping.answerByteCount == 0 ? 0 : 1
      let pieces = 8 - (ping.request.isEmpty ? 0 : writable) - 1
      let ones = [Int](repeating: 1, count: pieces)
      let shape =
        ping.request.isEmpty
        ? RingClient.Shape(name: "8 pieces", writable: ones) : RingClient.Shape(name: "8 pieces", readable: ones)
      if ping.request.count + ping.answerByteCount <= pieces { throw CaseStop.notApplicable("the device's small request is too short") }
      for _ in 0..<3 { try client.ping(shape: shape) }
    },
    CheckCase("layout.full-packed", "A chain may be as long as a packed ring", "virtio 1.4, 2.8") { context in
      try context.needs(.packedRing)
      let client = try context.client(RingClient.Setup(features: .packedRing, ringSize: 4))
      guard let ping = RingClient.ping(client.device) else { return }
      let shape =
        ping.request.isEmpty
        ? RingClient.Shape(name: "4 pieces", writable: [1, 1, 1])
        : RingClient.Shape(name: "4 pieces", readable: ping.answerByteCount == 0 ? [1, 1, 1] : [1, 1])
      for _ in 0..<6 { try client.ping(shape: shape) }
    },
    CheckCase("layout.direct-then-indirect", "Direct descriptors may be followed by one indirect table", "virtio 1.4, 2.7.5.3") { context in
      try context.needs(.indirectDescriptors)
      let client = try context.client(RingClient.Setup(features: .indirectDescriptors))
      for _ in 0..<3 { try client.pingDirectThenIndirect() }
    },
  ]
}

extension RingClient {
  func startOthers() throws(ProbeError) {
    try eachOther { client, ring throws(ProbeError) in try client.link.start(ring) }
  }

  /// As `start`, for rings that were enabled before.
  func startWithoutEnabling() throws(ProbeError) {
    func start(_ ring: borrowing ProbeRing) throws(ProbeError) {
      let event = VringEvent(index: UInt8(ring.index), carriesDescriptor: true)
      try link.describe(ring)
      try link.send(.setVringCall(event), descriptors: [ring.call.fd.rawValue])
      try link.send(.setVringKick(event), descriptors: [ring.kick.fd.rawValue])
    }
    try eachOther { _, ring throws(ProbeError) in try start(ring) }
    try start(ring)
    try link.ready()
  }

  /// As `start`, with the call descriptor after everything else.
  func startCallLast() throws(ProbeError) {
    try startOthers()
    let event = VringEvent(index: UInt8(ring.index), carriesDescriptor: true)
    try link.describe(ring)
    try link.send(.setVringKick(event), descriptors: [ring.kick.fd.rawValue])
    if link.offer.hasProtocolFeatures { try link.enable(ring.index, true) }
    try link.send(.setVringCall(event), descriptors: [ring.call.fd.rawValue])
    try link.ready()
  }

  /// The small request as two descriptors: one that is direct, and behind it a table with all the rest. Nothing in the
  /// driver's books knows of it, so the used ring is looked at as it lies in memory.
  func pingDirectThenIndirect() throws(ProbeError) {
    guard let ping = Self.ping(device), ping.request.count + ping.answerByteCount >= 2 else { return }
    guard arena.memory.copyIn(ping.request, at: readable),
      arena.memory.copyIn([UInt8](repeating: 0xA5, count: ping.answerByteCount), at: writable)
    else { throw .unsuitable("The probe lost its buffer") }
    var pieces: [(address: UInt64, count: UInt64, isWritable: Bool)] = []
    let half = UInt64(ping.request.count / 2)
    if half > 0 { pieces.append((readable.rawValue, half, false)) }
    if ping.request.count > 0 { pieces.append((readable.rawValue + half, UInt64(ping.request.count) - half, false)) }
    if ping.answerByteCount > 0 {
      let first = UInt64(ping.request.isEmpty ? 1 : 0)
      if first > 0 { pieces.append((writable.rawValue, first, true)) }
      pieces.append((writable.rawValue + first, UInt64(ping.answerByteCount) - first, true))
    }
    let tail = pieces.dropFirst()
    for (index, piece) in tail.enumerated() {
      let isLast = index == tail.count - 1
      let flags: UInt64 = (piece.isWritable ? 2 : 0) | (isLast ? 0 : 1)
      let bytes =
        BlockWire.bytes(piece.address, 8) + BlockWire.bytes(piece.count, 4) + BlockWire.bytes(flags, 2)
        + BlockWire.bytes(isLast ? 0 : UInt64(index + 1), 2)
      guard arena.memory.copyIn(bytes, at: GuestAddress(tables.rawValue + UInt64(16 * index))) else {
        throw .unsuitable("The probe lost its table")
      }
    }
    let used = GuestAddress(ring.queue.configuration.device.rawValue + 2)
    guard let before = arena.memory.load(UInt16.self, at: used) else { throw .unsuitable("The probe lost its ring") }
    ring.queue.writeDescriptor(
      0, address: pieces[0].address, length: UInt32(pieces[0].count), third: (pieces[0].isWritable ? 2 : 0) | 1, fourth: 1)
    ring.queue.writeDescriptor(1, address: tables.rawValue, length: UInt32(16 * tail.count), third: 4, fourth: 0)
    let table = GuestAddress(ring.queue.configuration.descriptors.rawValue)
    link.trace.note("ring \(ring.index) descriptors 0 and 1: \(arena.memory.bytes(at: table, count: 32)?.hexText() ?? "")")
    link.trace.note("  the table: \(arena.memory.bytes(at: tables, count: 16 * tail.count)?.hexText() ?? "")")
    ring.queue.publishHead(0)
    ring.kick.signal()
    let end = MonotonicTime.now.advanced(by: patience)
    while arena.memory.load(UInt16.self, at: used) == before {
      guard MonotonicTime.now < end else { throw .notVhostUser("the request was not completed") }
      usleep(200)
    }
    let element = GuestAddress(used.rawValue + 2 + 8 * UInt64(before % ring.queue.configuration.size))
    let id = arena.memory.load(UInt32.self, at: element) ?? .max
    guard id == 0 else { throw .notVhostUser("chain \(id) was used, and chain 0 is the one outstanding") }
    let written = arena.memory.load(UInt32.self, at: GuestAddress(element.rawValue + 4)) ?? 0
    if let problem = ping.judge(try answer(written, ping.answerByteCount)) { throw .notVhostUser(problem) }
  }

  /// Does something through another ring of the same session.
  func with(_ box: RingBox, _ body: (RingClient) throws(ProbeError) -> Void) throws(ProbeError) {
    swap(&ring, &box.ring)
    defer { swap(&ring, &box.ring) }
    try body(self)
  }
}
