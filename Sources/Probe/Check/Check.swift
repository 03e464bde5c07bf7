import ControlProtocol
import Glibc
import HostSystem
import VhostUser
import VirtioSpec

extension Verb {
  /// Whether a back end keeps to the specifications.
  package static let check = Verb(
    name: "check", summary: "conformance: what the specifications promise, case by case",
    notes: "Cases that write to a disk run only with --writes: its content is lost then.",
    options: [
      OptionRow("writes", nil, "also run cases that destroy the disk's content"),
      OptionRow("only", "TEXT", "only cases whose id begins so (commas between several)"),
      OptionRow("skip", "TEXT", "leave out cases whose id begins so (commas between several)"),
      OptionRow("list", nil, "print ids and sentences of all cases, and run nothing"),
      OptionRow("format", "FORMAT", "text, tap, junit or json (default text)"),
      OptionRow("output", "PATH", "write the result to a file"),
      OptionRow("verbose", nil, "in text, also cases that passed"),
    ],
    run: { options throws(ProbeError) in
      if options.has("list") {
        for item in Check.all { Output.line(item.id.padded(to: 32) + item.sentence + " [\(item.section)]") }
        return .passed
      }
      let format = try options.choice("format", CheckReport.Format.allCases.map { ($0.rawValue, $0) }) ?? .text
      try Output.expect(options.text("output"))
      let target = try Target(options)
      let report = try Check(target, options).run()
      target.close()
      let text = report.written(as: format, isVerbose: options.has("verbose"))
      if let path = options.text("output") { try Output.save(Array(text.utf8), to: path) } else { Output.write(text) }
      return report.failures.isEmpty ? .passed : .findings
    })
}

/// A run over the cases.
package struct Check {
  static let all =
    ProtocolCases.all + SessionCases.all + RingCases.all + InflightCases.all + TranslationCases.all + SpecialCases.all + BlockCases.all
    + OtherCases.all + ConsolePortCases.all

  private let target: Target
  private let options: Options
  private let interruption: Interruption

  package init(_ target: Target, _ options: Options) throws(ProbeError) {
    self.target = target
    self.options = options
    interruption = try Interruption()
  }

  /// The ids of every case.
  package static var ids: [String] { all.map(\.id) }

  /// - Parameter endurance: how long a ring is driven round and round at most.
  package func run(endurance: Duration = .seconds(2)) throws(ProbeError) -> CheckReport {
    guard target.canReconnect else {
      throw .unsuitable("Every case needs a connection of its own, and --fd gives only one; use --socket or a command")
    }
    let card = try InfoCard(target, options)
    let context = CheckContext(target, card.guess.device, card.offer, mayWrite: options.has("writes"), endurance: endurance)
    let only = options.text("only").map { $0.split(separator: ",").map(String.init) }
    let skip = options.text("skip").map { $0.split(separator: ",").map(String.init) } ?? []
    let chosen = Self.all.filter { item in
      (only?.contains { item.id.hasPrefix($0) } ?? true) && !skip.contains { item.id.hasPrefix($0) }
    }
    guard !chosen.isEmpty else { throw .badOption("only", why: "fits no case; --list shows them") }
    var results: [CaseResult] = []
    for (index, item) in chosen.enumerated() {
      if interruption.isRequested { break }
      Progress.show("\(index + 1)/\(chosen.count) \(item.id)")
      results.append(context.run(item))
    }
    Progress.clear()
    return CheckReport(
      name: target.name, device: card.guess.device?.name ?? "unknown", results: results, wasInterrupted: interruption.happened,
      title: "check")
  }
}
