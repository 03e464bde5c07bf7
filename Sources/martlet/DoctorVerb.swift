import ControlProtocol
import HostSystem

let doctorVerb = Verb(
  name: "doctor", usage: "martlet doctor [--json]", summary: "say whether this host can run guests, and with what",
  help: {
    "usage: martlet doctor [--json]\n\nLooks at what this host offers and tries in a small guest the instructions "
      + "that a kernel needs.\n\n" + "Options:\n" + HelpText.line("  --json", "print the findings as one JSON object")
      + "\nExit codes: 0 stock guests run here, 1 they do not, 2 wrong command line.\n"
  },
  run: { arguments in
    var isJSON = false
    for argument in arguments {
      guard argument == "--json", !isJSON else {
        Log.error("Argument '\(argument)' is not understood; martlet doctor --help tells more")
        return .usage
      }
      isJSON = true
    }
    let findings = Doctor.examine()
    Output.standard.write(isJSON ? Doctor.json(findings).text + "\n" : Doctor.text(findings))
    return Doctor.isHealthy(findings) ? .success : ExitCode(rawValue: 1)
  })

/// One thing about this host.
struct Finding: Sendable {
  enum Status: String, Sendable {
    case good = "ok"
    /// Guests run without it; something is slower or less protected.
    case limited
    /// Without it no stock guest runs.
    case missing
  }

  let name: String
  let status: Status
  let text: String
  /// What to do about it; empty when nothing need be done.
  let remedy: String

  init(_ name: String, _ status: Status, _ text: String, remedy: String = "") {
    self.name = name
    self.status = status
    self.text = text
    self.remedy = remedy
  }
}

enum Doctor {
  static func examine() -> [Finding] {
    KVMExamination.findings() + [
      HostExamination.identities(), HostExamination.landlock(), HostExamination.asynchronousIO(),
      HostExamination.userNamespaces(), HostExamination.controlGroups(), HostExamination.hugePages(), HostExamination.tun(),
    ]
  }

  static func isHealthy(_ findings: [Finding]) -> Bool { !findings.contains { $0.status == .missing } }

  static func text(_ findings: [Finding]) -> String {
    let width = findings.map(\.name.count).max() ?? 0
    var text = ""
    for finding in findings {
      let mark = finding.status == .good ? "ok     " : finding.status == .limited ? "limited" : "MISSING"
      text += "\(mark)  \(finding.name)\(String(repeating: " ", count: width - finding.name.count))  \(finding.text)\n"
      if !finding.remedy.isEmpty { text += String(repeating: " ", count: width + 11) + "-> \(finding.remedy)\n" }
    }
    return text + (isHealthy(findings) ? "Stock guests run here.\n" : "Stock guests do not run here.\n")
  }

  static func json(_ findings: [Finding]) -> JSONValue {
    .record([
      "ok": .bool(isHealthy(findings)),
      "findings": .array(
        findings.map {
          .record([
            "name": .string($0.name), "status": .string($0.status.rawValue), "text": .string($0.text),
            "remedy": .string($0.remedy),
          ])
        }),
    ])
  }
}
