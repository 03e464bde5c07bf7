import Glibc
import HostSystem

exit(Entropy.program.run(OwnProgram.arguments, serving: Entropy.make))
