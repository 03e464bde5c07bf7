import ConsoleDevice
import Glibc

exit(ConsoleProgram.run(CommandLine.arguments))
