import CLinux
import VirtioSpec

/// `vring_need_event`: whether a ring index that moved from `old` to `new` passed `event`. All of it wraps at 65536.
@inlinable @inline(__always)
func passesEvent(_ event: UInt16, new: UInt16, old: UInt16) -> Bool {
  new &- event &- 1 < new &- old
}

/// Who has to be told of what (virtio 1.4, sections 2.7.7, 2.7.10, 2.8.14).
extension Virtqueue {
  /// Asks the driver for no kicks. It may kick nevertheless.
  @inlinable
  public mutating func disableKicks() {
    if isPacked {
      unsafe clinux_store_relaxed_u16(device + PackedRing.eventFlagsOffset, PackedRing.eventDisable)
    } else if !hasEventIndex {
      unsafe clinux_store_relaxed_u16(device + SplitRing.usedFlagsOffset, SplitRing.noNotify)
    }
    // With event indices a split ring is silent as soon as avail_event lies behind.
  }

  /// As `disableKicks`, when a kick was asked for that has not come: takes that back.
  @inlinable
  public mutating func withdrawKicks() {
    guard !isPacked, hasEventIndex else { return disableKicks() }
    // SAFETY: avail_event is within the device area.
    unsafe clinux_store_relaxed_u16(device + SplitRing.availableEventOffset(queueSize: size), availableIndex &- 1)
  }

  /// Asks the driver for a kick when it makes something available; true if it has done so already, and then it will not
  /// kick for that: take it now.
  @inlinable
  public mutating func enableKicks() -> Bool {
    guard broken == nil else { return false }
    if isPacked {
      if hasEventIndex {
        let event = availableIndex | (availableWrap ? PackedRing.wrapBit : 0)
        unsafe clinux_store_relaxed_u16(device + PackedRing.eventDescriptorOffset, event)
        // The offset has to be there before the flag that says so.
        unsafe clinux_store_release_u16(device + PackedRing.eventFlagsOffset, PackedRing.eventDescriptor)
      } else {
        unsafe clinux_store_relaxed_u16(device + PackedRing.eventFlagsOffset, PackedRing.eventEnable)
      }
    } else if hasEventIndex {
      // SAFETY: avail_event is within the device area.
      unsafe clinux_store_relaxed_u16(device + SplitRing.availableEventOffset(queueSize: size), availableIndex)
    } else {
      unsafe clinux_store_relaxed_u16(device + SplitRing.usedFlagsOffset, 0)
    }
    // Pairs with the driver's fence between publishing a buffer and looking at the fields just written: one of the two
    // sees what the other did.
    clinux_fence_full()
    return hasAvailable()
  }

  @inlinable
  mutating func needsCallSplit() -> Bool {
    // Pairs with the driver's fence between asking for a call and looking at used.idx.
    clinux_fence_full()
    let old = decidedIndex
    let isFirst = !hasDecided
    decidedIndex = usedIndex
    hasDecided = true
    if hasEventIndex {
      // SAFETY: used_event is within the driver area.
      let event = unsafe clinux_load_relaxed_u16(driver + SplitRing.usedEventOffset(queueSize: size))
      return isFirst || passesEvent(event, new: usedIndex, old: old)
    }
    let flags = unsafe clinux_load_relaxed_u16(driver + SplitRing.availableFlagsOffset)
    return flags & SplitRing.noInterrupt == 0
  }

  @inlinable
  mutating func needsCallPacked() -> Bool {
    // Pairs as above, with the driver's look at the flags of the next descriptor.
    clinux_fence_full()
    var old = decidedIndex
    let isFirst = !hasDecided
    decidedIndex = usedIndex
    hasDecided = true
    // Offset and flags in one load.
    // SAFETY: the driver area is the event structure, 4 bytes and aligned.
    let event = unsafe clinux_load_acquire_u32(driver)
    let flags = UInt16(truncatingIfNeeded: event >> 16) & 3
    if flags == PackedRing.eventDisable { return false }
    // Anything that is not one of the agreed values is answered with a call, which is never wrong.
    guard flags == PackedRing.eventDescriptor, hasEventIndex, !isFirst else { return true }
    if usedIndex <= old { old &-= size }
    var offset = UInt16(truncatingIfNeeded: event) & ~PackedRing.wrapBit
    let wrap = UInt16(truncatingIfNeeded: event) & PackedRing.wrapBit != 0
    if wrap != usedWrap { offset &-= size }
    return passesEvent(offset, new: usedIndex, old: old)
  }
}
