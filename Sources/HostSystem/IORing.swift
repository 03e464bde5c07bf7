import CLinux
import Glibc

/// An io_uring instance (`io_uring(7)`), owned by one thread: the one that makes it is the only one that may use it.
///
/// Entries are prepared in user space; `enter` hands them over, and sleeps if asked, in one system call; completions are
/// then taken one by one. What an entry points to (buffers, iovec arrays) must live until its completion was taken; iovec
/// arrays as well, because a kernel before 5.5 or a punt to a worker may read them late.
@safe
public struct IORing: ~Copyable {
  public let fd: OwnedFD
  /// What the kernel granted.
  public let traits: Traits

  private let memory: RingMemory
  @usableFromInline let entries: UnsafeMutablePointer<SubmissionEntry>
  @usableFromInline let submissionHead: UnsafeMutableRawPointer
  @usableFromInline let submissionTailPointer: UnsafeMutableRawPointer
  @usableFromInline let submissionFlags: UnsafeMutableRawPointer
  @usableFromInline let submissionMask: UInt32
  @usableFromInline let completionHeadPointer: UnsafeMutableRawPointer
  @usableFromInline let completionTailPointer: UnsafeMutableRawPointer
  @usableFromInline let completions: UnsafeMutableRawPointer
  @usableFromInline let completionMask: UInt32
  /// Next free submission slot; published to the kernel by `enter`.
  @usableFromInline var submissionTail: UInt32
  /// Prepared and not yet handed over.
  @usableFromInline var pending: UInt32 = 0
  @usableFromInline var completionHead: UInt32
  /// The flag for waiting work was set though the last `enter` had brought nothing.
  @usableFromInline var flagsMisled = false

  /// How a ring came out on this kernel.
  public struct Traits: Equatable, Sendable {
    /// `IORING_SETUP_SINGLE_ISSUER` and `IORING_SETUP_DEFER_TASKRUN` (Linux 6.1): completion work runs when we ask for it.
    public var defersTaskWork = false
    /// `IORING_SETUP_COOP_TASKRUN` (Linux 5.19): completion work never interrupts us.
    public var cooperates = false
    /// `IORING_SETUP_TASKRUN_FLAG` (Linux 5.19): waiting completion work shows in memory, so `hasWork` tells the whole truth (`showsWork`).
    public var showsTaskWork = false
    /// Operations and registrations are limited to what was asked for.
    public var isRestricted = false
    /// Slots of the submission queue.
    public var capacity = 0
  }

  public struct Configuration: Sendable {
    /// Most entries prepared between two `enter`s; rounded up to a power of two.
    public var capacity: Int
    /// Most completions waiting to be taken; rounded up to a power of two, at least twice `capacity`.
    public var completionCapacity: Int
    /// Descriptors to register: entries name them as `.registered(index)`.
    public var files: [CInt] = []
    /// The only operations this ring will ever do; nil for any.
    public var allowedOperations: [IOOperation]?
    /// Most kernel worker threads for operations that cannot be done without blocking; nil for the kernel's default.
    public var workerLimit: Int?

    public init(capacity: Int, completionCapacity: Int? = nil) {
      self.capacity = max(1, min(capacity, 32768))
      self.completionCapacity = max(completionCapacity ?? 0, 2 * self.capacity)
    }
  }

  /// Makes the ring with the best flags this kernel has, registers files, and closes it to everything else.
  /// - Throws: `EPERM` or `ENOSYS` where io_uring is disabled or filtered; use ordinary calls then.
  public init(_ configuration: Configuration) throws(SystemError) {
    var traits = Traits()
    traits.isRestricted = configuration.allowedOperations != nil
    var parameters = io_uring_params()
    let fd = try Self.create(configuration, &parameters, &traits)
    traits.capacity = Int(parameters.sq_entries)
    let memory = try RingMemory(fd, parameters)
    try Self.register(configuration, ring: fd.rawValue)
    self.init(fd: fd, traits: traits, memory: memory, parameters: parameters)
  }

