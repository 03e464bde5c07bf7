import CLinux
import VMMemory
import VirtioSpec

extension DriverQueue {
  /// Writes the 16 bytes of a descriptor: address, length, and two more fields whose meaning depends on the layout.
  @unsafe @inlinable @inline(__always)
  static func store(
    _ entry: UnsafeMutableRawPointer, _ address: UInt64, _ length: UInt32, _ third: UInt16, _ fourth: UInt16
  ) {
    unsafe clinux_store_relaxed_u64(entry, address)
    unsafe clinux_store_relaxed_u64(
      entry + 8, UInt64(length) | UInt64(third) << 32 | UInt64(fourth) << 48)
  }

  @inlinable
  mutating func addSplit(_ buffers: Span<DriverBuffer>) -> UInt16? {
    let head = freeHead
    var index = head
    for position in 0..<buffers.count {
      let buffer = buffers[position]
      let isLast = position == buffers.count - 1
      // SAFETY: entries of the free list are below size, and it has at least buffers.count of them.
      let next = unsafe slots[Int(index)].next
      let flags = (buffer.isDeviceWritable ? SplitRing.write : 0) | (isLast ? 0 : SplitRing.next)
      unsafe Self.store(
        descriptors + 16 * Int(index), buffer.address.rawValue, buffer.byteCount, flags, isLast ? 0 : next)
      if isLast {
        unsafe slots[Int(head)].last = index
        freeHead = next
      } else {
        index = next
      }
    }
    unsafe slots[Int(head)].count = UInt16(truncatingIfNeeded: buffers.count)
    freeCount -= buffers.count
    listCount -= buffers.count
    placeHead(head)
    return head
  }

  mutating func placeSplitSingle(_ address: UInt64, _ length: UInt32, _ flags: UInt16) -> UInt16 {
    let head = freeHead
    // SAFETY: the caller made sure that a descriptor is free.
    freeHead = unsafe slots[Int(head)].next
    unsafe slots[Int(head)].count = 1
    unsafe slots[Int(head)].last = head
    freeCount -= 1
    listCount -= 1
    unsafe Self.store(descriptors + 16 * Int(head), address, length, flags, 0)
    placeHead(head)
    return head
  }

  @inlinable @inline(__always)
  mutating func placeHead(_ head: UInt16) {
    let slot = Int(availableIndex & (size &- 1))
    // SAFETY: slot < size.
    unsafe clinux_store_relaxed_u16(driver + SplitRing.availableSlotsOffset + 2 * slot, head)
    availableIndex &+= 1
    unpublishedCount &+= 1
    remember(head)
  }

  @inlinable
  mutating func loadUsedSplit() -> UsedOutcome {
    if usedSeen == usedIndex {
      // Pairs with the device's release of used.idx.
      // SAFETY: the device area covers the used ring.
      usedSeen = unsafe clinux_load_acquire_u16(device + SplitRing.usedIndexOffset)
      if usedSeen == usedIndex { return .empty }
      guard usedSeen &- usedIndex <= size else { return .broken }
    }
    let slot = Int(usedIndex & (size &- 1))
    // SAFETY: slot < size.
    let element = unsafe device + SplitRing.usedElementsOffset + SplitRing.usedElementByteCount * slot
    let id = unsafe clinux_load_relaxed_u32(element)
    guard id < size else { return .broken }
    return unsafe .used(head: UInt16(truncatingIfNeeded: id), written: clinux_load_relaxed_u32(element + 4))
  }
}
