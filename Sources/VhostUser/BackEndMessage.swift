/// A request of the back end with its payload, on the channel passed by `SET_BACKEND_REQ_FD`.
public enum BackEndMessage: Equatable, Sendable {
  /// A miss or an access failure.
  case iotlb(IOTLBMessage)
  /// The configuration space changed; the front end reads it again.
  case configChange
  case vringHostNotifier(VringArea)
  case vringCall(VringState)
  case vringErr(VringState)
  case sharedObjectAdd(SharedObjectName)
  case sharedObjectRemove(SharedObjectName)
  case sharedObjectLookup(SharedObjectName)
  case shmemMap(SharedMemoryRange)
  case shmemUnmap(SharedMemoryRange)
}

extension BackEndMessage {
  /// Decodes the payload of a request, checking its exact size and every field that can be judged by itself.
  public init(request: BackEndRequest, payload: some Collection<UInt8>) throws(VhostUserError) {
    func state() throws(VhostUserError) -> VringState {
      let state = try VringState(decoding: payload)
      guard state.number == 0 else { throw .invalidValue(field: "notification number", value: UInt64(state.number)) }
      return state
    }
    switch request {
    case .iotlb:
      let entry = try IOTLBMessage(decoding: payload)
      guard entry.kind == .miss || entry.kind == .accessFail else {
        throw .invalidValue(field: "IOTLB type", value: UInt64(entry.kind.rawValue))
      }
      self = .iotlb(entry)
    case .configChange:
      guard payload.isEmpty else { throw .wrongSize(of: "payload of \(request.name)", expected: 0, actual: payload.count) }
      self = .configChange
    case .vringHostNotifier: self = .vringHostNotifier(try VringArea(decoding: payload))
    case .vringCall: self = .vringCall(try state())
    case .vringErr: self = .vringErr(try state())
    case .sharedObjectAdd: self = .sharedObjectAdd(try SharedObjectName(decoding: payload))
    case .sharedObjectRemove: self = .sharedObjectRemove(try SharedObjectName(decoding: payload))
    case .sharedObjectLookup: self = .sharedObjectLookup(try SharedObjectName(decoding: payload))
    case .shmemMap: self = .shmemMap(try SharedMemoryRange(decoding: payload))
    case .shmemUnmap: self = .shmemUnmap(try SharedMemoryRange(decoding: payload))
    }
  }

  public var request: BackEndRequest {
    switch self {
    case .iotlb: .iotlb
    case .configChange: .configChange
    case .vringHostNotifier: .vringHostNotifier
    case .vringCall: .vringCall
    case .vringErr: .vringErr
    case .sharedObjectAdd: .sharedObjectAdd
    case .sharedObjectRemove: .sharedObjectRemove
    case .sharedObjectLookup: .sharedObjectLookup
    case .shmemMap: .shmemMap
    case .shmemUnmap: .shmemUnmap
    }
  }

  /// The payload's bytes, without the header.
  public var payload: [UInt8] {
    switch self {
    case .configChange: []
    case .iotlb(let entry): entry.encoded
    case .vringHostNotifier(let area): area.encoded
    case .vringCall(let state), .vringErr(let state): state.encoded
    case .sharedObjectAdd(let name), .sharedObjectRemove(let name), .sharedObjectLookup(let name): name.encoded
    case .shmemMap(let range), .shmemUnmap(let range): range.encoded
    }
  }

  /// The header that goes in front of `payload`.
  public func header(needsReply: Bool = false) -> MessageHeader {
    MessageHeader(
      request: request.rawValue, flags: needsReply ? [.version1, .needReply] : .version1, size: UInt32(payload.count))
  }

  /// How many descriptors the message may carry.
  public var descriptorCounts: ClosedRange<Int> {
    switch self {
    case .shmemMap: 1...1
    case .vringHostNotifier(let area): area.event.carriesDescriptor ? 1...1 : 0...0
    default: 0...0
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
