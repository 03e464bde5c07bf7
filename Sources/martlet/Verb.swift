import ControlProtocol
import HostSystem

/// One thing that `martlet` can do.
struct Verb: Sendable {
  let name: String
  let usage: String
  let summary: String
  /// The whole text of `martlet NAME --help`.
  let help: @Sendable () -> String
  /// Whether `--help` behind the verb is passed on to it.
  var readsHelpItself = false
  let run: @Sendable ([String]) -> ExitCode

  static let version = "0.1.0"

  static let table: [Verb] = [runVerb, controlVerb, doctorVerb, probeVerb, jailVerb]

  static func main(_ arguments: [String]) -> ExitCode {
    Log.setSpeaker("martlet")
    guard let name = arguments.first else {
      Output.error.write(overview)
      return .usage
    }
    let rest = Array(arguments.dropFirst())
    switch name {
    case "--help", "-h", "help":
      Output.standard.write(overview)
      return .success
    case "--version", "-V":
      Output.standard.write("martlet \(version)\n")
      return .success
    default: break
    }
    guard let verb = table.first(where: { $0.name == name }) else {
      let near = EditDistance.nearest(to: name, in: table.map(\.name))
      Log.error("Unknown command '\(name)'; \(near.map { "did you mean martlet \($0)?" } ?? "martlet --help lists the commands")")
      return .usage
    }
    if !verb.readsHelpItself, rest.contains("--help") || rest.contains("-h") {
      Output.standard.write(verb.help())
      return .success
    }
    return verb.run(rest)
  }

  private static var overview: String {
    var text = "usage: martlet COMMAND ...\n\nVirtual machines with every device in a process of its own.\n\nCommands:\n"
    for verb in table { text += HelpText.line("  \(verb.name)", verb.summary) }
    text += HelpText.line("  --version", "print the version")
    return text + "\nmartlet COMMAND --help tells more.\n"
  }
}
