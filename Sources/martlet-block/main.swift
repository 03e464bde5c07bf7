import BlockDevice
import Glibc

exit(BlockProgram.run(CommandLine.arguments))
