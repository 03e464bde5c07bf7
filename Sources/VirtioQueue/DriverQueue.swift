import CLinux
import VMMemory
import VirtioSpec

/// One buffer of a chain that a driver offers.
public struct DriverBuffer: Hashable, Sendable {
  public var address: GuestAddress
  public var byteCount: UInt32
  /// Whether the device writes it; otherwise it reads it.
  public var isDeviceWritable: Bool

  @inlinable
  public init(_ address: GuestAddress, _ byteCount: UInt32, isDeviceWritable: Bool) {
    self.address = address
    self.byteCount = byteCount
    self.isDeviceWritable = isDeviceWritable
  }
}

/// What `DriverQueue.nextUsed` found.
public enum UsedOutcome: Equatable, Sendable {
  /// The device is done with a chain. `written` is nil if it reported several chains of an in-order queue by one element,
  /// of which this was not the last.
  case used(head: UInt16, written: UInt32?)
  /// Nothing more is used.
  case empty
  /// The device reports what is not outstanding, or moved its index too far.
  case broken
}

/// The driver side of a virtqueue, split or packed: for tests, and for tools that drive a back end without a guest.
///
///     var driver = try DriverQueue(.contiguous(size: 256, features: features, at: address), memory: memory)
///     let buffers: InlineArray<3, DriverBuffer> = [header, data, status]
///     while let head = driver.add(buffers.span) { requests[Int(head)] = ... }
///     if driver.publish() { kick.signal() }
///     while case .used(let head, let written) = driver.nextUsed() { ... }
///     if driver.enableCalls() { /* more came meanwhile */ }
///
/// One owner, one thread at a time. The memory of the ring is cleared at `init`.
@safe
public struct DriverQueue: ~Copyable, @unchecked Sendable {
  // @unchecked: private state has one owner; the ring is reached through single loads and stores.

  public let configuration: VirtqueueConfiguration
  public let memory: GuestMemory
  @usableFromInline let size: UInt16
  @usableFromInline let isPacked: Bool
  @usableFromInline let hasEventIndex: Bool
  @usableFromInline let isInOrder: Bool
  @usableFromInline let descriptors: UnsafeMutableRawPointer
  @usableFromInline let driver: UnsafeMutableRawPointer
  @usableFromInline let device: UnsafeMutableRawPointer

  /// Split: index of the next available entry. Packed: next slot to fill, with its wrap counter.
  @usableFromInline var availableIndex: UInt16 = 0
  @usableFromInline var availableWrap = true
  /// `availableIndex` at the last decision about a kick.
  @usableFromInline var decidedIndex: UInt16 = 0
  @usableFromInline var unpublishedCount: UInt16 = 0
  /// Packed: the first descriptor of the batch, whose flags are stored last.
  @usableFromInline var firstSlot: UInt16 = 0
  @usableFromInline var firstFlags: UInt16 = 0
  @usableFromInline var usedIndex: UInt16 = 0
  @usableFromInline var usedWrap = true
  /// Split: the device's index as last loaded.
  @usableFromInline var usedSeen: UInt16 = 0

  /// What is known of an outstanding chain, by head or buffer id, and the list of free descriptors or ids.
  @usableFromInline
  struct Slot {
    /// Next in the chain (split), or next in the free list.
    @usableFromInline var next: UInt16 = 0
    /// Descriptors of the chain; 0 if none is outstanding under this head.
    @usableFromInline var count: UInt16 = 0
    /// Last descriptor of the chain (split).
    @usableFromInline var last: UInt16 = 0
    @inlinable init() {}
  }
  @usableFromInline let slots: UnsafeMutablePointer<Slot>
  @usableFromInline var freeHead: UInt16 = 0
  @usableFromInline var freeTail: UInt16
  /// Free descriptors.
  @usableFromInline var freeCount: Int
  /// Entries of the free list: descriptors of a split ring, buffer ids of a packed one.
  @usableFromInline var listCount: Int
  /// Heads in the order they were made available, as a ring of `size` entries; kept for in-order queues only.
  @usableFromInline let order: UnsafeMutablePointer<UInt16>
  @usableFromInline var orderStart = 0
  @usableFromInline var orderCount = 0
  /// The element of an in-order batch that is being handed out.
  @usableFromInline var batchHead: UInt16 = 0
  @usableFromInline var batchWritten: UInt32 = 0
  @usableFromInline var isInBatch = false

