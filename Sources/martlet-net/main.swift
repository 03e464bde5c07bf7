import Glibc
import HostSystem
import NetDevice

exit(NetProgram.run(OwnProgram.arguments))
