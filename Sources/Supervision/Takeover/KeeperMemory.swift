import CLinux
import CSandbox
import Glibc
import HostSystem

/// What supervisor and keeper share: the supervisor's latest state, which it writes and its successor reads, and the ends of
/// processes, which the keeper writes because it is their parent. The keeper looks at nothing of it but whether there is a state,
/// and whether an upgrade has been prepared.
///
/// Unchecked: all accesses are atomic, or to a place that nobody looks at.
@safe
final class KeeperMemory: @unchecked Sendable {
  // Two places for a state; the number of the latest one says which counts, so that one that was being written when its
  // writer was killed does not.
  private enum Layout {
    static let number = 0
    static let hasState = 8
    static let lengths = 16
    /// An upgrade: one more than the number of the program's descriptor, or 0; the state's length; why it came to nothing.
    static let program = 32
    static let upgradeLength = 40
    static let obstacle = 48
    static let endCount = 64
    static let ends = 4096
    static let endSize = 16
    static let states = 32768
    static let upgradeState = states + 2 * SupervisorState.limit
    static let size = upgradeState + SupervisorState.limit
  }

  /// As many ends are known as a VM can have at a time, and more.
  private static let endCapacity: UInt64 = 1024
  /// How long the keeper may take to write down an end that has shown.
  private static let patience = 2000

  private let memory: UnsafeMutableRawPointer
  /// The keeper's.
  let processID: Int32

  // What the latest state names must stay open, under the same numbers, until there is another.
  private var putsOffClosing = false
  private var closings: [CInt] = []

  /// In the keeper, before it has a child.
  init() throws(SupervisionError) {
    guard let memory = unsafe csandbox_shared_memory(Layout.size) else {
      throw .system(SystemError("share memory with the supervisor", Errno.current))
    }
    unsafe self.memory = memory
    processID = getpid()
  }

  // SAFETY, for all below: offsets are those of the layout, whose memory lives as long as the process.

  // MARK: the state

  /// False: it is too long, and there is none now.
  func publish(_ state: [UInt8]) -> Bool {
    guard state.count <= SupervisorState.limit else {
      retract()
      return false
    }
    let next = unsafe clinux_load_relaxed_u64(memory + Layout.number) &+ 1
    let place = Int(next & 1)
    unsafe state.withUnsafeBytes { bytes in
      guard let start = bytes.baseAddress else { return }
      unsafe (memory + Layout.states + place * SupervisorState.limit).copyMemory(from: start, byteCount: bytes.count)
    }
    unsafe clinux_store_relaxed_u64(memory + Layout.lengths + 8 * place, UInt64(state.count))
    unsafe clinux_store_release_u64(memory + Layout.number, next)
    unsafe clinux_store_release_u64(memory + Layout.hasState, 1)
    closePutOff()
    putsOffClosing = true
    return true
  }

  /// The VM ends: nobody is to take it over.
  func retract() {
    unsafe clinux_store_release_u64(memory + Layout.hasState, 0)
    putsOffClosing = false
    closePutOff()
  }

  /// In a successor: what it closes, the next one may have to close again.
  func putOffClosing() { putsOffClosing = true }

  /// Called for every descriptor that is to be closed; true: it is done later.
  func putOff(_ number: CInt) -> Bool {
    if putsOffClosing { closings.append(number) }
    return putsOffClosing
  }

  private func closePutOff() {
    for number in closings { close(number) }
    closings = []
  }

  var hasState: Bool { unsafe clinux_load_acquire_u64(memory + Layout.hasState) == 1 }

  /// The latest one.
  var state: [UInt8] {
    let place = Int(unsafe clinux_load_acquire_u64(memory + Layout.number) & 1)
    let length = min(Int(clamping: unsafe clinux_load_relaxed_u64(memory + Layout.lengths + 8 * place)), SupervisorState.limit)
    return unsafe Array(UnsafeRawBufferPointer(start: memory + Layout.states + place * SupervisorState.limit, count: length))
  }

  // MARK: an upgrade

