import CLinux
import VirtioSpec

@unsafe func clinuxLoad16(_ pointer: UnsafeRawPointer) -> UInt16 { unsafe clinux_load_acquire_u16(pointer) }
@unsafe func clinuxLoad32(_ pointer: UnsafeRawPointer) -> UInt32 { unsafe clinux_load_acquire_u32(pointer) }
@unsafe func clinuxLoad64(_ pointer: UnsafeRawPointer) -> UInt64 { unsafe clinux_load_acquire_u64(pointer) }

/// The record of one queue while it runs. Writes the region and never reads it: whatever somebody else puts there, this
/// process goes by its own copy. All stores are in program order (release), for a process is killed between two of them.
@safe
@usableFromInline
final class InflightRecorder {
  let region: InflightRegion
  let size: Int
  let isPacked: Bool
  var nextCounter: UInt64 = 0

  /// Heads (split) or entries (packed) completed since the last `commit`, and the ring entries they stand for.
  private var batch: [UInt16] = []
  private(set) var batchEntries = 0
  private var lastBatchHead: UInt16 = 0

  // Packed: our copies of the links in the region.
  var freeHead: UInt16 = 0
  var next: [UInt16] = []
  var last: [UInt16] = []
  /// The entry that a buffer id in flight is recorded under.
  var entryOfID: [UInt16] = []
  private var usedWord: UInt64 = 0

  /// Stores that are still done; a test lets the process "die" between any two by a number. Nothing else sets it.
  var storesLeft = Int.max

  init(_ region: InflightRegion, size: UInt16, packed: Bool) {
    self.region = region
    self.size = Int(size)
    isPacked = packed
    batch.reserveCapacity(Int(size))
    if packed {
      next = [UInt16](repeating: 0, count: Int(size))
      last = next
      entryOfID = next
    }
  }

  // MARK: Stores

  /// Whether the process lives for one more store, this time one into the ring.
  func mayStore() -> Bool { isAlive }

  private var isAlive: Bool {
    guard storesLeft > 0 else { return false }
    storesLeft &-= 1
    return true
  }

  // SAFETY (all four): offsets are header fields, or of an entry below `size`; the region was checked to have room for as many.
  func store8(_ offset: Int, _ value: UInt8) { if isAlive { unsafe clinux_store_release_u8(region.base + offset, value) } }
  func store16(_ offset: Int, _ value: UInt16) { if isAlive { unsafe clinux_store_release_u16(region.base + offset, value) } }
  func store32(_ offset: Int, _ value: UInt32) { if isAlive { unsafe clinux_store_release_u32(region.base + offset, value) } }
  func store64(_ offset: Int, _ value: UInt64) { if isAlive { unsafe clinux_store_release_u64(region.base + offset, value) } }

  // MARK: Taking

  /// A head was taken from a split ring.
  func take(head: UInt16) {
    let entry = InflightLayout.Split.entry(Int(head))
    store64(entry + InflightLayout.Split.counter, nextCounter)
    nextCounter &+= 1
    store16(entry + InflightLayout.Split.state, 1)
  }

  /// A list was taken from a packed ring, of whose descriptors copies are made: used elements may be written over it before
  /// it is answered. The caller has checked that as many entries are free.
  @unsafe
  func take(_ token: ChainToken, ring: UnsafeMutableRawPointer, slot: UInt16) {
    let first = freeHead
    var here = first
    var final = first
    var slot = Int(slot)
    for _ in 0..<Int(token.entryCount) {
      let entry = InflightLayout.Packed.entry(Int(here))
      // SAFETY: slot < size, the entries of the ring.
      let descriptor = unsafe ring + 16 * slot
      let tail = unsafe DescriptorTail(clinux_load_relaxed_u64(descriptor + PackedRing.lengthOffset))
      store64(entry + InflightLayout.Packed.address, unsafe clinux_load_relaxed_u64(descriptor))
      store64(
        entry + InflightLayout.Packed.idFlagsLength,
        UInt64(tail.third) | UInt64(tail.fourth) << 16 | UInt64(tail.length) << 32)
      final = here
      here = next[Int(here)]
      slot = slot + 1 == size ? 0 : slot + 1
    }
    let entry = InflightLayout.Packed.entry(Int(first))
    store32(entry + InflightLayout.Packed.extent, UInt32(final) | UInt32(token.entryCount) << 16)
    store64(entry + InflightLayout.Packed.counter, nextCounter)
    nextCounter &+= 1
    store16(entry + InflightLayout.Packed.state, 1)
    last[Int(first)] = final
    entryOfID[Int(token.head)] = first
    freeHead = here
    // From here on it is taken; before, the whole list is still among the free ones.
    storeFreeHead()
  }

