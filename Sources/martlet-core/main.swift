import Glibc
import Monitor

exit(CoreProgram.run(CommandLine.arguments))
