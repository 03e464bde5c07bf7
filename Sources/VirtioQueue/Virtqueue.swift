import CLinux
import VMMemory
import VirtioSpec

/// What `Virtqueue.next` found.
public enum ChainOutcome: Equatable, Sendable {
  /// The chain was filled; it belongs to the device until `complete` or `giveBack`.
  case chain
  /// Nothing is available.
  case empty
  /// The driver broke the ring. Nothing more comes from it, nothing more is published.
  case broken(BrokenRing)
}

/// The device side of a virtqueue, split or packed. One owner, one thread at a time.
///
/// The ring lies in memory that the driver changes at will. Its areas were checked as a whole at `init`, indices are
/// checked before use, and each field is loaded once. The queue keeps `memory` alive, and so every address it lends.
@safe
public struct Virtqueue: ~Copyable, @unchecked Sendable {
  // @unchecked: all private state has this one owner; shared memory is reached through single loads and stores only.

  /// As it was set up; frozen until the queue is given up.
  public let configuration: VirtqueueConfiguration
  @usableFromInline let size: UInt16
  @usableFromInline let isPacked: Bool
  @usableFromInline let hasEventIndex: Bool
  @usableFromInline let hasIndirect: Bool
  @usableFromInline let isInOrder: Bool
  @usableFromInline var storedMemory: GuestMemory

  // Where the areas are: whole and aligned, by `resolve`.
  @usableFromInline var descriptors: UnsafeMutableRawPointer
  @usableFromInline var driver: UnsafeMutableRawPointer
  @usableFromInline var device: UnsafeMutableRawPointer

  /// Split: free-running index of the next entry to take. Packed: slot of the next descriptor, with its wrap counter.
  @usableFromInline var availableIndex: UInt16
  @usableFromInline var availableWrap: Bool
  /// Split: the driver's index as last loaded, so that a drain touches the driver's cache line once.
  @usableFromInline var availableSeen: UInt16
  /// The same for used entries. Split: `usedIndex` runs ahead of what is published.
  @usableFromInline var usedIndex: UInt16
  @usableFromInline var usedWrap: Bool
  /// Entries written since the last `publish`.
  @usableFromInline var unpublishedCount: UInt16 = 0
  /// Packed: the batch's first descriptor, whose flags are stored last.
  @usableFromInline var firstSlot: UInt16 = 0
  @usableFromInline var firstFlags: UInt16 = 0
  /// In-order: entries that the next used element stands for as well.
  @usableFromInline var coalescedEntries: UInt16 = 0
  /// `usedIndex` at the last decision about a call; without one (after start and restore) the driver is called.
  @usableFromInline var decidedIndex: UInt16 = 0
  @usableFromInline var hasDecided = false

  /// One bit per head in flight. The words are owned here.
  @usableFromInline let inFlight: UnsafeMutablePointer<UInt64>
  @usableFromInline var inFlightEntries = 0
  @usableFromInline var broken: BrokenRing?

  /// Writes down what is in flight, where that is wanted.
  @usableFromInline var recorder: InflightRecorder?
  /// What a former process left, the next one to be taken again, and how far they have been counted.
  var replays: [InflightRecovery.Replay] = []
  var replayPosition = 0
  var replayMark = 0
  /// By head: it was taken from `replays`. Empty where nothing was left.
  var isReplayed: [Bool] = []
  /// Chains of `replays` that were taken and neither answered nor given back.
  @usableFromInline var replayedCount = 0
  @usableFromInline var hasReplays = false

  // SAFETY, of the caller: the pointers are those of a split ring, whose device area covers the used ring.
  @unsafe private static func usedIndex(_ pointers: RingPointers) -> UInt16 {
    unsafe clinux_load_acquire_u16(pointers.device + SplitRing.usedIndexOffset)
  }

  private static func isPossible(_ base: VringBase, used: UInt16, _ configuration: VirtqueueConfiguration) -> Bool {
    configuration.isPacked
      ? base.availableSlot < configuration.size && base.usedSlot < configuration.size
      : base.rawValue <= UInt32(UInt16.max) && base.availableIndex &- used <= configuration.size
  }

  /// Where a split ring stands by what was answered, if it cannot be where `configuration.base` says; nil if it can, and of packed rings.
  public static func usedIndex(misplaced configuration: VirtqueueConfiguration, _ memory: GuestMemory) throws(VirtqueueError) -> UInt16? {
    guard !configuration.isPacked else { return nil }
    let pointers = try unsafe configuration.resolve(in: memory)
    // SAFETY: a split ring's own.
    let used = unsafe usedIndex(pointers)
    return isPossible(configuration.base, used: used, configuration) ? nil : used
  }

