import VirtioSpec

/// A request of the front end with its payload, as both ends know it. Descriptors travel beside it; how many belong to it
/// is `descriptorCounts`.
public enum FrontEndMessage: Equatable, Sendable {
  case getFeatures
  case setFeatures(FeatureSet)
  case setOwner
  case resetOwner
  case setMemTable(RegionTable)
  /// With `LOG_SHMFD`: where the log is in the attached file.
  case setLogBase(LogDescription)
  /// Without `LOG_SHMFD`: a bare address, of use to nobody in another process.
  case setLogBaseAddress(UInt64)
  case setLogFD
  /// The ring's size.
  case setVringNum(VringState)
  case setVringAddr(VringAddress)
  case setVringBase(VringState)
  /// `number` 1 suspends instead of draining, with `GET_VRING_BASE_INFLIGHT`.
  case getVringBase(VringState)
  case setVringKick(VringEvent)
  case setVringCall(VringEvent)
  case setVringErr(VringEvent)
  case getProtocolFeatures
  case setProtocolFeatures(ProtocolFeatures)
  case getQueueNum
  /// `number` 1 enables, 0 disables.
  case setVringEnable(VringState)
  /// The MAC address in the six low bytes.
  case sendRARP(UInt64)
  case netSetMTU(UInt64)
  case setBackEndRequestFD
  case iotlb(IOTLBMessage)
  /// `number` 0 little-endian, 1 big-endian.
  case setVringEndian(VringState)
  /// The bytes asked for are sent along, and their content ignored.
  case getConfig(ConfigMessage)
  case setConfig(ConfigMessage)
  /// Implementations disagree about the layout; the bytes as they are.
  case createCryptoSession([UInt8])
  case closeCryptoSession(UInt64)
  case postcopyAdvise
  case postcopyListen
  case postcopyEnd
  case getInflightFD(InflightDescription)
  case setInflightFD(InflightDescription)
  case gpuSetSocket
  case resetDevice
  case vringKick(VringState)
  case getMaxMemSlots
  case addMemReg(SingleRegion)
  case remMemReg(SingleRegion)
  /// The virtio status byte.
  case setStatus(UInt64)
  case getStatus
  case getSharedObject(SharedObjectName)
  case setDeviceStateFD(DeviceStateTransfer)
  case checkDeviceState
  case getShmemConfig
}

