import HostSystem
import VhostUser
import VirtioSpec

/// Rings that have stopped while their back end is still at work on what it had taken from them.
///
/// By the protocol a ring that `GET_VRING_BASE` has stopped is not touched any more. Not every back end keeps to that: QEMU's
/// storage daemon (7.2) answers with the index up to which it has taken chains, and finishes those afterwards. Who goes on with such
/// a ring would race with it for the used ring, and a guest whose reset is over would find its memory written to. Where the ring
/// is split and nobody records requests in flight, the used index in guest memory tells: it arrives at the base when all is done.
///
/// A packed ring's base says both where chains were taken to and where they were answered to; there nothing in memory can be waited
/// for, but such a ring is not handed on.
extension DeviceFrontEnd {
  /// What goes on afterwards.
  enum Sequel { case exchange, pause, reset }

  struct Settling {
    /// A pause may come while a reset is being waited for.
    var sequels: [Sequel] = []
    /// Used rings in guest memory, and where their index must arrive.
    var rings: [(used: UInt64, base: UInt16)] = []
    var deadline: MonotonicTime
    var nextLook: MonotonicTime
  }

  /// How long a look at the rings is good for.
  private static var interval: Duration { .microseconds(500) }

  /// Goes on with `sequel`: at once, or as soon as nothing is in flight any more.
  ///
  /// - Parameter bases: what `GET_VRING_BASE` was answered.
  func settle(_ bases: [VringState], _ sequel: Sequel, _ now: MonotonicTime) {
    let limit = now.advanced(by: configuration.timeouts.drain)
    var settling = settling ?? Settling(deadline: limit, nextLook: now)
    settling.sequels.append(sequel)
    settling.nextLook = now
    if sequel == .exchange { settling.deadline = drainDeadline ?? limit }
    let mayFinishLate = session?.mayFinishLate == true
    if mayFinishLate {
      settling.rings += bases.compactMap { base in
        usedRings[Int(base.index)].map { ($0, UInt16(truncatingIfNeeded: base.number)) }
      }
    }
    self.settling = settling
    if mayFinishLate, sequel == .exchange, activation?.features.contains(.packedRing) == true {
      let unfinished = bases.count { $0.number & 0xFFFF != $0.number >> 16 }
      guard unfinished == 0 else { return failExchange(.unfinished(rings: unfinished), now) }
    }
    lookWhetherSettled(now)
  }

  func lookWhetherSettled(_ now: MonotonicTime) {
    guard var present = settling, present.nextLook <= now else { return }
    // A used ring in no memory is nobody's.
    present.rings.removeAll { ring in host?.usedIndex(ofUsedRing: ring.used).map { $0 == ring.base } ?? true }
    present.nextLook = now.advanced(by: Self.interval)
    settling = present
    if present.rings.isEmpty {
      settling = nil
      for sequel in present.sequels { finish(sequel, now) }
    } else if present.deadline <= now {
      let error = VhostUserError.unfinished(rings: present.rings.count)
      if present.sequels.contains(.exchange) { failExchange(error, now) } else { lose(error) }
    }
  }

  /// Where rings go on that have stopped at `bases`. A back end whose ring has a thread of its own may look where the ring stands before that
  /// thread has stopped (virtiofsd does): its used index is then beyond what it answered, and what was answered must not be taken again.
  func notBehindUsed(_ bases: [VringState]) -> [VringState] {
    guard activation?.features.contains(.packedRing) == false else { return bases }
    return bases.map { base in
      guard let used = usedRings[Int(base.index)].flatMap({ host?.usedIndex(ofUsedRing: $0) }),
        Int16(bitPattern: used &- UInt16(truncatingIfNeeded: base.number)) > 0
      else { return base }
      return VringState(index: base.index, number: UInt32(used))
    }
  }

  private func finish(_ sequel: Sequel, _ now: MonotonicTime) {
    switch sequel {
    case .exchange: startCandidate(notBehindUsed(oldBases), now)
    case .pause:
      guard state == .pausing else { return }
      state = .paused
      events.append(.paused)
    case .reset:
      if state == .resetting { state = .idle }
      completeReset()
    }
  }
}
