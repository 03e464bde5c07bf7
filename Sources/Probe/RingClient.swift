import Glibc
import HostSystem
import VMMemory
import VhostUser
import VirtioQueue
import VirtioSpec

/// A driver that does one thing at a time: a session with memory and rings, for checks.
final class RingClient {
  var link: Link
  let arena: Arena
  let device: DeviceID?
  let features: FeatureSet
  /// The ring that requests go through.
  var ring: ProbeRing
  /// Rings before it that the device wants to be there too.
  private var others: [RingBox] = []
  /// Where request and answer lie; used again by every request.
  let readable: GuestAddress
  let writable: GuestAddress
  let tables: GuestAddress
  /// How long an answer may take.
  var patience: Duration

  static let bufferByteCount = 2 << 20

  final class RingBox {
    var ring: ProbeRing
    init(_ ring: consuming ProbeRing) { self.ring = ring }
  }

  struct Setup {
    var features: FeatureSet = []
    var ringSize: UInt16 = 64
    var queue: Int?
    var regionCount = 1
    var starts = true
    var protocolFeatures = Link.wanted
    /// Where the guest's memory begins.
    var guestStart: UInt64 = 0
    /// Whether the memory is sealed against being cut off.
    var isSealed = true
  }

  /// The queue a device's requests go through.
  static func requestQueue(_ device: DeviceID?) -> Int {
    switch device {
    case .net?, .console?, .fileSystem?: 1
    default: 0
    }
  }

  /// Connects, negotiates, shares memory, makes the rings, and starts them unless told otherwise.
  init(_ target: Target, _ device: DeviceID?, _ setup: Setup, trace: Trace) throws(ProbeError) {
    var link = try Link(target, trace: trace)
    try link.negotiate(setup.protocolFeatures)
    let features = link.offer.features.intersection(setup.features.union(.version1))
    let queue = setup.queue ?? Self.requestQueue(device)
    let ringBytes = UInt64(VirtqueueConfiguration.contiguousByteCount(size: setup.ringSize, features: features)) + 8192
    let arena = try Arena(
      byteCount: (UInt64(2 * Self.bufferByteCount) + ringBytes * UInt64(queue + 1) + (1 << 20)) * UInt64(setup.regionCount),
      regionCount: setup.regionCount, guestStart: setup.guestStart, isSealed: setup.isSealed)
    let ring = try ProbeRing(queue, size: setup.ringSize, features: features, arena: arena)
    // Only some devices want the rings before theirs: both of a pair, or the one for urgent requests.
    if device != .block {
      for index in 0..<queue { others.append(RingBox(try ProbeRing(index, size: setup.ringSize, features: features, arena: arena))) }
    }
    readable = try arena.allocate(Self.bufferByteCount, alignment: 4096)
    writable = try arena.allocate(Self.bufferByteCount, alignment: 4096)
    tables = try arena.allocate(16 * 1024, alignment: 4096)
    patience = min(target.timeout, .seconds(2))
    try link.accept(features)
    try link.share(arena)
    self.link = link
    self.arena = arena
    self.device = device
    self.features = features
    self.ring = ring
    if setup.starts { try start() }
  }

  func start(base: UInt32? = nil) throws(ProbeError) {
    for box in others { try link.start(box.ring) }
    try link.start(ring, base: base)
    try link.ready()
  }

  /// Does something with each of the rings before this one.
  func eachOther(_ body: (RingClient, borrowing ProbeRing) throws(ProbeError) -> Void) throws(ProbeError) {
    for box in others { try body(self, box.ring) }
  }

  /// An answer as it lies in memory.
  struct Answer {
    /// As the back end reported it.
    var written: UInt32
    /// The whole device-writable part; bytes that were not written are 0xA5.
    var bytes: [UInt8]
  }

  /// How a request is cut into descriptors: lengths of the pieces, the last of which takes the rest.
  struct Shape {
    var name: String
    var readable: [Int] = []
    var writable: [Int] = []
    var isIndirect = false
    /// So many direct descriptors before the indirect one (split rings).
    static let plain = Shape(name: "plain")
  }

