import CLinux
import VirtioSpec

@unsafe func clinuxLoad16(_ pointer: UnsafeRawPointer) -> UInt16 { unsafe clinux_load_acquire_u16(pointer) }
@unsafe func clinuxLoad32(_ pointer: UnsafeRawPointer) -> UInt32 { unsafe clinux_load_acquire_u32(pointer) }
@unsafe func clinuxLoad64(_ pointer: UnsafeRawPointer) -> UInt64 { unsafe clinux_load_acquire_u64(pointer) }

/// The record of one queue while it runs. Writes the region and never reads it: whatever somebody else puts there, this
/// process goes by its own copy. All stores are in program order (release), for a process is killed between two of them.
///
/// A value with raw storage that its queue owns and frees: a class here would cost each chain two counts of references and
/// a dozen checks of exclusive access, several times what the stores cost.
@safe
@usableFromInline
struct InflightRecorder: @unchecked Sendable {
  // @unchecked: one owner, the queue.

  let region: InflightRegion
  @usableFromInline let base: UnsafeMutableRawPointer
  @usableFromInline let size: Int
  @usableFromInline let isPacked: Bool
  @usableFromInline var nextCounter: UInt64 = 0

  /// Heads (split) or entries (packed) completed since the last `commit`, and the ring entries they stand for. Never more
  /// than the ring has, by `hasRoom`.
  @usableFromInline let batch: UnsafeMutablePointer<UInt16>
  @usableFromInline var batchCount = 0
  @usableFromInline var batchEntries = 0
  @usableFromInline var lastBatchHead: UInt16 = 0

  // Packed: our copies of the links in the region; `size` numbers each, all below `size` but for the end of the free list.
  @usableFromInline var freeHead: UInt16 = 0
  @usableFromInline let next: UnsafeMutablePointer<UInt16>
  @usableFromInline let last: UnsafeMutablePointer<UInt16>
  /// The entry that a buffer id in flight is recorded under.
  @usableFromInline let entryOfID: UnsafeMutablePointer<UInt16>
  @usableFromInline var usedWord: UInt64 = 0

  /// Stores that are still done; a test lets the process "die" between any two by a number. Nothing else sets it.
  @usableFromInline var storesLeft = Int.max
  @usableFromInline var isMortal: Bool { @inlinable @inline(__always) get { storesLeft != .max } }

  /// - Parameter region: has room for `size` entries.
  init(_ region: InflightRegion, size: UInt16, packed: Bool) {
    self.region = region
    self.size = Int(size)
    isPacked = packed
    // SAFETY: four arrays of `size` numbers, freed by the queue's deinit; indices are below `size` as said at each.
    unsafe base = region.base
    unsafe batch = .allocate(capacity: 4 * self.size)
    unsafe batch.initialize(repeating: 0, count: 4 * self.size)
    unsafe next = unsafe batch + self.size
    unsafe last = unsafe next + self.size
    unsafe entryOfID = unsafe last + self.size
  }

  /// Once, by the queue.
  func deallocate() { unsafe batch.deallocate() }

  // MARK: Stores
  // Everything below is written once for all kinds of `Stores`; the running device uses `AllStores`, of which nothing is left
  // after inlining.

  @usableFromInline
  protocol Stores {
    /// Whether the process lives for one more store.
    mutating func lives() -> Bool
  }

  @usableFromInline
  struct AllStores: Stores {
    @inlinable @inline(__always) init() {}
    @inlinable @inline(__always) mutating func lives() -> Bool { true }
  }

  /// A process that dies after some more.
  struct CountedStores: Stores {
    var left: Int
    mutating func lives() -> Bool {
      guard left > 0 else { return false }
      left &-= 1
      return true
    }
  }

  // SAFETY (all three): offsets are header fields, or of an entry below `size`; the region was checked to have room for as many.
  @inlinable @inline(__always)
  func store16(_ offset: Int, _ value: UInt16, _ stores: inout some Stores) {
    if stores.lives() { unsafe clinux_store_release_u16(base + offset, value) }
  }
  @inlinable @inline(__always)
  func store32(_ offset: Int, _ value: UInt32, _ stores: inout some Stores) {
    if stores.lives() { unsafe clinux_store_release_u32(base + offset, value) }
  }
  @inlinable @inline(__always)
  func store64(_ offset: Int, _ value: UInt64, _ stores: inout some Stores) {
    if stores.lives() { unsafe clinux_store_release_u64(base + offset, value) }
  }

