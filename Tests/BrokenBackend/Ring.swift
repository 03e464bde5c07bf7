import HostSystem
import VMMemory
import VhostUser
import VirtioQueue

/// A region that the front end shares, and its file.
final class Shared {
  let description: RegionDescription
  let region: MemoryRegion
  let file: OwnedFD

  init(_ description: RegionDescription, _ region: MemoryRegion, _ file: consuming OwnedFD) {
    self.description = description
    self.region = region
    self.file = file
  }
}

/// One ring as the front end described it.
final class Ring {
  var size: UInt32 = 0
  var base: UInt32 = 0
  var address: VringAddress?
  var kick: OwnedFD?
  var call: OwnedFD?
  var oldCall: OwnedFD?
  var queue: Virtqueue?
  var isEnabled = false
  var isStarted = false
  var done: UInt32 = 0
  var wasKicked = false
  /// Has been stopped, and goes on.
  var isLate = false
  /// For translations of its own place.
  var isWaiting = false
}
