import HostSystem
import VirtioSpec

/// How a front end deals with one back end.
public struct FrontEndConfiguration: Sendable {
  /// Device features the guest may see; what the back end offers beyond them is not passed on.
  public var allowedFeatures: FeatureSet
  public var requiredFeatures: FeatureSet = .version1
  public var wantedProtocolFeatures: ProtocolFeatures = [.mq, .replyAck, .config, .resetDevice, .configureMemSlots]
  /// Negotiation fails without these.
  public var requiredProtocolFeatures: ProtocolFeatures = []
  /// Bytes of the configuration space to read at first contact, if the back end has one; 0 to 256.
  public var configurationByteCount = 0
  /// More of it where the back end offers a feature whose fields lie further on. Never asked for otherwise: back ends refuse
  /// to read more than their own structure has, and that grew over the years.
  public var configurationGrowth: [(feature: FeatureSet, byteCount: Int)] = []
  /// Gives the back end a channel on which it may say that its configuration changed, and nothing else.
  public var hearsConfigurationChanges = false
  /// What was negotiated at first contact, when this is a later one: the back end must offer at least that again.
  public var fixedOffer: Offer?
  /// The inflight area of the back end before this one, which is passed on when rings of its shape are started.
  public var inflight: InflightKept?
  public var timeouts = FrontEndTimeouts()
  /// It may finish requests after it has answered GET_VRING_BASE, unless it records them, and gets its call descriptor back for that.
  public var mayFinishLate = false

  public init(allowedFeatures: FeatureSet) { self.allowedFeatures = allowedFeatures }
}

/// How long the answers of a back end may take.
public struct FrontEndTimeouts: Sendable {
  /// Everything but stopping a ring.
  public var setUp: Duration = .seconds(1)
  /// `GET_VRING_BASE` that leaves requests in flight.
  public var suspend: Duration = .seconds(5)
  /// `GET_VRING_BASE` that waits for requests in flight.
  public var drain: Duration = .seconds(30)

  public init() {}
}

/// What a back end offers and we accept, fixed at first contact.
public struct Offer: Equatable, Sendable {
  /// For the guest: without the bits between the two ends.
  public var features: FeatureSet
  /// As negotiated.
  public var protocolFeatures: ProtocolFeatures
  /// Whether bit 30 is to be acknowledged with the driver's features.
  public var hasProtocolFeatures: Bool
  /// The answer to `GET_QUEUE_NUM`: rings, but queue pairs from some network back ends. Nil without `MQ`.
  public var queueCount: Int?
  /// Nil without `CONFIGURE_MEM_SLOTS`.
  public var maximumMemorySlots: Int?
  /// The configuration space as first read; nil without `CONFIG`.
  public var configuration: [UInt8]?

  public init(
    features: FeatureSet, protocolFeatures: ProtocolFeatures, hasProtocolFeatures: Bool, queueCount: Int? = nil,
    maximumMemorySlots: Int? = nil, configuration: [UInt8]? = nil
  ) {
    self.features = features
    self.protocolFeatures = protocolFeatures
    self.hasProtocolFeatures = hasProtocolFeatures
    self.queueCount = queueCount
    self.maximumMemorySlots = maximumMemorySlots
    self.configuration = configuration
  }
}

/// An inflight area as a front end keeps it from one back end to the next: passed on, never looked into.
public struct InflightKept: Sendable {
  public var description: InflightDescription
  public var descriptor: SharedDescriptor

  public init(_ description: InflightDescription, _ descriptor: SharedDescriptor) {
    self.description = description
    self.descriptor = descriptor
  }
}

/// A region of guest memory to be shared with a back end.
public struct SharedRegion: Sendable {
  public var description: RegionDescription
  public var descriptor: SharedDescriptor

  public init(_ description: RegionDescription, _ descriptor: SharedDescriptor) {
    self.description = description
    self.descriptor = descriptor
  }
}

/// One ring as the driver set it up, in the front end's own addresses.
public struct VringActivation: Sendable {
  public var index: Int
  public var size: Int
  /// User addresses of the front end, in the space of `RegionDescription.userAddress`.
  public var descriptorTable: UInt64
  public var availableRing: UInt64
  public var usedRing: UInt64
  /// 0 for a split ring that never ran; `0x8000_8000` for a packed one.
  public var base: UInt32
  public var kick: SharedDescriptor
  /// Nil: nobody is to be called.
  public var call: SharedDescriptor?
  public var err: SharedDescriptor?

  public init(
    index: Int, size: Int, descriptorTable: UInt64, availableRing: UInt64, usedRing: UInt64, base: UInt32 = 0,
    kick: SharedDescriptor, call: SharedDescriptor?, err: SharedDescriptor? = nil
  ) {
    self.index = index
    self.size = size
    self.descriptorTable = descriptorTable
    self.availableRing = availableRing
    self.usedRing = usedRing
    self.base = base
    self.kick = kick
    self.call = call
    self.err = err
  }
}

/// Everything a back end needs to serve a guest's driver.
public struct BackEndActivation: Sendable {
  /// What the driver acknowledged.
  public var features: FeatureSet
  public var regions: [SharedRegion]
  public var vrings: [VringActivation]
  /// Configuration bytes to be written before any ring starts: what the driver told the back end before this one.
  public var configuration: [ConfigMessage] = []

  public init(features: FeatureSet, regions: [SharedRegion], vrings: [VringActivation]) {
    self.features = features
    self.regions = regions
    self.vrings = vrings
  }
}

extension SharedDescriptor {
  /// A second descriptor of the same open file, to be kept until the back end has it.
  public convenience init(duplicating fd: borrowing OwnedFD) throws(SystemError) {
    self.init(try fd.duplicate())
  }
}
