import HostSystem
import VirtioSpec

extension BackEndSession {
  /// The ring of an index, compared as the 32-bit number it came as.
  func vring(_ index: UInt32, _ request: String) throws(VhostUserError) -> Vring {
    guard index < UInt32(vrings.count) else { throw .invalidValue(field: "ring index of \(request)", value: UInt64(index)) }
    return vrings[Int(index)]
  }

  private var isPacked: Bool { features.contains(.packedRing) }

  mutating func setVringNum(_ state: VringState) throws(VhostUserError) {
    let name = FrontEndRequest.setVringNum.name
    let vring = try vring(state.index, name)
    guard !vring.isStarted else { throw .wrongState(request: name, why: "ring \(state.index) is running") }
    let size = Int(state.number)
    guard size <= offer.maximumQueueSize else { throw .invalidValue(field: "ring size", value: UInt64(size)) }
    // Whether the ring is packed may not be known yet; if it is split, it is looked at again when the ring starts.
    if features != [], !isPacked, size & (size - 1) != 0 { throw .invalidValue(field: "ring size", value: UInt64(size)) }
    vring.size = size
  }

  mutating func setVringBase(_ state: VringState) throws(VhostUserError) {
    let name = FrontEndRequest.setVringBase.name
    let vring = try vring(state.index, name)
    guard !vring.isStarted else { throw .wrongState(request: name, why: "ring \(state.index) is running") }
    if features != [], !isPacked, state.number > 0xFFFF { throw .invalidValue(field: "vring base", value: UInt64(state.number)) }
    vring.base = state.number
  }

  mutating func setVringAddr<D: BackEndDelegate & ~Copyable>(
    _ address: VringAddress, _ delegate: inout D
  ) throws(VhostUserError) {
    let name = FrontEndRequest.setVringAddr.name
    let vring = try vring(address.index, name)
    if vring.isStarted {
      // Only the log may change under a running ring.
      guard let current = vring.address, current.descriptorTable == address.descriptorTable,
        current.availableRing == address.availableRing, current.usedRing == address.usedRing
      else { throw .wrongState(request: name, why: "ring \(address.index) is running") }
      let layout = try layout(of: vring, at: address, in: regions, name)
      delegate.moveVring(at: Int(address.index), to: layout)
      vring.layout = layout
    } else if vring.size != nil, !regions.isEmpty {
      // Known early enough to be told to the front end with this message and not with the kick.
      _ = try layout(of: vring, at: address, in: regions, name)
    }
    vring.address = address
  }

  mutating func setVringKick<D: BackEndDelegate & ~Copyable>(
    _ index: Int, _ kick: consuming OwnedFD?, _ delegate: inout D
  ) throws(VhostUserError) {
    let name = FrontEndRequest.setVringKick.name
    let vring = try vring(UInt32(index), name)
    if vring.isStarted {
      do { try delegate.replaceKick(at: index, kick) } catch { throw refused(name, error) }
      return
    }
    guard features.contains(.version1) else {
      throw .wrongState(request: name, why: "VERSION_1 was not acknowledged, and legacy rings are not spoken")
    }
    guard let address = vring.address else { throw .wrongState(request: name, why: "ring \(index) has no address") }
    let layout = try layout(of: vring, at: address, in: regions, name)
    if !layout.isPacked, vring.base > 0xFFFF { throw .wrongState(request: name, why: "ring \(index) has an impossible base") }
    let call = vring.call.take()
    do {
      try delegate.startVring(
        VringSetup(
          index: index, layout: layout, features: driverFeatures, base: vring.base, isEnabled: vring.isEnabled,
          kick: kick, call: call, err: vring.err))
    } catch { throw refused(name, error) }
    vring.isStarted = true
    vring.layout = layout
    sendDueConfigurationChange()
  }

  mutating func getVringBase<D: BackEndDelegate & ~Copyable>(
    _ state: VringState, _ delegate: inout D
  ) throws(VhostUserError) -> Outcome {
    let name = FrontEndRequest.getVringBase.name
    let vring = try vring(state.index, name)
    // Without the feature it means nothing, and some leave there what memory held.
    let suspending = protocolFeatures.contains(.getVringBaseInflight) && state.number != 0
    guard !suspending || state.number == 1 else { throw .invalidValue(field: "suspend flag", value: UInt64(state.number)) }
    let index = Int(state.index)
    guard vring.isStarted else { return .reply(stopped(index, vring.base), nil) }
    let outcome: StopOutcome
    do { outcome = try delegate.stopVring(at: index, suspending: suspending) } catch { throw refused(name, error) }
    switch outcome {
    case .stopped(let base): return .reply(stopped(index, base), nil)
    case .pending:
      pending = .vringBase(index: index)
      return .later
    }
  }

  /// Remembers that a ring is stopped. Its kick and call are gone with it.
  func stopped(_ index: Int, _ base: UInt32) -> Reply {
    let vring = vrings[index]
    vring.isStarted = false
    vring.layout = nil
    vring.call = nil
    vring.base = base
    return .vringState(VringState(index: UInt32(index), number: base))
  }

  // MARK: Geometry

