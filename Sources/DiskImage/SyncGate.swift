import HostSystem
import Synchronization

/// Lets one sync of an image's file run at a time. The kernel tells of a lost write once per open file: of two syncs that are under way
/// together one hears of it, and the other does not, though what was lost may be what it was to make stable. Who comes while one runs
/// waits; the next one is for all who wait.
package final class SyncGate: Sendable {
  struct Waiter: Sendable {
    let port: SyncPort
    let slot: UInt16
  }

  private struct State {
    var isBusy = false
    /// For whom the running sync is, besides the one that leads it.
    var group: [Waiter] = []
    /// For whom the next one will be.
    var waiting: [Waiter] = []
  }

  private let state = Mutex(State())

  package init() {}

  /// Makes room for the slots of one more engine, so that none is made while it works.
  func reserve(_ depth: Int) {
    state.withLock { state in
      let count = max(state.group.capacity, state.waiting.capacity) + depth
      state.group.reserveCapacity(count)
      state.waiting.reserveCapacity(count)
    }
  }

  /// Whether the slot's sync is to begin now; else a letter says what is to be done.
  package func enter(_ port: SyncPort, _ slot: UInt16) -> Bool {
    state.withLock { state in
      if state.isBusy {
        state.waiting.append(Waiter(port: port, slot: slot))
        return false
      }
      state.isBusy = true
      return true
    }
  }

  /// A sync that was to begin has ended, with zero or a negated errno. All it was for are told, and one of those who came meanwhile is
  /// told to begin. Letters to `port` are left to the caller, who takes them at once.
  package func leave(_ result: CInt, from port: SyncPort?) {
    state.withLock { state in
      for waiter in state.group { waiter.port.post(.ended(result), to: waiter.slot, wakes: waiter.port !== port) }
      state.group.removeAll(keepingCapacity: true)
      swap(&state.group, &state.waiting)
      // One of the caller's own needs nobody to be woken.
      guard let place = state.group.firstIndex(where: { $0.port === port }) ?? state.group.indices.first else {
        state.isBusy = false
        return
      }
      let leader = state.group.remove(at: place)
      leader.port.post(.begin, to: leader.slot, wakes: leader.port !== port)
    }
  }
}

/// Where an engine gets its letters from the gate.
package final class SyncPort: Sendable {
  package enum Letter: Sendable, Equatable {
    /// The slot's sync is to begin.
    case begin
    /// It was part of another's, which has ended with zero or a negated errno.
    case ended(CInt)
  }

  /// Readable when there may be letters.
  package let event: EventFD
  private let letters = Mutex<[(slot: UInt16, letter: Letter)]>([])

  package init(depth: Int) throws(SystemError) {
    event = try EventFD()
    letters.withLock { $0.reserveCapacity(depth) }
  }

  fileprivate func post(_ letter: Letter, to slot: UInt16, wakes: Bool) {
    letters.withLock { $0.append((slot, letter)) }
    if wakes { event.signal() }
  }

  package func next() -> (slot: UInt16, letter: Letter)? { letters.withLock { $0.popLast() } }

  /// The next letter, written into the state of its slot: what the slot's request has come to, or nil where its sync is to begin.
  @unsafe
  func next(
    for slots: UnsafeMutablePointer<TransferState>, _ image: DiskImage, _ ends: WriteEnds?
  ) -> (slot: UInt16, outcome: StorageOutcome?)? {
    guard let (slot, letter) = next() else { return nil }
    // SAFETY: the gate was given the slot by the engine that has this port, and gives it back.
    let state = unsafe slots + Int(slot)
    switch letter {
    case .begin:
      unsafe state.pointee.leadsSync = true
      return (slot, nil)
    case .ended(let result):
      guard case .finished(let outcome) = unsafe state.pointee.advance(Int(result), image) else {
        preconditionFailure("A sync ends with its result.")
      }
      return (slot, unsafe state.pointee.settled(outcome, image, looks: true, ends, Int(slot)))
    }
  }
}
