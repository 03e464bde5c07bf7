import VMMemory
import VirtioSpec

/// Where a stopped ring stands: what `VHOST_USER_GET_VRING_BASE` returns and `VHOST_USER_SET_VRING_BASE` carries.
public struct VringBase: RawRepresentable, Hashable, Sendable {
  public var rawValue: UInt32

  @inlinable
  public init(rawValue: UInt32) { self.rawValue = rawValue }

  /// A split ring: the next available index. The used index is in guest memory.
  @inlinable
  public init(availableIndex: UInt16) { rawValue = UInt32(availableIndex) }

  /// A packed ring: the next slots to read and to write, each below the size, with their wrap counters.
  @inlinable
  public init(availableSlot: UInt16, availableWrap: Bool, usedSlot: UInt16, usedWrap: Bool) {
    let available = UInt32(availableSlot & 0x7FFF) | (availableWrap ? 0x8000 : 0)
    let used = UInt32(usedSlot & 0x7FFF) | (usedWrap ? 0x8000 : 0)
    rawValue = available | used << 16
  }

  /// A ring that was never used.
  @inlinable
  public static func start(packed: Bool) -> VringBase {
    packed
      ? VringBase(availableSlot: 0, availableWrap: true, usedSlot: 0, usedWrap: true) : VringBase(availableIndex: 0)
  }

  @inlinable var availableIndex: UInt16 { UInt16(truncatingIfNeeded: rawValue) }
  @inlinable var availableSlot: UInt16 { UInt16(truncatingIfNeeded: rawValue & 0x7FFF) }
  @inlinable var availableWrap: Bool { rawValue & 0x8000 != 0 }
  @inlinable var usedSlot: UInt16 { UInt16(truncatingIfNeeded: rawValue >> 16 & 0x7FFF) }
  @inlinable var usedWrap: Bool { rawValue >> 31 != 0 }
}

/// All that makes a virtqueue out of guest memory.
public struct VirtqueueConfiguration: Hashable, Sendable {
  public var size: UInt16
  /// Descriptor table, or packed descriptor ring; 16-byte aligned.
  public var descriptors: GuestAddress
  /// Available ring (2-byte aligned), or driver event suppression (4-byte aligned).
  public var driver: GuestAddress
  /// Used ring, or device event suppression; 4-byte aligned.
  public var device: GuestAddress
  /// The negotiated features, of which `packedRing`, `eventIndex`, `indirectDescriptors` and `inOrder` matter.
  public var features: FeatureSet
  public var base: VringBase

  /// A queue at the given state, by default one that was never used.
  public init(
    size: UInt16, descriptors: GuestAddress, driver: GuestAddress, device: GuestAddress, features: FeatureSet,
    base: VringBase? = nil
  ) {
    self.size = size
    self.descriptors = descriptors
    self.driver = driver
    self.device = device
    self.features = features
    self.base = base ?? .start(packed: features.contains(.packedRing))
  }

  public var isPacked: Bool { features.contains(.packedRing) }

  var descriptorByteCount: Int {
    isPacked ? PackedRing.descriptorRingByteCount(queueSize: size) : SplitRing.descriptorTableByteCount(queueSize: size)
  }
  var driverByteCount: Int {
    isPacked ? PackedRing.eventByteCount : SplitRing.availableRingByteCount(queueSize: size)
  }
  var deviceByteCount: Int { isPacked ? PackedRing.eventByteCount : SplitRing.usedRingByteCount(queueSize: size) }

  /// The host addresses of the three areas. They are valid as long as `memory` is.
  func resolve(in memory: GuestMemory) throws(VirtqueueError) -> RingPointers {
    let valid = isPacked ? PackedRing.isValid(queueSize: size) : SplitRing.isValid(queueSize: size)
    guard valid else { throw .size(size) }
    let driverAlignment = isPacked ? PackedRing.eventAlignment : SplitRing.availableRingAlignment
    let deviceAlignment = isPacked ? PackedRing.eventAlignment : SplitRing.usedRingAlignment
    return unsafe RingPointers(
      descriptors: try Self.locate(.descriptors, descriptors, descriptorByteCount, alignment: 16, in: memory),
      driver: try Self.locate(.driver, driver, driverByteCount, alignment: driverAlignment, in: memory),
      device: try Self.locate(.device, device, deviceByteCount, alignment: deviceAlignment, in: memory))
  }

  private static func locate(
    _ part: VirtqueueError.Part, _ address: GuestAddress, _ byteCount: Int, alignment: UInt64, in memory: GuestMemory
  ) throws(VirtqueueError) -> UnsafeMutableRawPointer {
    guard address.rawValue % alignment == 0 else { throw .misaligned(part, address) }
    guard let pointer = unsafe memory.translate(address, byteCount: UInt64(byteCount)) else {
      throw .notMemory(part, address, byteCount: byteCount)
    }
    // Regions start at pages in guest and host alike, unless a front end maps oddly: single loads need real alignment.
    guard UInt64(UInt(bitPattern: pointer)) % alignment == 0 else { throw .misaligned(part, address) }
    return unsafe pointer
  }
}

/// Host addresses of a ring's areas, each checked for its whole extent.
@unsafe
struct RingPointers {
  let descriptors: UnsafeMutableRawPointer
  let driver: UnsafeMutableRawPointer
  let device: UnsafeMutableRawPointer
}

extension VirtqueueConfiguration {
  /// A ring whose areas follow one another from `start` (16-byte aligned) on, each at a cache line of its own, as a
  /// driver would lay it out.
  public static func contiguous(size: UInt16, features: FeatureSet, at start: GuestAddress) -> VirtqueueConfiguration {
    var configuration = VirtqueueConfiguration(
      size: size, descriptors: start, driver: start, device: start, features: features)
    let driver = start.rawValue + UInt64(roundedUp(configuration.descriptorByteCount))
    configuration.driver = GuestAddress(driver)
    configuration.device = GuestAddress(driver + UInt64(roundedUp(configuration.driverByteCount)))
    return configuration
  }

  /// Bytes from `start` on that a contiguous ring takes up.
  public static func contiguousByteCount(size: UInt16, features: FeatureSet) -> Int {
    let configuration = contiguous(size: size, features: features, at: GuestAddress(0))
    return Int(configuration.device.rawValue) + roundedUp(configuration.deviceByteCount)
  }

  private static func roundedUp(_ count: Int) -> Int { (count + 63) & ~63 }
}
