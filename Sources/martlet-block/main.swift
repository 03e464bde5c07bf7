import BlockDevice
import Glibc
import HostSystem

exit(BlockProgram.run(OwnProgram.arguments))
