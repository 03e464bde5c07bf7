import Glibc
import HostSystem
import VhostUser
import VirtioQueue
import VirtioSpec

/// What a back end made of hostile behaviour. There is no "unknown".
package enum FaultVerdict: Equatable, Sendable {
  /// It went on, and serves the next front end.
  case survived
  /// It said no, closed the connection, or ended in order; the next front end is served.
  case refused(String)
  /// It lives, and serves nobody within the time-out.
  case hung(String)
  case crashed(String)
  /// It serves, and holds descriptors or memory that it did not hold before.
  case leaked(String)

  package var isFinding: Bool {
    switch self {
    case .survived, .refused: false
    case .hung, .crashed, .leaked: true
    }
  }

  package var word: String {
    switch self {
    case .survived: "survived"
    case .refused: "refused"
    case .hung: "HUNG"
    case .crashed: "CRASHED"
    case .leaked: "LEAKED"
    }
  }

  package var reason: String {
    switch self {
    case .survived: ""
    case .refused(let text), .hung(let text), .crashed(let text), .leaked(let text): text
    }
  }
}

/// One attack. The body says what it likes and looks at nothing but what it needs to go on.
struct FaultCase: Sendable {
  let id: String
  let sentence: String
  let body: @Sendable (FaultContext) throws -> Void

  init(_ id: String, _ sentence: String, _ body: @escaping @Sendable (FaultContext) throws -> Void) {
    self.id = id
    self.sentence = sentence
    self.body = body
  }
}

package struct FaultResult: Sendable {
  package let id: String
  package let sentence: String
  package let verdict: FaultVerdict
  package let trace: [String]
  package let duration: Duration
}

/// How an attack says that it cannot be made here.
struct NotPossible: Error {
  let why: String
}

/// What attacks share, and the judgement after each.
final class FaultContext {
  let target: Target
  let device: DeviceID?
  let offer: Offer
  let trace = Trace()
  private var baseline: Usage?
  /// Set by an attack that saw the process hold far too many descriptors.
  var openDescriptorsSeen = 0

  /// What a process holds.
  struct Usage {
    var descriptors: Int
    /// KiB
    var memory: Int
  }

  init(_ target: Target, _ device: DeviceID?, _ offer: Offer) {
    self.target = target
    self.device = device
    self.offer = offer
  }

  func open() throws(ProbeError) -> Link { try Link(target, trace: trace) }

  func negotiated() throws(ProbeError) -> Link {
    var link = try open()
    try link.negotiate()
    try link.accept(offer.features.intersection(.version1))
    return link
  }

  func client(_ features: FeatureSet = [], ringSize: UInt16 = 16) throws -> RingClient {
    guard offer.features.isSuperset(of: features) else {
      throw NotPossible(why: features.subtracting(offer.features).names(for: device).joined(separator: ", ") + " not offered")
    }
    return try RingClient(target, device, RingClient.Setup(features: features, ringSize: ringSize), trace: trace)
  }

  /// Runs one attack; nil when it cannot be made here.
  func run(_ item: FaultCase) -> FaultResult? {
    trace.reset()
    let begin = MonotonicTime.now
    if baseline == nil || target.process?.processID != baselineProcess { measureBaseline() }
    let crashes = target.crashes.count
    var refusal: String?
    do {
      try item.body(self)
    } catch is NotPossible {
      return nil
    } catch let error as ProbeError {
      if case .protocolError(_, .peerRefused(_, let code)) = error { refusal = "answered with \(code)" }
    } catch {
      refusal = "\(error)"
    }
    if trace.sawClosing { refusal = "closed the connection" }
    var verdict = judge(item, crashes, refusal)
    if case .crashed = verdict { baseline = nil }
    if verdict.isFinding, target.isOurs {
      target.stop()
      baseline = nil
    }
    if case .leaked = verdict { baseline = nil }
    if !verdict.isFinding, target.isOurs, case .refused(let text) = verdict, text.hasPrefix("the process") {
      baseline = nil
      endsWithItsFrontEnd = true
    }
    if case .survived = verdict, let refusal { verdict = .refused(refusal) }
    return FaultResult(
      id: item.id, sentence: item.sentence, verdict: verdict, trace: verdict.isFinding ? trace.lines : [],
      duration: MonotonicTime.now.since(begin))
  }

  private var baselineProcess: Int32?
  /// Seen to: nothing can be left in it for long.
  private var endsWithItsFrontEnd = false

  /// Ordinary sessions, and what the process holds after them. Some close what a front end left only when their threads get round to it;
  /// what is still open then would hide what attacks leave. So the least that is seen counts, once it stands still.
  private func measureBaseline() {
    for _ in 0..<2 { _ = serve() }
    usleep(2_000)
    baseline = usage()
    baselineProcess = target.process?.processID
    guard !endsWithItsFrontEnd else { return }
    var unchanged = 0
    for _ in 0..<200 where unchanged < 10 {
      usleep(3_000)
      guard let now = usage(), let least = baseline else { return }
      unchanged = now.descriptors < least.descriptors ? 0 : unchanged + 1
      if unchanged == 0 { baseline = now }
    }
  }