  /// Where a ring lies for the guest: every area whole in one region, aligned, of the size the ring's size implies.
  private func layout(
    of vring: Vring, at address: VringAddress, in regions: [RegionDescription], _ request: String
  ) throws(VhostUserError) -> VringLayout {
    guard let count = vring.size, let size = UInt16(exactly: count) else {
      throw .wrongState(request: request, why: "ring \(address.index) has no size")
    }
    let areas: [(field: String, start: UInt64, byteCount: Int, alignment: UInt64)]
    if isPacked {
      areas = [
        (
          "descriptor ring", address.descriptorTable, PackedRing.descriptorRingByteCount(queueSize: size),
          PackedRing.descriptorRingAlignment
        ),
        ("driver area", address.availableRing, PackedRing.eventByteCount, PackedRing.eventAlignment),
        ("device area", address.usedRing, PackedRing.eventByteCount, PackedRing.eventAlignment),
      ]
    } else {
      guard SplitRing.isValid(queueSize: size) else { throw .invalidValue(field: "ring size", value: UInt64(size)) }
      areas = [
        (
          "descriptor table", address.descriptorTable, SplitRing.descriptorTableByteCount(queueSize: size),
          SplitRing.descriptorTableAlignment
        ),
        ("available ring", address.availableRing, SplitRing.availableRingByteCount(queueSize: size), SplitRing.availableRingAlignment),
        ("used ring", address.usedRing, SplitRing.usedRingByteCount(queueSize: size), SplitRing.usedRingAlignment),
      ]
    }
    var guest: [UInt64] = []
    for area in areas {
      guard let start = Self.guestAddress(of: area.start, byteCount: UInt64(area.byteCount), in: regions),
        start % area.alignment == 0
      else { throw .invalidValue(field: "address of the \(area.field) of ring \(address.index)", value: area.start) }
      guest.append(start)
    }
    let logs = address.flags & VringAddress.logFlag != 0
    return VringLayout(
      size: count, isPacked: isPacked, descriptorTable: guest[0], availableRing: guest[1], usedRing: guest[2],
      log: logs ? address.log : nil)
  }

  /// The guest address of a range of the front end's addresses, if one region holds all of it.
  static func guestAddress(of start: UInt64, byteCount: UInt64, in regions: [RegionDescription]) -> UInt64? {
    for region in regions where start >= region.userAddress && start - region.userAddress < region.size {
      let offset = start - region.userAddress
      guard byteCount <= region.size - offset else { return nil }
      return region.guestAddress + offset
    }
    return nil
  }

  // MARK: Memory

  mutating func replaceMemory<D: BackEndDelegate & ~Copyable>(
    _ table: [RegionDescription], _ descriptors: inout ReceivedDescriptors, _ delegate: inout D
  ) throws(VhostUserError) {
    let name = FrontEndRequest.setMemTable.name
    guard table.count <= offer.maximumMemorySlots else { throw .invalidValue(field: "region count", value: UInt64(table.count)) }
    // Every running ring must find its place in the new table before anything is changed.
    var moved: [(Int, VringLayout)] = []
    for (index, vring) in vrings.enumerated() where vring.isStarted {
      guard let address = vring.address else { continue }
      moved.append((index, try layout(of: vring, at: address, in: table, name)))
    }
    var owned = ReceivedDescriptors()
    swap(&owned, &descriptors)
    do { try delegate.replaceMemory(table, owned) } catch { throw refused(name, error) }
    regions = table
    for (index, layout) in moved {
      vrings[index].layout = layout
      delegate.moveVring(at: index, to: layout)
    }
  }

  mutating func addMemory<D: BackEndDelegate & ~Copyable>(
    _ region: RegionDescription, _ descriptors: inout ReceivedDescriptors, _ delegate: inout D
  ) throws(VhostUserError) {
    let name = FrontEndRequest.addMemReg.name
    guard regions.count < offer.maximumMemorySlots else { throw .wrongState(request: name, why: "all memory slots are in use") }
    guard !regions.contains(where: { $0.overlaps(region) }) else { throw .overlappingRegions(at: region.guestAddress) }
    guard let fd = descriptors.takeFirst() else { throw .misuse("a checked descriptor is missing") }
    do { try delegate.addMemory(region, fd) } catch { throw refused(name, error) }
    regions.append(region)
  }

  mutating func removeMemory<D: BackEndDelegate & ~Copyable>(
    _ region: RegionDescription, _ delegate: inout D
  ) throws(VhostUserError) {
    let name = FrontEndRequest.remMemReg.name
    guard let position = regions.firstIndex(where: { $0.isSameRegion(as: region) }) else {
      throw .wrongState(request: name, why: "there is no such region")
    }
    var rest = regions
    let removed = rest.remove(at: position)
    for (index, vring) in vrings.enumerated() where vring.isStarted {
      guard let address = vring.address, (try? layout(of: vring, at: address, in: rest, name)) != nil else {
        throw .wrongState(request: name, why: "ring \(index) runs in the region")
      }
    }
    do { try delegate.removeMemory(removed) } catch { throw refused(name, error) }
    regions = rest
  }
}
