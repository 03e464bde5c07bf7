import CLinux
import Glibc
import HostSystem
import VMMemory
import VhostUser
import VirtioQueue
import VirtioSpec

/// Memory, and rings from their start to their end.
extension Session {
  func map(_ region: RegionDescription, _ fds: inout ReceivedFDs) throws -> Shared {
    guard let fd = fds.takeFirst() else { throw Refused(why: "no descriptor") }
    var guest = region.guestAddress
    if has("high") { guest &= 0xFFFF_FFFF }
    do {
      let mapped = try MemoryRegion.mapping(
        fd, guestAddress: GuestAddress(guest), byteCount: region.size, frontEndAddress: region.userAddress, fileOffset: region.mapOffset,
        allowUnsealed: true)
      return Shared(region, mapped, fd)
    } catch { throw Refused(why: "\(error)") }
  }

  func remap() throws {
    do { memory = try GuestMemory(regions: regions.map(\.region)) } catch { throw Refused(why: "\(error)") }
    guard let memory else { return }
    for ring in rings where ring.queue != nil {
      do { try ring.queue?.replaceMemory(memory) } catch {
        ring.queue = nil
        ring.isStarted = false
        throw Refused(why: "\(error)")
      }
    }
  }

  func configuration(_ ring: Ring, _ address: VringAddress) throws -> VirtqueueConfiguration {
    let isTranslated = features.contains(.accessPlatform)
    guard let memory = present, ring.size > 0, ring.size <= 32768,
      let descriptors = isTranslated
        ? GuestAddress(address.descriptorTable) : memory.guestAddress(ofFrontEnd: address.descriptorTable, byteCount: 1),
      let driver = isTranslated
        ? GuestAddress(address.availableRing) : memory.guestAddress(ofFrontEnd: address.availableRing, byteCount: 1),
      let device = isTranslated ? GuestAddress(address.usedRing) : memory.guestAddress(ofFrontEnd: address.usedRing, byteCount: 1)
    else { throw Refused(why: "the ring is not in memory") }
    var features = self.features
    if has("no-indirect") { features.remove(.indirectDescriptors) }
    if has("no-event-index") { features.remove(.eventIndex) }
    let configuration = VirtqueueConfiguration(
      size: UInt16(ring.size), descriptors: descriptors, driver: driver, device: device, features: features,
      base: VringBase(rawValue: ring.base))
    do {
      _ = try Virtqueue(
        VirtqueueConfiguration(
          size: UInt16(ring.size), descriptors: descriptors, driver: driver, device: device, features: features, base: nil), memory: memory)
    } catch VirtqueueError.base {
    } catch { throw Refused(why: "\(error)") }
    return configuration
  }

  /// With ACCESS_PLATFORM a ring whose pages are not known yet starts when they are.
  func start(_ ring: Ring) throws {
    if features.contains(.accessPlatform), !has("iotlb-deaf"), let address = ring.address {
      let missing = translation.missing(ring: address, size: ring.size)
      ring.isWaiting = !missing.isEmpty
      for page in missing { miss(page) }
      if ring.isWaiting { return }
    }
    guard let memory = present, let address = ring.address else { throw Refused(why: "the ring is not described") }
    let configuration = try configuration(ring, address)
    do { ring.queue = try Virtqueue(configuration, memory: memory, inflight: inflightRegion(ring)) } catch {
      throw Refused(why: "\(error)")
    }
    ring.isStarted = true
    ring.wasKicked = !has("start-waits")
    if features.contains(.accessPlatform) { ring.wasKicked = true }
    if has("start-skips"), !configuration.isPacked {
      // Pretends that what lies there is done.
      var lost = DescriptorChain(capacity: 64)
      while case .chain = ring.queue?.next(&lost) {}
    }
  }

  /// What addresses in the ring mean: guest memory, or the pages we know.
  var present: GuestMemory? { features.contains(.accessPlatform) && !has("iotlb-deaf") ? translation.memory : memory }

  /// An entry is there, or gone.
  func translate(_ entry: IOTLBMessage) throws {
    switch entry.kind {
    case .update:
      guard let place = memory?.guestAddress(ofFrontEnd: entry.userAddress, byteCount: entry.size),
        let shared = regions.first(where: { place.rawValue &- $0.description.guestAddress < $0.description.size })
      else { throw Refused(why: "no memory behind that") }
      let offset = shared.description.mapOffset + place.rawValue - shared.description.guestAddress
      try translation.add(entry, shared.file, offset: offset)
    case .invalidate: if !has("iotlb-stale") { try translation.remove(entry) }
    default: throw Refused(why: "no entry")
    }
    guard let pages = translation.memory else { return }
    for ring in rings {
      if ring.isWaiting { try start(ring) } else { try? ring.queue?.replaceMemory(pages) }
      ring.wasKicked = true
    }
  }

  /// Asks the front end for a page.
  func miss(_ page: UInt64) {
    guard translation.asks(page) else { return }
    ask(.iotlb(IOTLBMessage(iova: page, size: Translation.pageSize, userAddress: 0, permission: 3, kind: .miss)))
  }

  /// Says something on our own channel.
  func ask(_ message: BackEndMessage) {
    guard let number = channel?.rawValue else { return }
    let bytes = message.header().encoded + message.payload
    _ = bytes.withUnsafeBytes { write(number, $0.baseAddress, $0.count) }
  }

  func stop(_ ring: Ring) -> UInt32 {
    var base = ring.queue?.base.rawValue ?? ring.base
    if has("base-zero") { base = 0 }
    if has("base-packed"), features.contains(.packedRing) { base &= 0xFFFF }
    if has("stale"), ring.queue == nil, ring.base == 0, let stale = disk.staleBase { base = stale }
    if has("stop-twice"), ring.queue == nil { base += 1 }
    if has("resume-loses"), ring.queue != nil { base += 1 }
    if has("stop-runs") { return base }
    // Says where it has taken chains to, and is not done with them.
    if has("stop-late"), let memory = present, let address = ring.address, let configuration = try? configuration(ring, address) {
      while case .chain = ring.queue?.next(&chain) {}
      base = ring.queue?.base.rawValue ?? base
      ring.queue = try? Virtqueue(configuration, memory: memory)
      ring.isLate = true
      ring.wasKicked = true
      return base
    }
    ring.queue = nil
    ring.isStarted = false
    ring.isWaiting = false
    ring.kick = nil
    ring.call = nil
    ring.base = base
    return base
  }
}
