import Glibc
import HostSystem
import Supervision

exit(JailProgram.main(Array(OwnProgram.arguments.dropFirst())))
