import CLinux
import VMMemory
import VirtioSpec

/// What no honest driver does: any bytes anywhere in the ring. Nothing of it is booked, so used chains that come of it
/// are "broken" to `nextUsed`.
extension DriverQueue {
  /// Overwrites a descriptor. In a split ring `third` is the flags and `fourth` is `next`; in a packed ring they are the
  /// buffer id and the flags, the wrap bits included.
  public mutating func writeDescriptor(
    _ index: UInt16, address: UInt64, length: UInt32, third: UInt16, fourth: UInt16
  ) {
    precondition(index < size, "Even a bad driver has no more descriptors than that")
    // SAFETY: index < size.
    unsafe Self.store(descriptors + 16 * Int(index), address, length, third, fourth)
  }

  /// Makes any head available at once (split rings).
  public mutating func publishHead(_ head: UInt16) {
    precondition(!isPacked, "Packed rings have no list of heads")
    // SAFETY: the slot is below size.
    unsafe clinux_store_relaxed_u16(
      driver + SplitRing.availableSlotsOffset + 2 * Int(availableIndex & (size &- 1)), head)
    setAvailableIndex(availableIndex &+ 1)
  }

  /// Stores any available index (split rings).
  public mutating func setAvailableIndex(_ index: UInt16) {
    precondition(!isPacked, "Packed rings have no index")
    availableIndex = index
    // SAFETY: the driver area covers the available ring.
    unsafe clinux_store_release_u16(driver + SplitRing.availableIndexOffset, index)
  }

  /// The wrap bits that make a descriptor available at the present turn of a packed ring.
  public var availableMark: UInt16 { availableFlags }
}