  /// The supervisor ends, for the program behind a descriptor to take the VM over with this state; when that cannot be executed, the
  /// latest state counts. False: it is too long.
  func offer(_ state: [UInt8], program: CInt) -> Bool {
    guard state.count <= SupervisorState.limit else { return false }
    unsafe state.withUnsafeBytes { bytes in
      guard let start = bytes.baseAddress else { return }
      unsafe (memory + Layout.upgradeState).copyMemory(from: start, byteCount: bytes.count)
    }
    unsafe clinux_store_relaxed_u64(memory + Layout.upgradeLength, UInt64(state.count))
    unsafe clinux_store_release_u64(memory + Layout.program, UInt64(UInt32(bitPattern: program)) + 1)
    return true
  }

  /// In the keeper: what the supervisor that has ended wanted to be executed, and with which state.
  var offered: (program: CInt, state: [UInt8])? {
    guard let program = CInt(exactly: Int64(bitPattern: unsafe clinux_load_acquire_u64(memory + Layout.program)) &- 1), program >= 0 else {
      return nil
    }
    let length = min(Int(clamping: unsafe clinux_load_relaxed_u64(memory + Layout.upgradeLength)), SupervisorState.limit)
    return (program, unsafe Array(UnsafeRawBufferPointer(start: memory + Layout.upgradeState, count: length)))
  }

  /// In the keeper, before there is another supervisor.
  func withdrawOffer() { unsafe clinux_store_release_u64(memory + Layout.program, 0) }

  /// Why the program was not executed.
  var obstacle: Errno {
    get { Errno(Int32(truncatingIfNeeded: unsafe clinux_load_acquire_u64(memory + Layout.obstacle))) }
    set { unsafe clinux_store_release_u64(memory + Layout.obstacle, UInt64(UInt32(bitPattern: newValue.rawValue))) }
  }

  // MARK: ends of processes

  /// Those that are known, the oldest first.
  var ends: [KeeperState.End] {
    let count = unsafe clinux_load_acquire_u64(memory + Layout.endCount)
    return (count - min(count, Self.endCapacity)..<count).map { index in
      let place = unsafe memory + Layout.ends + Int(index % Self.endCapacity) * Layout.endSize
      let how = unsafe clinux_load_relaxed_u64(place + 8)
      return KeeperState.End(
        process: Int32(truncatingIfNeeded: unsafe clinux_load_relaxed_u64(place)), code: Int32(truncatingIfNeeded: how >> 32),
        status: Int32(truncatingIfNeeded: how))
    }
  }

  /// In the keeper.
  func record(_ process: Int32, code: CInt, status: CInt) {
    let count = unsafe clinux_load_relaxed_u64(memory + Layout.endCount)
    let place = unsafe memory + Layout.ends + Int(count % Self.endCapacity) * Layout.endSize
    unsafe clinux_store_relaxed_u64(place, UInt64(UInt32(bitPattern: process)))
    unsafe clinux_store_relaxed_u64(place + 8, UInt64(UInt32(bitPattern: code)) << 32 | UInt64(UInt32(bitPattern: status)))
    unsafe clinux_store_release_u64(memory + Layout.endCount, count &+ 1)
  }

  /// How a child of the keeper has ended; nil while it lives.
  /// - Parameter pidfd: becomes readable a moment before the keeper has written the end down.
  func end(of process: Int32, _ pidfd: CInt, waiting: Bool) -> ProcessEnd? {
    var entry = pollfd(fd: pidfd, events: Int16(POLLIN), revents: 0)
    // SAFETY: one entry of ours, alive for the call.
    guard unsafe poll(&entry, 1, waiting ? -1 : 0) > 0 else { return nil }
    for _ in 0..<Self.patience {
      if let end = recordedEnd(of: process) { return end }
      _ = poll(nil, 0, 1)
    }
    return nil
  }

  /// The newest of this number: numbers come again only after many others.
  private func recordedEnd(of process: Int32) -> ProcessEnd? {
    let count = unsafe clinux_load_acquire_u64(memory + Layout.endCount)
    for back in 0..<min(count, Self.endCapacity) {
      let place = unsafe memory + Layout.ends + Int((count - 1 - back) % Self.endCapacity) * Layout.endSize
      guard unsafe clinux_load_relaxed_u64(place) == UInt64(UInt32(bitPattern: process)) else { continue }
      let how = unsafe clinux_load_relaxed_u64(place + 8)
      let status = Int32(truncatingIfNeeded: how)
      return how >> 32 == UInt64(CLD_EXITED) ? .exited(code: status) : .killed(signal: status)
    }
    return nil
  }
}
