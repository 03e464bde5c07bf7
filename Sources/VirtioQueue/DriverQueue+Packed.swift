import CLinux
import VMMemory
import VirtioSpec

extension DriverQueue {
  @inlinable @inline(__always)
  var availableFlags: UInt16 { availableWrap ? PackedRing.available : PackedRing.used }

  @inlinable
  mutating func addPacked(_ buffers: Span<DriverBuffer>) -> UInt16? {
    let id = freeHead
    // SAFETY: a free descriptor means a free id; entries of the list are below size.
    freeHead = unsafe slots[Int(id)].next
    unsafe slots[Int(id)].count = UInt16(truncatingIfNeeded: buffers.count)
    freeCount -= buffers.count
    listCount -= 1
    for position in 0..<buffers.count {
      let buffer = buffers[position]
      let more = position == buffers.count - 1 ? 0 : PackedRing.next
      place(buffer.address.rawValue, buffer.byteCount, id, more | (buffer.isDeviceWritable ? PackedRing.write : 0), isFirst: position == 0)
    }
    unpublishedCount &+= 1
    remember(id)
    return id
  }

  mutating func placePackedSingle(_ address: UInt64, _ length: UInt32, _ flags: UInt16) -> UInt16 {
    let id = freeHead
    // SAFETY: as above.
    freeHead = unsafe slots[Int(id)].next
    unsafe slots[Int(id)].count = 1
    freeCount -= 1
    listCount -= 1
    place(address, length, id, flags, isFirst: true)
    unpublishedCount &+= 1
    remember(id)
    return id
  }

  /// Fills the next slot. The flags of a batch's first descriptor are left for `publish`; a later chain's may be stored at
  /// once, as the device does not get that far.
  @inlinable @inline(__always)
  mutating func place(_ address: UInt64, _ length: UInt32, _ id: UInt16, _ flags: UInt16, isFirst: Bool) {
    // SAFETY: availableIndex < size.
    let entry = unsafe descriptors + 16 * Int(availableIndex)
    if isFirst && unpublishedCount == 0 {
      firstSlot = availableIndex
      firstFlags = flags | availableFlags
      unsafe clinux_store_relaxed_u64(entry, address)
      unsafe clinux_store_relaxed_u32(entry + PackedRing.lengthOffset, length)
      unsafe clinux_store_relaxed_u16(entry + PackedRing.idOffset, id)
    } else {
      unsafe Self.store(entry, address, length, id, flags | availableFlags)
    }
    availableIndex &+= 1
    if availableIndex == size {
      availableIndex = 0
      availableWrap.toggle()
    }
  }

  @inlinable @inline(__always)
  func isUsed(_ flags: UInt16) -> Bool {
    (flags & PackedRing.available != 0) == usedWrap && (flags & PackedRing.used != 0) == usedWrap
  }

  @inlinable
  mutating func loadUsedPacked() -> UsedOutcome {
    // Pairs with the device's release of these flags.
    // SAFETY: usedIndex < size.
    let entry = unsafe descriptors + 16 * Int(usedIndex)
    let tail = unsafe DescriptorTail(clinux_load_acquire_u64(entry + PackedRing.lengthOffset))
    guard isUsed(tail.fourth) else { return .empty }
    return .used(head: tail.third, written: tail.fourth & PackedRing.write == 0 ? 0 : tail.length)
  }
}
