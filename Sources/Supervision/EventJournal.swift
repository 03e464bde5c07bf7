import ControlProtocol
import Glibc
import HostSystem

/// The latest events of the VM, and how often each kind has happened to each device. Bounded: old events give way.
struct EventJournal {
  /// How many events are kept.
  static let capacity = 256

  private(set) var events: [SupervisionEvent] = []
  private var counts: [String: [SupervisionEvent.Kind: UInt64]] = [:]
  private var nextNumber: UInt64 = 1

  init() {}

  /// That of the program before an upgrade.
  init(_ state: SupervisorState) {
    events = state.events
    for count in state.eventCounts { counts[count.device, default: [:]][count.kind] = count.number }
    nextNumber = state.nextEvent
  }

  func capture(_ state: inout SupervisorState) {
    state.events = events
    state.nextEvent = nextNumber
    for (device, known) in counts.sorted(by: { $0.key < $1.key }) {
      for kind in SupervisionEvent.Kind.allCases {
        if let number = known[kind] { state.eventCounts.append(.init(device: device, kind: kind, number: number)) }
      }
    }
  }

  /// How many events have given way.
  var forgottenCount: UInt64 { nextNumber - 1 - UInt64(events.count) }

  mutating func add(
    _ kind: SupervisionEvent.Kind, _ device: String, _ text: String, _ values: [SupervisionEvent.Value]
  ) -> SupervisionEvent {
    let event = SupervisionEvent(number: nextNumber, time: Self.now, kind: kind, device: device, text: text, values: values)
    nextNumber += 1
    // A few hundred small values: shifting them costs less than thinking about it.
    if events.count == Self.capacity { events.removeFirst() }
    events.append(event)
    counts[device, default: [:]][kind, default: 0] += 1
    return event
  }

  /// `{"connected":1,"lost":2}`, only what has happened.
  func describeCounts(of device: String) -> JSONValue {
    let known = counts[device] ?? [:]
    return .object(SupervisionEvent.Kind.allCases.compactMap { kind in known[kind].map { .init(kind.rawValue, .unsigned($0)) } })
  }

  private static var now: UInt64 {
    var time = timespec()
    // SAFETY: `time` is ours and alive for the call; CLOCK_REALTIME always exists.
    _ = unsafe clock_gettime(CLOCK_REALTIME, &time)
    return UInt64(clamping: time.tv_sec) &* 1_000_000_000 &+ UInt64(clamping: time.tv_nsec)
  }
}

extension Supervisor {
  /// Writes down what happened, and tells those who follow. Extend `SupervisionEvent.Kind` for new kinds of events.
  /// - Parameter device: its id; empty for what concerns the VM.
  func note(
    _ kind: SupervisionEvent.Kind, _ device: String = "", _ text: String = "", _ values: KeyValuePairs<String, UInt64> = [:]
  ) {
    let event = journal.add(kind, device, text, values.map { .init($0.key, $0.value) })
    guard let control, control.hasFollowers else { return }
    control.publish(Self.line(event.json))
    adjustClients()
  }

  /// `martlet ctl events`: what is known, and with `--follow` what is to come, a line for each.
  func tellEvents(_ arguments: [String], to client: Int) {
    let follows = arguments.first == "--follow"
    guard follows || arguments.isEmpty else { return refuse(client, "The request is '\(ControlVerb.events.usage)'") }
    reply(
      client,
      .record([
        "ok": .bool(true), "forgotten": .unsigned(journal.forgottenCount), "events": .array(journal.events.map(\.json)),
      ]))
    if follows { control?.follow(client) }
  }

  static func line(_ value: JSONValue) -> [UInt8] {
    var line: [UInt8] = []
    value.write(to: &line)
    line.append(10)
    return line
  }
}
