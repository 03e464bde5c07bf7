import Boot
import HostSystem
import VMMemory

/// A guest's RAM: one sealed memory file, mapped once, shown to the guest as one or two ranges.
package struct MachineMemory: ~Copyable {
  /// Shareable with back ends: its size can never change.
  package let fd: OwnedFD
  package let memory: GuestMemory

  private static let dontDump: CInt = 16
  private static let dontFork: CInt = 10

  /// Makes RAM of the map's size; pages come to be when they are touched.
  package init(_ map: PhysicalMap, name: String) throws(MachineError) {
    do {
      let fd = try SharedMemory.sealed(name: name, byteCount: map.memoryByteCount)
      guard let size = Int(exactly: map.memoryByteCount) else {
        throw MachineError.system(SystemError("map guest memory", .tooBig))
      }
      let mapping = try MemoryMapping.shared(fd, byteCount: size)
      mapping.advise(Self.dontDump)
      mapping.advise(Self.dontFork)
      // SAFETY: only the number is taken.
      let base = UInt64(UInt(bitPattern: unsafe mapping.baseAddress))
      var regions = [
        try MemoryRegion(
          guestAddress: GuestAddress(0), byteCount: map.lowMemory.upperBound, frontEndAddress: base, fileOffset: 0,
          mapping: mapping)
      ]
      if let high = map.highMemory {
        let offset = map.lowMemory.upperBound
        regions.append(
          try MemoryRegion(
            guestAddress: GuestAddress(high.lowerBound), byteCount: high.upperBound - high.lowerBound,
            frontEndAddress: base + offset, fileOffset: offset, mapping: mapping, mappingOffset: Int(offset)))
      }
      memory = try GuestMemory(regions: regions)
      self.fd = fd
    } catch let error as MachineError {
      throw error
    } catch let error as SystemError {
      throw .system(error)
    } catch {
      throw .memory(0)
    }
  }

  /// Gives all pages back: the guest's RAM is zero again. Only while no processor runs and no back end uses it.
  package borrowing func clear() throws(MachineError) {
    do {
      try SharedMemory.punchHole(fd, offset: 0, byteCount: memory.byteCount)
    } catch {
      throw .system(error)
    }
  }
}
