import Glibc
import HostSystem
import VMMemory
import VhostUser
import VirtioQueue
import VirtioSpec

/// Addresses of a ring and its buffers that mean nothing until the back end asks (ACCESS_PLATFORM, IOTLB).
enum TranslationCases {
  static let all: [CheckCase] = [
    CheckCase("iotlb.update", "With ACCESS_PLATFORM an IOTLB entry is taken and can be taken back", "vhost-user, IOTLB") { context in
      let client = try TranslatedClient(context)
      try client.update(page: 0)
      try client.invalidate(page: 0)
    },
    CheckCase(
      "iotlb.translation", "Ring and buffers are reached through the pages that the front end names when it is asked", "vhost-user, IOTLB"
    ) { context in
      let client = try TranslatedClient(context)
      try client.start()
      try client.ping()
      try context.expect(client.missCount > 0, "the request was completed though no address was ever asked for")
    },
    CheckCase("iotlb.invalidate", "A page that was taken back is asked for again before it is used", "vhost-user, IOTLB") { context in
      let client = try TranslatedClient(context)
      try client.start()
      try client.ping()
      for _ in 0..<2 {
        let before = client.missCount
        try client.moveBuffers()
        try client.ping()
        try context.expect(client.missCount > before, "its new place was not asked for")
        try context.expect(client.oldPlaceIsUntouched, "the page was written where it lay before it was taken back")
      }
    },
  ]
}

/// A driver behind an IOMMU: I/O pages are mapped to pages of guest memory in no order, one at a time and when asked.
private final class TranslatedClient {
  private static let pageSize: UInt64 = 4096
  private static let base: UInt64 = 1 << 36
  private static let requestPage: UInt64 = 0x100, answerPage: UInt64 = 0x102

  private var link: Link
  private let channel: SideChannel
  private let device: DeviceID?
  private let arena: Arena
  private let rings: [RingClient.RingBox]
  private let queue: Int
  private let patience: Duration
  /// Guest pages by I/O page.
  private var pages: [UInt64: UInt64] = [:]
  private var oldAnswer: UInt64?
  private(set) var missCount = 0

  init(_ context: CheckContext) throws {
    try context.needs(.backEndRequests)
    try context.needs([.accessPlatform, .version1])
    device = context.device
    patience = context.patience
    var link = try context.negotiated(Link.wanted.union(.backEndRequests))
    let pair = try UnixSocket.pair(.stream)
    channel = try pair.split { ours, theirs throws(ProbeError) in
      try link.send(.setBackEndRequestFD, descriptors: [theirs.rawValue])
      return SideChannel(ours)
    }
    let features: FeatureSet = [.version1, .accessPlatform]
    try link.accept(features)
    let arena = try Arena(byteCount: 4 << 20)
    try link.share(arena)
    queue = RingClient.requestQueue(device)
    var rings: [RingClient.RingBox] = []
    for index in device == .block ? queue...queue : 0...queue {
      rings.append(RingClient.RingBox(try ProbeRing(index, size: 16, features: features, arena: arena)))
    }
    self.rings = rings
    // Whatever page is asked for that nobody mapped on purpose: rings lie one to one behind the base.
    for box in rings {
      let layout = box.ring.queue.configuration
      let size = VirtqueueConfiguration.contiguousByteCount(size: layout.size, features: features)
      let last = layout.descriptors.rawValue + UInt64(size)
      for page in layout.descriptors.rawValue / Self.pageSize...last / Self.pageSize { pages[Self.base / Self.pageSize + page] = page }
    }
    self.link = link
    self.arena = arena
    try map(Self.requestPage)
    try map(Self.answerPage)
  }

  /// Gives an I/O page a fresh page of memory, not next to the one before.
  private func map(_ page: UInt64) throws {
    _ = try arena.allocate(Int(Self.pageSize), alignment: Self.pageSize)
    pages[page] = try arena.allocate(Int(Self.pageSize), alignment: Self.pageSize).rawValue / Self.pageSize
  }

  private func entry(_ page: UInt64, _ kind: IOTLBMessage.Kind) -> FrontEndMessage {
    let guest = pages[page] ?? 0
    return .iotlb(
      IOTLBMessage(
        iova: page * Self.pageSize, size: Self.pageSize, userAddress: kind == .update ? Arena.userBase + guest * Self.pageSize : 0,
        permission: 3, kind: kind))
  }

  func update(page: UInt64) throws { try tell(entry(page, .update)) }
  func invalidate(page: UInt64) throws { try tell(entry(page, .invalidate)) }

  /// An IOTLB message with its acknowledgement; what is asked meanwhile is answered after it.
  private func tell(_ message: FrontEndMessage) throws {
    try link.tell(message, needsReply: link.hasAcknowledgements)
    guard let answer = try link.hear() else { throw CaseStop.fail("IOTLB_MSG was not answered") }
    let code = answer.payload.number(at: 0, 8)
    guard answer.header.request == FrontEndRequest.iotlb.rawValue, answer.payload.count == 8, code == 0 else {
      throw CaseStop.fail("IOTLB_MSG was answered with request \(answer.header.request): \(answer.payload.hexText())")
    }
  }

