import Glibc
import NetDevice

exit(NetProgram.run(CommandLine.arguments))
