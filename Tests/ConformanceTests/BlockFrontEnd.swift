import Foundation
import HostSystem
import TestSupport
import Testing
import VMMemory
import VhostUser
import VirtioQueue
import VirtioSpec

/// A block back end as a program of its own, listening on a socket; ended with the value.
final class BlockProgram {
  let process: Process
  let folder: URL
  var socketPath: String { folder.appendingPathComponent("socket").path }
  var imagePath: String { folder.appendingPathComponent("image").path }

  /// - Parameter arguments: the program's, given the image's and the socket's path.
  init(_ program: String, image: [UInt8], _ arguments: (_ image: String, _ socket: String) -> [String]) throws {
    folder = FileManager.default.temporaryDirectory.appendingPathComponent("martlet-conformance-\(UUID().uuidString)")
    try FileManager.default.createDirectory(at: folder, withIntermediateDirectories: true)
    process = Process()
    process.executableURL = URL(fileURLWithPath: program)
    try Data(image).write(to: folder.appendingPathComponent("image"))
    process.arguments = arguments(imagePath, socketPath)
    process.standardInput = FileHandle.nullDevice
    process.standardOutput = FileHandle.nullDevice
    process.standardError = FileHandle.nullDevice
    try process.run()
  }

  /// Our own program, built beside the tests.
  static var martletBlock: String? {
    guard let tests = try? FileManager.default.destinationOfSymbolicLink(atPath: "/proc/self/exe") else { return nil }
    let path = URL(fileURLWithPath: tests).deletingLastPathComponent().appendingPathComponent("martlet-block").path
    return FileManager.default.isExecutableFile(atPath: path) ? path : nil
  }

  deinit {
    if process.isRunning { kill(process.processIdentifier, SIGKILL) }
    process.waitUntilExit()
    try? FileManager.default.removeItem(at: folder)
  }

  /// The program's socket, waiting for it to listen.
  func connect() throws -> OwnedFD {
    for _ in 0..<200 {
      if let socket = try? UnixSocket.connect(to: socketPath) { return socket }
      guard process.isRunning else { break }
      usleep(25_000)
    }
    return try UnixSocket.connect(to: socketPath)
  }

  func imageBytes(_ range: Range<Int>) throws -> [UInt8] {
    Array(try Data(contentsOf: URL(fileURLWithPath: imagePath))[range])
  }
}

/// The guest's and the core's side of a disk: memory, driver rings and a front-end session that is waited for.
final class BlockFrontEnd {
  struct Failed: Error, CustomStringConvertible { var description: String }

  static let memoryByteCount: UInt64 = 1 << 20
  static let queueSize: UInt16 = 16

  var session: FrontEndSession
  let memory: GuestMemory
  let file: SharedDescriptor
  private let kicks: [SharedDescriptor]
  private let calls: [SharedDescriptor]
  private var queues: [Queue] = []
  private var features: FeatureSet = []

  private final class Queue {
    var ring: DriverQueue
    init(_ ring: consuming DriverQueue) { self.ring = ring }
  }

  /// Makes first contact.
  init(_ socket: consuming OwnedFD, features: FeatureSet, wanted: ProtocolFeatures? = nil, queueCount: Int = 1) throws {
    var configuration = FrontEndConfiguration(allowedFeatures: features)
    if let wanted { configuration.wantedProtocolFeatures = wanted }
    configuration.configurationByteCount = 60
    session = try FrontEndSession(socket, configuration)
    let fd = try SharedMemory.sealed(name: "conformance", byteCount: Self.memoryByteCount)
    memory = try GuestMemory(regions: [
      .mapping(
        fd, guestAddress: GuestAddress(0), byteCount: Self.memoryByteCount, frontEndAddress: 1 << 46, fileOffset: 0,
        allowUnsealed: false)
    ])
    file = SharedDescriptor(fd)
    kicks = try (0..<queueCount).map { _ in SharedDescriptor(try EventFD().fd.duplicate()) }
    calls = try (0..<queueCount).map { _ in SharedDescriptor(try EventFD().fd.duplicate()) }
    session.negotiate(now: .now)
    guard case .negotiated(let offer) = try wait() else { throw Failed(description: "no offer") }
    self.features = offer.features
  }

  /// The next event of the session, waited for as a program would.
  func wait() throws -> FrontEndSession.Event {
    let end = MonotonicTime.now.advanced(by: .seconds(20))
    while MonotonicTime.now < end {
      if let event = session.nextEvent() {
        if case .failed(let error) = event { throw error }
        return event
      }
      var entry = pollfd(fd: session.socketNumber, events: Int16(POLLIN), revents: 0)
      _ = poll(&entry, 1, 50)
      session.receive(now: .now)
      session.handleTimeout(now: .now)
    }
    throw Failed(description: "nothing happened")
  }