  private init(fd: consuming OwnedFD, traits: Traits, memory: RingMemory, parameters: io_uring_params) {
    self.fd = fd
    self.traits = traits
    self.memory = memory
    // SAFETY: offsets are the kernel's own, inside the mappings it sized; the mappings live as long as this value.
    let submission = unsafe memory.submission.baseAddress
    let completion = unsafe memory.completion.baseAddress
    unsafe entries = memory.entries.baseAddress.bindMemory(to: SubmissionEntry.self, capacity: Int(parameters.sq_entries))
    unsafe submissionHead = submission + Int(parameters.sq_off.head)
    unsafe submissionTailPointer = submission + Int(parameters.sq_off.tail)
    unsafe submissionFlags = submission + Int(parameters.sq_off.flags)
    unsafe submissionMask = clinux_load_relaxed_u32(submission + Int(parameters.sq_off.ring_mask))
    unsafe completionHeadPointer = completion + Int(parameters.cq_off.head)
    unsafe completionTailPointer = completion + Int(parameters.cq_off.tail)
    unsafe completions = completion + Int(parameters.cq_off.cqes)
    unsafe completionMask = clinux_load_relaxed_u32(completion + Int(parameters.cq_off.ring_mask))
    unsafe submissionTail = clinux_load_relaxed_u32(submissionTailPointer)
    unsafe completionHead = clinux_load_relaxed_u32(completionHeadPointer)
    // The indirection array is the identity for ever: slot n of the queue is entry n.
    let array = unsafe submission + Int(parameters.sq_off.array)
    for slot in 0..<parameters.sq_entries { unsafe clinux_store_relaxed_u32(array + Int(slot) * 4, slot) }
  }

  /// Tries sets of flags from the newest to the oldest kernel; `EINVAL` means that one of them is unknown.
  private static func create(
    _ configuration: Configuration, _ parameters: inout io_uring_params, _ traits: inout Traits
  ) throws(SystemError) -> OwnedFD {
    let always = IORING_SETUP_CQSIZE | IORING_SETUP_CLAMP | (traits.isRestricted ? IORING_SETUP_R_DISABLED : 0)
    let deferred = IORING_SETUP_SINGLE_ISSUER | IORING_SETUP_DEFER_TASKRUN
    let attempts: [UInt32] = [
      always | IORING_SETUP_SUBMIT_ALL | deferred | IORING_SETUP_TASKRUN_FLAG,
      always | IORING_SETUP_SUBMIT_ALL | IORING_SETUP_COOP_TASKRUN | IORING_SETUP_TASKRUN_FLAG,
      always,
    ]
    var result: CInt = -EINVAL
    for flags in attempts {
      parameters = io_uring_params()
      parameters.flags = flags
      parameters.cq_entries = UInt32(clamping: configuration.completionCapacity)
      // SAFETY: `parameters` is ours and alive for the call.
      result = unsafe clinux_io_uring_setup(UInt32(configuration.capacity), &parameters)
      if result >= 0 {
        traits.defersTaskWork = flags & IORING_SETUP_DEFER_TASKRUN != 0
        traits.cooperates = flags & (IORING_SETUP_DEFER_TASKRUN | IORING_SETUP_COOP_TASKRUN) != 0
        traits.showsTaskWork = flags & IORING_SETUP_TASKRUN_FLAG != 0
        break
      }
      if result != -EINVAL { break }
    }
    return OwnedFD(owning: try checked(result, "make an io_uring"))
  }

  private static func register(_ configuration: Configuration, ring: CInt) throws(SystemError) {
    if !configuration.files.isEmpty {
      var files = configuration.files
      let count = UInt32(files.count)
      // SAFETY: the array lives for the call and has `count` numbers.
      let result = unsafe files.withUnsafeMutableBytes { unsafe clinux_io_uring_register(ring, 2, $0.baseAddress, count) }
      _ = try checked(result, "register files with io_uring")  // IORING_REGISTER_FILES
    }
    if let limit = configuration.workerLimit {
      var limits: (UInt32, UInt32) = (UInt32(clamping: limit), UInt32(clamping: limit))
      // Linux 5.15 and later; before, the default stands.
      // SAFETY: two numbers, ours.
      _ = unsafe withUnsafeMutableBytes(of: &limits) { unsafe clinux_io_uring_register(ring, 19, $0.baseAddress, 2) }
    }
    guard let allowed = configuration.allowedOperations else { return }
    // Nothing may be registered any more, except that the ring is enabled once. With any restriction, what is not allowed
    // is forbidden.
    var restrictions = allowed.map { clinux_allow_operation($0.rawValue) }
    restrictions.append(clinux_allow_register(12))  // IORING_REGISTER_ENABLE_RINGS
    restrictions.append(clinux_allow_flags(1))  // IOSQE_FIXED_FILE
    let count = UInt32(restrictions.count)
    // SAFETY: the array lives for the call and has `count` entries.
    let result = unsafe restrictions.withUnsafeMutableBytes {
      unsafe clinux_io_uring_register(ring, 11, $0.baseAddress, count)  // IORING_REGISTER_RESTRICTIONS
    }
    _ = try checked(result, "restrict the io_uring")
    _ = try checked(clinux_io_uring_register(ring, 12, nil, 0), "enable the io_uring")
  }
}

