import CLinux
import HostSystem

/// The second half of the walls: what a program does itself, before it touches anything of its peers.
package enum ProcessWalls {
  /// First thing in a process of a VM. After this the program's arguments must not be read again: the title stands there.
  /// - Parameter title: `vm/NAME/ID`; nil for a program started by hand, which keeps its arguments.
  package static func raise(title: String?) throws(SandboxError) {
    // PR_SET_DUMPABLE: no core file, no ptrace by the same uid, /proc/PID owned by root.
    let result = clinux_prctl(4, 0, 0, 0, 0)
    if result < 0 { throw .step(.undumpable, program: title ?? "the program", Errno(-result)) }
    if let title { setTitle(title) }
  }

  /// Shows `title` in ps; also the speaker of the process's log lines.
  package static func setTitle(_ title: String) {
    // SAFETY: the text is a NUL-terminated copy that lives for the call.
    _ = unsafe clinux_set_title(title)
    Log.setSpeaker(title)
  }
}
