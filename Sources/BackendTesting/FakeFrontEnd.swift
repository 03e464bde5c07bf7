import BackendKit
import Glibc
import HostSystem
import VMMemory
import VhostUser
import VirtioQueue
import VirtioSpec

/// Why a test cannot go on.
public struct FakeFrontEndError: Error, Sendable, CustomStringConvertible {
  public let description: String
  public init(_ description: String) { self.description = description }
}

/// Front end and driver at once, for tests of a back end: guest memory, a vhost-user session, queues. No KVM, no root, no guest.
///
///     let front = try FakeFrontEnd { Upper() }                          // in this process, on a thread of its own
///     let front = try FakeFrontEnd(socket: "/tmp/upper.sock")           // a program that listens there
///     let answer = try front.request(Array("martlet".utf8), room: 64)
///     #expect(answer.bytes == Array("MARTLET".utf8))
///
/// It waits where a guest would sleep, at most `patience`, and is for one thread.
public final class FakeFrontEnd {
  /// What the session and its rings are to be.
  public struct Setup: Sendable {
    /// Queues that are started, from the first on.
    public var queueCount = 1
    public var queueSize: UInt16 = 64
    /// Features acknowledged, of those offered; nil for all of them.
    public var features: FeatureSet?
    public var memoryByteCount = 16 << 20
    /// Rings get no kick descriptor: the device has to look at them by itself.
    public var isPolled = false
    public init() {}
    public init(queueCount: Int = 1, queueSize: UInt16 = 64, features: FeatureSet? = nil) {
      self.queueCount = queueCount
      self.queueSize = queueSize
      self.features = features
    }
  }

  /// A chain that came back.
  public struct Answer: Sendable {
    /// What the device wrote: the first `written` bytes of the room it was given.
    public let bytes: [UInt8]
    public let head: UInt16
  }

  /// One queue from the driver's side.
  final class Queue {
    var driver: DriverQueue
    let kick: EventFD
    let call: EventFD
    let error: EventFD
    /// By head: where the room begins, and how much there is.
    var rooms: [UInt16: (address: GuestAddress, byteCount: Int)] = [:]

    init(_ driver: consuming DriverQueue) throws(SystemError) {
      let kick = try EventFD()
      let call = try EventFD()
      let error = try EventFD()
      self.kick = kick
      self.call = call
      self.error = error
      self.driver = driver
    }
  }

  /// How long an answer is waited for.
  public var patience = Duration.seconds(5)
  /// What the back end offers.
  public internal(set) var offered: FeatureSet = []
  /// What was acknowledged.
  public internal(set) var features: FeatureSet = []
  public internal(set) var protocolFeatures: ProtocolFeatures = []
  /// The guest's memory.
  public let memory: GuestMemory

  var session: BlockingFrontEnd?
  var queues: [Queue] = []
  let setup: Setup
  private var server: HostThread?
  let memoryFD: OwnedFD
  /// Guest memory is handed out from here on, and again from the start when all of it was.
  var nextFree: UInt64
  let firstBuffer: UInt64
  static let guestStart: UInt64 = 0x10_0000
  static let userStart: UInt64 = 0x7D00_0000_0000