  /// Makes a request available without waiting; false when the ring is full.
  func offer(_ request: [UInt8], answerByteCount: Int, shape: Shape = .plain, kick: Bool = true) throws(ProbeError) -> UInt16 {
    guard arena.memory.copyIn(request, at: readable),
      arena.memory.copyIn([UInt8](repeating: 0xA5, count: answerByteCount), at: writable)
    else { throw .unsuitable("A request is larger than the probe's buffer") }
    var buffers = Self.cut(readable, request.count, shape.readable, isWritable: false)
    buffers += Self.cut(writable, answerByteCount, shape.writable, isWritable: true)
    let head = shape.isIndirect ? ring.queue.addIndirect(buffers.span, table: tables) : ring.queue.add(buffers.span)
    guard let head else { throw .unsuitable("The probe's ring has no room for a request of \(buffers.count) descriptors") }
    let wantsKick = ring.queue.publish()
    if kick, wantsKick { ring.kick.signal() }
    return head
  }

  private static func cut(_ start: GuestAddress, _ count: Int, _ pieces: [Int], isWritable: Bool) -> [DriverBuffer] {
    var buffers: [DriverBuffer] = []
    var offset = 0
    for piece in pieces where offset + piece < count {
      buffers.append(DriverBuffer(GuestAddress(start.rawValue + UInt64(offset)), UInt32(piece), isDeviceWritable: isWritable))
      offset += piece
    }
    if offset < count {
      buffers.append(DriverBuffer(GuestAddress(start.rawValue + UInt64(offset)), UInt32(count - offset), isDeviceWritable: isWritable))
    }
    return buffers
  }

  /// The next used chain; nil when none came in time.
  func takeUsed(within patience: Duration? = nil) throws(ProbeError) -> (head: UInt16, written: UInt32)? {
    let end = MonotonicTime.now.advanced(by: patience ?? self.patience)
    while true {
      switch ring.queue.nextUsed() {
      case .used(let head, let written): return (head, written ?? 0)
      case .broken: throw .notVhostUser("the used ring reports a chain that is not outstanding, or too many")
      case .empty: break
      }
      guard MonotonicTime.now < end else { return nil }
      if !ring.queue.enableCalls() {
        // A call shortens the wait; that it comes at all is a case of its own.
        _ = try? ring.call.fd.waitUntil(.readable, timeout: .milliseconds(2))
        ring.call.drain()
      }
    }
  }

  /// A request and its answer; an error when it does not come.
  func exchange(_ request: [UInt8], answerByteCount: Int, shape: Shape = .plain) throws(ProbeError) -> Answer {
    let head = try offer(request, answerByteCount: answerByteCount, shape: shape)
    link.trace.note("ring \(ring.index) > \(request.hexText(limit: 24)), room for \(answerByteCount)")
    guard let used = try takeUsed() else {
      throw .notVhostUser("the request (\(shape.name)) was not completed within \(decimal(Double(patience.nanoseconds) / 1e9, 1)) s")
    }
    guard used.head == head else { throw .notVhostUser("chain \(used.head) was used, and chain \(head) is the one outstanding") }
    let answer = try answer(used.written, answerByteCount)
    link.trace.note("ring \(ring.index) < used \(used.written), \(answer.bytes.suffix(16).hexText()) at the end")
    return answer
  }

  func answer(_ written: UInt32, _ count: Int) throws(ProbeError) -> Answer {
    guard let bytes = arena.memory.bytes(at: writable, count: count) else { throw .unsuitable("The probe lost its buffer") }
    return Answer(written: written, bytes: bytes)
  }

  // MARK: A small request that every known device answers

  /// The request, the room it needs, and a judgement of the answer (nil: right).
  struct Ping {
    var request: [UInt8]
    var answerByteCount: Int
    var judge: (Answer) -> String?
  }

