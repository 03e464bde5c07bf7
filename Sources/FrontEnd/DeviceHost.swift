import HostSystem
import VhostUser
import VirtioTransport

/// What a device's front end needs of the machine it is plugged into.
package protocol DeviceHost {
  /// The doorbell of a queue, as a descriptor to be given away; nil when there is no such queue.
  func kick(ofQueue queue: Int) -> SharedDescriptor?
  /// The event of an interrupt vector, as a descriptor to be given away; nil when there is no such vector.
  func call(ofVector vector: Int) -> SharedDescriptor?
  /// The used index of a split ring whose used ring is there in guest memory; nil when that is not memory.
  func usedIndex(ofUsedRing address: UInt64) -> UInt16?
  /// Two bytes of guest memory, little-endian; nil where there is no memory.
  func word(at address: UInt64) -> UInt16?
  /// Changes the registers the guest sees, and carries out what follows from it.
  func update(_ change: (inout VirtioPCIFunction) -> [TransportEffect])
}

/// Guest memory as it is given to back ends: regions of one file, at addresses that say nothing about where the core has
/// them mapped. A back end needs *some* address space to name rings in; giving it the core's own would tell a hostile one
/// where to aim.
package struct SharedGuestMemory: Sendable {
  /// The sum with a guest address is the address named to back ends. Never zero, which some take for "not set".
  private static let base: UInt64 = 1 << 46

  package let regions: [SharedRegion]

  /// - Parameter regions: guest address, byte count and file offset of each; they do not overlap.
  package init(regions: [(guestAddress: UInt64, byteCount: UInt64, fileOffset: UInt64)], file: SharedDescriptor) {
    self.regions = regions.map { region in
      precondition(region.guestAddress < 1 << 52, "Guest memory lies where processors can address it.")
      return SharedRegion(
        RegionDescription(
          guestAddress: region.guestAddress, size: region.byteCount, userAddress: Self.base + region.guestAddress,
          mapOffset: region.fileOffset), file)
    }
  }

  /// The address named to back ends for a guest range; nil unless one region holds all of it.
  package func userAddress(of guestAddress: UInt64, byteCount: Int) -> UInt64? {
    for region in regions.map(\.description) where guestAddress >= region.guestAddress {
      let offset = guestAddress - region.guestAddress
      guard offset < region.size else { continue }
      return UInt64(byteCount) <= region.size - offset ? region.userAddress + offset : nil
    }
    return nil
  }
}