extension FrontEndMessage {
  /// Decodes the payload of a request, checking its exact size and every field that can be judged by itself.
  ///
  /// - Parameter xen: whether `XEN_MMAP` was negotiated, which makes regions eight bytes longer.
  public init(request: FrontEndRequest, payload: some Collection<UInt8>, xen: Bool = false) throws(VhostUserError) {
    func number() throws(VhostUserError) -> UInt64 { try NumberPayload.decode(payload, of: "payload of \(request.name)") }
    func state(_ field: String, _ allowed: ClosedRange<UInt32>) throws(VhostUserError) -> VringState {
      let state = try VringState(decoding: payload)
      guard allowed.contains(state.number) else { throw .invalidValue(field: field, value: UInt64(state.number)) }
      return state
    }
    func number(_ field: String, atMost limit: UInt64) throws(VhostUserError) -> UInt64 {
      let value = try number()
      guard value <= limit else { throw .invalidValue(field: field, value: value) }
      return value
    }
    func nothing(_ message: FrontEndMessage) throws(VhostUserError) -> FrontEndMessage {
      guard payload.isEmpty else { throw .wrongSize(of: "payload of \(request.name)", expected: 0, actual: payload.count) }
      return message
    }
    switch request {
    case .getFeatures: self = try nothing(.getFeatures)
    case .setFeatures: self = .setFeatures(FeatureSet(rawValue: try number()))
    case .setOwner: self = try nothing(.setOwner)
    case .resetOwner: self = try nothing(.resetOwner)
    case .setMemTable: self = .setMemTable(try RegionTable(decoding: payload, xen: xen))
    case .setLogBase:
      self = payload.count == 8 ? .setLogBaseAddress(try number()) : .setLogBase(try LogDescription(decoding: payload))
    case .setLogFD: self = try nothing(.setLogFD)
    case .setVringNum: self = .setVringNum(try state("ring size", 1...32768))
    case .setVringAddr: self = .setVringAddr(try VringAddress(decoding: payload))
    case .setVringBase: self = .setVringBase(try VringState(decoding: payload))
    case .getVringBase: self = .getVringBase(try VringState(decoding: payload))
    case .setVringKick: self = .setVringKick(try VringEvent(decoding: payload))
    case .setVringCall: self = .setVringCall(try VringEvent(decoding: payload))
    case .setVringErr: self = .setVringErr(try VringEvent(decoding: payload))
    case .getProtocolFeatures: self = try nothing(.getProtocolFeatures)
    case .setProtocolFeatures: self = .setProtocolFeatures(ProtocolFeatures(rawValue: try number()))
    case .getQueueNum: self = try nothing(.getQueueNum)
    case .setVringEnable: self = .setVringEnable(try state("enable flag", 0...1))
    case .sendRARP: self = .sendRARP(try number())
    case .netSetMTU: self = .netSetMTU(try number("MTU", atMost: 65535))
    case .setBackEndRequestFD: self = try nothing(.setBackEndRequestFD)
    case .iotlb:
      let entry = try IOTLBMessage(decoding: payload)
      guard entry.kind == .update || entry.kind == .invalidate else {
        throw .invalidValue(field: "IOTLB type", value: UInt64(entry.kind.rawValue))
      }
      self = .iotlb(entry)
    case .setVringEndian: self = .setVringEndian(try state("endian flag", 0...1))
    case .getConfig: self = .getConfig(try ConfigMessage(decoding: payload))
    case .setConfig:
      let config = try ConfigMessage(decoding: payload)
      guard !config.bytes.isEmpty else { throw .invalidValue(field: "config size", value: 0) }
      self = .setConfig(config)
    case .createCryptoSession: self = .createCryptoSession(Array(payload))
    case .closeCryptoSession: self = .closeCryptoSession(try number())
    case .postcopyAdvise: self = try nothing(.postcopyAdvise)
    case .postcopyListen: self = try nothing(.postcopyListen)
    case .postcopyEnd: self = try nothing(.postcopyEnd)
    case .getInflightFD: self = .getInflightFD(try InflightDescription(decoding: payload))
    case .setInflightFD:
      let area = try InflightDescription(decoding: payload)
      guard area.size != 0 else { throw .invalidValue(field: "inflight size", value: 0) }
      self = .setInflightFD(area)
    case .gpuSetSocket: self = try nothing(.gpuSetSocket)
    case .resetDevice: self = try nothing(.resetDevice)
    case .vringKick: self = .vringKick(try state("kick number", 0...0))
    case .getMaxMemSlots: self = try nothing(.getMaxMemSlots)
    case .addMemReg: self = .addMemReg(try SingleRegion(decoding: payload, xen: xen))
    case .remMemReg: self = .remMemReg(try SingleRegion(decoding: payload, xen: xen))
    case .setStatus: self = .setStatus(try number("device status", atMost: 255))
    case .getStatus: self = try nothing(.getStatus)
    case .getSharedObject: self = .getSharedObject(try SharedObjectName(decoding: payload))
    case .setDeviceStateFD: self = .setDeviceStateFD(try DeviceStateTransfer(decoding: payload))
    case .checkDeviceState: self = try nothing(.checkDeviceState)
    case .getShmemConfig: self = try nothing(.getShmemConfig)
    }
  }