  /// An ordinary front end: nil when it is served, else why not.
  private func serve() -> String? {
    do {
      if RingClient.ping(device) != nil {
        // As attacks begin, so that the only difference is what they do.
        let client = try RingClient(target, device, RingClient.Setup(ringSize: 16), trace: Trace())
        try client.ping()
      } else {
        var link = try Link(target, trace: Trace())
        _ = try link.number(.getFeatures)
      }
      return nil
    } catch {
      return "\(error)"
    }
  }

  private func judge(_ item: FaultCase, _ crashes: Int, _ refusal: String?) -> FaultVerdict {
    let process = target.process?.processID
    let begin = MonotonicTime.now
    var problem = serve()
    if problem != nil {
      // Who refuses at once may be dying, which takes its time, on a loaded machine more of it; who says nothing rather hangs.
      let isQuick = MonotonicTime.now.since(begin) < min(target.timeout, .seconds(2)) / 2
      let end = MonotonicTime.now.advanced(by: isQuick ? min(target.timeout, .seconds(3)) : .milliseconds(150))
      while problem != nil, target.crashes.count == crashes, MonotonicTime.now < end {
        usleep(50_000)
        if target.collect() == nil { problem = serve() }
      }
    }
    target.collect()
    if target.crashes.count > crashes {
      if let crash = crash(since: crashes) { return crash }
      let end = target.crashes[crashes]
      // It ended by itself: in order if another one, just started, serves.
      // The one that is going may still take a connection or two with it.
      if let problem, serve() != nil, serve() != nil, serve() != nil {
        // The one that is there now may well be alive, and stuck: what ended was the one before.
        if target.process != nil, target.collect() == nil { return .hung("the next front end is not served: \(problem)") }
        return crash(since: crashes) ?? .crashed("\(end), and a new one does not serve")
      }
      return .refused("the process \(end)")
    }
    if let problem {
      if !target.isOurs, problem.contains("refused (ECONNREFUSED)") || problem.contains("ENOENT") {
        return .crashed("nobody listens any more")
      }
      return .hung("the next front end is not served: \(problem)")
    }
    let leak = leak(process, item)
    // Looking for a leak may have made the attack again.
    target.collect()
    return crash(since: crashes) ?? leak ?? refusal.map { .refused($0) } ?? .survived
  }

  /// An end by a signal. One for a single front end ends after each: the first new end may be that of the process before.
  private func crash(since count: Int) -> FaultVerdict? {
    for end in target.crashes[count...] {
      if case .killed = end { return .crashed("\(end)" + (target.lastWords.isEmpty ? "" : "; it said: \(target.lastWords)")) }
    }
    return nil
  }

  private func leak(_ process: Int32?, _ item: FaultCase) -> FaultVerdict? {
    if openDescriptorsSeen > 0 {
      defer { openDescriptorsSeen = 0 }
      return .leaked("\(openDescriptorsSeen) descriptors open while one connection repeated itself")
    }
    guard let baseline else { return nil }
    // Some close what a front end left only when their threads get round to it.
    let patience = useconds_t(clamping: min(target.timeout, .seconds(5)).nanoseconds / 1000)
    let pauses = [2_000, patience / 100, patience / 50, patience / 15, patience / 6]
    // One descriptor more may be anything; an attack that leaves one each time has left three when it was made thrice.
    for isAgain in [false, true] {
      if isAgain { for _ in 0..<2 { try? item.body(self) } }
      for (attempt, pause) in pauses.enumerated() {
        usleep(pause)
        guard process == target.process?.processID, let now = usage() else { return nil }
        let descriptors = now.descriptors - baseline.descriptors
        // It was still busy with something when it was first looked at.
        if descriptors < 0 { self.baseline = now }
        let memory = now.memory - baseline.memory
        let isLast = attempt == pauses.count - 1
        // Made again it may still be at work on it, so that only the last look counts.
        if descriptors <= (isAgain ? 2 : 0), memory < 32 << 10, isLast || !isAgain {
          // What is left is not to be held against the next attack.
          if isAgain { self.baseline = nil }
          return nil
        }
        if !isLast {
          _ = serve()
          continue
        }
        if !isAgain, descriptors == 1, memory < 32 << 10 { break }
        return .leaked(descriptors > 1 ? "\(descriptors) more descriptors than before" : "\(memory / 1024) MiB more memory than before")
      }
    }
    return nil
  }

  private func usage() -> Usage? {
    guard let process = target.processID else { return nil }
    let descriptors = SystemCallCounter.entries(of: "/proc/\(process)/fd").count
    guard descriptors > 0, let file = try? OwnedFD.open("/proc/\(process)/statm", O_RDONLY), let bytes = try? file.readToEnd(limit: 200)
    else { return nil }
    let fields = String(decoding: bytes, as: UTF8.self).split(separator: " ").compactMap { Int($0) }
    guard fields.count > 2 else { return nil }
    // Private memory: what is mapped of the guest's does not count.
    return Usage(descriptors: descriptors, memory: max(0, fields[1] - fields[2]) * 4)
  }
}
