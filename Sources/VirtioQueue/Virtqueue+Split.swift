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
    let token = ChainToken(head: head, entryCount: 1)
    var walk = QuickWalk(chain)
    if quickWalkSplit(head, &walk) {
      guard chain.finish(walk, token) else { return breakRing(.tooManyBytes) }
    } else {
      let walked = unsafe Self.walkSplit(
        head, descriptors, WalkRules(size: size, hasIndirect: hasIndirect), storedMemory, chain.builder())
      if let reason = walked.broken { return breakRing(reason) }
      chain.finish(walked, token)
    }
    availableIndex &+= 1
    return .chain
  }

  @inlinable @inline(__always)
  mutating func quickWalkSplit(_ head: UInt16, _ walk: inout QuickWalk) -> Bool {
    var entries = unsafe descriptors
    var limit = Int(size)
    let memory = unsafe storedMemory.tableAlone
    // SAFETY: head < size.
    var entry = unsafe entries + 16 * Int(head)
    var address = unsafe clinux_load_relaxed_u64(entry)
    var tail = unsafe DescriptorTail(clinux_load_relaxed_u64(entry + 8))
    if tail.third & SplitRing.indirect != 0 {
      guard tail.third & SplitRing.next == 0,
        let table = unsafe quickTable(address, tail.length, memory)
      else { return false }
      unsafe entries = table
      limit = Int(tail.length / 16)
      unsafe entry = table
      address = unsafe clinux_load_relaxed_u64(entry)
      tail = unsafe DescriptorTail(clinux_load_relaxed_u64(entry + 8))
    }
    // Bounded: a chain that uses up `left` is a loop.
    var left = limit
    while true {
      let flags = tail.third
      guard flags & SplitRing.indirect == 0,
        unsafe walk.append(address, tail.length, isWritable: flags & SplitRing.write != 0, memory)
      else { return false }
      if flags & SplitRing.next == 0 { return true }
      left &-= 1
      let next = Int(tail.fourth)
      guard next < limit, left > 0 else { return false }
      // SAFETY: next < limit, the entries of the ring's table or of the checked indirect one.
      unsafe entry = unsafe entries + 16 * next
      address = unsafe clinux_load_relaxed_u64(entry)
      tail = unsafe DescriptorTail(clinux_load_relaxed_u64(entry + 8))
    }
  }

  /// An indirect table in one piece, aligned and of an allowed size.
  @unsafe @inlinable @inline(__always)
  func quickTable(_ address: UInt64, _ length: UInt32, _ memory: GuestMemory.Table) -> UnsafeMutableRawPointer? {
    guard hasIndirect, length & 15 == 0, length != 0, Int(length / 16) <= greatestChainLength,
      let base = unsafe memory.translate(address, byteCount: UInt64(length)), UInt(bitPattern: base) & 7 == 0
    else { return nil }
    return unsafe base
  }

  @usableFromInline @inline(never)
  static func walkSplit(
    _ head: UInt16, _ descriptors: UnsafeMutableRawPointer, _ rules: WalkRules, _ memory: GuestMemory, _ start: ChainBuilder
  ) -> ChainBuilder {
    var builder = start
    var index = head
    for _ in 0..<rules.size {
      // SAFETY: index < size.
      let entry = unsafe descriptors + 16 * Int(index)
      let address = unsafe clinux_load_relaxed_u64(entry)
      let tail = unsafe DescriptorTail(clinux_load_relaxed_u64(entry + 8))
      let flags = tail.third
      if flags & SplitRing.indirect != 0 {
        guard flags & SplitRing.next == 0 else { return builder.breaking(.indirectNesting) }
        return walkSplitTable(address, tail.length, rules, memory, builder)
      }
      builder.append(address, tail.length, isWritable: flags & SplitRing.write != 0, memory)
      guard flags & SplitRing.next != 0, builder.broken == nil else { return builder }
      index = tail.fourth
      guard index < rules.size else { return builder.breaking(.next) }
    }
    return builder.breaking(.tooManyDescriptors)
  }

  @inline(never)
  static func walkSplitTable(
    _ address: UInt64, _ length: UInt32, _ rules: WalkRules, _ memory: GuestMemory, _ start: ChainBuilder
  ) -> ChainBuilder {
    var builder = start
    let table: IndirectTable
    switch indirectTable(address, length, rules, memory) {
    case .success(let checked): table = checked
    case .failure(let reason): return builder.breaking(reason)
    }
    var index = 0
    for _ in 0..<table.count {
      guard let (address, tail) = table.load(index, memory) else { return builder.breaking(.notMemory) }
      let flags = tail.third
      guard flags & SplitRing.indirect == 0 else { return builder.breaking(.indirectNesting) }
      builder.append(address, tail.length, isWritable: flags & SplitRing.write != 0, memory)
      guard flags & SplitRing.next != 0, builder.broken == nil else { return builder }
      index = Int(tail.fourth)
      guard index < table.count else { return builder.breaking(.next) }
    }
    return builder.breaking(.tooManyDescriptors)
  }
}