  /// Whether a list of that length can be recorded. A driver that keeps the rules never has more outstanding than the ring
  /// has entries; what is used but not published still counts.
  func hasRoom(for entryCount: UInt16, inFlight: Int) -> Bool { inFlight + batchEntries + Int(entryCount) <= size }

  /// The chain goes back to the ring as if never taken; the last one taken.
  func giveBack(_ token: ChainToken) {
    guard isPacked else { return store16(InflightLayout.Split.entry(Int(token.head)) + InflightLayout.Split.state, 0) }
    let first = entryOfID[Int(token.head)]
    link(first, before: freeHead)
    freeHead = first
    storeFreeHead()
    store16(InflightLayout.Packed.entry(Int(first)) + InflightLayout.Packed.state, 0)
  }

  // MARK: Answering

  /// The chain is used; nobody knows until `commit`.
  func complete(_ token: ChainToken) {
    batch.append(isPacked ? entryOfID[Int(token.head)] : token.head)
    batchEntries += Int(token.entryCount)
  }

  /// Before the driver sees the batch of a split ring.
  func prepareSplit() {
    for head in batch {
      store16(InflightLayout.Split.entry(Int(head)) + InflightLayout.Split.next, lastBatchHead)
      lastBatchHead = head
      store16(InflightLayout.Split.lastBatchHead, head)
    }
  }

  /// After the driver sees it.
  func commitSplit(usedIndex: UInt16) {
    for head in batch { store16(InflightLayout.Split.entry(Int(head)) + InflightLayout.Split.state, 0) }
    store16(InflightLayout.Split.usedIndex, usedIndex)
    emptyBatch()
  }

  func preparePacked(usedIndex: UInt16, usedWrap: Bool) {
    for first in batch {
      link(first, before: freeHead)
      freeHead = first
    }
    store16(InflightLayout.Packed.freeHead, freeHead)
    // The committed half stays.
    let committed = usedWord & 0xFF00_FFFF_0000
    usedWord = committed | UInt64(usedIndex) | (usedWrap ? 1 << 32 : 0)
    store64(InflightLayout.Packed.used, usedWord)
  }

  func commitPacked(usedIndex: UInt16, usedWrap: Bool) {
    for first in batch { store16(InflightLayout.Packed.entry(Int(first)) + InflightLayout.Packed.state, 0) }
    storeFreeHead()
    storeUsed(usedIndex, usedWrap)
    emptyBatch()
  }

  private func emptyBatch() {
    batch.removeAll(keepingCapacity: true)
    batchEntries = 0
  }

  private func link(_ first: UInt16, before rest: UInt16) {
    let final = Int(last[Int(first)])
    next[final] = rest
    store16(InflightLayout.Packed.entry(final) + InflightLayout.Packed.next, rest)
  }

  /// Both values of the free list's head.
  func storeFreeHead() { store32(InflightLayout.Packed.freeHead, UInt32(freeHead) | UInt32(freeHead) << 16) }

  /// Both values of the used position.
  func storeUsed(_ index: UInt16, _ wrap: Bool) {
    usedWord = UInt64(index) | UInt64(index) << 16 | (wrap ? 1 << 32 | 1 << 40 : 0)
    store64(InflightLayout.Packed.used, usedWord)
  }

  /// One more replay of what is recorded at `entry`; counted before it begins, or a chain that kills could not be told.
  func countReplay(entry: UInt16, _ count: UInt8) {
    let offset = isPacked ? InflightLayout.Packed.entry(Int(entry)) : InflightLayout.Split.entry(Int(entry))
    store16(offset, 1 | UInt16(count) << 8)
  }

  func setLastBatchHead(_ head: UInt16) { lastBatchHead = head }
}
