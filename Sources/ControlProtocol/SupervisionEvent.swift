/// Something that happened to a device of a VM, or to the VM itself, as `martlet ctl events` tells it.
package struct SupervisionEvent: Equatable, Sendable {
  /// What happened. The raw values are what programs read: they stay what they are.
  package enum Kind: String, CaseIterable, Sendable {
    /// The core has made first contact with the device's first back end.
    case connected
    /// The back end is gone: its process ended, its connection closed, or it broke the protocol.
    case lost
    /// A successor ended, or was not accepted, before the device was served again.
    case startFailed = "start-failed"
    /// A new back end does what the one before did.
    case restarted
    /// Requests that were in flight when a back end was lost have been done again.
    case replayed
    /// The device waits for a back end, and nothing will bring one, because the operator wished it so.
    case held
    /// No back end will come any more; the guest has been told that the device needs a reset.
    case givenUp = "given-up"
    /// A process waits behind its walls to take over.
    case spareReady = "spare-ready"
    /// Another back end took over from one that lived.
    case replaced
    /// As `replaced`, by the installed version of the same program.
    case upgraded
    /// The device was plugged into, or taken out of, the running guest.
    case added, removed
    /// The device has told the guest that it needs a reset.
    case needsReset = "needs-reset"
    /// The guest was reset in place.
    case guestReset = "guest-reset"
    /// The supervisor was killed, and another one has taken over.
    case takenOver = "taken-over"
  }

  /// Counts the events of a VM from 1: a gap tells that some were lost.
  package var number: UInt64
  /// Nanoseconds since 1970-01-01 00:00 UTC.
  package var time: UInt64
  package var kind: Kind
  /// Empty for what concerns the VM.
  package var device: String
  /// A sentence or a part of one for people; may be empty.
  package var text: String
  /// Numbers for programs, by name: `pid`, `gap_ns`, `requests`.
  package var values: [Value]

  package struct Value: Equatable, Sendable {
    package var name: String
    package var number: UInt64

    package init(_ name: String, _ number: UInt64) {
      self.name = name
      self.number = number
    }
  }

  package init(number: UInt64, time: UInt64, kind: Kind, device: String, text: String = "", values: [Value] = []) {
    self.number = number
    self.time = time
    self.kind = kind
    self.device = device
    self.text = text
    self.values = values
  }

  package var json: JSONValue {
    var members: [JSONValue.Member] = [
      .init("number", .unsigned(number)), .init("time", .string(WallTime.text(time))), .init("time_ns", .unsigned(time)),
      .init("event", .string(kind.rawValue)),
    ]
    if !device.isEmpty { members.append(.init("device", .string(device))) }
    if !text.isEmpty { members.append(.init("text", .string(text))) }
    for value in values { members.append(.init(value.name, .unsigned(value.number))) }
    return .object(members)
  }
}

/// Points in time as people and programs write them.
package enum WallTime {
  /// `2026-11-30T13:05:07.123456Z` (RFC 3339, UTC) of nanoseconds since 1970.
  package static func text(_ nanoseconds: UInt64) -> String {
    let seconds = nanoseconds / 1_000_000_000
    let (year, month, day) = date(daysSince1970: seconds / 86400)
    let (hour, minute, second) = (seconds / 3600 % 24, seconds / 60 % 60, seconds % 60)
    func padded(_ number: UInt64, _ width: Int) -> String {
      let digits = String(number)
      return String(repeating: "0", count: max(0, width - digits.utf8.count)) + digits
    }
    return "\(padded(year, 4))-\(padded(month, 2))-\(padded(day, 2))T\(padded(hour, 2)):\(padded(minute, 2)):\(padded(second, 2))."
      + "\(padded(nanoseconds / 1000 % 1_000_000, 6))Z"
  }

  /// The Gregorian calendar in years that begin with March, so that the leap day is a year's last.
  private static func date(daysSince1970 days: UInt64) -> (year: UInt64, month: UInt64, day: UInt64) {
    // From 0000-03-01, which is 719468 days before 1970.
    let shifted = days + 719_468
    let era = shifted / 146_097
    let dayOfEra = shifted % 146_097
    let yearOfEra = (dayOfEra - dayOfEra / 1460 + dayOfEra / 36_524 - dayOfEra / 146_096) / 365
    let dayOfYear = dayOfEra - (365 * yearOfEra + yearOfEra / 4 - yearOfEra / 100)
    let monthFromMarch = (5 * dayOfYear + 2) / 153
    let day = dayOfYear - (153 * monthFromMarch + 2) / 5 + 1
    let month = monthFromMarch < 10 ? monthFromMarch + 3 : monthFromMarch - 9
    return (era * 400 + yearOfEra + (month <= 2 ? 1 : 0), month, day)
  }
}
