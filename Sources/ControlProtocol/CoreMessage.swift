import VirtioSpec

/// What the core tells the supervisor. Answers carry the sequence of the request, reports carry 0.
/// `protocol/control.md` has the bytes.
package enum CoreMessage: Equatable, Sendable {
  /// Answer to `configure`: the VM exists, memory is there, the payload is loaded.
  case ready
  /// Answer to `start`: the vCPUs run.
  case started
  /// The request has been carried out.
  case done
  /// The request cannot be carried out; one sentence says why. The VM goes on as before.
  case refused(String)
  /// Answer to `information`.
  case information(VMInformation)
  /// Answer to `examine`: one finding for each thing that matters.
  case examined([Finding])
  /// A device has changed its state.
  case device(DeviceReport)
  /// Answer to `device` while the guest runs: it is on the bus, in this slot.
  case plugged(slot: UInt8)
  /// A device is gone: off the bus, its rings stopped, its connection closed. Asked for, or by the guest's own wish.
  case unplugged(id: String)
  /// Answer to `conversation`; also a report, when a back end has been lost: what was said to and by it lately, as a recording
  /// (`docs/probe.md`).
  case conversation(id: String, text: String)
  /// The guest did something that concerns the outside.
  case guest(GuestEvent)
  /// The core cannot go on and exits after this message; one sentence says why.
  case failed(FailureKind, String)

  /// What was found of a back end that might take over.
  package struct Finding: Equatable, Sendable {
    package enum Verdict: UInt8, Equatable, Sendable {
      case fine = 0
      /// Possible, and worth knowing.
      case note
      /// The guest would notice, or lose data.
      case refusal
    }
    package var verdict: Verdict
    /// What was looked at.
    package var subject: String
    package var sentence: String

    package init(_ verdict: Verdict, _ subject: String, _ sentence: String) {
      self.verdict = verdict
      self.subject = subject
      self.sentence = sentence
    }
  }

  package enum GuestEvent: UInt8, Equatable, Sendable {
    /// The guest reset the machine and has been started again in place.
    case reset = 0
    /// The guest reset the machine; the VM has ended, because `restartsOnReset` is false.
    case resetEnded = 1
    /// The guest powered off; the VM has ended.
    case poweredOff = 2
    /// The guest's kernel reported a panic (pvpanic or the like); the VM goes on.
    case panicked = 3
    /// The guest cannot run any more (triple fault without restart, KVM shutdown, emulation failure); the VM has ended.
    case crashed = 4
    /// The VM ended because the supervisor asked for it.
    case shutDown = 5
  }

  /// Whose fault it was; decides the exit code of `martlet run`.
  package enum FailureKind: UInt8, Equatable, Sendable {
    /// Kernel, initramfs or sizes given by the user.
    case input = 0
    /// This host's KVM or memory.
    case host = 1
    /// A back end refused, broke the protocol or did not answer in time.
    case device = 2
    /// A defect of ours.
    case defect = 3
  }
}

/// The state of the VM at one moment.
package struct VMInformation: Equatable, Sendable {
  package enum State: UInt8, Equatable, Sendable {
    case created = 0, running, paused, resetting, stopped

    package var name: String {
      switch self {
      case .created: "created"
      case .running: "running"
      case .paused: "paused"
      case .resetting: "resetting"
      case .stopped: "stopped"
      }
    }
  }

  package struct Counter: Equatable, Sendable {
    package var name: String
    package var value: UInt64

    package init(name: String, value: UInt64) {
      self.name = name
      self.value = value
    }
  }

  package var state: State
  package var resetCount: UInt32
  /// Since `start`, in nanoseconds.
  package var uptime: UInt64
  /// Event counts of the core by name (`vcpu_exits`, `mmio_exits`, ...), for people and tests.
  package var counters: [Counter]

  package init(state: State, resetCount: UInt32, uptime: UInt64, counters: [Counter] = []) {
    self.state = state
    self.resetCount = resetCount
    self.uptime = uptime
    self.counters = counters
  }
}

