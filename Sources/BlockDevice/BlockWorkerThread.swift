import DiskImage
import HostSystem
import Synchronization

/// How a worker's start came out.
enum WorkerStart: Sendable {
  /// With the way to the storage in words, and whether it is a ring.
  case ready(String, ring: Bool)
  case failed(SystemError)
}

/// Carries the result of a start from a new thread to the one that waits.
final class StartReport: Sendable {
  private let stored = Mutex<WorkerStart?>(nil)
  var value: WorkerStart? { stored.withLock { $0 } }
  func set(_ value: WorkerStart) { stored.withLock { $0 = value } }
}

/// An eventfd that a closure can hold.
final class SignalPort: Sendable {
  let event: EventFD
  init(_ event: consuming EventFD) { self.event = event }
}

/// The body of a worker's thread: the ring is made here, because only the thread that makes it may use it.
func runBlockWorker(
  _ desk: WorkerDesk, _ space: BlockConfigurationSpace, _ access: BlockOptions.Access?, queue: Int, report: (WorkerStart) -> Void
) {
  do {
    let needsCalls = access == nil && space.image.isServedByProcess
    if needsCalls, queue == 0 { Log.info("The image is on a file system that is a process (FUSE), so not by io_uring") }
    if access != .threads, !needsCalls {
      do {
        let engine = try RingEngine(space.image, depth: Int(space.greatestQueueSize))
        let traits = engine.traits
        var worker = try BlockQueueWorker(desk, space, engine)
        let work = traits.defersTaskWork ? "deferred completion work" : traits.cooperates ? "cooperative" : "basic"
        report(.ready("io_uring, " + work, ring: true))
        return worker.run()
      } catch {
        // Asked for by name, it must be had; else ordinary calls do as well, and it is said.
        if access == .ring { throw error }
        if queue == 0 {
          Log.warning("io_uring cannot be used (\(error.errno.explanation)): storage is reached by ordinary calls in threads")
        }
      }
    }
    let engine = try ThreadEngine(space.image, depth: Int(space.greatestQueueSize))
    var worker = try BlockQueueWorker(desk, space, engine)
    report(.ready("ordinary calls in \(ThreadEngine.threadCount) threads a queue", ring: false))
    worker.run()
  } catch {
    report(.failed(error as? SystemError ?? SystemError("start a queue's thread", .invalid)))
  }
}
