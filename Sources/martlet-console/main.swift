import ConsoleDevice
import Glibc
import HostSystem

exit(ConsoleProgram.run(OwnProgram.arguments))