  /// Each ring has 32 KiB from 64 KiB on: descriptors, available ring, used ring, then room for data.
  private func start(of queue: Int) -> UInt64 { 0x10000 + UInt64(queue) * 0x8000 }

  /// Fresh rings, served.
  func activate() throws {
    let isPacked = features.contains(.packedRing)
    queues = []
    var vrings: [VringActivation] = []
    for index in kicks.indices {
      let start = start(of: index)
      check(memory.copyIn([UInt8](repeating: 0, count: 0x8000), at: GuestAddress(start)))
      let configuration = VirtqueueConfiguration(
        size: Self.queueSize, descriptors: GuestAddress(start), driver: GuestAddress(start + 0x1000),
        device: GuestAddress(start + 0x2000), features: features)
      queues.append(Queue(try DriverQueue(configuration, memory: memory)))
      vrings.append(
        VringActivation(
          index: index, size: Int(Self.queueSize), descriptorTable: 1 << 46 + start, availableRing: 1 << 46 + start + 0x1000,
          usedRing: 1 << 46 + start + 0x2000, base: isPacked ? 0x8000_8000 : 0, kick: kicks[index], call: calls[index]))
    }
    let region = RegionDescription(guestAddress: 0, size: Self.memoryByteCount, userAddress: 1 << 46, mapOffset: 0)
    session.activate(
      BackEndActivation(features: features, regions: [SharedRegion(region, file)], vrings: vrings), now: .now)
    guard case .activated = try wait() else { throw Failed(description: "not activated") }
  }

  func stop() throws -> [VringState] {
    session.stop(now: .now)
    guard case .stopped(let bases) = try wait() else { throw Failed(description: "not stopped") }
    return bases
  }

  func resume() throws {
    session.resume(now: .now)
    guard case .resumed = try wait() else { throw Failed(description: "not resumed") }
  }

  func reset() throws {
    session.reset(now: .now)
    guard case .reset = try wait() else { throw Failed(description: "not reset") }
  }

  /// One request with its answer: status byte and, for a read, the bytes.
  func request(
    _ type: UInt32, sector: UInt64, write: [UInt8] = [], readByteCount: Int = 0, queue: Int = 0
  ) throws -> (status: UInt8, bytes: [UInt8]) {
    let base = start(of: queue) + 0x4000
    let header = GuestAddress(base)
    let data = GuestAddress(base + 0x100)
    let status = GuestAddress(base + 0x80)
    func little(_ value: UInt64, _ count: Int) -> [UInt8] { (0..<count).map { UInt8(truncatingIfNeeded: value >> (8 * $0)) } }
    check(memory.copyIn(little(UInt64(type), 4) + [0, 0, 0, 0] + little(sector, 8), at: header))
    check(memory.copyIn(write, at: data))
    check(memory.copyIn([0xFF], at: status))
    var buffers = [DriverBuffer(header, 16, isDeviceWritable: false)]
    if !write.isEmpty { buffers.append(DriverBuffer(data, UInt32(write.count), isDeviceWritable: false)) }
    if readByteCount > 0 { buffers.append(DriverBuffer(data, UInt32(readByteCount), isDeviceWritable: true)) }
    buffers.append(DriverBuffer(status, 1, isDeviceWritable: true))
    let owner = queues[queue]
    guard owner.ring.add(buffers.span) != nil else { throw Failed(description: "the ring is full") }
    if owner.ring.publish() {
      _ = unsafe [UInt64(1)].withUnsafeBytes { unsafe kicks[queue].fd.write($0) }
    }
    let end = MonotonicTime.now.advanced(by: .seconds(10))
    while true {
      if case .used = owner.ring.nextUsed() { break }
      guard MonotonicTime.now < end else { throw Failed(description: "no answer on queue \(queue)") }
      // Asks for a call at the next used chain; true: it is there already.
      if owner.ring.enableCalls() { continue }
      // The call is what wakes a guest; a lost one shows as slowness here, and as an error below.
      guard try calls[queue].fd.waitUntil(.readable, timeout: .seconds(10)) else { throw Failed(description: "no call on queue \(queue)") }
      var counter = [UInt8](repeating: 0, count: 8)
      _ = unsafe counter.withUnsafeMutableBytes { unsafe calls[queue].fd.read(into: $0) }
    }
    return (memory.bytes(at: status, count: 1)?.first ?? 0xFF, memory.bytes(at: data, count: readByteCount) ?? [])
  }
}
