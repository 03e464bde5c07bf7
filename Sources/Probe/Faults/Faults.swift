import ControlProtocol
import Glibc
import HostSystem
import VhostUser
import VirtioSpec

extension Verb {
  /// How a back end stands up to front ends that lie.
  package static let faults = Verb(
    name: "faults", summary: "hostile front ends: malformed messages, memory, rings, floods, sudden ends",
    notes: """
      After each attack an ordinary front end tries to be served. Verdicts: survived, refused (both good), HUNG, CRASHED,
      LEAKED. A crashed or hung back end is started again when it was started here.
      Use a scratch disk: garbage in a ring may well be a write.
      """,
    options: [
      OptionRow("only", "TEXT", "only cases whose id begins so (commas between several)"),
      OptionRow("exact", nil, "--only names whole ids"),
      OptionRow("skip", "TEXT", "leave out cases whose id begins so (commas between several)"),
      OptionRow("list", nil, "print ids and sentences of all cases, and run nothing"),
      OptionRow("format", "FORMAT", "text, tap, junit or json (default text)"),
      OptionRow("output", "PATH", "write the result to a file"),
      OptionRow("verbose", nil, "in text, also what was survived"),
    ],
    run: { options throws(ProbeError) in
      if options.has("list") {
        for item in Faults.all { Output.line(item.id.padded(to: 40) + item.sentence) }
        return .passed
      }
      let format = try options.choice("format", CheckReport.Format.allCases.map { ($0.rawValue, $0) }) ?? .text
      try Output.expect(options.text("output"))
      let target = try Target(options)
      let faults = try Faults(target, options)
      let results = try faults.run()
      target.close()
      let text = faults.written(results, as: format, isVerbose: options.has("verbose"))
      if let path = options.text("output") { try Output.save(Array(text.utf8), to: path) } else { Output.write(text) }
      return results.contains { $0.verdict.isFinding } ? .findings : .passed
    })
}

/// A run over the attacks.
package final class Faults {
  static let all = MessageFaults.all + MemoryFaults.all + RingFaults.all + FloodFaults.all
  package static var ids: [String] { all.map(\.id) }

  private let target: Target
  private let options: Options
  private let interruption: Interruption
  private var device = "unknown"
  /// What the verdicts cannot know here.
  private var caveat = ""

  package init(_ target: Target, _ options: Options) throws(ProbeError) {
    self.target = target
    self.options = options
    interruption = try Interruption()
  }

  package func run() throws(ProbeError) -> [FaultResult] {
    guard target.canReconnect else {
      throw .unsuitable("Every attack needs a connection of its own, and --fd gives only one; use --socket or a command")
    }
    let card = try InfoCard(target, options)
    device = card.guess.device?.name ?? "unknown"
    if card.worksInChild {
      caveat = "It works in a child of the process that was started: a crash of that child shows as an end of the process by itself.\n"
    }
    let context = FaultContext(target, card.guess.device, card.offer)
    let only = options.text("only").map { $0.split(separator: ",").map(String.init) }
    let skip = options.text("skip").map { $0.split(separator: ",").map(String.init) } ?? []
    let isExact = options.has("exact")
    let chosen = Self.all.filter { item in
      (only?.contains { isExact ? item.id == $0 : item.id.hasPrefix($0) } ?? true) && !skip.contains { item.id.hasPrefix($0) }
    }
    guard !chosen.isEmpty else { throw .badOption("only", why: "fits no case; --list shows them") }
    var results: [FaultResult] = []
    for (index, item) in chosen.enumerated() {
      if interruption.isRequested { break }
      Progress.show("\(index + 1)/\(chosen.count) \(item.id)")
      if let result = context.run(item) { results.append(result) }
      if !target.isOurs, case .crashed? = results.last?.verdict { break }
    }
    Progress.clear()
    return results
  }

  package func written(_ results: [FaultResult], as format: CheckReport.Format, isVerbose: Bool) -> String {
    if format == .text { return text(results, isVerbose) }
    let cases = results.map { result in
      CaseResult(
        id: result.id, sentence: result.sentence, section: "",
        verdict: result.verdict.isFinding ? .fail("\(result.verdict.word): \(result.verdict.reason)") : .pass, trace: result.trace,
        duration: result.duration)
    }
    return CheckReport(name: target.name, device: device, results: cases, wasInterrupted: interruption.happened, title: "faults")
      .written(as: format, isVerbose: isVerbose)
  }

  private func text(_ results: [FaultResult], _ isVerbose: Bool) -> String {
    var text = "faults: \(target.name)\ndevice: \(device)\n\(caveat)\n"
    for result in results where isVerbose || result.verdict.isFinding {
      text += result.verdict.word.padded(to: 10) + result.id.padded(to: 44) + result.sentence + "\n"
      if !result.verdict.reason.isEmpty { text += "          \(result.verdict.reason)\n" }
      for line in result.trace.suffix(isVerbose ? 12 : 3) { text += "            \(line)\n" }
    }
    let counts = ["survived", "refused", "HUNG", "CRASHED", "LEAKED"].map { word in
      "\(results.count { $0.verdict.word == word }) \(word.lowercased())"
    }
    return text + counts.joined(separator: ", ") + (interruption.happened ? "; interrupted" : "") + "\n"
  }
}
