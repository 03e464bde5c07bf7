import ControlProtocol
import HostSystem

/// What the supervisor keeps of one device to replace its back end when that dies, and how far it has come with that.
final class DeviceCare {
  enum Kind {
    /// `resources` are kept open: a tap stays attached, a terminal stays what it is. Empty for a disk, whose image must be
    /// closed here, or its lock would not tell when the dead process's writes have ended.
    case program(String, arguments: [String], isOnTerminal: Bool)
    case external(path: String)
    case jailed(JailedDevice)
  }

  enum Step: Equatable {
    /// There is a back end, as far as we know.
    case none
    /// A new one is due.
    case due(MonotonicTime)
    /// The image is still in use by what the dead process left behind; asked again at the first time, until the second.
    case fencing(MonotonicTime, until: MonotonicTime)
    /// The new process is starting.
    case starting(since: MonotonicTime)
    /// The core makes first contact with it.
    case reattaching(sequence: UInt32)
    /// By the operator's wish, or for good.
    case held, givenUp
  }

  /// The image of a disk, and what it was.
  struct Image {
    let path: String
    let readOnly: Bool
    let isShared: Bool
    let status: FileStatus
  }

  let id: String
  let kind: Kind
  let policy: VMConfiguration.DeathPolicy
  let image: Image?
  private(set) var resources: [FDBox] = []
  /// The core's end of the connection to a process that has not said READY.
  var socket: FDBox?
  var step = Step.none
  var restartCount = 0
  /// Within the last minute.
  private var deaths: [MonotonicTime] = []
  /// Since the device was served last.
  private var failureCount = 0
  /// When service was lost; nil while there is a back end, as far as we know.
  var lostTime: MonotonicTime?

  private static let window = Duration.seconds(60)
  private static let firstDelay = Duration.milliseconds(50)
  private static let longestDelay = Duration.seconds(5)
  static let connectInterval = Duration.milliseconds(100)
  static let fenceInterval = Duration.milliseconds(2)

  init(
    _ id: String, _ kind: Kind, _ policy: VMConfiguration.DeathPolicy, image: Image?
  ) {
    self.id = id
    self.kind = kind
    self.policy = policy
    self.image = image
  }

  /// The first process has its resources.
  func started(_ resources: [FDBox]) {
    if image != nil { for resource in resources { resource.close() } } else { self.resources = resources }
  }

  /// One more death: when the next process is due; nil when there were too many.
  func delay(afterDeathAt now: MonotonicTime) -> Duration? {
    deaths.removeAll { now.since($0) > Self.window }
    deaths.append(now)
    guard deaths.count <= policy.limit else { return nil }
    defer { failureCount += 1 }
    // The first at once; while none comes into service, 50 ms, doubled each time.
    guard failureCount > 0 else { return .zero }
    var delay = Self.firstDelay
    for _ in 0..<min(failureCount - 1, 7) { delay = delay * 2 }
    return min(delay, Self.longestDelay)
  }

  /// The device is served again.
  func succeeded() {
    step = .none
    lostTime = nil
    restartCount += 1
    failureCount = 0
  }

  /// When something has to be done or is late.
  func nextStep(ready: UInt32) -> MonotonicTime? {
    switch step {
    case .due(let time), .fencing(let time, _): time
    case .starting(let start): start.advanced(by: .milliseconds(ready))
    case .none, .reattaching, .held, .givenUp: nil
    }
  }
}
