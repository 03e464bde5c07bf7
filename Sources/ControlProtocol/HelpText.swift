/// Renders an option table as the text that `--help` prints.
package enum HelpText {
  static let column = 30

  package static func render<Draft>(usage: String, intro: String, table: OptionTable<Draft>) -> String {
    var text = "\(usage)\n\n\(intro)\n"
    var group = ""
    for option in table.options {
      if option.group != group {
        group = option.group
        text += "\n\(group):\n"
      }
      text += line("  --\(option.name) \(shape(option.shape))", option.summary + many(option))
      if case .list(let keys, let words) = option.shape {
        for word in words { text += line("      \(word.name)", word.summary) }
        for key in keys { text += line("      \(key.name)=\(key.value)", key.summary + (key.required ? " (needed)" : "")) }
      }
    }
    return text
  }

  private static func many<Draft>(_ option: OptionDescription<Draft>) -> String {
    option.occurrence == .many ? "; may stand often" : ""
  }

  private static func shape<Draft>(_ shape: OptionDescription<Draft>.Shape) -> String {
    switch shape {
    case .none: ""
    case .text(let name): name
    case .list(_, let words): words.isEmpty ? "KEY=VALUE,..." : "WORD|KEY=VALUE"
    }
  }

  package static func line(_ left: String, _ right: String) -> String {
    if left.utf8.count >= column { return "\(left)\n\(String(repeating: " ", count: column + 2))\(right)\n" }
    return left + String(repeating: " ", count: column + 2 - left.utf8.count) + right + "\n"
  }
}
