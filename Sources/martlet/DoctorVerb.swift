import ControlProtocol
import HostSystem

let doctorVerb = Verb(
  name: "doctor", usage: "martlet doctor [--json]", summary: "say whether this host can run guests, and with what",
  help: {
    "usage: martlet doctor [--json]\n\nLooks at what this host offers and runs a few instructions in a guest.\n\n"
      + "Exit codes: 0 stock guests run, 1 they do not, 2 wrong command line.\n"
  },
  run: { arguments in
    return .defect
  })
