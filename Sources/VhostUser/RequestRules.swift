/// What the protocol says about one request apart from its payload: who may send it when, what travels with it, and what
/// comes back. One row per request, for both ends.
public struct RequestRules: Equatable, Sendable {
  public var size: SizeRule
  public var descriptors: DescriptorRule
  public var reply: ReplyRule
  public var gate: Gate

  /// Payload bytes, as far as the header alone can tell.
  public enum SizeRule: Equatable, Sendable {
    case exactly(Int)
    /// One of two forms.
    case either(Int, Int)
    /// From the first to the second, inclusive; the payload says which.
    case within(ClosedRange<Int>)

    public func allows(_ count: Int) -> Bool {
      switch self {
      case .exactly(let size): count == size
      case .either(let one, let other): count == one || count == other
      case .within(let range): range.contains(count)
      }
    }
  }

  public enum DescriptorRule: Equatable, Sendable {
    case none
    case one
    /// None by the specification, but some front ends attach one: it is closed.
    case upToOne
    /// One per region, in the same order.
    case perRegion
    /// One unless bit 8 of the payload says otherwise.
    case perEvent
    /// One in the form that describes a log in a file, none in the other.
    case withSharedLog
  }

  public enum ReplyRule: Equatable, Sendable {
    /// A `U64` that is 0 for success, and only if it was asked for and `REPLY_ACK` negotiated.
    case acknowledgement
    case always(ReplyPayload)
    /// As `always` when the feature is negotiated, else as `acknowledgement`.
    case with(ProtocolFeatures, ReplyPayload)
  }

  /// What has to be negotiated before the request may be sent.
  public enum Gate: Equatable, Sendable {
    case none
    /// The back end offers `VHOST_USER_F_PROTOCOL_FEATURES`.
    case protocolFeaturesOffered
    /// The front end acknowledged `VHOST_USER_F_PROTOCOL_FEATURES`.
    case protocolFeaturesAcknowledged
    case feature(ProtocolFeatures)
    /// `VIRTIO_F_ACCESS_PLATFORM` is acknowledged.
    case accessPlatform
  }
}

/// What a reply carries.
public enum ReplyPayload: Equatable, Sendable {
  case number
  case vringState
  /// As long as the request's; or empty, or 12 bytes with size 0, for failure.
  case config
  /// With one descriptor unless the size in it is 0.
  case inflight
  /// The log description; some back ends send a number or nothing.
  case log
  /// Nothing but one descriptor (a userfaultfd).
  case descriptorOnly
  /// With one descriptor for success.
  case sharedObject
  /// A number of flags; one descriptor unless bit 8 is set.
  case deviceState
  case sharedMemory
  case crypto

  /// How such a reply says that the request failed; nil where it has no form for that.
  func failure(_ code: UInt64) -> Reply? {
    switch self {
    // Only numbers that are 0 for success: those that are values are always given.
    case .number, .sharedObject: .number(code)
    case .config: .configRefused
    case .inflight: .inflight(InflightDescription(queueCount: 0, queueSize: 0))
    case .descriptorOnly: .empty
    case .deviceState: .number(code & 0xFF | 0x100)
    case .sharedMemory: .sharedMemory(SharedMemoryConfiguration(sizes: []))
    case .vringState, .log, .crypto: nil
    }
  }
}

