import CLinux
import VMMemory
import VirtioSpec

/// Walking split rings (virtio 1.4, section 2.7).
extension Virtqueue {
  @inlinable
  mutating func nextSplit(_ chain: inout DescriptorChain) -> ChainOutcome {
    if availableSeen == availableIndex {
      // Pairs with the driver's release of avail.idx: slots and descriptors up to it are complete.
      // SAFETY: the driver area covers the available ring.
      let index = unsafe clinux_load_acquire_u16(driver + SplitRing.availableIndexOffset)
      if index == availableIndex { return .empty }
      // `&-` is the distance of two ring indices.
      guard index &- availableIndex <= size else { return breakRing(.availableIndex) }
      availableSeen = index
    }
    let slot = Int(availableIndex & (size &- 1))
    // SAFETY: slot < size.
    let head = unsafe clinux_load_relaxed_u16(driver + SplitRing.availableSlotsOffset + 2 * slot)
    guard head < size else { return breakRing(.head) }
    guard enter(head, entryCount: 1) else { return breakRing(.headInFlight) }
    chain.clear()
    if let reason = walkSplit(head, &chain) { return breakRing(reason) }
    chain.storedToken = ChainToken(head: head, entryCount: 1)
    availableIndex &+= 1
    return .chain
  }

  @inlinable @inline(__always)
  func walkSplit(_ head: UInt16, _ chain: inout DescriptorChain) -> BrokenRing? {
    var index = head
    for _ in 0..<size {
      // SAFETY: index < size.
      let entry = unsafe descriptors + 16 * Int(index)
      let address = unsafe clinux_load_relaxed_u64(entry)
      let tail = unsafe DescriptorTail(clinux_load_relaxed_u64(entry + 8))
      let flags = tail.third
      if flags & SplitRing.indirect != 0 {
        guard flags & SplitRing.next == 0 else { return .indirectNesting }
        return walkSplitTable(address, tail.length, &chain)
      }
      if let reason = chain.append(address, tail.length, isWritable: flags & SplitRing.write != 0, storedMemory) {
        return reason
      }
      guard flags & SplitRing.next != 0 else { return nil }
      index = tail.fourth
      guard index < size else { return .next }
    }
    return .tooManyDescriptors
  }

  @inlinable
  func walkSplitTable(_ address: UInt64, _ length: UInt32, _ chain: inout DescriptorChain) -> BrokenRing? {
    let table: IndirectTable
    switch indirectTable(address, length) {
    case .success(let checked): table = checked
    case .failure(let reason): return reason
    }
    var index = 0
    for _ in 0..<table.count {
      guard let (address, tail) = table.load(index, storedMemory) else { return .notMemory }
      let flags = tail.third
      guard flags & SplitRing.indirect == 0 else { return .indirectNesting }
      if let reason = chain.append(address, tail.length, isWritable: flags & SplitRing.write != 0, storedMemory) {
        return reason
      }
      guard flags & SplitRing.next != 0 else { return nil }
      index = Int(tail.fourth)
      guard index < table.count else { return .next }
    }
    return .tooManyDescriptors
  }
}