  static func ping(_ device: DeviceID?) -> Ping? {
    switch device {
    case .block?:
      return Ping(request: BlockWire.header(.read, 0), answerByteCount: 513) { answer in
        answer.bytes[512] != 0
          ? "a read of sector 0 ends with status \(answer.bytes[512])"
          : answer.written != 513 ? "a read of 512 bytes reports \(answer.written) bytes written instead of 513" : nil
      }
    case .net?:
      // To a group address of our own; nobody answers.
      let frame: [UInt8] = [1, 0, 0x5E, 0, 0, 1, 2, 0, 0, 0, 0, 1, 0x88, 0xB5] + [UInt8](repeating: 0, count: 46)
      return Ping(request: [UInt8](repeating: 0, count: 12) + frame, answerByteCount: 0) { answer in
        answer.written != 0 ? "a sent frame reports \(answer.written) bytes written instead of 0" : nil
      }
    case .console?:
      return Ping(request: Array("probe\n".utf8), answerByteCount: 0) { answer in
        answer.written != 0 ? "output reports \(answer.written) bytes written instead of 0" : nil
      }
    case .fileSystem?:
      return Ping(request: FuseWire.initialise(unique: 0x1122_3344_5566_7788), answerByteCount: 80) { answer in
        FuseWire.problem(answer, unique: 0x1122_3344_5566_7788)
      }
    case .entropy?:
      return Ping(request: [], answerByteCount: 64) { answer in
        let written = Int(answer.written)
        if written < 1 || written > 64 { return "a buffer of 64 bytes comes back with \(written) bytes written" }
        let random = answer.bytes[..<written]
        if written >= 16, Set(random).count == 1 { return "all bytes of the answer are \(random.prefix(1).hexText())" }
        return answer.bytes[written...].allSatisfy { $0 == 0xA5 } ? nil : "more was written than reported"
      }
    default: return nil
    }
  }

  /// Does the small request; an error when anything about it is wrong.
  func ping(shape: Shape = .plain) throws(ProbeError) {
    guard let ping = Self.ping(device) else { return }
    let answer = try exchange(ping.request, answerByteCount: ping.answerByteCount, shape: shape)
    if let problem = ping.judge(answer) { throw .notVhostUser(problem) }
  }

  /// Whether the small request was completed, and rightly; nil when it was not completed in this time.
  func tryPing(within patience: Duration) throws(ProbeError) -> Bool? {
    guard let ping = Self.ping(device) else { return nil }
    _ = try offer(ping.request, answerByteCount: ping.answerByteCount)
    guard let used = try takeUsed(within: patience) else { return nil }
    return ping.judge(try answer(used.written, ping.answerByteCount)) == nil
  }
}

/// Bytes of block requests.
enum BlockWire {
  static func header(_ type: BlockRequestType, _ sector: UInt64) -> [UInt8] {
    bytes(UInt64(type.rawValue), 4) + bytes(0, 4) + bytes(sector, 8)
  }

  static func segment(_ sector: UInt64, _ count: UInt32, _ flags: UInt32 = 0) -> [UInt8] {
    bytes(sector, 8) + bytes(UInt64(count), 4) + bytes(UInt64(flags), 4)
  }

  static func bytes(_ value: UInt64, _ count: Int) -> [UInt8] { (0..<count).map { UInt8(truncatingIfNeeded: value >> UInt64(8 * $0)) } }
}

/// Bytes of the one FUSE exchange that needs no file (linux/fuse.h).
enum FuseWire {
  static func initialise(unique: UInt64) -> [UInt8] {
    let body = BlockWire.bytes(7, 4) + BlockWire.bytes(31, 4) + BlockWire.bytes(65536, 4) + BlockWire.bytes(0, 4)
    var header = BlockWire.bytes(UInt64(40 + body.count), 4) + BlockWire.bytes(26, 4)
    header += BlockWire.bytes(unique, 8) + BlockWire.bytes(0, 8) + [UInt8](repeating: 0, count: 16)
    return header + body
  }

  static func problem(_ answer: RingClient.Answer, unique: UInt64) -> String? {
    let length = answer.bytes.number(at: 0, 4)
    let error = Int32(truncatingIfNeeded: answer.bytes.number(at: 4, 4))
    if answer.bytes.number(at: 8, 8) != unique { return "FUSE_INIT is answered for another request" }
    if error != 0 { return "FUSE_INIT fails with \(error)" }
    if length != UInt64(answer.written) { return "FUSE_INIT says \(length) bytes and the ring says \(answer.written)" }
    return answer.bytes.number(at: 16, 4) == 7 ? nil : "FUSE_INIT answers with version \(answer.bytes.number(at: 16, 4))"
  }
}