extension FrontEndRequest {
  public var rules: RequestRules {
    switch self {
    case .getFeatures: rules(.exactly(0), reply: .always(.number))
    case .setFeatures: rules(.exactly(8))
    case .setOwner: rules(.exactly(0))
    case .resetOwner: rules(.exactly(0))
    case .setMemTable: rules(.within(8...1288), .perRegion)
    case .setLogBase: rules(.either(8, 16), .withSharedLog, reply: .with(.logShmFD, .log))
    case .setLogFD: rules(.exactly(0), .one)
    case .setVringNum: rules(.exactly(8))
    case .setVringAddr: rules(.exactly(40))
    case .setVringBase: rules(.exactly(8))
    case .getVringBase: rules(.exactly(8), reply: .always(.vringState))
    case .setVringKick: rules(.exactly(8), .perEvent)
    case .setVringCall: rules(.exactly(8), .perEvent)
    case .setVringErr: rules(.exactly(8), .perEvent)
    case .getProtocolFeatures: rules(.exactly(0), reply: .always(.number), gate: .protocolFeaturesOffered)
    case .setProtocolFeatures: rules(.exactly(8), gate: .protocolFeaturesOffered)
    case .getQueueNum: rules(.exactly(0), reply: .always(.number), gate: .feature(.mq))
    case .setVringEnable: rules(.exactly(8), gate: .protocolFeaturesAcknowledged)
    case .sendRARP: rules(.exactly(8), gate: .feature(.rarp))
    case .netSetMTU: rules(.exactly(8), gate: .feature(.netMTU))
    case .setBackEndRequestFD: rules(.exactly(0), .one, gate: .feature(.backEndRequests))
    case .iotlb: rules(.exactly(32), reply: .always(.number), gate: .accessPlatform)
    case .setVringEndian: rules(.exactly(8), gate: .feature(.crossEndian))
    case .getConfig: rules(.within(12...268), reply: .always(.config), gate: .feature(.config))
    case .setConfig: rules(.within(12...268), gate: .feature(.config))
    case .createCryptoSession:
      rules(.within(0...MessageHeader.maximumPayload), reply: .always(.crypto), gate: .feature(.cryptoSession))
    case .closeCryptoSession: rules(.exactly(8), gate: .feature(.cryptoSession))
    case .postcopyAdvise: rules(.exactly(0), reply: .always(.descriptorOnly), gate: .feature(.pageFault))
    case .postcopyListen: rules(.exactly(0), gate: .feature(.pageFault))
    case .postcopyEnd: rules(.exactly(0), reply: .always(.number), gate: .feature(.pageFault))
    case .getInflightFD: rules(.exactly(24), reply: .always(.inflight), gate: .feature(.inflightShmFD))
    case .setInflightFD: rules(.exactly(24), .one, gate: .feature(.inflightShmFD))
    case .gpuSetSocket: rules(.exactly(0), .one)
    case .resetDevice: rules(.exactly(0), gate: .feature(.resetDevice))
    case .vringKick: rules(.exactly(8), gate: .feature(.inbandNotifications))
    case .getMaxMemSlots: rules(.exactly(0), reply: .always(.number), gate: .feature(.configureMemSlots))
    case .addMemReg: rules(.either(40, 48), .one, gate: .feature(.configureMemSlots))
    case .remMemReg: rules(.either(40, 48), .upToOne, gate: .feature(.configureMemSlots))
    case .setStatus: rules(.exactly(8), gate: .feature(.status))
    case .getStatus: rules(.exactly(0), reply: .always(.number), gate: .feature(.status))
    case .getSharedObject: rules(.exactly(16), reply: .always(.sharedObject), gate: .feature(.sharedObject))
    case .setDeviceStateFD: rules(.exactly(8), .one, reply: .always(.deviceState), gate: .feature(.deviceState))
    case .checkDeviceState: rules(.exactly(0), reply: .always(.number), gate: .feature(.deviceState))
    case .getShmemConfig: rules(.exactly(0), reply: .always(.sharedMemory), gate: .feature(.sharedMemory))
    }
  }

  private func rules(
    _ size: RequestRules.SizeRule, _ descriptors: RequestRules.DescriptorRule = .none,
    reply: RequestRules.ReplyRule = .acknowledgement, gate: RequestRules.Gate = .none
  ) -> RequestRules {
    RequestRules(size: size, descriptors: descriptors, reply: reply, gate: gate)
  }
}

extension BackEndRequest {
  public var rules: RequestRules {
    switch self {
    case .iotlb: rules(32, gate: .accessPlatform)
    case .configChange: rules(0, gate: .feature(.config))
    case .vringHostNotifier: rules(24, .perEvent, gate: .feature(.hostNotifier))
    case .vringCall: rules(8, gate: .feature(.inbandNotifications))
    case .vringErr: rules(8, gate: .feature(.inbandNotifications))
    case .sharedObjectAdd: rules(16, gate: .feature(.sharedObject))
    case .sharedObjectRemove: rules(16, gate: .feature(.sharedObject))
    case .sharedObjectLookup: rules(16, reply: .always(.sharedObject), gate: .feature(.sharedObject))
    case .shmemMap: rules(40, .one, gate: .feature(.sharedMemory))
    case .shmemUnmap: rules(40, gate: .feature(.sharedMemory))
    }
  }

  private func rules(
    _ size: Int, _ descriptors: RequestRules.DescriptorRule = .none, reply: RequestRules.ReplyRule = .acknowledgement,
    gate: RequestRules.Gate
  ) -> RequestRules {
    RequestRules(size: .exactly(size), descriptors: descriptors, reply: reply, gate: gate)
  }
}
