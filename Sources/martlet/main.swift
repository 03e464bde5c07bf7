import ControlProtocol
import Glibc

exit(Verb.main(Array(CommandLine.arguments.dropFirst())).rawValue)