  /// A fresh ring; `configuration.base` is ignored.
  public init(_ configuration: VirtqueueConfiguration, memory: GuestMemory) throws(VirtqueueError) {
    let pointers = try unsafe configuration.resolve(in: memory)
    self.configuration = configuration
    self.memory = memory
    size = configuration.size
    isPacked = configuration.isPacked
    hasEventIndex = configuration.features.contains(.eventIndex)
    isInOrder = configuration.features.contains(.inOrder)
    unsafe descriptors = pointers.descriptors
    unsafe driver = pointers.driver
    unsafe device = pointers.device
    freeTail = configuration.size &- 1
    freeCount = Int(configuration.size)
    listCount = Int(configuration.size)
    unsafe slots = .allocate(capacity: Int(configuration.size))
    unsafe order = .allocate(capacity: Int(configuration.size))
    unsafe order.initialize(repeating: 0, count: Int(configuration.size))
    // SAFETY: `resolve` checked the extents; `slots` and `order` have `size` entries.
    unsafe pointers.descriptors.initializeMemory(as: UInt8.self, repeating: 0, count: configuration.descriptorByteCount)
    unsafe pointers.driver.initializeMemory(as: UInt8.self, repeating: 0, count: configuration.driverByteCount)
    unsafe pointers.device.initializeMemory(as: UInt8.self, repeating: 0, count: configuration.deviceByteCount)
    for index in 0..<Int(configuration.size) {
      var slot = Slot()
      slot.next = UInt16(truncatingIfNeeded: index + 1)
      unsafe (slots + index).initialize(to: slot)
    }
  }

  deinit {
    unsafe slots.deallocate()
    unsafe order.deallocate()
  }

  /// Descriptors that are free.
  @inlinable public var freeDescriptorCount: Int { freeCount }

  // MARK: Offering chains

  /// Writes a chain; the device sees it with the next `publish`. Returns its head (packed: buffer id), below the size, or
  /// nil if there are not enough free descriptors or no buffers.
  @inlinable
  public mutating func add(_ buffers: Span<DriverBuffer>) -> UInt16? {
    guard !buffers.isEmpty, buffers.count <= freeCount else { return nil }
    return isPacked ? addPacked(buffers) : addSplit(buffers)
  }

  /// Writes a chain as an indirect table at `table` (8-byte aligned guest memory for 16 bytes per buffer, not to be changed
  /// until the chain is used), which takes up one descriptor of the ring. Nil if there is none, or no such memory.
  public mutating func addIndirect(_ buffers: Span<DriverBuffer>, table: GuestAddress) -> UInt16? {
    guard !buffers.isEmpty, freeCount > 0, table.rawValue % 8 == 0,
      let base = unsafe memory.translate(table, byteCount: UInt64(16 * buffers.count))
    else { return nil }
    for index in 0..<buffers.count {
      // SAFETY: the table was checked for all its entries.
      let entry = unsafe base + 16 * index
      let buffer = buffers[index]
      let isLast = index == buffers.count - 1
      let write = buffer.isDeviceWritable ? SplitRing.write : 0
      if isPacked {
        unsafe Self.store(entry, buffer.address.rawValue, buffer.byteCount, 0, write)
      } else {
        unsafe Self.store(
          entry, buffer.address.rawValue, buffer.byteCount, write | (isLast ? 0 : SplitRing.next),
          isLast ? 0 : UInt16(truncatingIfNeeded: index + 1))
      }
    }
    let length = UInt32(16 * buffers.count)
    return isPacked
      ? placePackedSingle(table.rawValue, length, PackedRing.indirect)
      : placeSplitSingle(table.rawValue, length, SplitRing.indirect)
  }

  /// Shows the device all chains added since the last time; true if it has to be kicked for that.
  @inlinable
  public mutating func publish() -> Bool {
    guard unpublishedCount != 0 else { return false }
    unpublishedCount = 0
    if isPacked {
      // Pairs with the device's load of these flags.
      // SAFETY: firstSlot < size.
      unsafe clinux_store_release_u16(
        descriptors + 16 * Int(firstSlot) + PackedRing.flagsOffset, firstFlags)
    } else {
      // Pairs with the device's load of avail.idx.
      unsafe clinux_store_release_u16(driver + SplitRing.availableIndexOffset, availableIndex)
    }
    // Pairs with the device's fence between asking for kicks and looking for chains.
    clinux_fence_full()
    let old = decidedIndex
    decidedIndex = availableIndex
    return isPacked ? needsKickPacked(old) : needsKickSplit(old)
  }

  @inlinable
  func needsKickSplit(_ old: UInt16) -> Bool {
    if hasEventIndex {
      // SAFETY: avail_event is within the device area.
      let event = unsafe clinux_load_relaxed_u16(device + SplitRing.availableEventOffset(queueSize: size))
      return passesEvent(event, new: availableIndex, old: old)
    }
    return unsafe clinux_load_relaxed_u16(device + SplitRing.usedFlagsOffset) & SplitRing.noNotify == 0
  }

  @inlinable
  func needsKickPacked(_ previous: UInt16) -> Bool {
    var old = previous
    // SAFETY: the device area is the event structure.
    let event = unsafe clinux_load_acquire_u32(device)
    let flags = UInt16(truncatingIfNeeded: event >> 16) & 3
    if flags == PackedRing.eventDisable { return false }
    guard flags == PackedRing.eventDescriptor, hasEventIndex else { return true }
    if availableIndex <= old { old &-= size }
    var offset = UInt16(truncatingIfNeeded: event) & ~PackedRing.wrapBit
    if (UInt16(truncatingIfNeeded: event) & PackedRing.wrapBit != 0) != availableWrap { offset &-= size }
    return passesEvent(offset, new: availableIndex, old: old)
  }

