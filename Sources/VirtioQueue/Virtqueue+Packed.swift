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
    let first = unsafe clinux_load_acquire_u64(
      descriptors + 16 * Int(availableIndex) + PackedRing.lengthOffset)
    guard isAvailable(DescriptorTail(first).fourth) else { return .empty }
    var walk = QuickWalk(chain)
    guard let token = quickWalkPacked(DescriptorTail(first), &walk) else { return nextPackedCarefully(&chain) }
    // The id of a list is in its last descriptor. Ids could be any 16-bit number; all known drivers stay below the size,
    // and devices index by it.
    guard token.head < size else { return breakRing(.head) }
    guard enter(token.head, entryCount: token.entryCount) else { return breakRing(.headInFlight) }
    guard chain.finish(walk, token) else { return breakRing(.tooManyBytes) }
    advanceAvailable(by: token.entryCount)
    return .chain
  }

  @inlinable @inline(__always)
  mutating func advanceAvailable(by entryCount: UInt16) {
    // Both at most 32768, so the sum does not wrap.
    availableIndex &+= entryCount
    if availableIndex >= size {
      availableIndex &-= size
      availableWrap.toggle()
    }
  }

  /// The token of an ordinary list, not yet checked.
  @inlinable @inline(__always)
  mutating func quickWalkPacked(_ first: DescriptorTail, _ walk: inout QuickWalk) -> ChainToken? {
    let memory = unsafe storedMemory.tableAlone
    var tail = first
    var slot = Int(availableIndex)
    // SAFETY: slot < size, here and below.
    var address = unsafe clinux_load_relaxed_u64(descriptors + 16 * slot)
    if tail.fourth & PackedRing.indirect != 0 {
      guard tail.fourth & PackedRing.next == 0, Int(size) > inFlightEntries,
        let table = unsafe quickTable(address, tail.length, memory)
      else { return nil }
      for index in 0..<Int(tail.length / 16) {
        // SAFETY: index is below the checked number of entries.
        let entry = unsafe table + 16 * index
        let address = unsafe clinux_load_relaxed_u64(entry)
        let inner = unsafe DescriptorTail(clinux_load_relaxed_u64(entry + PackedRing.lengthOffset))
        guard inner.fourth & PackedRing.indirect == 0,
          unsafe walk.append(address, inner.length, isWritable: inner.fourth & PackedRing.write != 0, memory)
        else { return nil }
      }
      return ChainToken(head: tail.third, entryCount: 1)
    }
    // Bounded by what of the ring is not in flight.
    let limit = Int(size) &- inFlightEntries
    var count = 1
    while count <= limit {
      let flags = tail.fourth
      guard flags & PackedRing.indirect == 0,
        unsafe walk.append(address, tail.length, isWritable: flags & PackedRing.write != 0, memory)
      else { return nil }
      if flags & PackedRing.next == 0 {
        return ChainToken(head: tail.third, entryCount: UInt16(truncatingIfNeeded: count))
      }
      count &+= 1
      slot = slot &+ 1 == Int(size) ? 0 : slot &+ 1
      tail = unsafe DescriptorTail(clinux_load_relaxed_u64(descriptors + 16 * slot + PackedRing.lengthOffset))
      address = unsafe clinux_load_relaxed_u64(descriptors + 16 * slot)
    }
    return nil
  }

  @usableFromInline @inline(never)
  mutating func nextPackedCarefully(_ chain: inout DescriptorChain) -> ChainOutcome {
    let rules = WalkRules(size: size, hasIndirect: hasIndirect)
    var builder = chain.builder()
    var slot = Int(availableIndex)
    var count = 0
    var tail: DescriptorTail
    // Bounded by what of the ring is not in flight.
    let limit = Int(size) &- inFlightEntries
    repeat {
      guard count < limit else { return breakRing(.tooManyDescriptors) }
      // SAFETY: slot < size.
      let entry = unsafe descriptors + 16 * slot
      tail = unsafe DescriptorTail(clinux_load_relaxed_u64(entry + PackedRing.lengthOffset))
      let address = unsafe clinux_load_relaxed_u64(entry)
      if tail.fourth & PackedRing.indirect != 0 {
        // A list is all direct, or one indirect descriptor.
        guard count == 0, tail.fourth & PackedRing.next == 0 else { return breakRing(.indirectNesting) }
        builder = Self.walkPackedTable(address, tail.length, rules, storedMemory, builder)
      } else {
        builder.append(address, tail.length, isWritable: tail.fourth & PackedRing.write != 0, storedMemory)
      }
      if let reason = builder.broken { return breakRing(reason) }
      count += 1
      slot = slot + 1 == Int(size) ? 0 : slot + 1
    } while tail.fourth & PackedRing.next != 0
    let token = ChainToken(head: tail.third, entryCount: UInt16(truncatingIfNeeded: count))
    guard token.head < size else { return breakRing(.head) }
    guard enter(token.head, entryCount: token.entryCount) else { return breakRing(.headInFlight) }
    chain.finish(builder, token)
    advanceAvailable(by: token.entryCount)
    return .chain
  }

  @inline(never)
  static func walkPackedTable(
    _ address: UInt64, _ length: UInt32, _ rules: WalkRules, _ memory: GuestMemory, _ start: ChainBuilder
  ) -> ChainBuilder {
    var builder = start
    let table: IndirectTable
    switch indirectTable(address, length, rules, memory) {
    case .success(let checked): table = checked
    case .failure(let reason): return builder.breaking(reason)
    }
    // Entries follow one another; of their flags only WRITE means anything.
    for index in 0..<table.count {
      guard let (address, tail) = table.load(index, memory) else { return builder.breaking(.notMemory) }
      guard tail.fourth & PackedRing.indirect == 0 else { return builder.breaking(.indirectNesting) }
      builder.append(address, tail.length, isWritable: tail.fourth & PackedRing.write != 0, memory)
      guard builder.broken == nil else { return builder }
    }
    return builder
  }
}
