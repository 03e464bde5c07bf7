/// The steps from fork to service, in their order. The order is not free: each case says why it stands where it does.
/// Those up to `exec` run in the child of the launcher, the others in the new program.
package enum Stage: Int32, CaseIterable, Sendable {
  /// `clone3(CLONE_PIDFD)`: the pid is never without its pidfd. Place for `CLONE_NEWPID`, `NEWNS`, `NEWNET`, `NEWIPC`,
  /// `NEWUTS`, `NEWCGROUP`, `CLONE_INTO_CGROUP` (and `NEWUSER` when the launcher is not root).
  case fork = 1
  /// `setsid`: no signals from somebody's terminal.
  case session
  /// Dispositions and mask at their defaults; exec would keep ignored ones.
  case signals
  /// The agreed descriptors at the agreed numbers, `close_range` for all others: before a later step can leak one.
  case descriptors
  /// `chdir("/")`. Place for the empty root: private mounts, tmpfs, `pivot_root`, detach. Needs CAP_SYS_ADMIN and must
  /// come before Landlock, which forbids mounting.
  case directory
  /// Resource limits: core 0, message queues 0, descriptors.
  case limits
  /// Bounding set (needs CAP_SETPCAP, so before the uid goes), ambient set, groups, gid, uid in this order: libcap-ng.
  case identity
  /// No capability left, ids as asked for, and root cannot be had back.
  case verification
  /// `PR_SET_NO_NEW_PRIVS`: wanted by Landlock and seccomp without capabilities.
  case noNewPrivileges
  /// `PR_SET_PDEATHSIG`: a change of ids clears it, exec without set-user-ID does not.
  case parentDeath
  /// `execveat` of an open descriptor: fresh address layout, no path walked.
  case exec
  /// `PR_SET_DUMPABLE` 0 (exec sets it back to 1) and the process title.
  case undumpable
  /// Place for the wide work of start-up: memory mapped, rings made and restricted, threads started; then the barrier
  /// at which every thread has said that it is ready.
  case acquisition
  /// Place for Landlock: before the last filter, so that the filter need not allow its system calls.
  case landlock
  /// Place for seccomp with `TSYNC` on all threads: last.
  case systemCallFilter

  /// What was being done, for "Cannot ... in the new process".
  package var action: String {
    switch self {
    case .fork: "start a process"
    case .session: "start a session"
    case .signals: "reset signals"
    case .descriptors: "arrange descriptors"
    case .directory: "enter the root directory"
    case .limits: "set resource limits"
    case .identity: "give up privileges"
    case .verification: "verify that privileges are gone"
    case .noNewPrivileges: "refuse new privileges"
    case .parentDeath: "bind its life to the supervisor's"
    case .exec: "execute the program"
    case .undumpable: "forbid memory dumps"
    case .acquisition: "acquire its resources"
    case .landlock: "restrict access by Landlock"
    case .systemCallFilter: "filter system calls"
    }
  }
}
