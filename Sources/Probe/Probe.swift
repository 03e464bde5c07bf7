// Probe: tests and measures any vhost-user back end, without a guest. It is a front end with memory and rings of its own:
// no KVM, no root, no huge pages.
//
// Each verb is a room of its own: `Info`, `Check`, `Faults`, `Verify`, `Bench`, `Bridge`, `Record` (with replay). They share how a back end is reached
// (`Target`), the conversation (`Link`), memory and rings (`Arena`, `ProbeRing`) and the way findings are told.
//
// This is a tool, not a server: it waits, it allocates, and it ends with an exit code: 0 all passed, 1 findings,
// 2 could not run.
//
//     martlet probe info --socket /run/vhost.sock
//     martlet probe bench --rw randread --iodepth 32 -- martlet-block --socket-path {socket} --blk-file disk.img

import Glibc
import HostSystem

/// The program.
package enum ProbeProgram {
  package static let verbs: [Verb] = [.info, .check, .faults, .verify, .bench, .bridge, .record, .replay, .decode]

  /// Runs the program with the process's arguments; returns its exit code.
  package static func run(_ arguments: [String]) -> CInt {
    Log.setSpeaker("martlet probe")
    Signals.ignoreBrokenPipes()
    do throws(ProbeError) {
      return try dispatch(Array(arguments.dropFirst())).rawValue
    } catch {
      Output.error("martlet probe: \(error)")
      return Outcome.couldNotRun.rawValue
    }
  }

  private static func dispatch(_ arguments: [String]) throws(ProbeError) -> Outcome {
    guard let name = arguments.first else {
      Output.error(overview)
      return .couldNotRun
    }
    if name == "--help" || name == "-h" || name == "help" {
      Output.write(overview + "\n")
      return .passed
    }
    guard let verb = verbs.first(where: { $0.name == name }) else {
      throw .unknownVerb(name, nearest: Words.nearest(to: name, in: verbs.map(\.name)))
    }
    let rest = Array(arguments.dropFirst())
    if rest.prefix(while: { $0 != "--" }).contains(where: { $0 == "--help" || $0 == "-h" }) {
      Output.write(verb.help)
      return .passed
    }
    let options = try Options.parse(rest, verb: verb)
    return try verb.run(options)
  }

  private static var overview: String {
    var text = "usage: martlet probe VERB [OPTIONS] (--socket PATH | --fd NUMBER | -- COMMAND ...)\n\n"
    text += "Tests and measures a vhost-user back end, without a guest.\n\n"
    for verb in verbs { text += "  " + verb.name.padded(to: 10) + verb.summary + "\n" }
    return text + "\nIn COMMAND, {socket} stands for the path it is to listen on, {fd} for a connected socket.\n"
      + "martlet probe VERB --help tells more. Exit code: 0 all passed, 1 findings, 2 could not run."
  }
}

/// How a run ended; the exit code.
package enum Outcome: CInt, Sendable {
  case passed = 0
  case findings = 1
  case couldNotRun = 2
}

/// One thing the program can do.
package struct Verb: Sendable {
  package let name: String
  package let summary: String
  /// Paragraphs after the options in the help text.
  package var notes = ""
  /// Whether it needs a back end at all.
  package var reachesBackEnd = true
  package let options: [OptionRow]
  package let run: @Sendable (Options) throws(ProbeError) -> Outcome

  /// Every option it takes.
  var known: [OptionRow] { (reachesBackEnd ? Options.common : []) + options }

  var help: String {
    var text = "usage: martlet probe \(name) [OPTIONS]" + (reachesBackEnd ? " (--socket PATH | --fd NUMBER | -- COMMAND ...)" : "")
    text += "\n\n\(summary)\n\n"
    for option in known {
      let left = "  --\(option.name)" + (option.argument.map { " " + $0 } ?? "")
      text += left.utf8.count > 28 ? left + "\n" + String(repeating: " ", count: 30) : left.padded(to: 30)
      text += option.help + "\n"
    }
    return text + (notes.isEmpty ? "" : "\n\(notes)\n")
  }
}
