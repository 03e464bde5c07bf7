import HostSystem
import VirtioSpec

/// The front end's half of a vhost-user connection, as a state machine inside somebody's event loop: no call waits.
///
/// Operations are queued and carried out one request at a time; every answer has a deadline and is checked exactly
/// (number, flags, size, descriptors). The owner watches `socketNumber` for reading (and `channelNumber`, once there is
/// one), arms a timer for `deadline`, calls `receive` and `handleTimeout`, and takes what came of it from `nextEvent`.
///
///     var session = try FrontEndSession(socket, configuration)
///     session.negotiate(now: .now)
///     // on readable:
///     session.receive(now: .now)
///     while let event = session.nextEvent() { ... }
///
/// After `.failed` nothing more happens; let go of the session, which closes the connection.
@safe
public struct FrontEndSession: ~Copyable {
  /// What became of an operation, or of the back end.
  public enum Event: Equatable, Sendable {
    case negotiated(Offer)
    /// Features, memory and ring sizes have been taken; no ring runs.
    case prepared
    /// All rings run.
    case activated
    /// All rings are stopped, with the base each would go on from.
    case stopped([VringState])
    /// The rings that `stop` stopped run again.
    case resumed
    /// The device is as before the first activation; with the base at which each ring had stopped.
    case reset([VringState])
    case configuration(offset: Int, bytes: [UInt8])
    case configurationWritten
    /// The back end did not give, or take, the configuration bytes; the device goes on.
    case configurationRefused
    case callReplaced(index: Int)
    /// `replaceKicks` is done.
    case kicksReplaced
    /// The back end says that its configuration changed; read it again.
    case configurationChanged
    /// The back end closed its own channel; stop watching `channelNumber`.
    case channelClosed
    /// The back end is of no more use.
    case failed(VhostUserError)
  }

  /// Whether a ring is stopped after what is in flight has been completed, or at once where that was negotiated.
  public enum StopMode: Equatable, Sendable { case drain, suspend }

  enum Operation: Sendable {
    case negotiate
    case activate(BackEndActivation)
    case prepare(BackEndActivation)
    case begin([VringState])
    case stop(StopMode)
    case resume
    case reset
    case readConfiguration(offset: Int, count: Int)
    case writeConfiguration(offset: Int, bytes: [UInt8])
    case replaceCall(index: Int, SharedDescriptor?)
    case replaceKicks(SharedDescriptor?)
  }

  /// One request of the running operation.
  struct Step: Sendable {
    var message: FrontEndMessage
    var descriptors: [SharedDescriptor] = []
    var timeout: Duration
    /// Goes out behind `message` without waiting for the answer to that, and is not acknowledged.
    var companion: Companion?
  }

  struct Companion: Sendable {
    var message: FrontEndMessage
    var descriptors: [SharedDescriptor]
  }

  /// A request whose answer has not come.
  struct Outstanding: Sendable {
    var message: FrontEndMessage
    var expected: ReplyPayload
    var isAcknowledgement: Bool
    var deadline: MonotonicTime
    var timeout: Duration
  }

  public let configuration: FrontEndConfiguration
  /// Nil until `.negotiated`.
  public internal(set) var offer: Offer?

  var connection: Connection
  /// Our end of the back end's own channel.
  var channel: Connection?
  /// Its end, until it was sent.
  var channelPeer: SharedDescriptor?
  var channelBudget = MessageBudget(burst: 20, perSecond: 10)

  var queue: [Operation] = []
  var running: Operation?
  var steps: [Step] = []
  var nextStep = 0
  var outstanding: Outstanding?
  /// Requests were sent that nobody has acknowledged, so that a barrier is due.
  var isUnacknowledged = false
  var events: [Event] = []
  public internal(set) var hasFailed = false
  /// What was said lately.
  public internal(set) var recorder = FlightRecorder()

  /// The first `GET_FEATURES` was answered; later ones are barriers.
  var sawFeatures = false
  var draft = Offer(features: [], protocolFeatures: [], hasProtocolFeatures: false)
  /// What runs, or what `stop` stopped.
  var activation: BackEndActivation?
  var isRunning = false
  /// Some ring has been given its kick since rings were last stopped, so that the back end may have worked on it.
  public internal(set) var hasBegunRings = false
  var bases: [VringState] = []
  /// The regions the back end holds because of `ADD_MEM_REG`.
  var addedRegions: [RegionDescription] = []
  /// The area in use, to be kept for the next back end; outlives a failure.
  public internal(set) var inflight: InflightKept?