  /// What is not on the path of every chain, or in a process that is to die, with the stores that are left to it.
  @inline(never)
  mutating func mortally(_ work: (inout InflightRecorder, inout CountedStores) -> Void) {
    var stores = CountedStores(left: storesLeft)
    work(&self, &stores)
    if isMortal { storesLeft = stores.left }
  }

  // MARK: Taking

  /// Whether a list of that length can be recorded. A driver that keeps the rules never has more outstanding than the ring
  /// has entries; what is used but not published still counts.
  @inlinable @inline(__always)
  func hasRoom(for entryCount: UInt16, inFlight: Int) -> Bool { inFlight &+ batchEntries &+ Int(entryCount) <= size }

  /// A chain was taken whose first descriptor is in `slot` of a packed ring.
  @inlinable @inline(__always)
  mutating func take(_ token: ChainToken, ring: UnsafeMutableRawPointer, slot: UInt16) {
    guard !isMortal else { return unsafe takeMortally(token, ring: ring, slot: slot) }
    var stores = AllStores()
    if isPacked {
      unsafe take(list: token, ring: ring, slot: slot, &stores)
    } else {
      take(head: token.head, &stores)
    }
  }

  @usableFromInline @inline(never)
  mutating func takeMortally(_ token: ChainToken, ring: UnsafeMutableRawPointer, slot: UInt16) {
    mortally {
      if $0.isPacked { unsafe $0.take(list: token, ring: ring, slot: slot, &$1) } else { $0.take(head: token.head, &$1) }
    }
  }

  /// A head was taken from a split ring; below `size`.
  @inlinable @inline(__always)
  mutating func take(head: UInt16, _ stores: inout some Stores) {
    let entry = InflightLayout.Split.entry(Int(head))
    store64(entry + InflightLayout.Split.counter, nextCounter, &stores)
    nextCounter &+= 1
    store16(entry + InflightLayout.Split.state, 1, &stores)
  }

  /// A list was taken from a packed ring, of whose descriptors copies are made: used elements may be written over it before
  /// it is answered. The caller has checked that as many entries are free.
  @unsafe @inlinable @inline(__always)
  mutating func take(list token: ChainToken, ring: UnsafeMutableRawPointer, slot: UInt16, _ stores: inout some Stores) {
    let first = freeHead
    var here = first
    var final = first
    var slot = Int(slot)
    for _ in 0..<Int(token.entryCount) {
      let entry = InflightLayout.Packed.entry(Int(here))
      // SAFETY: slot < size, the entries of the ring; `here` < size, since as many entries are free.
      let descriptor = unsafe ring + 16 * slot
      let tail = unsafe DescriptorTail(clinux_load_relaxed_u64(descriptor + PackedRing.lengthOffset))
      store64(entry + InflightLayout.Packed.address, unsafe clinux_load_relaxed_u64(descriptor), &stores)
      store64(
        entry + InflightLayout.Packed.idFlagsLength,
        UInt64(tail.third) | UInt64(tail.fourth) << 16 | UInt64(tail.length) << 32, &stores)
      final = here
      here = unsafe next[Int(here)]
      slot = slot &+ 1 == size ? 0 : slot &+ 1
    }
    let entry = InflightLayout.Packed.entry(Int(first))
    store32(entry + InflightLayout.Packed.extent, UInt32(final) | UInt32(token.entryCount) << 16, &stores)
    store64(entry + InflightLayout.Packed.counter, nextCounter, &stores)
    nextCounter &+= 1
    store16(entry + InflightLayout.Packed.state, 1, &stores)
    // SAFETY: entries and buffer ids are below size.
    unsafe last[Int(first)] = final
    unsafe entryOfID[Int(token.head)] = first
    freeHead = here
    // From here on it is taken; before, the whole list is still among the free ones.
    storeFreeHead(&stores)
  }

  /// The chain goes back to the ring as if never taken; the last one taken.
  mutating func giveBack(_ token: ChainToken) {
    mortally {
      guard $0.isPacked else {
        return $0.store16(InflightLayout.Split.entry(Int(token.head)) + InflightLayout.Split.state, 0, &$1)
      }
      // SAFETY: a head in flight is below size.
      let first = unsafe $0.entryOfID[Int(token.head)]
      $0.link(first, &$1)
      $0.storeFreeHead(&$1)
      $0.store16(InflightLayout.Packed.entry(Int(first)) + InflightLayout.Packed.state, 0, &$1)
    }
  }

  // MARK: Answering

  /// The chain is used; nobody knows until `publish`.
  @inlinable @inline(__always)
  mutating func complete(_ token: ChainToken) {
    guard !isMortal else { return completeMortally(token) }
    var stores = AllStores()
    complete(token, &stores)
  }

