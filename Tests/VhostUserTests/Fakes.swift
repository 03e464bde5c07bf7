import Foundation
import HostSystem
import TestSupport
import Testing
import VhostUser
import VirtioSpec

let guestFeatures: FeatureSet = [.version1, .indirectDescriptors, .eventIndex, .packedRing]

func fullOffer(queues: Int = 4) -> BackEndOffer {
  BackEndOffer(
    features: [guestFeatures, .vhostLogAll], protocolFeatures: BackEndOffer.implemented, queueCount: queues, maximumQueueSize: 1024,
    maximumMemorySlots: 12)
}

/// A memory object with a name by which its descriptors can be counted.
func memoryObject(_ name: String) throws -> OwnedFD { try SharedMemory.sealed(name: name, byteCount: 1 << 20) }

/// How many descriptors of this process refer to the memory object of that name; other tests do not disturb it.
func openDescriptors(of name: String) -> Int {
  let folder = "/proc/self/fd"
  let numbers = (try? FileManager.default.contentsOfDirectory(atPath: folder)) ?? []
  return numbers.count { number in
    (try? FileManager.default.destinationOfSymbolicLink(atPath: "\(folder)/\(number)"))?.hasPrefix("/memfd:\(name) ") == true
  }
}

let frontEndBase: UInt64 = 0x7f00_0000_0000

/// `count` regions of 64 KiB, one after the other.
func regionDescriptions(_ count: Int) -> [RegionDescription] {
  (0..<count).map { index in
    let start = UInt64(index) << 16
    return RegionDescription(guestAddress: start, size: 1 << 16, userAddress: frontEndBase + start, mapOffset: start)
  }
}

/// A ring of 64 entries in the first region; each index has a page block of its own.
func ringAddress(_ index: UInt32, flags: UInt32 = 0, log: UInt64 = 0) -> VringAddress {
  let start = frontEndBase + UInt64(index) * 0x3000
  return VringAddress(
    index: index, flags: flags, descriptorTable: start, availableRing: start + 0x1000, usedRing: start + 0x2000, log: log)
}

/// A back end on one end of a socket pair, and raw bytes from the other, all on this thread.
struct BackEndBench: ~Copyable {
  var backEnd: BackEndConnection
  var device = RecordingDevice()
  var frontEnd: Connection
  var now = MonotonicTime.now

  init(_ offer: BackEndOffer = fullOffer()) throws {
    let pair = try UnixSocket.pair(.stream)
    backEnd = BackEndConnection(pair.first, offer: offer)
    frontEnd = Connection(pair.second, expecting: .anything, descriptorLimit: 8)
  }

  /// Lets the back end work on what was sent.
  mutating func serve() throws(VhostUserError) { try backEnd.receive(now: now, &device) }

  /// Sends a message and returns the reply's payload, nil when there is none.
  @discardableResult
  mutating func send(_ message: FrontEndMessage, needsReply: Bool = false, descriptors: [CInt] = []) throws -> [UInt8]? {
    try frontEnd.send(message.header(needsReply: needsReply), message.payload, descriptors: descriptors)
    try serve()
    guard let reply = try frontEnd.receive(now: now) else { return nil }
    try reply.header.checkReply(to: message.request.rawValue)
    return reply.payload
  }

  /// Sends a message with the mark and returns the acknowledged code.
  mutating func acknowledge(_ message: FrontEndMessage, descriptors: [CInt] = []) throws -> UInt64? {
    guard let payload = try send(message, needsReply: true, descriptors: descriptors) else { return nil }
    guard case .number(let code) = try Reply(.number, payload: payload) else { return nil }
    return code
  }

  /// Everything up to the memory table of one region.
  mutating func negotiate(_ features: FeatureSet = [.version1, .vhostUserProtocolFeatures]) throws {
    try send(.setOwner)
    try send(.setProtocolFeatures(BackEndOffer.implemented))
    try send(.setFeatures(features))
    let object = try memoryObject("bench")
    try send(.setMemTable(RegionTable(regions: regionDescriptions(1))), descriptors: [object.rawValue])
  }

  /// Size, base and address of ring `index`, and its kick.
  mutating func startRing(_ index: UInt32, kick: borrowing EventFD) throws {
    try send(.setVringNum(VringState(index: index, number: 64)))
    try send(.setVringBase(VringState(index: index, number: 7)))
    try send(.setVringAddr(ringAddress(index)))
    try send(.setVringKick(VringEvent(index: UInt8(index), carriesDescriptor: true)), descriptors: [kick.fd.rawValue])
  }
}

/// A front-end session and a back end facing each other, run by turns on this thread.
struct SessionBench: ~Copyable {
  var front: FrontEndSession
  var back: BackEndConnection
  var device = RecordingDevice()
  var now = MonotonicTime(nanoseconds: 1_000_000_000)

  init(_ configuration: FrontEndConfiguration, _ offer: BackEndOffer = fullOffer()) throws {
    let pair = try UnixSocket.pair(.stream)
    front = try FrontEndSession(pair.first, configuration)
    back = BackEndConnection(pair.second, offer: offer)
  }

  /// Runs both until the front end has nothing under way; what it said.
  mutating func run() throws -> [FrontEndSession.Event] {
    var events: [FrontEndSession.Event] = []
    for _ in 0..<500 {
      try back.receive(now: now, &device)
      front.receive(now: now)
      while let event = front.nextEvent() { events.append(event) }
      if front.isIdle || front.hasFailed { break }
    }
    // Once more for what the back end says by itself.
    front.receive(now: now)
    while let event = front.nextEvent() { events.append(event) }
    return events
  }
}

func standardConfiguration() -> FrontEndConfiguration {
  var configuration = FrontEndConfiguration(allowedFeatures: guestFeatures)
  configuration.configurationByteCount = 16
  return configuration
}

func sampleActivation(rings: Int, regions: Int = 1, base: UInt32 = 0, _ object: borrowing OwnedFD) throws -> BackEndActivation {
  let descriptor = try SharedDescriptor(duplicating: object)
  return BackEndActivation(
    features: [.version1, .eventIndex], regions: regionDescriptions(regions).map { SharedRegion($0, descriptor) },
    vrings: try (0..<rings).map { index in
      let address = ringAddress(UInt32(index))
      return VringActivation(
        index: index, size: 64, descriptorTable: address.descriptorTable, availableRing: address.availableRing,
        usedRing: address.usedRing, base: base, kick: SharedDescriptor(try EventFD().fd.duplicate()),
        call: SharedDescriptor(try EventFD().fd.duplicate()))
    })
}
