/// The payload of a reply, of either direction, as both ends know it.
public enum Reply: Equatable, Sendable {
  /// A value asked for, or an acknowledgement: 0 is success.
  case number(UInt64)
  case vringState(VringState)
  case config(ConfigMessage)
  /// The back end could not give the configuration: no payload, or one that says no bytes follow.
  case configRefused
  case inflight(InflightDescription)
  case log(LogDescription)
  /// No payload. Where a descriptor is the answer, it is attached.
  case empty
  case sharedObject(SharedObjectName)
  case sharedMemory(SharedMemoryConfiguration)
  case crypto([UInt8])

  /// Decodes the answer to a request, checking its exact size.
  public init(_ expected: ReplyPayload, payload: some Collection<UInt8>) throws(VhostUserError) {
    switch expected {
    case .number, .deviceState: self = .number(try NumberPayload.decode(payload, of: "reply"))
    case .vringState: self = .vringState(try VringState(decoding: payload))
    case .config:
      guard !payload.isEmpty else {
        self = .configRefused
        return
      }
      let config = try ConfigMessage(decoding: payload)
      self = config.bytes.isEmpty ? .configRefused : .config(config)
    case .inflight: self = .inflight(try InflightDescription(decoding: payload))
    case .log:
      switch payload.count {
      case 0: self = .empty
      case 8: self = .number(try NumberPayload.decode(payload, of: "reply"))
      default: self = .log(try LogDescription(decoding: payload))
      }
    case .descriptorOnly:
      guard payload.isEmpty else { throw .wrongSize(of: "reply", expected: 0, actual: payload.count) }
      self = .empty
    case .sharedObject:
      self =
        payload.count == 8
        ? .number(try NumberPayload.decode(payload, of: "reply"))
        : .sharedObject(try SharedObjectName(decoding: payload))
    case .sharedMemory: self = .sharedMemory(try SharedMemoryConfiguration(decoding: payload))
    case .crypto: self = .crypto(Array(payload))
    }
  }

  /// The payload's bytes, without the header.
  public var payload: [UInt8] {
    switch self {
    case .number(let value): NumberPayload.encode(value)
    case .vringState(let state): state.encoded
    case .config(let config): config.encoded
    case .configRefused, .empty: []
    case .inflight(let area): area.encoded
    case .log(let log): log.encoded
    case .sharedObject(let name): name.encoded
    case .sharedMemory(let configuration): configuration.encoded
    case .crypto(let bytes): bytes
    }
  }

  /// The header of this reply to the request of that number: flags exactly `0x5`.
  public func header(to request: UInt32) -> MessageHeader {
    MessageHeader(request: request, flags: .replyExactly, size: UInt32(payload.count))
  }

  /// How many descriptors the answer may carry.
  public func descriptorCounts(_ expected: ReplyPayload) -> ClosedRange<Int> {
    switch (expected, self) {
    case (.inflight, .inflight(let area)): area.size == 0 ? 0...0 : 1...1
    case (.descriptorOnly, _): 1...1
    case (.sharedObject, .number(let code)): code == 0 ? 1...1 : 0...0
    case (.sharedObject, _): 0...1
    case (.deviceState, .number(let flags)): flags & 0x1FF == 0 ? 1...1 : 0...0
    default: 0...0
    }
  }

  /// Fails unless `count` descriptors came with the answer as its rule says.
  public func checkDescriptorCount(_ count: Int, _ expected: ReplyPayload) throws(VhostUserError) {
    let allowed = descriptorCounts(expected)
    guard allowed.contains(count) else { throw .wrongDescriptorCount(message: "reply", allowed: allowed, actual: count) }
  }
}
