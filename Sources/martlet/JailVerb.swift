import ControlProtocol
import Glibc
import HostSystem

/// `martlet jail`: the program beside this one does it all, its help included.
let jailVerb = Verb(
  name: "jail", usage: "martlet jail --profile FILE -- PROGRAM ...", summary: "run somebody else's back end behind the same walls",
  help: { "" }, readsHelpItself: true,
  run: { arguments in
    do throws(SystemError) {
      let path = try OwnProgram.directory() + "/martlet-jail"
      throw SystemError("start \(path)", become(path, ["martlet-jail"] + arguments))
    } catch {
      Log.error("\(error.description); install all of Martlet's programs together")
      // As every failure of the jail's own.
      return ExitCode(rawValue: 125)
    }
  })
