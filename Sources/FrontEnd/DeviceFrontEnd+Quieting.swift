import HostSystem
import VhostUser
import VirtioSpec

/// A back end comes to rest before it is stopped.
///
/// One that records no requests in flight and dies at the stop, as QEMU's storage daemon may (DeviceFrontEnd+Settling), takes what it
/// had begun with it: what it had finished out of turn looks as if it were still to be done, and the rest is lost. So a disk's rings
/// first get a kick that nobody gives; what the guest makes available meanwhile waits behind its own, which counts. When the used
/// rings have stood still for a moment, nothing is in flight, or only what takes long.
extension DeviceFrontEnd {
  struct Quieting {
    let silence: SharedDescriptor
    var indices: [UInt16?] = []
    var since: MonotonicTime
    /// Nil until the back end has the other kick, and when it is to have its own again.
    var nextLook: MonotonicTime?
  }

  /// How long the used rings must stand still.
  private static var rest: Duration { .milliseconds(10) }
  private static var interval: Duration { .microseconds(500) }

  /// False: it need not be, or cannot.
  func deafen(_ now: MonotonicTime) -> Bool {
    guard session?.mayFinishLate == true, activation?.features.contains(.packedRing) == false,
      let event = try? EventFD(), let silence = try? SharedDescriptor(event.fd.duplicate())
    else { return false }
    quieting = Quieting(silence: silence, since: now)
    session?.replaceKicks(silence, now: now)
    return true
  }

  /// The back end hears what it is to hear.
  func kicksReplaced(_ now: MonotonicTime) {
    guard quieting != nil else { return }
    switch exchange {
    case .draining:
      quieting?.since = now
      quieting?.nextLook = now
      lookWhetherQuiet(now)
    case .undoing:
      quieting = nil
      finishUndoing(now)
    default: break
    }
  }

  func lookWhetherQuiet(_ now: MonotonicTime) {
    guard var present = quieting, let next = present.nextLook, next <= now else { return }
    let indices = usedRings.sorted { $0.key < $1.key }.map { host?.usedIndex(ofUsedRing: $0.value) }
    if indices != present.indices {
      present.indices = indices
      present.since = now
    }
    present.nextLook = now.advanced(by: Self.interval)
    quieting = present
    guard now.since(present.since) >= Self.rest else { return }
    quieting = nil
    session?.stop(now: now)
  }
}