  /// Takes over a ring as the driver has set it up. It need not be new: `configuration.base` says where it stands.
  /// - Parameter inflight: where chains in flight are recorded. If a former process has recorded some there, they come
  ///   first, and the record, not `configuration.base`, says where the ring stands.
  public init(
    _ configuration: VirtqueueConfiguration, memory: GuestMemory, inflight: InflightRegion? = nil
  ) throws(VirtqueueError) {
    let pointers = try unsafe configuration.resolve(in: memory)
    let packed = configuration.isPacked
    var base = configuration.base
    var recovery: InflightRecovery?
    if let inflight {
      guard inflight.byteCount >= InflightRegion.byteCount(size: configuration.size, packed: packed) else {
        throw .inflight("it has \(inflight.byteCount) bytes")
      }
      let found = try unsafe Self.recover(inflight, configuration, pointers)
      recovery = found
      if let later = found.isFresh ? nil : unsafe Self.base(after: found, configuration, pointers) { base = later }
    }
    // SAFETY: the pointers are those of this configuration.
    let usedInMemory = unsafe packed ? 0 : Self.usedIndex(pointers)
    guard Self.isPossible(base, used: usedInMemory, configuration) else { throw .base(base) }
    self.configuration = configuration
    size = configuration.size
    isPacked = packed
    hasEventIndex = configuration.features.contains(.eventIndex)
    hasIndirect = configuration.features.contains(.indirectDescriptors)
    isInOrder = configuration.features.contains(.inOrder)
    storedMemory = memory
    unsafe descriptors = pointers.descriptors
    unsafe driver = pointers.driver
    unsafe device = pointers.device
    availableIndex = packed ? base.availableSlot : base.availableIndex
    availableWrap = packed ? base.availableWrap : true
    usedIndex = packed ? base.usedSlot : usedInMemory
    usedWrap = packed ? base.usedWrap : true
    availableSeen = availableIndex
    let words = (Int(size) + 63) / 64
    unsafe inFlight = .allocate(capacity: words)
    unsafe inFlight.initialize(repeating: 0, count: words)
    if let inflight, let recovery {
      var recorder = InflightRecorder(inflight, size: configuration.size, packed: packed)
      recorder.begin(recovery, usedIndex: usedIndex, usedWrap: usedWrap)
      self.recorder = recorder
      replays = recovery.replays
      hasReplays = !replays.isEmpty
      if hasReplays { isReplayed = [Bool](repeating: false, count: Int(configuration.size)) }
      if packed { hideUnpublished(recovery.entryCount) }
    } else {
      recorder = nil
    }
  }

  private static func recover(
    _ region: InflightRegion, _ configuration: VirtqueueConfiguration, _ pointers: RingPointers
  ) throws(VirtqueueError) -> InflightRecovery {
    guard configuration.isPacked else {
      // SAFETY: the device area of a split ring covers the used ring.
      let used = unsafe clinux_load_acquire_u16(pointers.device + SplitRing.usedIndexOffset)
      return try .split(region, size: configuration.size, usedIndex: used)
    }
    let ring = unsafe pointers.descriptors
    return try .packed(region, size: configuration.size, base: configuration.base) { slot, wrap in
      // SAFETY: slot < size, checked by `packed`.
      let flags = unsafe clinux_load_acquire_u16(ring + 16 * Int(slot) + PackedRing.flagsOffset)
      return (flags & PackedRing.available != 0) != wrap || (flags & PackedRing.used != 0) == wrap
    }
  }

  /// A batch is shown to the driver by its first descriptor, whose flags are stored last. If its process was killed before
  /// that, the others already look used, and would be found by the driver behind the first one that is published now. The
  /// slots of chains in flight are ours to write.
  private func hideUnpublished(_ entryCount: Int) {
    var slot = Int(usedIndex)
    var wrap = usedWrap
    for _ in 0..<min(entryCount, Int(size)) {
      // SAFETY: slot < size.
      let place = unsafe descriptors + 16 * slot + PackedRing.flagsOffset
      let flags = unsafe clinux_load_relaxed_u16(place)
      let marks = PackedRing.available | PackedRing.used
      if flags & marks == (wrap ? marks : 0) {
        unsafe clinux_store_release_u16(place, flags & ~marks | (wrap ? PackedRing.available : PackedRing.used))
      }
      slot += 1
      if slot == Int(size) {
        slot = 0
        wrap.toggle()
      }
    }
  }

