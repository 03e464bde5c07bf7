import HostSystem

/// Whether a queue's thread looks at the ring for a while before it sleeps.
package enum PollPolicy: Equatable, Sendable {
  case off
  /// As long as it pays, at most `PollBudget.longest`.
  case auto
  /// Always so many microseconds.
  case fixed(Int)

  /// `auto`, `off`, or microseconds from 1 to 1000000.
  package init?(_ text: String) {
    switch text {
    case "auto": self = .auto
    case "off": self = .off
    default:
      guard let number = Int(text), (1...1_000_000).contains(number) else { return nil }
      self = .fixed(number)
    }
  }
}

/// How long to look before sleeping, in nanoseconds, learned from what sleeping and looking have brought.
///
/// A sleep that was over sooner than the longest look would have been makes the look longer; one that lasted makes it
/// shorter, down to nothing. Two things make it end at once, and for a while that doubles each time: time lost while looking
/// (somebody else needs this processor), and looks of full length in vain with short sleeps behind them (whoever we wait for
/// runs only when we do not).
package struct PollBudget {
  /// About what falling asleep and waking up costs both sides.
  package static let longest: UInt64 = 32_000
  /// A gap between two looks that only losing the processor explains.
  static let lostTime: UInt64 = 20_000
  /// After how long a look the processor is first offered to others, and how long that takes when nobody wants it.
  static let firstPatience: UInt64 = 2_000
  static let yieldTime: UInt64 = 1_500
  private static let first: UInt64 = 4_000
  private static let vainLimit = 4
  private static let shortestRest: UInt64 = 1_000_000
  private static let longestRest: UInt64 = 1_000_000_000

  private let policy: PollPolicy
  /// Now.
  package private(set) var nanoseconds: UInt64
  /// How often in a row the processor was offered and nobody wanted it.
  private var vainYields = 0
  private var vain = 0
  private var rest = shortestRest
  private var restsUntil: UInt64 = 0

  package init(_ policy: PollPolicy) {
    self.policy = policy
    if case .fixed(let microseconds) = policy { nanoseconds = UInt64(microseconds) * 1000 } else { nanoseconds = 0 }
  }

  /// How long to look before the processor is offered to others again: longer the more often nobody wanted it, so that looking on a processor
  /// of one's own comes to cost no system calls.
  package var patience: UInt64 { Self.firstPatience << UInt64(vainYields / 16) }

  /// Whether the length of sleeps has to be told.
  package var isLearning: Bool { policy == .auto }

  /// A look brought something.
  package mutating func succeeded() {
    vain = 0
    rest = Self.shortestRest
  }

  /// The processor was offered to others, and nobody wanted it.
  package mutating func yieldedInVain() { vainYields = min(vainYields + 1, 64) }

  /// The processor was taken away during a look.
  package mutating func lostProcessor(now: UInt64) { if isLearning { giveUp(now) } }

  /// A sleep is over that began after a look of `nanoseconds` in vain.
  package mutating func slept(from begin: UInt64, to end: UInt64) {
    guard isLearning else { return }
    let length = end &- begin
    if length > Self.longest {
      vain = 0
      nanoseconds = nanoseconds / 2 < Self.first ? 0 : nanoseconds / 2
      return
    }
    guard end >= restsUntil else { return }
    if nanoseconds >= Self.longest {
      vain += 1
      if vain >= Self.vainLimit { giveUp(end) }
    } else {
      nanoseconds = nanoseconds == 0 ? Self.first : min(nanoseconds * 2, Self.longest)
    }
  }

  private mutating func giveUp(_ now: UInt64) {
    nanoseconds = 0
    vain = 0
    vainYields = 0
    restsUntil = now &+ rest
    rest = min(rest * 2, Self.longestRest)
  }
}
