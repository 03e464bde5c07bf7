import HostSystem
import VirtioSpec

/// Why the owner of a session does not do what a request asks for.
public struct Refusal: Error, Sendable {
  /// A clause that names the thing and what is wrong with it.
  public var why: String
  /// Travels in the acknowledgement as a hint; any value but zero means failure.
  public var errno: Errno

  public init(_ why: String, _ errno: Errno = .invalid) {
    self.why = why
    self.errno = errno
  }
}

/// A descriptor that several holders share; closed when the last one lets go.
@safe
public final class SharedDescriptor: Sendable {
  public let fd: OwnedFD

  public init(_ fd: consuming OwnedFD) { self.fd = fd }
}

/// Where a ring lies in guest memory. Each area is inside one region and aligned as the ring's format wants.
public struct VringLayout: Equatable, Sendable {
  /// Entries: 1 to 32768, a power of two for a split ring.
  public var size: Int
  public var isPacked: Bool
  /// Guest addresses.
  public var descriptorTable: UInt64
  /// The available ring, or the driver area of a packed ring.
  public var availableRing: UInt64
  /// The used ring, or the device area of a packed ring.
  public var usedRing: UInt64
  /// Guest address under which used-ring writes are logged, when they are.
  public var log: UInt64?
}

/// Everything a device needs to run one ring.
@frozen public struct VringSetup: ~Copyable {
  public let index: Int
  public let layout: VringLayout
  /// What the driver acknowledged, without the bits that are between the two ends.
  public let features: FeatureSet
  /// As in `SET_VRING_BASE`: the next available index, or the two indices and wrap counters of a packed ring.
  public let base: UInt32
  public let isEnabled: Bool
  /// Nil: the ring is polled.
  public var kick: OwnedFD?
  /// Nil: the driver polls.
  public var call: OwnedFD?
  public var err: SharedDescriptor?
}

/// What comes of stopping a ring.
public enum StopOutcome: Equatable, Sendable {
  /// It is stopped: everything taken is given back, and this is where it would go on.
  case stopped(base: UInt32)
  /// Requests are still in flight; `BackEndSession.finishStop` answers later. No other request is handled until then.
  case pending
}

/// What comes of a device reset.
public enum ResetOutcome: Equatable, Sendable {
  case done
  /// `BackEndSession.finishReset` answers later.
  case pending
}

/// The device behind a `BackEndSession`. All calls come from the thread that handles messages. A refusal leaves everything
/// as it was; the session tells the front end or closes the connection, as the protocol has it.
public protocol BackEndDelegate: ~Copyable {
  /// The whole memory table is replaced; one descriptor per region, in order. The regions were checked against each
  /// other; sizes and seals of the files were not. Rings that run are moved by `moveVring` right after.
  mutating func replaceMemory(_ regions: [RegionDescription], _ descriptors: consuming ReceivedDescriptors) throws(Refusal)
  mutating func addMemory(_ region: RegionDescription, _ descriptor: consuming OwnedFD) throws(Refusal)
  /// No running ring lies in the region. When this returns, the region is not touched any more.
  mutating func removeMemory(_ region: RegionDescription) throws(Refusal)

  /// `SET_FEATURES`, without the bits that are between the two ends. While rings run this changes nothing but logging.
  mutating func setFeatures(_ features: FeatureSet, logging: Bool) throws(Refusal)

  /// A ring starts. Look at the available ring once without waiting for a kick: entries may be there already.
  mutating func startVring(_ setup: consuming VringSetup) throws(Refusal)
  /// A running ring lies elsewhere from now on, because the memory table changed, or its log address did. The place was
  /// checked; a device that cannot follow treats the ring as broken.
  mutating func moveVring(at index: Int, to layout: VringLayout)
  /// Stops a running ring; its kick and call descriptors are dropped. `suspending`: requests in flight need not be waited
  /// for if they are recorded in the inflight area.
  mutating func stopVring(at index: Int, suspending: Bool) throws(Refusal) -> StopOutcome
  /// A running ring is enabled or disabled. A disabled ring is running, but without effect.
  mutating func enableVring(at index: Int, _ isEnabled: Bool)
  /// New descriptors for a running ring; nil: poll, or do not signal.
  mutating func replaceKick(at index: Int, _ kick: consuming OwnedFD?) throws(Refusal)
  mutating func replaceCall(at index: Int, _ call: consuming OwnedFD?)
  mutating func replaceErr(at index: Int, _ err: SharedDescriptor?)

  /// The device goes back to its initial state; rings that run are abandoned.
  mutating func resetDevice() -> ResetOutcome

  /// Bytes of the configuration space; exactly as many as the range has.
  mutating func configuration(_ range: Range<Int>) throws(Refusal) -> [UInt8]
  /// A write to the configuration space. `migrating`: any field may be written, not only what a driver may.
  mutating func writeConfiguration(at offset: Int, _ bytes: [UInt8], migrating: Bool) throws(Refusal)

  /// Makes the area that records requests in flight. Nil: there is none.
  mutating func makeInflightArea(queueCount: Int, queueSize: Int) throws(Refusal) -> InflightArea?
  /// An area this device, or its predecessor, made. Its content is foreign; size and seals of the file were not checked.
  mutating func setInflightArea(_ description: InflightDescription, _ descriptor: consuming OwnedFD) throws(Refusal)

  /// The dirty log; its size was not checked against the file.
  mutating func setLog(_ log: LogDescription, _ descriptor: consuming OwnedFD) throws(Refusal)
  mutating func setLogSignal(_ descriptor: consuming OwnedFD) throws(Refusal)

  mutating func setMTU(_ bytes: Int) throws(Refusal)
  /// Announce the address on the network after a migration.
  mutating func sendRARP(_ address: [UInt8]) throws(Refusal)
  /// The virtio status byte changed to anything but zero (which is a reset).
  mutating func setStatus(_ status: DeviceStatus) throws(Refusal)
}

/// An inflight area with its file.
@frozen public struct InflightArea: ~Copyable {
  public var description: InflightDescription
  public var fd: OwnedFD

  public init(description: InflightDescription, fd: consuming OwnedFD) {
    self.description = description
    self.fd = fd
  }
}

extension BackEndDelegate where Self: ~Copyable {
  private static var missing: Refusal { Refusal("the device does not have it", .notSupported) }

  public mutating func replaceErr(at index: Int, _ err: SharedDescriptor?) {}
  public mutating func configuration(_ range: Range<Int>) throws(Refusal) -> [UInt8] { throw Self.missing }
  public mutating func writeConfiguration(at offset: Int, _ bytes: [UInt8], migrating: Bool) throws(Refusal) {
    throw Self.missing
  }
  public mutating func makeInflightArea(queueCount: Int, queueSize: Int) throws(Refusal) -> InflightArea? { throw Self.missing }
  public mutating func setInflightArea(_ description: InflightDescription, _ descriptor: consuming OwnedFD) throws(Refusal) {
    throw Self.missing
  }
  public mutating func setLog(_ log: LogDescription, _ descriptor: consuming OwnedFD) throws(Refusal) { throw Self.missing }
  public mutating func setLogSignal(_ descriptor: consuming OwnedFD) throws(Refusal) { throw Self.missing }
  public mutating func setMTU(_ bytes: Int) throws(Refusal) { throw Self.missing }
  public mutating func sendRARP(_ address: [UInt8]) throws(Refusal) { throw Self.missing }
  public mutating func setStatus(_ status: DeviceStatus) throws(Refusal) { throw Self.missing }
}
