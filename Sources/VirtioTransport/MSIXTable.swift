import VirtioSpec

/// MSI-X: table, function mask and enable bit (PCI 3.0, section 6.8.2). Pending bits are not kept here: a masked vector's
/// events stay in its eventfd, and whoever owns that is asked when the guest reads the pending bits.
package struct MSIXTable: Sendable {
  private struct Entry: Sendable {
    var message = InterruptMessage()
    /// Bit 0 of vector control; set after reset.
    var isMasked = true
  }

  private var entries: [Entry]
  package private(set) var isEnabled = false
  package private(set) var isFunctionMasked = false

  init(vectorCount: Int) {
    entries = Array(repeating: Entry(), count: vectorCount)
  }

  package var vectorCount: Int { entries.count }
  var byteCount: Int { entries.count * PCISpec.msixTableEntryByteCount }
  /// Whole 64-bit words.
  var pendingByteCount: Int { (entries.count + 63) / 64 * 8 }

  /// A vector's message, and whether its events must be held back: by its own mask, the function's, or because MSI-X is
  /// off altogether (there is no other interrupt to fall back to).
  package func vector(_ index: Int) -> (message: InterruptMessage, isMasked: Bool) {
    let entry = entries[index]
    return (entry.message, entry.isMasked || isFunctionMasked || !isEnabled)
  }

  /// Bits 14 and 15 of message control; the table size is not writable.
  mutating func setControl(enabled: Bool, functionMasked: Bool, effects: inout [TransportEffect]) {
    let before = isFunctionMasked || !isEnabled
    isEnabled = enabled
    isFunctionMasked = functionMasked
    guard before != (isFunctionMasked || !isEnabled) else { return }
    for index in entries.indices where !entries[index].isMasked {
      effects.append(
        .vectorChanged(index: index, message: entries[index].message, isMasked: vector(index).isMasked))
    }
  }

  func read(offset: Int, width: Int) -> UInt64 {
    var value: UInt64 = 0
    for index in 0..<width where offset + index < byteCount {
      value |= UInt64(byte(at: offset + index)) << UInt64(8 * index)
    }
    return value
  }

  private func byte(at offset: Int) -> UInt8 {
    let entry = entries[offset / PCISpec.msixTableEntryByteCount]
    let within = offset % PCISpec.msixTableEntryByteCount
    return switch within {
    case 0..<8: UInt8(truncatingIfNeeded: entry.message.address >> UInt64(8 * within))
    case 8..<12: UInt8(truncatingIfNeeded: entry.message.data >> UInt32(8 * (within - 8)))
    case 12: entry.isMasked ? 1 : 0
    default: 0
    }
  }

  /// Writes any run of bytes; a wider access than an entry's fields touches each of them once.
  mutating func write(offset: Int, width: Int, value: UInt64, effects: inout [TransportEffect]) {
    let end = min(offset + width, byteCount)
    guard offset < end else { return }
    let firstEntry = offset / PCISpec.msixTableEntryByteCount
    let lastEntry = (end - 1) / PCISpec.msixTableEntryByteCount
    for index in firstEntry...lastEntry {
      let before = vector(index)
      let base = index * PCISpec.msixTableEntryByteCount
      for position in max(offset, base)..<min(end, base + PCISpec.msixTableEntryByteCount) {
        store(UInt8(truncatingIfNeeded: value >> UInt64(8 * (position - offset))), entry: index, at: position - base)
      }
      let after = vector(index)
      // A masked vector's message matters only once it is unmasked, and is reported then.
      guard before.isMasked != after.isMasked || (!after.isMasked && before.message != after.message) else { continue }
      effects.append(.vectorChanged(index: index, message: after.message, isMasked: after.isMasked))
    }
  }

  private mutating func store(_ byte: UInt8, entry index: Int, at offset: Int) {
    switch offset {
    case 0..<8:
      let shift = UInt64(8 * offset)
      entries[index].message.address = entries[index].message.address & ~(0xFF << shift) | UInt64(byte) << shift
    case 8..<12:
      let shift = UInt32(8 * (offset - 8))
      entries[index].message.data = entries[index].message.data & ~(0xFF << shift) | UInt32(byte) << shift
    case 12: entries[index].isMasked = byte & 1 == 1
    default: break
    }
  }

  /// The pending bits from byte `offset` on. `isSignalled` is asked for masked vectors only: an event of an unmasked one
  /// is on its way and no longer pending.
  func readPending(offset: Int, width: Int, isSignalled: (Int) -> Bool) -> UInt64 {
    var value: UInt64 = 0
    for bit in 0..<(8 * width) {
      let index = 8 * offset + bit
      guard index < entries.count else { break }
      if vector(index).isMasked && isSignalled(index) { value |= 1 << UInt64(bit) }
    }
    return value
  }

  /// Back to the state after power-on.
  mutating func reset(effects: inout [TransportEffect]) {
    setControl(enabled: false, functionMasked: false, effects: &effects)
    entries = Array(repeating: Entry(), count: entries.count)
  }
}
