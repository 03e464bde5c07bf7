import CLinux
import VMMemory
import VirtioSpec

/// Standing chains: for a tool that makes the same few chains available over and over. Each is written once, at descriptors
/// that are its own, and stays; a request then costs one entry of the available ring. The descriptors' cache lines are read
/// by both sides and written by neither, which is most of what a request costs two processors that share a ring.
///
///     driver.beginStanding()
///     driver.writeStanding(buffers.span, at: 3 * slot)
///     driver.makeAvailable(3 * slot)
///     while case .used(let head, let written) = driver.nextUsedStanding() { ... }
///
/// Split rings that are not in order only. `add` finds no free descriptor in such a queue.
extension DriverQueue {
  public var allowsStandingChains: Bool { !isPacked && !isInOrder }

  /// Gives all descriptors to standing chains; only while nothing is outstanding.
  public mutating func beginStanding() {
    precondition(allowsStandingChains, "Standing chains need a split ring that is not in order")
    freeCount = 0
    listCount = 0
    // SAFETY: `slots` has `size` entries.
    for index in 0..<Int(size) { unsafe slots[index].count = 0 }
  }

  /// Writes a chain into the descriptors from `first` on. Only while the chain that begins there is not outstanding.
  public mutating func writeStanding(_ buffers: Span<DriverBuffer>, at first: UInt16) {
    precondition(Int(first) + buffers.count <= Int(size), "A standing chain lies within the ring")
    for position in 0..<buffers.count {
      let buffer = buffers[position]
      let index = first &+ UInt16(truncatingIfNeeded: position)
      let isLast = position == buffers.count - 1
      // SAFETY: index < size, as checked above.
      unsafe Self.store(
        descriptors + 16 * Int(index), buffer.address.rawValue, buffer.byteCount,
        (buffer.isDeviceWritable ? SplitRing.write : 0) | (isLast ? 0 : SplitRing.next), isLast ? 0 : index &+ 1)
    }
  }

  /// Makes the chain at `head` available with the next `publish`. Only while it is not outstanding.
  @inlinable @inline(__always)
  public mutating func makeAvailable(_ head: UInt16) {
    precondition(head < size, "A standing chain lies within the ring")
    // SAFETY: head < size; the slot is below size.
    unsafe slots[Int(head)].count = 1
    unsafe clinux_store_relaxed_u16(driver + SplitRing.availableSlotsOffset + 2 * Int(availableIndex & (size &- 1)), head)
    availableIndex &+= 1
    unpublishedCount &+= 1
  }

  /// `nextUsed` for standing chains.
  @inlinable @inline(__always)
  public mutating func nextUsedStanding() -> UsedOutcome {
    if usedSeen == usedIndex {
      // Pairs with the device's release of used.idx.
      // SAFETY: the device area covers the used ring.
      usedSeen = unsafe clinux_load_acquire_u16(device + SplitRing.usedIndexOffset)
      if usedSeen == usedIndex { return .empty }
      guard usedSeen &- usedIndex <= size else { return .broken }
    }
    // SAFETY: the slot is below size.
    let element = unsafe device + SplitRing.usedElementsOffset + SplitRing.usedElementByteCount * Int(usedIndex & (size &- 1))
    let id = unsafe clinux_load_relaxed_u32(element)
    guard id < UInt32(size), unsafe slots[Int(id)].count != 0 else { return .broken }
    unsafe slots[Int(id)].count = 0
    usedIndex &+= 1
    return unsafe .used(head: UInt16(truncatingIfNeeded: id), written: clinux_load_relaxed_u32(element + 4))
  }
}
