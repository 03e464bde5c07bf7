import VirtioSpec

extension VirtioPCIFunction {
  /// The structures of BAR 0, and nothing between them.
  private enum Region {
    case common(Int)
    case isr
    case device(Int)
    case notify(Int)
    case table(Int)
    case pending(Int)
    case nothing
  }

  /// An access belongs to the structure its first byte is in; bytes past that structure's end do not exist.
  private func region(at offset: UInt64) -> Region {
    guard offset < VirtioPCILayout.barByteCount else { return .nothing }
    let offset = Int(offset)
    switch offset {
    case VirtioPCILayout.common..<(VirtioPCILayout.common + state.commonByteCount): return .common(offset)
    case VirtioPCILayout.isr: return .isr
    case VirtioPCILayout.device..<(VirtioPCILayout.device + configuration.bytes.count):
      return .device(offset - VirtioPCILayout.device)
    case VirtioPCILayout.notify..<VirtioPCILayout.table: return .notify(offset - VirtioPCILayout.notify)
    case VirtioPCILayout.table..<(VirtioPCILayout.table + msix.byteCount):
      return .table(offset - VirtioPCILayout.table)
    case VirtioPCILayout.pending..<(VirtioPCILayout.pending + msix.pendingByteCount):
      return .pending(offset - VirtioPCILayout.pending)
    default: return .nothing
    }
  }

  /// Reads `width` (1 to 8) bytes of BAR 0 at any offset; what is not there reads as zero.
  ///
  /// `isSignalled` is asked, only when the guest reads pending bits, whether a masked vector has an event waiting.
  package mutating func readBAR(
    offset: UInt64, width: Int, isSignalled: (Int) -> Bool = { _ in false }
  ) -> UInt64 {
    let width = Self.bounded(width)
    switch region(at: offset) {
    case .common(let offset):
      return state.readCommon(offset: offset, width: width, generation: configuration.generation)
    case .isr:
      defer { isr = 0 }
      return UInt64(isr)
    case .device(let offset): return configuration.read(offset: offset, width: width)
    case .table(let offset): return msix.read(offset: offset, width: width)
    case .pending(let offset): return msix.readPending(offset: offset, width: width, isSignalled: isSignalled)
    case .notify, .nothing: return 0
    }
  }

  /// Writes `width` (1 to 8) bytes of BAR 0 at any offset; what is not there or not writable swallows them.
  package mutating func writeBAR(offset: UInt64, width: Int, value: UInt64) -> [TransportEffect] {
    let width = Self.bounded(width)
    var effects: [TransportEffect] = []
    switch region(at: offset) {
    case .common(let offset):
      let wasLive = !state.status.isEmpty
      state.writeCommon(
        offset: offset, width: width, value: value, generation: configuration.generation, effects: &effects)
      if wasLive && state.status.isEmpty { isr = 0 }
    case .device(let offset):
      if !state.isResetting { configuration.write(offset: offset, width: width, value: value, effects: &effects) }
    case .notify(let offset):
      // The register says which queue is meant; the value could only repeat it.
      let queue = offset / VirtioPCILayout.notifyMultiplier
      if offset % VirtioPCILayout.notifyMultiplier == 0, state.acceptsNotification(ofQueue: queue) {
        effects.append(.notify(queue: queue))
      }
    case .table(let offset): msix.write(offset: offset, width: width, value: value, effects: &effects)
    case .isr, .pending, .nothing: break
    }
    return effects
  }
}
