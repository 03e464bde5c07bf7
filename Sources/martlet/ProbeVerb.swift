import ControlProtocol
import Glibc
import HostSystem

/// `martlet probe`: the program beside this one does it all, its help included.
let probeVerb = Verb(
  name: "probe", usage: "martlet probe VERB [OPTION ...]", summary: "test and measure a vhost-user back end, without a VM",
  help: { "" }, readsHelpItself: true,
  run: { arguments in
    do throws(SystemError) {
      let path = try OwnProgram.directory() + "/martlet-probe"
      throw SystemError("start \(path)", become(path, ["martlet-probe"] + arguments))
    } catch {
      Log.error("\(error.description); install all of Martlet's programs together")
      return .host
    }
  })
