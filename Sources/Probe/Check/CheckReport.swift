import ControlProtocol
import HostSystem

/// Results of a run over cases, in the forms that people and machines read.
package struct CheckReport: Sendable {
  package enum Format: String, CaseIterable, Sendable { case text, tap, junit, json }

  package let name: String
  package let device: String
  package let results: [CaseResult]
  package let wasInterrupted: Bool
  package let title: String

  package var failures: [CaseResult] {
    results.filter { if case .fail = $0.verdict { true } else { false } }
  }

  func count(_ word: String) -> Int { results.count { $0.verdict.word == word } }

  package func written(as format: Format, isVerbose: Bool) -> String {
    switch format {
    case .text: text(isVerbose)
    case .tap: tap
    case .junit: junit
    case .json: json.text + "\n"
    }
  }

  private func text(_ isVerbose: Bool) -> String {
    var text = "\(title): \(name)\ndevice: \(device)\n\n"
    for result in results {
      var isShown = isVerbose
      if case .fail = result.verdict { isShown = true }
      guard isShown else { continue }
      text += result.verdict.word.padded(to: 15) + result.id.padded(to: 30) + result.sentence + "\n"
      guard !result.verdict.reason.isEmpty else { continue }
      text += "               \(result.verdict.reason)" + (result.section.isEmpty ? "" : " [\(result.section)]") + "\n"
      for line in result.trace.suffix(isVerbose ? 12 : 4) { text += "                 \(line)\n" }
    }
    text +=
      "\(count("pass")) passed, \(count("FAIL")) failed, \(count("not offered")) not offered, \(count("not applicable")) not applicable"
    return text + (wasInterrupted ? "; interrupted" : "") + "\n"
  }

  private var tap: String {
    var text = "TAP version 13\n1..\(results.count)\n"
    for (index, result) in results.enumerated() {
      var isFailure = false
      if case .fail = result.verdict { isFailure = true }
      text += "\(isFailure ? "not ok" : "ok") \(index + 1) - \(result.id) \(result.sentence.replacing("#", with: "\\#"))"
      switch result.verdict {
      case .notOffered(let why): text += " # SKIP not offered: \(why)"
      case .notApplicable(let why): text += " # SKIP not applicable: \(why)"
      default: break
      }
      text += "\n"
      if isFailure {
        text += "  ---\n  message: \(JSONValue.string(result.verdict.reason).text)\n  section: \(JSONValue.string(result.section).text)\n"
        text += "  trace:\n" + result.trace.map { "    - \(JSONValue.string($0).text)\n" }.joined() + "  ...\n"
      }
    }
    return text + (wasInterrupted ? "Bail out! interrupted\n" : "")
  }

  private static func escaped(_ text: String) -> String {
    var result = ""
    for scalar in text.unicodeScalars {
      switch scalar {
      case "&": result += "&amp;"
      case "<": result += "&lt;"
      case ">": result += "&gt;"
      case "\"": result += "&quot;"
      default: if scalar.value >= 0x20 || scalar == "\n" { result.unicodeScalars.append(scalar) } else { result += "?" }
      }
    }
    return result
  }

  private var junit: String {
    let skipped = count("not offered") + count("not applicable")
    let seconds = results.reduce(0.0) { $0 + Double($1.duration.nanoseconds) / 1e9 }
    var text =
      "<?xml version=\"1.0\" encoding=\"UTF-8\"?>\n<testsuite name=\"\(Self.escaped(title + ": " + name))\" tests=\"\(results.count)\" failures=\"\(failures.count)\" errors=\"0\" skipped=\"\(skipped)\" time=\"\(decimal(seconds, 3))\">\n"
    for result in results {
      let group = result.id.split(separator: ".").first.map(String.init) ?? result.id
      text +=
        "  <testcase classname=\"\(Self.escaped(device + "." + group))\" name=\"\(Self.escaped(result.id + ": " + result.sentence))\" time=\"\(decimal(Double(result.duration.nanoseconds) / 1e9, 3))\""
      switch result.verdict {
      case .pass: text += "/>\n"
      case .fail(let why):
        text +=
          ">\n    <failure message=\"\(Self.escaped(why))\">\(Self.escaped(([result.section] + result.trace).joined(separator: "\n")))</failure>\n  </testcase>\n"
      case .notOffered(let why): text += ">\n    <skipped message=\"not offered: \(Self.escaped(why))\"/>\n  </testcase>\n"
      case .notApplicable(let why): text += ">\n    <skipped message=\"not applicable: \(Self.escaped(why))\"/>\n  </testcase>\n"
      }
    }
    return text + "</testsuite>\n"
  }

  private var json: JSONValue {
    .record([
      "back_end": .string(name), "device": .string(device), "interrupted": .bool(wasInterrupted),
      "summary": .record([
        "pass": .unsigned(UInt64(count("pass"))), "fail": .unsigned(UInt64(count("FAIL"))),
        "not_offered": .unsigned(UInt64(count("not offered"))), "not_applicable": .unsigned(UInt64(count("not applicable"))),
      ]),
      "cases": .array(
        results.map { result in
          .record([
            "id": .string(result.id), "sentence": .string(result.sentence), "section": .string(result.section),
            "verdict": .string(result.verdict.word.lowercased()), "reason": .string(result.verdict.reason),
            "trace": .array(result.trace.map { .string($0) }), "ms": .number(Double(result.duration.nanoseconds) / 1e6),
          ])
        }),
    ])
  }
}
