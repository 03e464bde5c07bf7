import CLinux
import VMMemory
import VirtioSpec

/// Taking chains.
extension Virtqueue {
  /// Takes the next available chain into `chain`.
  @inlinable
  public mutating func next(_ chain: inout DescriptorChain) -> ChainOutcome {
    if let broken { return .broken(broken) }
    if hasReplays { return nextReplay(&chain) }
    return isPacked ? nextPacked(&chain) : nextSplit(&chain)
  }

  /// Whether the driver has made anything available that was not taken. Asks the driver's memory.
  @inlinable
  public mutating func hasAvailable() -> Bool {
    guard broken == nil else { return false }
    if hasReplays { return true }
    if isPacked {
      // SAFETY: availableIndex < size.
      let flags = unsafe clinux_load_acquire_u16(
        descriptors + 16 * Int(availableIndex) + PackedRing.flagsOffset)
      return isAvailable(flags)
    }
    if availableSeen != availableIndex { return true }
    // SAFETY: the driver area covers the available ring.
    return unsafe clinux_load_acquire_u16(driver + SplitRing.availableIndexOffset) != availableIndex
  }

  /// Puts the chain that was taken last back as if it had never been taken (too few buffers for a packet, say). With
  /// several, the last one first.
  @inlinable
  public mutating func giveBack(_ token: ChainToken) {
    leave(token)
    if recorder != nil, takeBackRecord(token) { return }
    if isPacked {
      if availableIndex < token.entryCount {
        availableIndex &+= size
        availableWrap.toggle()
      }
      availableIndex &-= token.entryCount
    } else {
      availableIndex &-= 1
    }
  }

  /// True if it was a replayed chain, which does not come from the ring.
  @usableFromInline @inline(never)
  mutating func takeBackRecord(_ token: ChainToken) -> Bool {
    if !isReplayed.isEmpty, giveBackReplay(token) { return true }
    recorder?.giveBack(token)
    return false
  }

  @usableFromInline @inline(never)
  mutating func breakRing(_ reason: BrokenRing) -> ChainOutcome {
    broken = reason
    return .broken(reason)
  }
}

/// The fields of a descriptor after its address, as one eight-byte load gives them: length, then flags and `next` in a
/// split ring, id and flags in a packed one. One load, so no field can change between two looks.
@usableFromInline
struct DescriptorTail {
  @usableFromInline let rawValue: UInt64
  @inlinable init(_ rawValue: UInt64) { self.rawValue = rawValue }
  @inlinable var length: UInt32 { UInt32(truncatingIfNeeded: rawValue) }
  @inlinable var third: UInt16 { UInt16(truncatingIfNeeded: rawValue >> 32) }
  @inlinable var fourth: UInt16 { UInt16(truncatingIfNeeded: rawValue >> 48) }
}

/// Indirect tables.
extension Virtqueue {
  /// A table of descriptors somewhere in guest memory. Each entry is loaded once; the table is not copied first, for that
  /// adds nothing when no entry is looked at twice, and costs when a table is long and its chain short.
  @safe @usableFromInline
  struct IndirectTable {
    @usableFromInline let address: UInt64
    @usableFromInline let count: Int
    /// The table in one piece and aligned; nil otherwise.
    @usableFromInline let base: UnsafeMutableRawPointer?

    @inlinable
    init(address: UInt64, count: Int, base: UnsafeMutableRawPointer?) {
      self.address = address
      self.count = count
      unsafe self.base = base
    }

    /// Entry `index`, below `count`; nil if it is not memory.
    @inlinable @inline(__always)
    func load(_ index: Int, _ memory: GuestMemory) -> (address: UInt64, tail: DescriptorTail)? {
      guard let base = unsafe base else { return loadPieces(index, memory) }
      // SAFETY: the table was checked as a whole and index < count.
      let entry = unsafe base + 16 * index
      let tail = unsafe DescriptorTail(clinux_load_relaxed_u64(entry + 8))
      return unsafe (clinux_load_relaxed_u64(entry), tail)
    }

    @usableFromInline @inline(never)
    func loadPieces(_ index: Int, _ memory: GuestMemory) -> (address: UInt64, tail: DescriptorTail)? {
      var words: (UInt64, UInt64) = (0, 0)
      guard let start = GuestAddress(address).advanced(by: UInt64(16 * index)) else { return nil }
      // SAFETY: the copy fills the two words and they are looked at only afterwards.
      let isMemory = unsafe withUnsafeMutableBytes(of: &words) { unsafe memory.copyOut(start, into: $0) }
      clinux_fence_acquire()
      return isMemory ? (words.0, DescriptorTail(words.1)) : nil
    }
  }

  /// What an indirect descriptor says of its table, checked; or why it breaks the ring.
  @inlinable @inline(__always)
  static func indirectTable(
    _ address: UInt64, _ length: UInt32, _ rules: WalkRules, _ memory: GuestMemory
  ) -> Result<IndirectTable, BrokenRing> {
    guard rules.hasIndirect else { return .failure(.indirectNotNegotiated) }
    let count = Int(length / 16)
    guard length % 16 == 0, count > 0, count <= max(Int(rules.size), 1024) else { return .failure(.indirectByteCount) }
    // SAFETY: lent while the queue holds its memory.
    guard address % 8 == 0, let base = unsafe memory.translate(GuestAddress(address), byteCount: UInt64(length)),
      UInt(bitPattern: base) % 8 == 0
    else { return unsafe .success(IndirectTable(address: address, count: count, base: nil)) }
    return unsafe .success(IndirectTable(address: address, count: count, base: base))
  }

  /// What the walk has to know besides the memory; static functions and values, because a `borrowing` self of this size is
  /// copied to the stack at every call.
  @usableFromInline
  struct WalkRules {
    @usableFromInline let size: UInt16
    @usableFromInline let hasIndirect: Bool
    @inlinable
    init(size: UInt16, hasIndirect: Bool) {
      self.size = size
      self.hasIndirect = hasIndirect
    }
  }
}
