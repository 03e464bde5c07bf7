import ControlProtocol
import Glibc
import HostSystem
import Supervision

exit(Supervisor.main(Array(OwnProgram.arguments.dropFirst())).rawValue)
