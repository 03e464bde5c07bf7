import Glibc
import HostSystem
import VhostUser
import VirtioQueue
import VirtioSpec

/// What one case came to.
package enum Verdict: Equatable, Sendable {
  case pass
  /// What was wrong, in one sentence.
  case fail(String)
  /// The back end does not claim to be able to.
  case notOffered(String)
  /// The case means nothing here.
  case notApplicable(String)

  package var word: String {
    switch self {
    case .pass: "pass"
    case .fail: "FAIL"
    case .notOffered: "not offered"
    case .notApplicable: "not applicable"
    }
  }

  package var reason: String {
    switch self {
    case .pass: ""
    case .fail(let text), .notOffered(let text), .notApplicable(let text): text
    }
  }
}

/// How a case ends early.
enum CaseStop: Error {
  case fail(String)
  case notOffered(String)
  case notApplicable(String)
}

/// One promise of the specification.
struct CheckCase: Sendable {
  let id: String
  /// What has to be so.
  let sentence: String
  /// Where it is written.
  let section: String
  let body: @Sendable (CheckContext) throws -> Void

  init(_ id: String, _ sentence: String, _ section: String, _ body: @escaping @Sendable (CheckContext) throws -> Void) {
    self.id = id
    self.sentence = sentence
    self.section = section
    self.body = body
  }
}

/// A case with its verdict.
package struct CaseResult: Sendable {
  package let id: String
  package let sentence: String
  package let section: String
  package let verdict: Verdict
  /// The last bytes of the conversation, for failures.
  package let trace: [String]
  package let duration: Duration
}

/// What the cases share: the back end, what it offered at first contact, and ways to talk to it.
final class CheckContext {
  let target: Target
  let device: DeviceID?
  let offer: Offer
  /// Whether the disk's content may be destroyed.
  let mayWrite: Bool
  /// How long a ring is driven round and round.
  let endurance: Duration
  let trace = Trace()

  init(_ target: Target, _ device: DeviceID?, _ offer: Offer, mayWrite: Bool, endurance: Duration) {
    self.target = target
    self.device = device
    self.offer = offer
    self.mayWrite = mayWrite
    self.endurance = endurance
  }

  var block: BlockConfiguration { BlockConfiguration(decoding: offer.configuration ?? []) }

  func open() throws -> Link { try Link(target, trace: trace) }

  /// A conversation after first contact.
  func negotiated(_ wanted: ProtocolFeatures = Link.wanted) throws -> Link {
    var link = try open()
    try link.negotiate(wanted)
    return link
  }

  func client(_ setup: RingClient.Setup = RingClient.Setup()) throws -> RingClient {
    guard RingClient.ping(device) != nil else { throw CaseStop.notApplicable("the probe knows no request for this device") }
    let client = try RingClient(target, device, setup, trace: trace)
    client.patience = patience
    return client
  }

  /// How long anything may take that has to happen. On a loaded machine a process may not run for seconds.
  var patience: Duration { target.timeout }

  /// For what comes true a little after what shows it, as the last step of a completion does after its publication.
  func soon(_ body: () throws -> Void) throws {
    let end = MonotonicTime.now.advanced(by: patience)
    while true {
      do {
        return try body()
      } catch let stop as CaseStop {
        guard MonotonicTime.now < end else { throw stop }
        usleep(500)
      }
    }
  }

  func needs(_ feature: ProtocolFeatures) throws {
    guard offer.protocolFeatures.isSuperset(of: feature) else {
      throw CaseStop.notOffered(feature.subtracting(offer.protocolFeatures).featureNames.joined(separator: ", "))
    }
  }

  func needs(_ feature: FeatureSet) throws {
    guard offer.features.isSuperset(of: feature) else {
      throw CaseStop.notOffered(feature.subtracting(offer.features).names(for: device).joined(separator: ", "))
    }
  }

  func needsWriting() throws {
    guard mayWrite else { throw CaseStop.notApplicable("it writes to the disk; allow that with --writes") }
    if offer.features.contains(.blockReadOnly) { throw CaseStop.notApplicable("the disk is read-only") }
  }

  func expect(_ condition: Bool, _ sentence: @autoclosure () -> String) throws {
    if !condition { throw CaseStop.fail(sentence()) }
  }

  /// The end of the process in this case, unless it is one that back ends for a single front end may make.
  private func newCrash(since count: Int) -> String? {
    target.collect()
    guard target.crashes.count > count, let end = target.crashes.last, end != .exited(code: 0) else { return nil }
    return "the back end \(end)" + (target.lastWords.isEmpty ? "" : "; it said: \(target.lastWords)")
  }

  /// A closed connection is an answer only if the next front end is served.
  private func trouble(after count: Int) -> String? {
    do throws(ProbeError) {
      var link = try Link(target, trace: Trace())
      _ = try link.number(.getFeatures)
      return nil
    } catch {
      usleep(50_000)
      return newCrash(since: count) ?? "the next front end is not served: \(error)"
    }
  }

  func run(_ item: CheckCase) -> CaseResult {
    trace.reset()
    let begin = MonotonicTime.now
    let crashes = target.crashes.count
    var verdict = Verdict.pass
    do {
      try item.body(self)
    } catch let stop as CaseStop {
      switch stop {
      case .fail(let text): verdict = .fail(text)
      case .notOffered(let text): verdict = .notOffered(text)
      case .notApplicable(let text): verdict = .notApplicable(text)
      }
    } catch ProbeError.notVhostUser(let why) {
      verdict = .fail(why)
    } catch {
      verdict = .fail("\(error)")
    }
    if trace.sawClosing, let problem = trouble(after: crashes) { verdict = .fail(problem) }
    if let end = newCrash(since: crashes) { verdict = .fail(end) }
    // The next case starts with a fresh process, whatever this one left behind.
    if case .fail = verdict, target.isOurs { target.stop() }
    var lines: [String] = []
    if case .fail = verdict { lines = trace.lines }
    return CaseResult(
      id: item.id, sentence: item.sentence, section: item.section, verdict: verdict, trace: lines,
      duration: MonotonicTime.now.since(begin))
  }
}