  // MARK: Taking used chains

  /// The next chain the device is done with. Its head and descriptors are free again.
  @inlinable
  public mutating func nextUsed() -> UsedOutcome {
    if !isInBatch {
      switch isPacked ? loadUsedPacked() : loadUsedSplit() {
      case .used(let head, let written):
        guard head < size, unsafe slots[Int(head)].count != 0 else { return .broken }
        guard isInOrder else {
          release(head)
          return .used(head: head, written: written)
        }
        batchHead = head
        batchWritten = written ?? 0
        isInBatch = true
      case .empty: return .empty
      case .broken: return .broken
      }
    }
    return nextOfBatch()
  }

  @inlinable
  mutating func nextOfBatch() -> UsedOutcome {
    guard orderCount > 0 else { return .broken }
    // SAFETY: orderStart < size.
    let head = unsafe order[orderStart]
    orderStart = orderStart + 1 == Int(size) ? 0 : orderStart + 1
    orderCount -= 1
    release(head)
    guard head == batchHead else { return .used(head: head, written: nil) }
    isInBatch = false
    return .used(head: head, written: batchWritten)
  }

  @inlinable @inline(__always)
  mutating func remember(_ head: UInt16) {
    guard isInOrder else { return }
    let end = orderStart + orderCount
    // SAFETY: the index is below size, as orderStart is, and no more than `size` chains are outstanding.
    unsafe order[end >= Int(size) ? end - Int(size) : end] = head
    orderCount += 1
  }

  /// Frees what a used chain took up and moves past its used entry.
  @inlinable @inline(__always)
  mutating func release(_ head: UInt16) {
    // SAFETY: head < size, checked by the caller.
    let count = unsafe slots[Int(head)].count
    unsafe slots[Int(head)].count = 0
    let last = unsafe isPacked ? head : slots[Int(head)].last
    if isPacked {
      let advanced = Int(usedIndex) + Int(count)
      if advanced >= Int(size) { usedWrap.toggle() }
      usedIndex = UInt16(truncatingIfNeeded: advanced >= Int(size) ? advanced - Int(size) : advanced)
    } else {
      usedIndex &+= 1
    }
    // In order, descriptors have to be taken in ring order: freed ones go to the end. Else the warmest first.
    if isInOrder {
      unsafe slots[Int(freeTail)].next = head
      freeTail = last
      if listCount == 0 { freeHead = head }
    } else {
      unsafe slots[Int(last)].next = freeHead
      freeHead = head
      if listCount == 0 { freeTail = last }
    }
    freeCount += Int(count)
    listCount += isPacked ? 1 : Int(count)
  }

  // MARK: Calls

  /// Asks the device for no calls. It may call nevertheless.
  @inlinable
  public mutating func disableCalls() {
    if isPacked {
      unsafe clinux_store_relaxed_u16(driver + PackedRing.eventFlagsOffset, PackedRing.eventDisable)
    } else if !hasEventIndex {
      unsafe clinux_store_relaxed_u16(driver + SplitRing.availableFlagsOffset, SplitRing.noInterrupt)
    } else {
      // The index just left: it is passed again only after a whole turn of 65536.
      unsafe clinux_store_relaxed_u16(driver + SplitRing.usedEventOffset(queueSize: size), usedIndex &- 1)
    }
  }

  /// Asks the device for a call when it has used something; true if it has done so already.
  @inlinable
  public mutating func enableCalls() -> Bool {
    if isPacked {
      if hasEventIndex {
        let event = usedIndex | (usedWrap ? PackedRing.wrapBit : 0)
        unsafe clinux_store_relaxed_u16(driver + PackedRing.eventDescriptorOffset, event)
        unsafe clinux_store_release_u16(driver + PackedRing.eventFlagsOffset, PackedRing.eventDescriptor)
      } else {
        unsafe clinux_store_relaxed_u16(driver + PackedRing.eventFlagsOffset, PackedRing.eventEnable)
      }
    } else if hasEventIndex {
      unsafe clinux_store_relaxed_u16(driver + SplitRing.usedEventOffset(queueSize: size), usedIndex)
    } else {
      unsafe clinux_store_relaxed_u16(driver + SplitRing.availableFlagsOffset, 0)
    }
    clinux_fence_full()
    return hasUsed()
  }

  /// Whether the device has used anything that was not taken. Asks the ring.
  @inlinable
  public mutating func hasUsed() -> Bool {
    if isInBatch { return true }
    if isPacked {
      // SAFETY: usedIndex < size.
      let flags = unsafe clinux_load_acquire_u16(descriptors + 16 * Int(usedIndex) + PackedRing.flagsOffset)
      return isUsed(flags)
    }
    return unsafe clinux_load_acquire_u16(device + SplitRing.usedIndexOffset) != usedIndex
  }
}