  public var request: FrontEndRequest {
    switch self {
    case .getFeatures: .getFeatures
    case .setFeatures: .setFeatures
    case .setOwner: .setOwner
    case .resetOwner: .resetOwner
    case .setMemTable: .setMemTable
    case .setLogBase, .setLogBaseAddress: .setLogBase
    case .setLogFD: .setLogFD
    case .setVringNum: .setVringNum
    case .setVringAddr: .setVringAddr
    case .setVringBase: .setVringBase
    case .getVringBase: .getVringBase
    case .setVringKick: .setVringKick
    case .setVringCall: .setVringCall
    case .setVringErr: .setVringErr
    case .getProtocolFeatures: .getProtocolFeatures
    case .setProtocolFeatures: .setProtocolFeatures
    case .getQueueNum: .getQueueNum
    case .setVringEnable: .setVringEnable
    case .sendRARP: .sendRARP
    case .netSetMTU: .netSetMTU
    case .setBackEndRequestFD: .setBackEndRequestFD
    case .iotlb: .iotlb
    case .setVringEndian: .setVringEndian
    case .getConfig: .getConfig
    case .setConfig: .setConfig
    case .createCryptoSession: .createCryptoSession
    case .closeCryptoSession: .closeCryptoSession
    case .postcopyAdvise: .postcopyAdvise
    case .postcopyListen: .postcopyListen
    case .postcopyEnd: .postcopyEnd
    case .getInflightFD: .getInflightFD
    case .setInflightFD: .setInflightFD
    case .gpuSetSocket: .gpuSetSocket
    case .resetDevice: .resetDevice
    case .vringKick: .vringKick
    case .getMaxMemSlots: .getMaxMemSlots
    case .addMemReg: .addMemReg
    case .remMemReg: .remMemReg
    case .setStatus: .setStatus
    case .getStatus: .getStatus
    case .getSharedObject: .getSharedObject
    case .setDeviceStateFD: .setDeviceStateFD
    case .checkDeviceState: .checkDeviceState
    case .getShmemConfig: .getShmemConfig
    }
  }

  /// The payload's bytes, without the header.
  public var payload: [UInt8] {
    switch self {
    case .getFeatures, .setOwner, .resetOwner, .setLogFD, .getProtocolFeatures, .getQueueNum, .setBackEndRequestFD,
      .postcopyAdvise, .postcopyListen, .postcopyEnd, .gpuSetSocket, .resetDevice, .getMaxMemSlots, .getStatus,
      .checkDeviceState, .getShmemConfig:
      []
    case .setLogBaseAddress(let value), .sendRARP(let value), .netSetMTU(let value),
      .closeCryptoSession(let value), .setStatus(let value):
      NumberPayload.encode(value)
    case .setFeatures(let features): NumberPayload.encode(features.rawValue)
    case .setProtocolFeatures(let features): NumberPayload.encode(features.rawValue)
    case .setMemTable(let table): table.encoded
    case .setLogBase(let log): log.encoded
    case .setVringNum(let state), .setVringBase(let state), .getVringBase(let state), .setVringEnable(let state),
      .setVringEndian(let state), .vringKick(let state):
      state.encoded
    case .setVringAddr(let address): address.encoded
    case .setVringKick(let event), .setVringCall(let event), .setVringErr(let event): event.encoded
    case .iotlb(let entry): entry.encoded
    case .getConfig(let config), .setConfig(let config): config.encoded
    case .createCryptoSession(let bytes): bytes
    case .getInflightFD(let area), .setInflightFD(let area): area.encoded
    case .addMemReg(let region), .remMemReg(let region): region.encoded
    case .getSharedObject(let name): name.encoded
    case .setDeviceStateFD(let transfer): transfer.encoded
    }
  }

  /// The header that goes in front of `payload`.
  public func header(needsReply: Bool = false) -> MessageHeader {
    MessageHeader(
      request: request.rawValue, flags: needsReply ? [.version1, .needReply] : .version1, size: UInt32(payload.count))
  }

  /// How many descriptors the message may carry; see `RequestRules.descriptors`.
  public var descriptorCounts: ClosedRange<Int> {
    switch request.rules.descriptors {
    case .none: return 0...0
    case .one: return 1...1
    case .upToOne: return 0...1
    case .perRegion:
      guard case .setMemTable(let table) = self else { return 0...0 }
      return table.regions.count...table.regions.count
    case .perEvent:
      switch self {
      case .setVringKick(let event), .setVringCall(let event), .setVringErr(let event):
        return event.carriesDescriptor ? 1...1 : 0...0
      default: return 0...0
      }
    case .withSharedLog:
      if case .setLogBase = self { return 1...1 }
      return 0...0
    }
  }

  /// Fails unless `count` descriptors came with the message as its rule says.
  public func checkDescriptorCount(_ count: Int) throws(VhostUserError) {
    let allowed = descriptorCounts
    guard allowed.contains(count) else {
      throw .wrongDescriptorCount(message: request.name, allowed: allowed, actual: count)
    }
  }
}
