import CLinux
import VirtioSpec

/// Giving chains back to the driver. What is written here into the ring is all the device side writes besides the event
/// fields: a dirty log of a migration has its place in `complete` and `publish`.
extension Virtqueue {
  /// Marks a chain as used; the driver sees it with the next `publish`. `written` is the number of bytes written from the
  /// start of the writable part on, never more than were written.
  @inlinable
  public mutating func complete(_ token: ChainToken, written: UInt32) {
    leave(token)
    guard broken == nil else { return }
    if recorder != nil { recordCompletion(token) }
    if isPacked {
      completePacked(token, written: written)
    } else {
      let slot = Int(usedIndex & (size &- 1))
      // SAFETY: slot < size. Elements are 4-byte aligned, hence two stores; `publish` orders them before the index.
      let element = unsafe device + SplitRing.usedElementsOffset + 8 * slot
      unsafe clinux_store_relaxed_u32(element, UInt32(token.head))
      unsafe clinux_store_relaxed_u32(element + 4, written)
      usedIndex &+= 1 &+ coalescedEntries
    }
    unpublishedCount &+= 1
    coalescedEntries = 0
  }

  @inlinable @inline(__always)
  mutating func completePacked(_ token: ChainToken, written: UInt32) {
    let flags =
      (written != 0 ? PackedRing.write : 0) | (usedWrap ? PackedRing.available | PackedRing.used : 0)
    // SAFETY: usedIndex < size.
    let entry = unsafe descriptors + 16 * Int(usedIndex)
    unsafe clinux_store_relaxed_u32(entry + PackedRing.lengthOffset, written)
    unsafe clinux_store_relaxed_u16(entry + PackedRing.idOffset, token.head)
    if unpublishedCount == 0 {
      // The driver looks here first; it shall find the whole batch.
      firstSlot = usedIndex
      firstFlags = flags
    } else {
      unsafe clinux_store_relaxed_u16(entry + PackedRing.flagsOffset, flags)
    }
    let advanced = Int(usedIndex) &+ Int(token.entryCount) &+ Int(coalescedEntries)
    if advanced >= Int(size) { usedWrap.toggle() }
    usedIndex = UInt16(truncatingIfNeeded: advanced >= Int(size) ? advanced &- Int(size) : advanced)
  }

  /// Marks a chain as used in full by the next `complete`, which gets the only element for both (feature `inOrder`).
  /// The driver learns no length of it: only for chains whose writable part was filled or that have none.
  @inlinable
  public mutating func coalesce(_ token: ChainToken) {
    precondition(isInOrder, "Used elements can be left out only when use in order was negotiated")
    leave(token)
    if recorder != nil, broken == nil { recordCompletion(token) }
    coalescedEntries &+= token.entryCount
  }

  /// Shows the driver everything completed since the last time; true if it has to be called (interrupted) for that.
  @inlinable
  public mutating func publish() -> Bool {
    // A ring that broke takes no completion any more, so none can follow.
    guard broken == nil else { return false }
    precondition(coalescedEntries == 0, "A coalesced chain needs a completion after it")
    guard unpublishedCount != 0 else { return false }
    unpublishedCount = 0
    if recorder != nil {
      publishRecorded()
      return isPacked ? needsCallPacked() : needsCallSplit()
    }
    if isPacked {
      // Pairs with the driver's load of these flags: data, ids and lengths of the whole batch come before.
      // SAFETY: firstSlot < size.
      unsafe clinux_store_release_u16(
        descriptors + 16 * Int(firstSlot) + PackedRing.flagsOffset, firstFlags)
      return needsCallPacked()
    }
    // Pairs with the driver's load of used.idx: data and elements come before.
    // SAFETY: the device area covers the used ring.
    unsafe clinux_store_release_u16(device + SplitRing.usedIndexOffset, usedIndex)
    return needsCallSplit()
  }

  @usableFromInline @inline(never)
  mutating func publishRecorded() {
    // SAFETY: firstSlot < size; the device area of a split ring covers the used ring.
    let place =
      unsafe isPacked ? descriptors + 16 * Int(firstSlot) + PackedRing.flagsOffset : device + SplitRing.usedIndexOffset
    unsafe recorder?.publish(
      .init(place: place, value: isPacked ? firstFlags : usedIndex, usedIndex: usedIndex, usedWrap: usedWrap))
  }
}
