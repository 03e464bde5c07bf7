import Synchronization

/// Whether processors run: one command for all, and how many have obeyed.
final class ProcessorControl: Sendable {
  enum Command: UInt32 {
    case pause = 0
    case run = 1
    case end = 2
  }

  /// Read by every processor before each entry into the guest; changed under the gate.
  private let current = Atomic<UInt32>(Command.pause.rawValue)
  /// Whether the PCI bus can be looked at. Read at every access to it; changed under the gate.
  private let busState = Atomic<Bool>(true)
  let gate = Gate()
  private let counts: Counts
  let processorCount: Int

  /// Guarded by the gate.
  private final class Counts: @unchecked Sendable {
    // @unchecked: only touched inside `gate.withLock`.
    var parked = 0
    var ended = 0
    var failure: MachineError?
  }

  init(processorCount: Int) {
    self.processorCount = processorCount
    counts = Counts()
  }

  var command: Command {
    @inline(__always) get { Command(rawValue: current.load(ordering: .sequentiallyConsistent)) ?? .pause }
  }

  var busIsOpen: Bool {
    @inline(__always) get { busState.load(ordering: .acquiring) }
  }

  func setBus(open: Bool) {
    gate.withLock {
      busState.store(open, ordering: .releasing)
      gate.wakeAll()
    }
  }

  /// A processor that looks at the bus while it is shut waits here, until it is opened or the guest is stopped.
  func waitForBus() {
    gate.withLock { gate.wait { busIsOpen || command != .run } }
  }

  /// Changes the command; an end is final.
  func set(_ command: Command) {
    gate.withLock {
      guard self.command != .end else { return }
      current.store(command.rawValue, ordering: .sequentiallyConsistent)
      gate.wakeAll()
    }
  }

  /// A processor's thread stops here until it shall run or end.
  func park() {
    gate.withLock {
      counts.parked += 1
      gate.wakeAll()
      gate.wait { command != .pause }
      counts.parked -= 1
    }
  }

  func reportFailure(_ error: MachineError) {
    gate.withLock {
      if counts.failure == nil { counts.failure = error }
    }
  }

  func reportEnd() {
    gate.withLock {
      counts.ended += 1
      gate.wakeAll()
    }
  }

  /// Waits until no processor runs; returns the first failure of a processor's set-up.
  func waitUntilParked() -> MachineError? {
    gate.withLock {
      gate.wait { counts.parked + counts.ended == processorCount }
      return counts.failure
    }
  }
}
