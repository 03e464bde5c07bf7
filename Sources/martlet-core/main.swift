import Glibc
import HostSystem
import Monitor

exit(CoreProgram.run(OwnProgram.arguments))
