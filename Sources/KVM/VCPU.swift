import CLinux
import Glibc
import HostSystem

/// One virtual processor: its descriptor and its run area. Calls belong to the thread that runs it, or to another one
/// while that thread is parked; only `requestExit` may come from anywhere at any time.
@safe
package struct VCPU: ~Copyable, @unchecked Sendable {
  // @unchecked: the run area is plain shared memory; `requestExit` stores one byte atomically, everything else follows the
  // rule above.
  package let fd: OwnedFD
  private let runArea: UnsafeMutableRawPointer
  private let runByteCount: Int

  init(adopting fd: consuming OwnedFD, runByteCount: Int) throws(KVMError) {
    precondition(runByteCount >= 4096, "KVM's run area is at least one page")
    // SAFETY: a new shared mapping of the processor's descriptor, unmapped in deinit.
    let address = unsafe mmap(nil, runByteCount, PROT_READ | PROT_WRITE, MAP_SHARED, fd.rawValue, 0)
    guard let base = unsafe address, unsafe base != MAP_FAILED else {
      throw .failed(.mapRun, Errno.current)
    }
    self.fd = fd
    unsafe runArea = base
    self.runByteCount = runByteCount
  }

  deinit {
    _ = unsafe munmap(runArea, runByteCount)
  }

  // MARK: running

  /// Runs the guest until something needs attention.
  package borrowing func run() -> VCPUExit {
    let result = call(fd.rawValue, .run)
    if result < 0 {
      switch -result {
      case EINTR: return .interrupted
      // After INIT and start-up messages the kernel asks to be called again.
      case EAGAIN: return .again
      case let code: return .failed(Errno(code))
      }
    }
    return decodeExit()
  }

  /// Makes the next `run` return `.interrupted` at once. A processor already running needs the kick signal too.
  package borrowing func requestExit() {
    // SAFETY: byte 1 of the run area is `immediate_exit`, written atomically by whoever wants an exit.
    unsafe clinux_store_release_u8(runArea + 1, 1)
  }

  /// Takes the request back; look at the flags it stood for afterwards, not before.
  package borrowing func clearExitRequest() {
    // SAFETY: as above.
    unsafe clinux_store_release_u8(runArea + 1, 0)
    clinux_fence_full()
  }

  /// Finishes the instruction whose port or memory access was just handled, without running further.
  package borrowing func completePendingAccess() {
    requestExit()
    _ = call(fd.rawValue, .run)
    clearExitRequest()
  }

  // MARK: the run area

  private borrowing func load<Value: BitwiseCopyable>(_ offset: Int, as type: Value.Type) -> Value {
    precondition(offset >= 0 && offset + MemoryLayout<Value>.size <= runByteCount, "Inside the run area")
    // SAFETY: inside the mapping by the check; the kernel writes it only during `run`.
    return unsafe runArea.loadUnaligned(fromByteOffset: offset, as: type)
  }

  private borrowing func store<Value: BitwiseCopyable>(_ value: Value, _ offset: Int) {
    precondition(offset >= 0 && offset + MemoryLayout<Value>.size <= runByteCount, "Inside the run area")
    // SAFETY: as above.
    unsafe runArea.storeBytes(of: value, toByteOffset: offset, as: Value.self)
  }

  private borrowing func decodeExit() -> VCPUExit {
    switch load(8, as: UInt32.self) {
    case 2:
      return .port(
        PortAccess(
          isWrite: load(32, as: UInt8.self) != 0, port: load(34, as: UInt16.self), width: Int(load(33, as: UInt8.self)),
          count: Int(load(36, as: UInt32.self)), dataOffset: Int(truncatingIfNeeded: load(40, as: UInt64.self))))
    case 6:
      return .memory(
        MemoryAccess(
          isWrite: load(52, as: UInt8.self) != 0, address: load(32, as: UInt64.self),
          byteCount: Int(min(load(48, as: UInt32.self), 8)), value: load(40, as: UInt64.self)))
    case 5: return .halted
    case 8: return .tripleFault
    case 10: return .interrupted
    case 26: return .endOfInterrupt(vector: load(32, as: UInt8.self))
    case 24: return .systemEvent(type: load(32, as: UInt32.self))
    case 9: return .failedEntry(reason: load(32, as: UInt64.self))
    case 17:
      let count = Int(min(load(36, as: UInt32.self), 16))
      return .internalError(
        suberror: load(32, as: UInt32.self), data: (0..<count).map { load(40 + $0 * 8, as: UInt64.self) })
    case let reason: return .unknown(reason: reason)
    }
  }

  /// The `index`-th element of a port write.
  package borrowing func portData(_ access: PortAccess, _ index: Int) -> UInt32 {
    let offset = access.dataOffset + index * access.width
    switch access.width {
    case 1: return UInt32(load(offset, as: UInt8.self))
    case 2: return UInt32(load(offset, as: UInt16.self))
    default: return load(offset, as: UInt32.self)
    }
  }

  /// Answers the `index`-th element of a port read.
  package borrowing func setPortData(_ access: PortAccess, _ index: Int, _ value: UInt32) {
    let offset = access.dataOffset + index * access.width
    switch access.width {
    case 1: store(UInt8(truncatingIfNeeded: value), offset)
    case 2: store(UInt16(truncatingIfNeeded: value), offset)
    default: store(value, offset)
    }
  }

  /// Answers a memory read; the kernel takes as many low bytes as were asked for.
  package borrowing func setMemoryData(_ value: UInt64) {
    store(value, 40)
  }
}

/// Why a processor stopped running the guest.
package enum VCPUExit: Equatable, Sendable {
  case port(PortAccess)
  case memory(MemoryAccess)
  /// A level-triggered vector of the I/O APIC's range was acknowledged.
  case endOfInterrupt(vector: UInt8)
  case interrupted
  case again
  case halted
  case tripleFault
  /// 1 shut-down, 2 reset, 3 crash.
  case systemEvent(type: UInt32)
  case failedEntry(reason: UInt64)
  case internalError(suberror: UInt32, data: [UInt64])
  case unknown(reason: UInt32)
  case failed(Errno)
}

/// A port instruction: `count` elements of `width` bytes (string instructions have more than one).
package struct PortAccess: Equatable, Sendable {
  package var isWrite: Bool
  package var port: UInt16
  package var width: Int
  package var count: Int
  var dataOffset: Int
}

/// An access to a guest address without memory, 1 to 8 bytes; `value` is what is written.
package struct MemoryAccess: Equatable, Sendable {
  package var isWrite: Bool
  package var address: UInt64
  package var byteCount: Int
  package var value: UInt64
}