/// What a device's session has come to.
package struct DeviceReport: Equatable, Sendable {
  package enum State: UInt8, Equatable, Sendable {
    /// The session's start is under way.
    case connecting = 0
    /// Feature negotiation with the back end is done; the guest's driver has not started it.
    case connected
    /// The guest's driver runs it (DRIVER_OK).
    case active
    /// The guest broke the rules or the back end asked for it: NEEDS_RESET is set.
    case needsReset
    /// The back end is gone.
    case lost
    /// The back end is gone, and the guest waits for the next one without knowing.
    case waiting

    package var name: String {
      switch self {
      case .connecting: "connecting"
      case .connected: "connected"
      case .active: "active"
      case .needsReset: "needs-reset"
      case .lost: "lost"
      case .waiting: "waiting-for-back-end"
      }
    }
  }

  package struct Queue: Equatable, Sendable {
    package var size: UInt16
    package var isEnabled: Bool
    /// `CLOCK_MONOTONIC` in nanoseconds: since then at least nothing was answered, though something waits. 0: nothing waits.
    package var waitingSince: UInt64
    /// How many requests wait; 0 when the ring does not tell.
    package var waitingCount: UInt16

    package init(size: UInt16, isEnabled: Bool, waitingSince: UInt64 = 0, waitingCount: UInt16 = 0) {
      self.size = size
      self.isEnabled = isEnabled
      self.waitingSince = waitingSince
      self.waitingCount = waitingCount
    }
  }

  package var id: String
  package var state: State
  /// Virtio features the driver accepted; before that, those offered to it.
  package var features: FeatureSet
  /// vhost-user protocol features in use.
  package var protocolFeatures: UInt64
  package var queues: [Queue]
  /// A sentence on why, when something went wrong; else empty.
  package var reason: String

  package init(
    id: String, state: State, features: FeatureSet, protocolFeatures: UInt64, queues: [Queue], reason: String = ""
  ) {
    self.id = id
    self.state = state
    self.features = features
    self.protocolFeatures = protocolFeatures
    self.queues = queues
    self.reason = reason
  }
}

extension CoreMessage {
  /// Bytes of a conversation.
  private static let conversationLimit = 15_500

  private enum Kind: UInt16 {
    case ready = 0x8001, started, done, refused, information, device, guest, failed, plugged, unplugged, conversation
    case examined = 0x8020
  }

  private var kind: Kind {
    switch self {
    case .ready: .ready
    case .started: .started
    case .done: .done
    case .refused: .refused
    case .information: .information
    case .device: .device
    case .guest: .guest
    case .failed: .failed
    case .examined: .examined
    case .plugged: .plugged
    case .unplugged: .unplugged
    case .conversation: .conversation
    }
  }

  /// The packet. `sequence` is that of the request answered, or 0.
  package func encode(sequence: UInt32) -> [UInt8] {
    var writer = WireWriter()
    WireHeader(kind: kind.rawValue, descriptorCount: 0, sequence: sequence).write(to: &writer)
    switch self {
    case .ready:
      writer.number(Wire.version)
    case .started, .done: break
    case .refused(let sentence): writer.text(sentence, limit: 1024)
    case .information(let information):
      writer.number(information.state.rawValue)
      writer.number(information.resetCount)
      writer.number(information.uptime)
      writer.list(information.counters) { writer, counter in
        writer.text(counter.name, limit: 32)
        writer.number(counter.value)
      }
    case .device(let report):
      writer.number(report.state.rawValue)
      writer.number(report.features.rawValue)
      writer.number(report.protocolFeatures)
      writer.text(report.id)
      writer.list(report.queues) { writer, queue in
        writer.number(queue.size)
        writer.flag(queue.isEnabled)
        writer.number(queue.waitingSince)
        writer.number(queue.waitingCount)
      }
      writer.text(report.reason, limit: 1024)
    case .conversation(let id, let text):
      writer.text(id)
      writer.text(text, limit: Self.conversationLimit)
    case .guest(let event): writer.number(event.rawValue)
    case .plugged(let slot): writer.number(slot)
    case .unplugged(let id): writer.text(id)
    case .failed(let kind, let sentence):
      writer.number(kind.rawValue)
      writer.text(sentence, limit: 1024)
    case .examined(let findings):
      writer.list(findings) { writer, finding in
        writer.number(finding.verdict.rawValue)
        writer.text(finding.subject, limit: 64)
        writer.text(finding.sentence, limit: 512)
      }
    }
    return writer.bytes
  }