/// The three shared areas of a ring.
private struct RingMemory {
  let submission: MemoryMapping
  let completion: MemoryMapping
  let entries: MemoryMapping

  init(_ fd: borrowing OwnedFD, _ parameters: io_uring_params) throws(SystemError) {
    let submissionBytes = Int(parameters.sq_off.array) + Int(parameters.sq_entries) * 4
    let completionBytes = Int(parameters.cq_off.cqes) + Int(parameters.cq_entries) * 16
    let single = parameters.features & 1 != 0  // IORING_FEAT_SINGLE_MMAP
    submission = try .shared(fd, offset: 0, byteCount: single ? max(submissionBytes, completionBytes) : submissionBytes)
    completion = single ? submission : try .shared(fd, offset: 0x800_0000, byteCount: completionBytes)  // IORING_OFF_CQ_RING
    entries = try .shared(fd, offset: 0x1000_0000, byteCount: Int(parameters.sq_entries) * 64)  // IORING_OFF_SQES
  }
}

/// Operations of a ring, as far as Martlet uses them (`IORING_OP_*`).
public struct IOOperation: RawRepresentable, Hashable, Sendable {
  public let rawValue: UInt8
  @inlinable public init(rawValue: UInt8) { self.rawValue = rawValue }

  @inlinable public static var noOperation: IOOperation { IOOperation(rawValue: 0) }
  @inlinable public static var readVectored: IOOperation { IOOperation(rawValue: 1) }
  @inlinable public static var writeVectored: IOOperation { IOOperation(rawValue: 2) }
  @inlinable public static var sync: IOOperation { IOOperation(rawValue: 3) }
  @inlinable public static var poll: IOOperation { IOOperation(rawValue: 6) }
  @inlinable public static var pollRemove: IOOperation { IOOperation(rawValue: 7) }
  @inlinable public static var timeout: IOOperation { IOOperation(rawValue: 11) }
  @inlinable public static var allocate: IOOperation { IOOperation(rawValue: 17) }
  @inlinable public static var read: IOOperation { IOOperation(rawValue: 22) }
  @inlinable public static var write: IOOperation { IOOperation(rawValue: 23) }
}

/// `struct io_uring_sqe`, 64 bytes.
@frozen @usableFromInline
struct SubmissionEntry {
  @usableFromInline var operation: UInt8
  @usableFromInline var flags: UInt8
  @usableFromInline var priority: UInt16 = 0
  @usableFromInline var file: Int32
  @usableFromInline var offset: UInt64
  @usableFromInline var address: UInt64
  @usableFromInline var length: UInt32
  @usableFromInline var operationFlags: UInt32
  @usableFromInline var userData: UInt64
  @usableFromInline var bufferIndex: UInt16 = 0
  @usableFromInline var personality: UInt16 = 0
  @usableFromInline var fileIndex: UInt32 = 0
  @usableFromInline var address3: UInt64 = 0
  @usableFromInline var padding: UInt64 = 0

  @inlinable
  init(
    operation: UInt8, flags: UInt8, file: Int32, offset: UInt64, address: UInt64, length: UInt32, operationFlags: UInt32,
    userData: UInt64
  ) {
    self.operation = operation
    self.flags = flags
    self.file = file
    self.offset = offset
    self.address = address
    self.length = length
    self.operationFlags = operationFlags
    self.userData = userData
  }
}
