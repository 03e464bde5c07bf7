import VirtioSpec

/// Offsets in configuration space of the capabilities that do something when touched.
struct CapabilityOffsets: Sendable {
  let msix: Int
  /// The window through which firmware reaches BAR 0 (`cfg_type` 5).
  let access: Int
}

extension VirtioPCIFunction {
  static func makeSpace(
    _ description: Description, commonByteCount: Int
  ) -> (space: PCIConfigurationSpace, offsets: CapabilityOffsets) {
    var space = PCIConfigurationSpace(
      vendorID: VirtioPCI.vendorID, deviceID: description.device.pciDeviceID, revision: VirtioPCI.revision,
      classCode: description.device.pciClassCode, subsystemVendorID: VirtioPCI.vendorID,
      subsystemID: description.device.pciDeviceID,
      bars: [.init(index: VirtioPCILayout.bar, byteCount: VirtioPCILayout.barByteCount)])
    let msix = space.addCapability(msixCapability(vectorCount: description.vectorCount))
    space.setWritable(PCISpec.msixEnable | PCISpec.msixFunctionMask, at: msix + 2)
    _ = space.addCapability(
      vendorCapability(.common, offset: VirtioPCILayout.common, length: commonByteCount))
    _ = space.addCapability(vendorCapability(.isr, offset: VirtioPCILayout.isr, length: 1))
    if !description.configuration.isEmpty {
      _ = space.addCapability(
        vendorCapability(.device, offset: VirtioPCILayout.device, length: description.configuration.count))
    }
    let notifyLength = description.queueSizes.count * VirtioPCILayout.notifyMultiplier
    _ = space.addCapability(
      vendorCapability(
        .notify, offset: VirtioPCILayout.notify, length: notifyLength,
        extra: UInt32(VirtioPCILayout.notifyMultiplier)))
    let access = space.addCapability(vendorCapability(.pciAccess, offset: 0, length: 0, extra: 0))
    space.setWritable(UInt8(0xFF), at: access + 4)
    space.setWritable(UInt64.max, at: access + 8)
    space.setWritable(UInt32.max, at: access + 16)
    return (space, CapabilityOffsets(msix: msix, access: access))
  }

  private static func msixCapability(vectorCount: Int) -> [UInt8] {
    var bytes = [UInt8](repeating: 0, count: 12)
    bytes[0] = PCISpec.capabilityMSIX
    LittleEndian.store(UInt16(vectorCount - 1), to: &bytes, at: 2)
    LittleEndian.store(UInt32(VirtioPCILayout.table | VirtioPCILayout.bar), to: &bytes, at: 4)
    LittleEndian.store(UInt32(VirtioPCILayout.pending | VirtioPCILayout.bar), to: &bytes, at: 8)
    return bytes
  }

  /// `struct virtio_pci_cap`, with four more bytes for the kinds that have them.
  private static func vendorCapability(
    _ type: VirtioPCI.ConfigurationType, offset: Int, length: Int, extra: UInt32? = nil
  ) -> [UInt8] {
    var bytes = [UInt8](repeating: 0, count: extra == nil ? 16 : 20)
    bytes[0] = PCISpec.capabilityVendor
    bytes[2] = UInt8(bytes.count)
    bytes[3] = type.rawValue
    bytes[4] = UInt8(VirtioPCILayout.bar)
    LittleEndian.store(UInt32(offset), to: &bytes, at: 8)
    LittleEndian.store(UInt32(length), to: &bytes, at: 12)
    if let extra { LittleEndian.store(extra, to: &bytes, at: 16) }
    return bytes
  }

  // MARK: Configuration space accesses

  /// Reads `width` (1 to 8) bytes of configuration space at any offset. `isSignalled` says whether a masked vector has
  /// an event waiting; see `readBAR`.
  package mutating func readConfigurationSpace(
    offset: Int, width: Int, isSignalled: (Int) -> Bool = { _ in false }
  ) -> UInt64 {
    let width = Self.bounded(width)
    if touchesAccessData(offset: offset, width: width), let window = accessWindow {
      let value = readBAR(offset: window.offset, width: window.width, isSignalled: isSignalled)
      space.store(UInt32(truncatingIfNeeded: value), at: offsets.access + 16)
    }
    return space.read(offset: offset, width: width)
  }

  /// Writes `width` (1 to 8) bytes of configuration space at any offset.
  package mutating func writeConfigurationSpace(offset: Int, width: Int, value: UInt64) -> [TransportEffect] {
    let width = Self.bounded(width)
    var effects: [TransportEffect] = []
    let before = decodedAddress
    space.write(offset: offset, width: width, value: value)
    let after = decodedAddress
    if before != after { effects.append(.barMoved(from: before, to: after)) }
    let control = space.load(UInt16.self, at: offsets.msix + 2)
    msix.setControl(
      enabled: control & PCISpec.msixEnable != 0, functionMasked: control & PCISpec.msixFunctionMask != 0,
      effects: &effects)
    if touchesAccessData(offset: offset, width: width), let window = accessWindow {
      let data = UInt64(space.load(UInt32.self, at: offsets.access + 16))
      effects += writeBAR(offset: window.offset, width: window.width, value: data)
    }
    return effects
  }

  static func bounded(_ width: Int) -> Int { min(max(width, 1), 8) }

  private func touchesAccessData(offset: Int, width: Int) -> Bool {
    let data = offsets.access + 16
    return offset < data + 4 && offset > data - width
  }

  /// The place in BAR 0 that the window points to, if it is one: length 1, 2 or 4, aligned, inside the BAR.
  private var accessWindow: (offset: UInt64, width: Int)? {
    let bar = space.load(UInt8.self, at: offsets.access + 4)
    let offset = UInt64(space.load(UInt32.self, at: offsets.access + 8))
    let length = UInt64(space.load(UInt32.self, at: offsets.access + 12))
    guard Int(bar) == VirtioPCILayout.bar, length == 1 || length == 2 || length == 4, offset % length == 0,
      offset + length <= VirtioPCILayout.barByteCount
    else { return nil }
    return (offset, Int(length))
  }
}
