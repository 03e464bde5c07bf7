import CLinux
import VMMemory
import VirtioSpec

/// Walking packed rings (virtio 1.4, section 2.8).
extension Virtqueue {
  @inlinable @inline(__always)
  func isAvailable(_ flags: UInt16) -> Bool {
    (flags & PackedRing.available != 0) == availableWrap && (flags & PackedRing.used != 0) != availableWrap
  }

  @inlinable
  mutating func nextPacked(_ chain: inout DescriptorChain) -> ChainOutcome {
    // Pairs with the driver's release of the first descriptor's flags: the list behind it is complete. Length, id and
    // flags come in one load.
    // SAFETY: availableIndex < size.
    let first = unsafe descriptors + 16 * Int(availableIndex)
    var tail = unsafe DescriptorTail(clinux_load_acquire_u64(first + PackedRing.lengthOffset))
    guard isAvailable(tail.fourth) else { return .empty }
    chain.clear()
    var slot = availableIndex
    var count: UInt16 = 1
    var address = unsafe clinux_load_relaxed_u64(first)
    // Bounded by `count`, which may not pass what of the ring is not in flight.
    let limit = Int(size) &- inFlightEntries
    while true {
      guard Int(count) <= limit else { return breakRing(.tooManyDescriptors) }
      let flags = tail.fourth
      if flags & PackedRing.indirect != 0 {
        // A list is all direct, or one indirect descriptor.
        guard count == 1, flags & PackedRing.next == 0 else { return breakRing(.indirectNesting) }
        if let reason = walkPackedTable(address, tail.length, &chain) { return breakRing(reason) }
      } else if let reason = chain.append(
        address, tail.length, isWritable: flags & PackedRing.write != 0, storedMemory)
      {
        return breakRing(reason)
      }
      slot &+= 1
      if slot == size { slot = 0 }
      guard flags & PackedRing.next != 0 else { break }
      count &+= 1
      // SAFETY: slot < size.
      let entry = unsafe descriptors + 16 * Int(slot)
      tail = unsafe DescriptorTail(clinux_load_relaxed_u64(entry + PackedRing.lengthOffset))
      address = unsafe clinux_load_relaxed_u64(entry)
    }
    // The id of a list is in its last descriptor. Ids could be any 16-bit number; all known drivers stay below the size,
    // and devices index by it.
    let id = tail.third
    guard id < size else { return breakRing(.head) }
    guard enter(id, entryCount: count) else { return breakRing(.headInFlight) }
    chain.storedToken = ChainToken(head: id, entryCount: count)
    if slot <= availableIndex { availableWrap.toggle() }
    availableIndex = slot
    return .chain
  }

  @inlinable
  func walkPackedTable(_ address: UInt64, _ length: UInt32, _ chain: inout DescriptorChain) -> BrokenRing? {
    let table: IndirectTable
    switch indirectTable(address, length) {
    case .success(let checked): table = checked
    case .failure(let reason): return reason
    }
    // Entries follow one another; of their flags only WRITE means anything.
    for index in 0..<table.count {
      guard let (address, tail) = table.load(index, storedMemory) else { return .notMemory }
      guard tail.fourth & PackedRing.indirect == 0 else { return .indirectNesting }
      if let reason = chain.append(
        address, tail.length, isWritable: tail.fourth & PackedRing.write != 0, storedMemory)
      {
        return reason
      }
    }
    return nil
  }
}
