import Glibc
import Probe

exit(ProbeProgram.run(CommandLine.arguments))