  /// For a back end at the other end of a connected socket.
  public init(_ socket: consuming OwnedFD, _ setup: Setup = Setup()) throws(FakeFrontEndError) {
    precondition(setup.queueCount > 0 && setup.queueCount <= 256, "A device has 1 to 256 queues.")
    self.setup = setup
    let size = setup.memoryByteCount
    let fd = try Self.attempt("There is no memory for the guest") { () throws(SystemError) in
      try SharedMemory.sealed(name: "fake-guest", byteCount: UInt64(size))
    }
    let mapping = try Self.attempt("There is no memory for the guest") { () throws(SystemError) in
      try MemoryMapping.shared(fd, byteCount: size)
    }
    memory = try Self.attempt("There is no memory for the guest") { () throws(MemoryError) in
      try GuestMemory(regions: [
        MemoryRegion(
          guestAddress: GuestAddress(Self.guestStart), byteCount: UInt64(size), frontEndAddress: Self.userStart, fileOffset: 0,
          mapping: mapping)
      ])
    }
    memoryFD = fd
    let all = DeviceProfile.ringFeatures.union(setup.features ?? [])
    let ring = UInt64(VirtqueueConfiguration.contiguousByteCount(size: setup.queueSize, features: []) + 4096) & ~63
    let packed = UInt64(VirtqueueConfiguration.contiguousByteCount(size: setup.queueSize, features: all) + 4096) & ~63
    firstBuffer = Self.guestStart + max(ring, packed) * UInt64(setup.queueCount)
    nextFree = firstBuffer
    session = BlockingFrontEnd(socket)
    try negotiate()
    for index in 0..<setup.queueCount {
      let place = GuestAddress(Self.guestStart + max(ring, packed) * UInt64(index))
      do {
        let shape = VirtqueueConfiguration.contiguous(size: setup.queueSize, features: features, at: place)
        queues.append(try Queue(DriverQueue(shape, memory: memory)))
      } catch { throw FakeFrontEndError("Queue \(index) cannot be made: \(error)") }
      try start(queue: index)
    }
  }

  /// For a program that listens at a path; waits for it to come up.
  public convenience init(socket path: String, _ setup: Setup = Setup()) throws(FakeFrontEndError) {
    try self.init(Self.connect(to: path), setup)
  }

  private static func connect(to path: String) throws(FakeFrontEndError) -> OwnedFD {
    let end = MonotonicTime.now.advanced(by: .seconds(10))
    while true {
      do { return try UnixSocket.connect(to: path) } catch {
        guard MonotonicTime.now < end else { throw FakeFrontEndError("No connection to \(path): \(error)") }
        usleep(5000)
      }
    }
  }

  /// For a device in this process, on a thread of its own.
  public convenience init<Device: ChainDevice & SendableMetatype & ~Copyable>(
    _ setup: Setup = Setup(), serving make: @escaping @Sendable () throws -> Device
  ) throws(FakeFrontEndError) {
    try self.init(setup, thread: { socket in try BackendProgram.serve(socket, try make()) })
  }

  /// For a device in this process that has its queues in its own hands.
  public convenience init<Device: DeviceBackend & SendableMetatype & ~Copyable>(
    _ setup: Setup = Setup(), serving make: @escaping @Sendable () throws -> Device
  ) throws(FakeFrontEndError) {
    try self.init(setup, thread: { socket in try BackendProgram.serve(socket, try make()) })
  }

  private convenience init(
    _ setup: Setup, thread body: @escaping @Sendable (consuming OwnedFD) throws -> Void
  ) throws(FakeFrontEndError) {
    let pair = try Self.attempt("There is no socket pair") { () throws(SystemError) in try UnixSocket.pair(.stream) }
    let ours = try Self.attempt("There is no socket") { () throws(SystemError) in try pair.first.duplicate() }
    let theirs = try Self.attempt("There is no socket") { () throws(SystemError) in try pair.second.duplicate().release() }
    let thread = try Self.attempt("The device has no thread") { () throws(SystemError) in
      try HostThread.start(name: "device") {
        do { try body(OwnedFD(owning: theirs)) } catch { Log.error("\(error)") }
      }
    }
    try self.init(ours, setup)
    server = thread
  }

  static func attempt<R: ~Copyable, E: Error>(_ what: String, _ body: () throws(E) -> R) throws(FakeFrontEndError) -> R {
    do { return try body() } catch { throw FakeFrontEndError("\(what): \(error)") }
  }

  deinit { leave() }

  /// Hangs up, and waits for the end of a device that runs in this process.
  public func leave() {
    session = nil
    server.take()?.join()
  }
}
