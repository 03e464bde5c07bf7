import CSandbox
import HostSystem
import Sandbox

/// The uid and gid of a process of its own.
package struct ChildIdentity: Hashable, Sendable {
  package var uid: UInt32
  package var gid: UInt32

  package init(uid: UInt32, gid: UInt32) {
    self.uid = uid
    self.gid = gid
  }
}

/// A process to be started: fork, the first half of the walls, exec.
package struct ChildLaunch {
  /// argv, the program's name first. Must hold the title's length: the title is later written over it.
  package var arguments: [String]
  /// Lent for the call of `start`; element i becomes descriptor i of the child, everything else is closed there.
  package var descriptors: [CInt]
  /// nil: the launcher's own ids are kept (it is an ordinary user).
  package var identity: ChildIdentity?
  /// RLIMIT_NOFILE of the child.
  package var fileLimit: UInt64
  /// RLIMIT_NPROC: threads, the kernel's io_uring workers among them. Only set for a uid or a user namespace of its own,
  /// because the kernel counts by them.
  package var threadLimit: UInt64?
  /// What of the host it does not see.
  package var namespaces: Namespaces = []
  /// What the child gets when the launcher dies.
  package var parentDeathSignal: CInt
  /// For somebody else's program: what it sees and may do. Without one: an empty root and no filter, which our programs
  /// put on themselves.
  package var jail: JailWalls?
  /// For a program that stands in for one behind its filter: the filter, and the number with which exec passes it.
  var filter: [SystemCallFilter.Instruction] = []
  var cookie: UInt64 = 0
  /// One that may what the launcher may: only descriptors are arranged.
  var isHelper = false

  /// The directory of its control group, lent for the call of `start`; nil: the launcher's.
  package var group: CInt?

  /// The most descriptors that can be handed over.
  package static let descriptorLimit = 32

  package init(
    arguments: [String], descriptors: [CInt], identity: ChildIdentity? = nil, fileLimit: UInt64 = 256,
    parentDeathSignal: CInt = 9, namespaces: Namespaces = [], threadLimit: UInt64? = nil
  ) {
    self.namespaces = namespaces
    self.threadLimit = threadLimit
    self.arguments = arguments
    self.descriptors = descriptors
    self.identity = identity
    self.fileLimit = fileLimit
    self.parentDeathSignal = parentDeathSignal
  }

  /// Starts the process and returns at once; whether exec succeeded is learnt from `StartedChild.poll`.
  /// Must be called on the main thread: the parent-death signal follows the thread that forked.
  /// - Parameter asSibling: the new process is not our child but our parent's.
  package func start(_ executable: borrowing OwnedFD, asSibling: Bool = false) throws(SandboxError) -> StartedChild {
    try start(executable.rawValue, asSibling: asSibling)
  }

  /// Walks through all steps but exec and waits for the outcome: nil when they all work here.
  package func attempt() throws(SandboxError) -> (Stage, Errno)? {
    let child = try start(-1)
    _ = child.process.waitForEnd()
    guard case .failed(let stage, let errno) = child.poll() else { return nil }
    return (stage, errno)
  }

  /// The same of a number; -1 for no program.
  func start(_ executable: CInt, asSibling: Bool = false) throws(SandboxError) -> StartedChild {
    precondition(descriptors.count <= Self.descriptorLimit, "No process is given more than 32 descriptors.")
    var pidfd: CInt = -1
    var report: CInt = -1
    // SAFETY: argument vector and descriptor array live unchanged for the call; the child works on its own copy of memory.
    let pid = unsafe ArgumentVector.lend(arguments) { argv in
      unsafe withArrays { numbers, program in
        let isCountedAlone = identity != nil || namespaces.contains(.user)
        var launch = unsafe csandbox_launch(
          executable: executable, arguments: argv, descriptors: numbers.baseAddress,
          descriptor_count: CInt(numbers.count), change_identity: identity == nil ? 0 : 1, uid: identity?.uid ?? 0,
          gid: identity?.gid ?? 0, file_limit: fileLimit, process_limit: isCountedAlone ? threadLimit ?? 0 : 0,
          namespaces: namespaces.rawValue | (asSibling ? 0x8000 : 0), parent_death_signal: parentDeathSignal, group: group ?? -1, jail: nil,
          filter: filter.isEmpty ? nil : program.baseAddress, filter_length: UInt16(filter.count), cookie: cookie,
          is_helper: isHelper ? 1 : 0)
        guard let jail else { return unsafe csandbox_start(&launch, &pidfd, &report) }
        return unsafe jail.withStructure { structure in
          unsafe launch.jail = structure
          return unsafe csandbox_start(&launch, &pidfd, &report)
        }
      }
    }
    guard pid > 0 else { throw .step(.fork, program: arguments.first ?? "", Errno(-pid)) }
    return StartedChild(
      process: ProcessHandle(processID: pid, adopting: OwnedFD(owning: pidfd)), report: OwnedFD(owning: report))
  }
}

extension ChildLaunch {
  /// Lends descriptors and filter, for the call only.
  private func withArrays<Result>(_ body: (UnsafeBufferPointer<CInt>, UnsafeRawBufferPointer) -> Result) -> Result {
    unsafe descriptors.withUnsafeBufferPointer { numbers in unsafe filter.withUnsafeBytes { unsafe body(numbers, $0) } }
  }
}

/// A process between fork and exec, or beyond.
package struct StartedChild: ~Copyable, Sendable {
  package let process: ProcessHandle
  /// Readable when exec has succeeded or a step has failed.
  package let report: OwnedFD

  /// Looks at the report pipe without waiting.
  package borrowing func poll() -> LaunchOutcome { LaunchOutcome(reading: report) }
}

/// How far a new process has come.
package enum LaunchOutcome: Equatable, Sendable {
  case pending
  case executed
  case failed(Stage, Errno)
  /// As `failed`, at a place of the jail (its index).
  case failedAt(Stage, Errno, place: Int)

  init(reading report: borrowing OwnedFD) {
    var raw = csandbox_report()
    // SAFETY: the buffer is `raw` itself.
    let transfer = unsafe withUnsafeMutableBytes(of: &raw) { bytes in unsafe report.read(into: bytes) }
    switch transfer {
    case .end: self = .executed
    case .wouldBlock: self = .pending
    case .bytes(let count) where count == MemoryLayout<csandbox_report>.size:
      let stage = Stage(rawValue: raw.step) ?? .exec
      self = raw.detail >= 0 ? .failedAt(stage, Errno(raw.error), place: Int(raw.detail)) : .failed(stage, Errno(raw.error))
    case .bytes: self = .failed(.exec, .inputOutput)
    case .failed(let error): self = .failed(.exec, error)
    }
  }
}
