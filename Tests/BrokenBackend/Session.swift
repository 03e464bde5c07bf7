import CLinux
import Glibc
import HostSystem
import VMMemory
import VhostUser
import VirtioQueue
import VirtioSpec

/// What outlives connections.
struct Disk {
  var bytes = [UInt8](repeating: 0x11, count: 8 << 20)
  var staleBase: UInt32?
  var writeback: UInt8 = 1
}

struct Closed: Error {}

/// One front end, from its connection to its end.
final class Session {
  let socket: OwnedFD
  let device: DeviceID
  var disk: Disk
  let sessionNumber: Int
  var protocolFeatures: ProtocolFeatures = []
  var features: FeatureSet = []
  var regions: [Shared] = []
  var memory: GuestMemory?
  let rings: [Ring]
  var status: UInt64 = 0
  var log: MemoryMapping?
  var inflight: (mapping: MemoryMapping, area: InflightDescription)?
  var leaked: [CInt] = []
  var configReads = 0
  var chain = DescriptorChain(capacity: 2048)
  var inbox: [UInt8] = []
  var inboxFDs: [CInt] = []
  /// For requests of our own.
  var channel: OwnedFD?
  /// With ACCESS_PLATFORM: pages of the front end's that we have been told of.
  var translation = Translation()
  /// Control messages of a console that wait for a buffer.
  var announcements: [[UInt8]] = []

  /// Of a state that is being given to us.
  var loading: OwnedFD?
  var stateCode: UInt64 = 0
  var hasOwner = false
  var featureQuestions = 0
  private var kicks: UInt64 = 0

  init(_ socket: consuming OwnedFD, _ device: DeviceID, _ disk: Disk, _ number: Int) {
    self.socket = socket
    self.device = device
    self.disk = disk
    sessionNumber = number
    rings = (0..<(device == .console ? 6 : 4)).map { _ in Ring() }
  }

  func run() {
    Habits.begin()
    do {
      while true {
        try wait()
        while let message = try nextMessage() { try handle(message.0, message.1, message.2) }
        for ring in rings { process(ring) }
      }
    } catch {
      if has("leak-descriptors") { leaked += rings.compactMap { $0.kick.take()?.release() } }
    }
    for number in inboxFDs { _ = close(number) }
    Habits.note("\(kicks) kicks")
    Habits.end()
  }

  private func wait() throws {
    var entries = [pollfd(fd: socket.rawValue, events: Int16(POLLIN), revents: 0)]
    var owners: [Ring] = []
    for ring in rings where ring.isStarted {
      if let number = ring.kick?.rawValue {
        entries.append(pollfd(fd: number, events: Int16(POLLIN), revents: 0))
        owners.append(ring)
      }
    }
    if poll(&entries, nfds_t(entries.count), 1000) < 0 { return }
    for (entry, ring) in zip(entries.dropFirst(), owners) where entry.revents != 0 {
      var value: UInt64 = 0
      _ = read(entry.fd, &value, 8)
      kicks &+= value
      if has("kick-spurious"), ring.queue?.hasAvailable() == false { abort() }
      ring.wasKicked = true
    }
    if entries[0].revents != 0 { try fill() }
  }

  private func fill() throws {
    let buffer = UnsafeMutableRawBufferPointer.allocate(byteCount: 65536, alignment: 16)
    defer { buffer.deallocate() }
    var reception = UnixSocket.receive(socket, into: buffer, descriptorLimit: 32, waiting: false)
    while let fd = reception.descriptors.takeFirst() { inboxFDs.append(fd.release()) }
    if reception.truncated { try violation("descriptors were cut off") }
    switch reception.transfer {
    case .bytes(let count):
      if has("pieces"), count < 12, inbox.isEmpty { throw Closed() }
      inbox += buffer[..<count]
    case .wouldBlock: return
    default:
      if !inbox.isEmpty { try violation("the end came in the middle of a message") }
      throw Closed()
    }
  }

  private func nextMessage() throws -> (MessageHeader, [UInt8], [CInt])? {
    guard inbox.count >= 12 else { return nil }
    let header = try MessageHeader(decoding: inbox.prefix(12))
    do { try header.checkRequest() } catch { try violation("\(error)") }
    guard let request = FrontEndRequest(rawValue: header.request) else {
      if has("accept-unknown") {
        inbox.removeFirst(12)
        reply(header.request, zero)
        return nil
      }
      try violation("unknown request")
      throw Closed()
    }
    if !request.rules.size.allows(Int(header.size)) { try violation("wrong size") }
    guard inbox.count >= 12 + Int(header.size) else { return nil }
    let payload = Array(inbox[12..<12 + Int(header.size)])
    inbox.removeFirst(12 + Int(header.size))
    let fds = inboxFDs
    inboxFDs = []
    Habits.note("\(header.encoded.map(Int.init)) \(payload) \(fds.map(Self.nature))")
    return (header, payload, fds)
  }

  /// The front end broke the protocol: a good back end closes the connection.
  func violation(_ why: String) throws {
    Habits.stray()
    if has("abort-malformed") { abort() }
    if has("hang-malformed") { while true { pause() } }
    if has("leak-malformed") { for _ in 0..<8 { leaked.append(dup(0)) } }
    if has("leak-one") { leaked.append(dup(0)) }
    throw Closed()
  }

  /// Size and seals of what was passed.
  private static func nature(_ number: CInt) -> String {
    var status = stat()
    fstat(number, &status)
    return "\(status.st_mode & 0o170000) \(status.st_size) \(clinux_fcntl(number, 1034, 0))"
  }

  var zero: [UInt8] { [UInt8](repeating: 0, count: 8) }
}
