import BackendKit
import DiskImage
import HostSystem
import VirtioQueue
import VirtioSpec

/// What a block device is to be, besides its image.
package struct BlockOptions: Sendable {
  /// How the storage is reached.
  package enum Access: String, Sendable {
    case ring = "io_uring"
    /// Ordinary calls, in threads of their own.
    case threads
  }

  package var queueCount = 1
  package var greatestQueueSize: UInt16 = 256
  /// The logical block the guest sees; nil for the image's own.
  package var blockSize: Int?
  /// At most 20 bytes.
  package var serial = ""
  /// Nil for io_uring where there is one.
  package var access: Access?
  package var poll = PollPolicy.auto
  /// No more than QEMU's storage daemon promises.
  package var isPortable = false
  package var byteRate: RateBucket?
  package var operationRate: RateBucket?
  /// Not to be offered, though it could be: of packed rings, event indices and indirect tables.
  package var missing: FeatureSet = []
  /// What the storage says of its wear.
  package var lifetime: StorageLifetime?

  package init() {}
}

/// The block device towards the kit: one worker thread per queue, all of them started before the sandbox closes and
/// asleep until their queue is.
package struct BlockBackend: DeviceBackend, ~Copyable {
  private let space: BlockConfigurationSpace
  private let access: BlockOptions.Access?
  private var desks: [WorkerDesk] = []
  private var threads: [HostThread] = []
  private var usesRing = false
  private var usesCalls = false
  /// Queues a worker has.
  private var running: [Int: QueuePorts] = [:]

  package init(image: DiskImage, _ options: BlockOptions) {
    space = BlockConfigurationSpace(image: image, blockSize: options.blockSize ?? image.logicalBlockSize, options)
    access = options.access
  }

  deinit {
    for desk in desks { desk.give(.leave) }
    for thread in threads { thread.join() }
  }

  package var profile: DeviceProfile {
    DeviceProfile(
      device: .block, queueCount: space.queueCount, greatestQueueSize: space.greatestQueueSize, features: space.features,
      kickWaiter: .device)
  }

  package var configuration: [UInt8] { space.bytes }

  package var systemCalls: SystemCallNeeds {
    SystemCallNeeds((usesRing ? [.block] : []) + (usesCalls ? [.blockCalls] : []) + (space.image.takesControl ? [.blockControl] : []))
  }

  package mutating func prepare(_ context: inout BackendContext) throws(BackendError) {
    do {
      for index in 0..<space.queueCount {
        let desk = try WorkerDesk()
        let start = StartReport()
        let space = space
        let access = access
        let ready = try EventFD()
        let signal = try ready.duplicate()
        let port = SignalPort(signal)
        threads.append(
          try HostThread.start(name: "queue \(index)") {
            runBlockWorker(desk, space, access, queue: index) { report in
              start.set(report)
              port.event.signal()
            }
          })
        desks.append(desk)
        try ready.fd.waitUntil(.readable)
        switch start.value {
        case .ready(let how, let ring):
          if ring { usesRing = true } else { usesCalls = true }
          if index == 0 { Log.info("Storage: \(how)") }
        case .failed(let error):
          guard access == .ring else { throw BackendError.system(error) }
          throw BackendError.device(
            "\(error); say --aio=threads (aio=threads of --disk), or leave it out; where the host forbids io_uring, sysctl "
              + "kernel.io_uring_disabled=0 allows it")
        case nil: throw BackendError.device("A queue's thread said nothing")
        }
      }
    } catch { throw BackendError(error) }
  }

  package mutating func negotiated(_ features: FeatureSet, _ context: inout BackendContext) { space.negotiated(features) }

  package mutating func writeConfiguration(_ bytes: [UInt8], at offset: Int, _ context: inout BackendContext) -> Bool {
    space.write(bytes, at: offset)
  }

  package mutating func start(_ queue: consuming DeviceQueue, _ context: inout BackendContext) throws(BackendError) {
    do { try space.image.claim() } catch { throw .device("\(error)") }
    space.image.keepFailures(in: queue.counters)
    let index = queue.index
    running[index] = queue.ports
    desks[index].give(.serve(queue))
  }

  package mutating func stop(queue index: Int, _ context: inout BackendContext) throws(BackendError) -> DeviceQueue? {
    guard let ports = running.removeValue(forKey: index) else { return nil }
    desks[index].give(.stop)
    do { return try desks[index].collect(ports) } catch { throw .system(error) }
  }

  package mutating func lookAgain(_ context: inout BackendContext) {
    do {
      guard try space.image.lookAgain() else { return }
      Log.info("The disk has \(space.image.byteCount) bytes now")
      context.configurationChanged()
    } catch {
      Log.warning("The disk's size cannot be taken anew, and stays: \(error)")
    }
  }

  package mutating func reset(_ context: inout BackendContext) { space.reset() }
  package mutating func disconnected(_ context: inout BackendContext) { space.reset() }
}