  public init(_ socket: consuming OwnedFD, _ configuration: FrontEndConfiguration) throws(VhostUserError) {
    precondition(
      ([configuration.configurationByteCount] + configuration.configurationGrowth.map(\.byteCount)).allSatisfy {
        (0...ConfigMessage.maximumSpace).contains($0)
      }, "A configuration space has at most 256 bytes.")
    self.configuration = configuration
    inflight = configuration.inflight
    connection = Connection(socket, expecting: .nothing, descriptorLimit: 8)
    if configuration.hearsConfigurationChanges {
      do {
        let pair = try UnixSocket.pair(.stream)
        channel = Connection(pair.first, expecting: .backEndRequests, descriptorLimit: 0)
        channelPeer = SharedDescriptor(pair.second)
      } catch { throw .system("making the back end's channel", error.errno) }
    }
  }

  // MARK: For the event loop

  /// The connection's descriptor, to be watched for reading as long as the session lives.
  public var socketNumber: CInt { connection.socket.rawValue }

  /// Our end of the back end's channel, once the back end has the other; from `.negotiated` on or never.
  public var channelNumber: CInt? {
    guard offer?.protocolFeatures.contains([.backEndRequests, .config]) == true else { return nil }
    switch channel {
    case .some(let channel): return channel.socket.rawValue
    case .none: return nil
    }
  }

  /// When `handleTimeout` has to be called at the latest.
  public var deadline: MonotonicTime? {
    guard !hasFailed else { return nil }
    let channelDeadline: MonotonicTime?
    switch channel {
    case .some(let channel): channelDeadline = channel.deadline
    case .none: channelDeadline = nil
    }
    return [outstanding?.deadline, connection.deadline, channelDeadline].compactMap { $0 }.min()
  }

  /// What happened, in order; nil when there is nothing more.
  public mutating func nextEvent() -> Event? { events.isEmpty ? nil : events.removeFirst() }

  /// No operation is under way or waiting.
  public var isIdle: Bool { running == nil && queue.isEmpty }

  /// Takes what the back end sent on the main socket and on its channel. Call when either is readable or hung up.
  public mutating func receive(now: MonotonicTime) {
    guard !hasFailed else { return }
    do throws(VhostUserError) {
      // Bounded: a reply is accepted only to a request of ours, and operations end.
      while let message = try connection.receive(now: now) { try take(message, now) }
      try receiveOnChannel(now)
    } catch { fail(error) }
  }

  /// Ends the session when the back end is late.
  public mutating func handleTimeout(now: MonotonicTime) {
    guard !hasFailed else { return }
    do throws(VhostUserError) {
      try connection.checkDeadline(now: now)
      try channel?.checkDeadline(now: now)
    } catch { return fail(error) }
    if let outstanding, now >= outstanding.deadline {
      fail(
        .noReply(
          to: outstanding.message.request.name, milliseconds: Int(outstanding.timeout.nanoseconds / 1_000_000)))
    }
  }

  // MARK: Operations

  /// First contact: owner, features, protocol features, counts and configuration. Ends with `.negotiated`.
  public mutating func negotiate(now: MonotonicTime) { begin(.negotiate, now) }

  /// Features, memory and rings. Ends with `.activated`. Only after `.negotiated`, and not while rings run.
  public mutating func activate(_ activation: BackEndActivation, now: MonotonicTime) { begin(.activate(activation), now) }

  /// All of an activation but the rings themselves, so that what takes time or may be refused is done before another back end
  /// stops. Ends with `.prepared`; may be repeated.
  public mutating func prepare(_ activation: BackEndActivation, now: MonotonicTime) { begin(.prepare(activation), now) }

  /// Starts the prepared rings at `bases`, with the record of requests in flight that another back end of the same rings has kept.
  /// Ends with `.activated`.
  public mutating func begin(at bases: [VringState], _ inflight: InflightKept?, now: MonotonicTime) {
    // One that keeps no record would leave what it is given to grow stale.
    self.inflight = offer?.protocolFeatures.contains(.inflightShmFD) == true ? inflight : nil
    begin(.begin(bases), now)
  }

  /// Stops all rings. Ends with `.stopped`; nothing runs: at once.
  public mutating func stop(_ mode: StopMode = .drain, now: MonotonicTime) { begin(.stop(mode), now) }

  /// Starts the rings that `stop` stopped from where they were. Ends with `.resumed`.
  /// - Parameter newBases: where they are instead, when another back end has worked on them meanwhile.
  public mutating func resume(at newBases: [VringState]? = nil, now: MonotonicTime) {
    if let newBases { bases = newBases }
    begin(.resume, now)
  }