  /// Reads a packet; the core sends no descriptors.
  package static func decode(
    _ packet: [UInt8], descriptorCount: Int = 0
  ) throws(MessageError) -> (message: CoreMessage, sequence: UInt32) {
    guard packet.count <= Wire.maximumLength else { throw .tooLong(byteCount: packet.count) }
    var reader = WireReader(packet)
    let header = try WireHeader(from: &reader)
    guard let kind = Kind(rawValue: header.kind) else { throw .unknownKind(header.kind) }
    let message: CoreMessage
    switch kind {
    case .ready:
      guard try reader.number(UInt16.self) == Wire.version else { throw .badField("version") }
      message = .ready
    case .started: message = .started
    case .done: message = .done
    case .refused: message = .refused(try reader.text("sentence", limit: 1024))
    case .information: message = .information(try VMInformation(from: &reader))
    case .device: message = .device(try DeviceReport(from: &reader))
    case .conversation:
      message = .conversation(id: try reader.identifier(), text: try reader.text("text", limit: conversationLimit))
    case .guest:
      guard let event = GuestEvent(rawValue: try reader.number()) else { throw .badField("event") }
      message = .guest(event)
    case .plugged:
      let slot: UInt8 = try reader.number()
      guard (1...31).contains(slot) else { throw .badField("slot") }
      message = .plugged(slot: slot)
    case .unplugged: message = .unplugged(id: try reader.identifier())
    case .failed:
      guard let kind = FailureKind(rawValue: try reader.number()) else { throw .badField("failure") }
      message = .failed(kind, try reader.text("sentence", limit: 1024))
    case .examined:
      message = .examined(
        try reader.list("findings", limit: 24) { reader throws(MessageError) in
          guard let verdict = Finding.Verdict(rawValue: try reader.number()) else { throw .badField("verdict") }
          return Finding(verdict, try reader.text("subject", limit: 64), try reader.text("sentence", limit: 512))
        })
    }
    try reader.finish()
    try header.checkDescriptors(expected: 0, received: descriptorCount)
    return (message, header.sequence)
  }
}

extension VMInformation {
  fileprivate init(from reader: inout WireReader) throws(MessageError) {
    guard let state = State(rawValue: try reader.number()) else { throw .badField("state") }
    self.state = state
    resetCount = try reader.number()
    uptime = try reader.number()
    counters = try reader.list("counters", limit: 128) { reader throws(MessageError) in
      Counter(name: try reader.text("counter", limit: 32), value: try reader.number())
    }
  }
}

extension DeviceReport {
  fileprivate init(from reader: inout WireReader) throws(MessageError) {
    guard let state = State(rawValue: try reader.number()) else { throw .badField("state") }
    self.state = state
    features = FeatureSet(rawValue: try reader.number())
    protocolFeatures = try reader.number()
    id = try reader.identifier()
    queues = try reader.list("queues", limit: VMConfiguration.Limits.queues) { reader throws(MessageError) in
      Queue(
        size: try reader.number(), isEnabled: try reader.flag("enabled"), waitingSince: try reader.number(),
        waitingCount: try reader.number())
    }
    reason = try reader.text("reason", limit: 1024)
  }
}
