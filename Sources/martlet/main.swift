import CRun
import ControlProtocol
import Glibc

crun_is_linked()
exit(Verb.main(Array(CommandLine.arguments.dropFirst())).rawValue)