  /// Rings at I/O addresses.
  func start() throws {
    guard RingClient.ping(device) != nil else { throw CaseStop.notApplicable("the probe knows no request for this device") }
    for box in rings {
      let index = UInt32(box.ring.index)
      let layout = box.ring.queue.configuration
      let event = VringEvent(index: UInt8(index), carriesDescriptor: true)
      try link.send(.setVringNum(VringState(index: index, number: UInt32(layout.size))))
      try link.send(.setVringBase(VringState(index: index, number: 0)))
      try send(
        .setVringAddr(
          VringAddress(
            index: index, descriptorTable: Self.base + layout.descriptors.rawValue, availableRing: Self.base + layout.driver.rawValue,
            usedRing: Self.base + layout.device.rawValue)))
      try send(.setVringCall(event), [box.ring.call.fd.rawValue])
      try send(.setVringKick(event), [box.ring.kick.fd.rawValue])
      if link.offer.hasProtocolFeatures { try send(.setVringEnable(VringState(index: index, number: 1))) }
    }
    try link.ready()
    try serve()
  }

  /// A message during whose work the back end may ask.
  private func send(_ message: FrontEndMessage, _ descriptors: [CInt] = []) throws {
    try link.send(message, descriptors: descriptors)
    try serve()
  }

  /// Answers what was asked.
  private func serve() throws {
    while let (header, payload) = try channel.receive() {
      link.trace.note("channel < " + (header.encoded + payload).hexText())
      guard let request = BackEndRequest(rawValue: header.request), let message = try? BackEndMessage(request: request, payload: payload)
      else { throw CaseStop.fail("request \(header.request) on the channel is none, or malformed: \(payload.hexText())") }
      if header.flags.contains(.needReply) { channel.answer(header.request, [UInt8](repeating: 0, count: 8)) }
      guard case .iotlb(let question) = message, question.kind == .miss else { continue }
      missCount += 1
      guard missCount < 10_000 else { throw CaseStop.fail("it asks without end") }
      let page = question.iova / Self.pageSize
      guard pages[page] != nil else { throw CaseStop.fail("0x\(String(question.iova, radix: 16)) was asked for, which nobody told it") }
      try update(page: page)
    }
  }

  /// The request and answer pages go elsewhere; the old ones are filled with something else.
  func moveBuffers() throws {
    oldAnswer = pages[Self.answerPage]
    for page in [Self.requestPage, Self.answerPage] {
      try invalidate(page: page)
      if let old = pages[page] {
        _ = arena.memory.copyIn([UInt8](repeating: 0xEE, count: Int(Self.pageSize)), at: GuestAddress(old * Self.pageSize))
      }
      try map(page)
    }
  }

  var oldPlaceIsUntouched: Bool {
    guard let oldAnswer, let bytes = arena.memory.bytes(at: GuestAddress(oldAnswer * Self.pageSize), count: Int(Self.pageSize)) else {
      return true
    }
    return bytes.allSatisfy { $0 == 0xEE }
  }

  /// The device's small request, its parts at I/O addresses.
  func ping() throws {
    guard let ping = RingClient.ping(device), let request = pages[Self.requestPage], let answer = pages[Self.answerPage] else { return }
    let answerPlace = GuestAddress(answer * Self.pageSize)
    guard arena.memory.copyIn(ping.request, at: GuestAddress(request * Self.pageSize)),
      arena.memory.copyIn([UInt8](repeating: 0xA5, count: ping.answerByteCount), at: answerPlace)
    else { throw CaseStop.fail("the probe lost its buffer") }
    var buffers: [DriverBuffer] = []
    if !ping.request.isEmpty {
      buffers.append(
        DriverBuffer(GuestAddress(Self.requestPage * Self.pageSize), UInt32(ping.request.count), isDeviceWritable: false))
    }
    if ping.answerByteCount > 0 {
      buffers.append(
        DriverBuffer(GuestAddress(Self.answerPage * Self.pageSize), UInt32(ping.answerByteCount), isDeviceWritable: true))
    }
    let box = rings[rings.count - 1]
    guard box.ring.queue.add(buffers.span) != nil else { throw CaseStop.fail("the probe's ring is full") }
    _ = box.ring.queue.publish()
    box.ring.kick.signal()
    let end = MonotonicTime.now.advanced(by: patience)
    while true {
      try serve()
      switch box.ring.queue.nextUsed() {
      case .used(_, let written):
        guard let bytes = arena.memory.bytes(at: answerPlace, count: ping.answerByteCount) else { return }
        if let problem = ping.judge(RingClient.Answer(written: written ?? 0, bytes: bytes)) { throw CaseStop.fail(problem) }
        return
      case .broken: throw CaseStop.fail("the used ring reports a chain that is not outstanding, or too many")
      case .empty: break
      }
      guard MonotonicTime.now < end else { throw CaseStop.fail("the request was not completed; \(missCount) addresses were asked for") }
      usleep(300)
    }
  }
}
