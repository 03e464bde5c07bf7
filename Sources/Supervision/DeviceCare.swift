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
    /// The new process is starting, or its image is still in use by what the dead process left behind.
    case succeeding(Succession)
    /// The core makes first contact with it.
    case reattaching(sequence: UInt32)
    /// By the operator's wish, or for good.
    case held, givenUp
  }

  /// How far a new process has come.
  struct Succession: Equatable {
    let since: MonotonicTime
    /// It has said READY.
    var isReady: Bool
    /// While its image is not locked: when to try again, and until when.
    var fence: (next: MonotonicTime, until: MonotonicTime)?

    static func == (a: Succession, b: Succession) -> Bool { a.since == b.since && a.isReady == b.isReady }
  }

  /// A process that waits to take over: its place among the processes, the core's end of its connection, its image.
  struct Spare {
    let index: Int
    let socket: FDBox
    let image: FDBox?
    var isReady = false
  }

  /// The image of a disk, and what it was.
  struct Image {
    let path: String
    let readOnly: Bool
    let isShared: Bool
    /// Nil where only the spawner has it.
    let status: FileStatus?
    /// What is written to it without O_DIRECT has been written when the process that asked for it is gone.
    var isSynchronous = false
  }

  let id: String
  let kind: Kind
  let policy: VMConfiguration.DeathPolicy
  private(set) var image: Image?
  var resources: [FDBox] = []
  /// The core's end of the connection to a process that has not taken over yet.
  var socket: FDBox?
  /// The open file that such a process has as its image, until it is locked: the lock is the open file's, not ours.
  var unlockedImage: FDBox?
  /// The open file of the process that serves, where its lock may be given up with the process.
  var lockedImage: FDBox?
  /// The open file that the next process will have, opened before the one that serves began: the kernel tells each open file once of writes
  /// that were lost, and what it has told a process that died it tells this one too. Nothing is done with it until then.
  var imageAhead: FDBox?
  var spare: Spare?
  /// When a spare is to be started, where one is wanted.
  var spareDue: MonotonicTime?
  /// Spares that have died since one took over.
  var spareFailures = 0
  var step = Step.none
  var restartCount = 0
  /// When it came into service again last, and how often that did not last.
  var servedTime: MonotonicTime?
  var shortServices = 0
  /// As the device's processes have counted them so far.
  var replayCount: UInt64 = 0
  /// Within the last minute.
  var deaths: [MonotonicTime] = []
  /// Since the device was served last.
  var failureCount = 0
  /// When service was lost; nil while there is a back end, as far as we know.
  var lostTime: MonotonicTime?

  private static let window = Duration.seconds(60)
  private static let firstDelay = Duration.milliseconds(50)
  private static let longestDelay = Duration.seconds(5)
  /// How often a socket is tried: often at first, when a back end is just being started again.
  static let eagerInterval = Duration.milliseconds(10)
  static let eagerTime = Duration.seconds(2)
  static let connectInterval = Duration.milliseconds(100)
  static let fenceInterval = Duration.milliseconds(1)
  private static let longestSpareDelay = Duration.seconds(60)

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
    guard image != nil else {
      self.resources = resources
      return
    }
    if let file = resources.first { locked(file) }
    for resource in resources.dropFirst() { resource.close() }
  }

  /// It serves the same file as `other`.
  func hasImage(of other: DeviceCare?) { image?.isSynchronous = other?.image?.isSynchronous == true }

  /// The image that the process has is locked by it. The lock is the open file's: it would outlive the process if nobody gave it up.
  func locked(_ file: FDBox) {
    if let image, image.isSynchronous, !image.readOnly, !image.isShared { lockedImage = file } else { file.close() }
  }

  /// The process that had it is gone, with all its threads and the kernel's that worked for it: nothing of it is under way but what goes
  /// past the page cache. Where nothing does, the lock need not wait until the kernel has tidied up its requests.
  func giveUpLock() {
    guard let file = lockedImage else { return }
    lockedImage = nil
    ImageLock.giveUp(file.number)
    file.close()
  }

  /// In a fork that does not have them.
  func abandonResources() {
    for resource in resources { _ = resource.take()?.release() }
    _ = lockedImage?.take()?.release()
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

  /// A back end of others is lost: when to connect again. One that takes connections and drops them at once is asked less
  /// and less often, but without end.
  func reconnectDelay(_ now: MonotonicTime) -> Duration {
    guard let servedTime, now.since(servedTime) < .seconds(1) else {
      shortServices = 0
      return .zero
    }
    defer { shortServices = min(shortServices + 1, 4) }
    var delay = Self.connectInterval
    for _ in 0..<shortServices { delay = delay * 2 }
    return min(delay, .seconds(1))
  }

  /// The device is served again.
  func succeeded() {
    servedTime = .now
    step = .none
    lostTime = nil
    restartCount += 1
    failureCount = 0
  }

  /// The process that was to take over next does not come to that.
  func dropSuccessor() {
    socket?.close()
    socket = nil
    unlockedImage?.close()
    unlockedImage = nil
  }

  /// A spare has died without use: the next one comes in a second, then in two, and so on.
  func dropSpare(_ now: MonotonicTime) {
    spare?.socket.close()
    spare?.image?.close()
    spare = nil
    var delay = Duration.seconds(1)
    for _ in 0..<min(spareFailures, 6) { delay = delay * 2 }
    spareFailures += 1
    spareDue = now.advanced(by: min(delay, Self.longestSpareDelay))
  }

  func spareIsUsed() {
    spare = nil
    spareFailures = 0
  }

  /// A process is on its way that knows descriptors which have no place in a state.
  var isStarting: Bool {
    if case .succeeding = step { true } else { socket != nil || unlockedImage != nil || spare?.isReady == false }
  }

  /// When something has to be done or is late.
  func nextStep(ready: UInt32) -> MonotonicTime? {
    switch step {
    case .due(let time): return time
    case .succeeding(let succession):
      let late = succession.isReady ? nil : succession.since.advanced(by: .milliseconds(ready))
      guard let next = succession.fence?.next else { return late }
      return late.map { min($0, next) } ?? next
    case .none: return spareDue
    case .reattaching, .held, .givenUp: return nil
    }
  }
}