  /// Stops all rings and resets the device, where that was negotiated. Ends with `.reset`.
  public mutating func reset(now: MonotonicTime) { begin(.reset, now) }

  /// Ends with `.configuration` or `.configurationRefused`.
  public mutating func readConfiguration(offset: Int, count: Int, now: MonotonicTime) {
    begin(.readConfiguration(offset: offset, count: count), now)
  }

  /// A driver's write. Ends with `.configurationWritten` or `.configurationRefused`.
  public mutating func writeConfiguration(offset: Int, bytes: [UInt8], now: MonotonicTime) {
    begin(.writeConfiguration(offset: offset, bytes: bytes), now)
  }

  /// Another call descriptor for a ring, or none. Ends with `.callReplaced`.
  public mutating func replaceCall(index: Int, _ call: SharedDescriptor?, now: MonotonicTime) {
    begin(.replaceCall(index: index, call), now)
  }

  /// Requests may be under way although `GET_VRING_BASE` was answered, and are written down nowhere.
  public var mayFinishLate: Bool { configuration.mayFinishLate && offer?.protocolFeatures.contains(.inflightShmFD) != true }

  /// Another kick descriptor for all rings that run, or their own again. With one that nobody signals the back end finishes what it
  /// has taken and hears of nothing new. Ends with `.kicksReplaced`.
  public mutating func replaceKicks(_ kick: SharedDescriptor?, now: MonotonicTime) { begin(.replaceKicks(kick), now) }

  /// Nothing more happens; nothing is reported.
  public mutating func abandon() {
    fail(.closed(midMessage: false))
    events = []
  }

  /// The rings that the area of `FrontEndConfiguration.inflight` tells of are no more: the next ones begin with a new one. Only
  /// while no rings run.
  public mutating func forgetInflight() { inflight = nil }

  private mutating func begin(_ operation: Operation, _ now: MonotonicTime) {
    guard !hasFailed else { return }
    queue.append(operation)
    advance(now)
  }

  mutating func fail(_ error: VhostUserError) {
    guard !hasFailed else { return }
    hasFailed = true
    outstanding = nil
    running = nil
    queue = []
    steps = []
    activation = nil
    isRunning = false
    events.append(.failed(error))
  }

  // MARK: The engine

  /// Sends requests until one has to be waited for or nothing is left to do.
  mutating func advance(_ now: MonotonicTime) {
    do throws(VhostUserError) {
      // Bounded by the operations in the queue and their steps.
      while outstanding == nil, !hasFailed {
        if nextStep < steps.count {
          let step = steps[nextStep]
          nextStep += 1
          try send(step, now)
        } else if isUnacknowledged {
          // A reply to anything says that everything before it was processed.
          try send(Step(message: .getFeatures, timeout: configuration.timeouts.setUp), now)
        } else {
          steps = []
          nextStep = 0
          if let operation = running.take() { finish(operation) }
          guard !queue.isEmpty else { return }
          let operation = queue.removeFirst()
          running = operation
          steps = try plan(operation)
        }
      }
    } catch { fail(error) }
  }

  private mutating func send(_ step: Step, _ now: MonotonicTime) throws(VhostUserError) {
    let request = step.message.request
    let expected: ReplyPayload?
    switch request.rules.reply {
    case .always(let payload): expected = payload
    case .with(let feature, let payload): expected = draft.protocolFeatures.contains(feature) ? payload : nil
    case .acknowledgement: expected = nil
    }
    // A request with a reply of its own is never marked: some back ends send the mark back with the reply.
    let acknowledges = expected == nil && draft.protocolFeatures.contains(.replyAck) && request != .setProtocolFeatures
    if expected != nil || acknowledges {
      connection.expectation = .reply(to: request.rawValue)
      outstanding = Outstanding(
        message: step.message, expected: expected ?? .number, isAcknowledgement: acknowledges,
        deadline: now.advanced(by: step.timeout), timeout: step.timeout)
    } else {
      isUnacknowledged = true
    }
    let header = step.message.header(needsReply: acknowledges)
    let payload = step.message.payload
    recorder.note(.frontEnd, header, payload, step.message.attachmentKinds, now)
    if case .setVringKick = step.message { hasBegunRings = true }
    try connection.send(
      header, payload,
      descriptors: step.descriptors.map { $0.fd.rawValue })
    if let companion = step.companion {
      let header = companion.message.header(needsReply: false)
      recorder.note(.frontEnd, header, companion.message.payload, companion.message.attachmentKinds, now)
      try connection.send(header, companion.message.payload, descriptors: companion.descriptors.map { $0.fd.rawValue })
    }
  }
}