  /// Where the ring stands: behind what was answered come the chains in flight, then new ones.
  private static func base(
    after recovery: InflightRecovery, _ configuration: VirtqueueConfiguration, _ pointers: RingPointers
  ) -> VringBase {
    guard configuration.isPacked else {
      // SAFETY: as above. The driver's index may have changed only if somebody else serves the ring.
      let used = unsafe clinux_load_acquire_u16(pointers.device + SplitRing.usedIndexOffset)
      return VringBase(availableIndex: used &+ UInt16(truncatingIfNeeded: recovery.replays.count))
    }
    // At most size entries are in flight: one turn.
    let slot = Int(recovery.usedIndex) + recovery.entryCount
    let wraps = slot >= Int(configuration.size)
    return VringBase(
      availableSlot: UInt16(truncatingIfNeeded: wraps ? slot - Int(configuration.size) : slot),
      availableWrap: wraps ? !recovery.usedWrap : recovery.usedWrap, usedSlot: recovery.usedIndex, usedWrap: recovery.usedWrap)
  }

  deinit {
    unsafe inFlight.deallocate()
    recorder?.deallocate()
  }

  /// The memory behind the lent addresses.
  public var memory: GuestMemory { storedMemory }

  /// Chains that were taken and not completed yet.
  public var inFlightCount: Int { (0..<((Int(size) + 63) / 64)).reduce(0) { unsafe $0 + inFlight[$1].nonzeroBitCount } }

  /// Why nothing comes from the ring any more, if so.
  public var brokenReason: BrokenRing? { broken }

  /// Descriptors of the longest acceptable chain. A direct chain is bounded by the ring; drivers exist whose indirect
  /// tables are longer than a small ring, so those may have 1024 entries.
  @inlinable public var greatestChainLength: Int { max(Int(size), 1024) }

  /// Where the ring stands, to go on from later. Only while nothing is in flight and all is published; what is in
  /// flight otherwise would be lost.
  public var base: VringBase {
    isPacked
      ? VringBase(
        availableSlot: availableIndex, availableWrap: availableWrap, usedSlot: usedIndex, usedWrap: usedWrap)
      : VringBase(availableIndex: availableIndex)
  }

  /// The same ring in another memory table, with all its state. Chains in flight keep pointing into the old memory:
  /// whoever works on them holds the old table until they are done.
  public mutating func replaceMemory(_ memory: GuestMemory) throws(VirtqueueError) {
    let pointers = try unsafe configuration.resolve(in: memory)
    storedMemory = memory
    unsafe descriptors = pointers.descriptors
    unsafe driver = pointers.driver
    unsafe device = pointers.device
  }

  // MARK: Heads in flight

  /// Marks a head as in flight and writes it down; false if it is in flight already, or if the ring cannot have as many
  /// entries outstanding.
  @inlinable @inline(__always)
  mutating func enter(_ head: UInt16, entryCount: UInt16) -> Bool {
    guard recorder != nil else { return mark(head, entryCount: entryCount) }
    guard recorder?.hasRoom(for: entryCount, inFlight: inFlightEntries) == true, mark(head, entryCount: entryCount) else {
      return false
    }
    // SAFETY: the ring's descriptors, from the slot that the list begins at.
    unsafe recorder?.take(ChainToken(head: head, entryCount: entryCount), ring: descriptors, slot: availableIndex)
    return true
  }

  @inlinable @inline(__always)
  mutating func recordCompletion(_ token: ChainToken) {
    recorder?.complete(token)
    if replayedCount != 0 { endReplay(token) }
  }

  @usableFromInline @inline(never)
  mutating func endReplay(_ token: ChainToken) {
    guard isReplayed[Int(token.head)] else { return }
    isReplayed[Int(token.head)] = false
    replayedCount -= 1
  }

  @inlinable @inline(__always)
  mutating func mark(_ head: UInt16, entryCount: UInt16) -> Bool {
    let bit: UInt64 = 1 << UInt64(head & 63)
    // SAFETY: every caller has checked head < size.
    let word = unsafe inFlight[Int(head >> 6)]
    guard word & bit == 0 else { return false }
    unsafe inFlight[Int(head >> 6)] = word | bit
    inFlightEntries &+= Int(entryCount)
    return true
  }

  @inlinable @inline(__always)
  mutating func leave(_ token: ChainToken) {
    let bit: UInt64 = 1 << UInt64(token.head & 63)
    precondition(token.head < size, "A token belongs to the queue it came from")
    // SAFETY: head < size.
    let word = unsafe inFlight[Int(token.head >> 6)]
    precondition(word & bit != 0, "A chain is completed once")
    unsafe inFlight[Int(token.head >> 6)] = word & ~bit
    inFlightEntries &-= Int(token.entryCount)
  }
}
