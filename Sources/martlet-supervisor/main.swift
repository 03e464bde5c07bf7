import ControlProtocol
import Glibc
import HostSystem
import Supervision

exit(Supervisor.main(Array(CommandLine.arguments.dropFirst())).rawValue)