  @usableFromInline @inline(never)
  mutating func completeMortally(_ token: ChainToken) { mortally { $0.complete(token, &$1) } }

  @inlinable @inline(__always)
  mutating func complete(_ token: ChainToken, _ stores: inout some Stores) {
    var entry = token.head
    if isPacked {
      // SAFETY: a head in flight is below size, and so is its entry; the batch has room, by `hasRoom` at each `take`.
      entry = unsafe entryOfID[Int(entry)]
    } else {
      // Nobody follows this link before `lastBatchHead` says so, and the chain before it in the batch stays there.
      store16(InflightLayout.Split.entry(Int(entry)) + InflightLayout.Split.next, lastBatchHead, &stores)
      lastBatchHead = entry
    }
    unsafe batch[batchCount] = entry
    batchCount &+= 1
    batchEntries &+= Int(token.entryCount)
  }

  /// What makes the batch visible to the driver: the index of a split ring, the flags of a batch's first descriptor.
  @safe @usableFromInline
  struct Publication {
    let place: UnsafeMutableRawPointer
    let value: UInt16
    let usedIndex: UInt16
    let usedWrap: Bool
    @usableFromInline
    init(place: UnsafeMutableRawPointer, value: UInt16, usedIndex: UInt16, usedWrap: Bool) {
      unsafe self.place = place
      self.value = value
      self.usedIndex = usedIndex
      self.usedWrap = usedWrap
    }
  }

  /// Shows the batch to the driver between the two halves of the record: killed at any point, the next process can tell from
  /// ring and record together what the driver was told.
  @usableFromInline @inline(never)
  mutating func publish(_ publication: Publication) {
    guard !isMortal else { return mortally { $0.publish(publication, &$1) } }
    var stores = AllStores()
    publish(publication, &stores)
  }

  @inline(__always)
  private mutating func publish(_ publication: Publication, _ stores: inout some Stores) {
    if isPacked {
      // SAFETY: batchCount entries were put there.
      for index in 0..<batchCount { unsafe link(batch[index], &stores) }
      store16(InflightLayout.Packed.freeHead, freeHead, &stores)
      // The committed half stays.
      let committed = usedWord & 0xFF00_FFFF_0000
      usedWord = committed | UInt64(publication.usedIndex) | (publication.usedWrap ? 1 << 32 : 0)
      store64(InflightLayout.Packed.used, usedWord, &stores)
    } else {
      store16(InflightLayout.Split.lastBatchHead, lastBatchHead, &stores)
    }
    // Pairs with the driver's load: data, ids and lengths of the whole batch come before.
    // SAFETY: the queue's own place in its checked ring.
    if stores.lives() { unsafe clinux_store_release_u16(publication.place, publication.value) }
    let unit = isPacked ? InflightLayout.Packed.unit : InflightLayout.Split.unit
    for index in 0..<batchCount { unsafe store16(unit &* (Int(batch[index]) &+ 1), 0, &stores) }
    if isPacked {
      storeFreeHead(&stores)
      storeUsed(publication.usedIndex, publication.usedWrap, &stores)
    } else {
      store16(InflightLayout.Split.usedIndex, publication.usedIndex, &stores)
    }
    batchCount = 0
    batchEntries = 0
  }

  /// Puts a list before the free ones.
  @inlinable @inline(__always)
  mutating func link(_ first: UInt16, _ stores: inout some Stores) {
    // SAFETY: entries are below size.
    let final = unsafe Int(last[Int(first)])
    unsafe next[final] = freeHead
    store16(InflightLayout.Packed.entry(final) + InflightLayout.Packed.next, freeHead, &stores)
    freeHead = first
  }

  /// Both values of the free list's head.
  @inlinable @inline(__always)
  func storeFreeHead(_ stores: inout some Stores) {
    store32(InflightLayout.Packed.freeHead, UInt32(freeHead) | UInt32(freeHead) << 16, &stores)
  }

  /// Both values of the used position.
  mutating func storeUsed(_ index: UInt16, _ wrap: Bool, _ stores: inout some Stores) {
    usedWord = UInt64(index) | UInt64(index) << 16 | (wrap ? 1 << 32 | 1 << 40 : 0)
    store64(InflightLayout.Packed.used, usedWord, &stores)
  }

  /// One more replay of what is recorded at `entry`; counted before it begins, or a chain that kills could not be told.
  mutating func countReplay(entry: UInt16, _ count: UInt8) {
    let unit = isPacked ? InflightLayout.Packed.unit : InflightLayout.Split.unit
    mortally { $0.store16(unit * (Int(entry) + 1), 1 | UInt16(count) << 8, &$1) }
  }
}
