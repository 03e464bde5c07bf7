import VirtioSpec

/// Configuration space of a type 0 PCI function: 256 bytes of which each bit is either fixed or writable, and its base
/// address registers. Behaviour beyond storing (what a capability does) belongs to the function that owns it.
package struct PCIConfigurationSpace: Sendable {
  /// A 64-bit memory BAR, which takes two registers.
  package struct MemoryBAR: Hashable, Sendable {
    /// Number of its first register, 0 to 4.
    package let index: Int
    /// A power of two, at least 4096.
    package let byteCount: UInt64
    package let isPrefetchable: Bool

    package init(index: Int, byteCount: UInt64, isPrefetchable: Bool = false) {
      precondition((0...4).contains(index), "A 64-bit BAR needs two of the six registers")
      precondition(byteCount >= 4096 && byteCount & (byteCount - 1) == 0, "The size of a BAR is a power of two of pages")
      self.index = index
      self.byteCount = byteCount
      self.isPrefetchable = isPrefetchable
    }
  }

  private var bytes = [UInt8](repeating: 0, count: PCISpec.conventionalByteCount)
  private var writable = [UInt8](repeating: 0, count: PCISpec.conventionalByteCount)
  private let bars: [MemoryBAR]
  /// Offset of the last capability's `next` byte, where the next one is linked in.
  private var lastLink = PCISpec.capabilityPointer
  private var nextFree = 0x40

  package init(
    vendorID: UInt16, deviceID: UInt16, revision: UInt8, classCode: UInt32, subsystemVendorID: UInt16,
    subsystemID: UInt16, bars: [MemoryBAR] = []
  ) {
    self.bars = bars
    store(vendorID, at: PCISpec.vendorID)
    store(deviceID, at: PCISpec.deviceID)
    bytes[PCISpec.revision] = revision
    for index in 0..<3 { bytes[PCISpec.classCode + index] = UInt8(truncatingIfNeeded: classCode >> (8 * UInt32(index))) }
    store(subsystemVendorID, at: PCISpec.subsystemVendorID)
    store(subsystemID, at: PCISpec.subsystemID)
    let command = PCISpec.commandMemory | PCISpec.commandBusMaster | PCISpec.commandParity
    setWritable(
      UInt16(command | PCISpec.commandSystemError | PCISpec.commandInterruptDisable), at: PCISpec.command)
    setWritable(UInt8(0xFF), at: PCISpec.cacheLineSize)
    setWritable(UInt8(0xFF), at: PCISpec.interruptLine)
    for bar in bars {
      let offset = PCISpec.baseAddress0 + 4 * bar.index
      store(PCISpec.barMemory64 | (bar.isPrefetchable ? PCISpec.barPrefetchable : 0), at: offset)
      setWritable(~(bar.byteCount - 1), at: offset)
    }
  }

  /// Adds a capability of these bytes (its first two, id and link, included) and returns its offset. The first one sits
  /// at 0x40, each at a multiple of 4.
  package mutating func addCapability(_ capability: [UInt8]) -> Int {
    let offset = (nextFree + 3) & ~3
    precondition(capability.count >= 2 && offset + capability.count <= bytes.count, "Capabilities fit 256 bytes")
    for (index, byte) in capability.enumerated() { bytes[offset + index] = byte }
    bytes[offset + 1] = 0
    bytes[lastLink] = UInt8(offset)
    lastLink = offset + 1
    nextFree = offset + capability.count
    store(load(UInt16.self, at: PCISpec.status) | PCISpec.statusCapabilityList, at: PCISpec.status)
    return offset
  }

  /// The value at any offset and width up to 8; what lies beyond 256 bytes is zero, which means no extended capability.
  package func read(offset: Int, width: Int) -> UInt64 {
    var value: UInt64 = 0
    for index in 0..<width where offset >= 0 && offset + index < bytes.count {
      value |= UInt64(bytes[offset + index]) << UInt64(8 * index)
    }
    return value
  }

  /// Stores the writable bits among the `width` bytes at any offset.
  package mutating func write(offset: Int, width: Int, value: UInt64) {
    for index in 0..<width where offset >= 0 && offset + index < bytes.count {
      let mask = writable[offset + index]
      let byte = UInt8(truncatingIfNeeded: value >> UInt64(8 * index))
      bytes[offset + index] = bytes[offset + index] & ~mask | byte & mask
    }
  }

  /// Where BAR number `index` answers, or `nil` while memory decoding is off.
  package func decodedAddress(ofBAR index: Int) -> UInt64? {
    load(UInt16.self, at: PCISpec.command) & PCISpec.commandMemory == 0 ? nil : address(ofBAR: index)
  }

  /// What the registers of the BAR say, decoded or not.
  package func address(ofBAR index: Int) -> UInt64 {
    guard let bar = bars.first(where: { $0.index == index }) else { return 0 }
    return load(UInt64.self, at: PCISpec.baseAddress0 + 4 * index) & ~(bar.byteCount - 1)
  }

  /// Puts a BAR where firmware would have put it. `address` is a multiple of the BAR's size.
  package mutating func setAddress(_ address: UInt64, ofBAR index: Int) {
    write(offset: PCISpec.baseAddress0 + 4 * index, width: 8, value: address)
  }

  // MARK: Raw bytes, for the function that owns them

  package func load<Value: FixedWidthInteger & UnsignedInteger>(_ type: Value.Type, at offset: Int) -> Value {
    LittleEndian.load(from: bytes, at: offset)
  }

  package mutating func store<Value: FixedWidthInteger & UnsignedInteger>(_ value: Value, at offset: Int) {
    LittleEndian.store(value, to: &bytes, at: offset)
  }

  package mutating func setWritable<Value: FixedWidthInteger & UnsignedInteger>(_ mask: Value, at offset: Int) {
    LittleEndian.store(mask, to: &writable, at: offset)
  }
}
