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
  let text = arguments.flatMap { Array($0.utf8CString) }
  // SAFETY: all arguments stand NUL-terminated one behind the other in `text`, which lives for the call.
  return unsafe text.withUnsafeBufferPointer { bytes in
    var pointers: [UnsafeMutablePointer<CChar>?] = unsafe []
    var offset = 0
    for argument in arguments {
      unsafe pointers.append(bytes.baseAddress.map { unsafe UnsafeMutablePointer(mutating: $0 + offset) })
      offset += argument.utf8.count + 1
    }
    unsafe pointers.append(nil)
    _ = unsafe execv(path, &pointers)
    return Errno(errno)
  }
}
