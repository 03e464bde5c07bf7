import ControlProtocol
import Glibc
import HostSystem

let runVerb = Verb(
  name: "run", usage: "martlet run --kernel PATH [OPTION ...]", summary: "run a virtual machine",
  help: {
    HelpText.render(
      usage: "usage: martlet run --kernel PATH [OPTION ...]",
      intro: "Runs a virtual machine until the guest powers off. Values are written --option VALUE or --option=VALUE;\n"
        + "several values may follow an option that may stand often. Sizes take K, M, G or T. \"Quotes\" and\n"
        + "[brackets] protect commas.",
      table: VMConfiguration.optionTable) + "\nExit codes:\n"
      + ExitCode.table.map { HelpText.line("  \($0.code)", $0.meaning) }.joined()
  },
  run: { arguments in
    // The supervisor checks the options, before it does anything else: checking them here too would only take time.
    do throws(SystemError) {
      let path = try OwnProgram.directory() + "/martlet-supervisor"
      throw SystemError("start \(path)", become(path, ["martlet-supervisor"] + arguments))
    } catch {
      Log.error("\(error.description); install all of Martlet's programs together")
      return .host
    }
  })

/// `execv`: this process becomes the program, so no second process stays behind. Returns only when it failed.
func become(_ path: String, _ arguments: [String]) -> Errno {
  // SAFETY: the vector lives for the call.
  unsafe ArgumentVector.lend(arguments) { vector in
    if let vector = unsafe vector { _ = unsafe execv(path, vector) }
    return Errno(errno)
  }
}
