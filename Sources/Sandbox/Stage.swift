/// The steps from fork to service, in their order. The order is not free: each case says why it stands where it does.
/// Those up to `exec` run in the child of the launcher, the others in the new program.
package enum Stage: Int32, CaseIterable, Sendable {
  /// `clone3(CLONE_PIDFD)`: the pid is never without its pidfd. With its own pid, mount, net, ipc, uts and cgroup
  /// namespaces, and a user namespace when the launcher is not root.
  case fork = 1
  /// `setsid`: no signals from somebody's terminal.
  case session
  /// Dispositions and mask at their defaults; exec would keep ignored ones.
  case signals
  /// The agreed descriptors at the agreed numbers, `close_range` for all others: before a later step can leak one.
  case descriptors
  /// In a user namespace: the one mapped uid and gid, groups fixed. Needs /proc, so before the root goes.
  case userMap
  /// The empty root: mounts made private, a read-only tmpfs of one page, `pivot_root`, detach. Needs CAP_SYS_ADMIN and must
  /// come before Landlock, which forbids mounting. Without a mount namespace just `chdir("/")`.
  case directory
  /// A host name that says nothing about the host.
  case hostName
  /// Resource limits: core 0, message queues 0, real-time priority 0, descriptors, threads.
  case limits
  /// uid 0 without privileges and no ambient capabilities, locked: `PR_SET_SECUREBITS`. Needs CAP_SETPCAP.
  case secureBits
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
  /// Landlock without a single right: after everything that is opened by path (by hand only: a supervised process gets
  /// descriptors) and before any thread exists, because threads inherit it and it cannot be spread to those that live.
  case landlock
  /// The wide work of start-up: rings made and restricted, threads started; then the barrier at which every thread has
  /// said that it is ready. A thread killed in the midst of glibc's own start is what the barrier prevents.
  case acquisition
  /// seccomp on all threads: last.
  case systemCallFilter
  /// For somebody else's program (`martlet jail`), before exec, because it does not wall itself in: Landlock with the rights
  /// of its profile, then the filter of its profile, which lets this one exec pass.
  case restriction

  /// What was being done, for "Cannot ... in the new process".
  package var action: String {
    switch self {
    case .fork: "start a process"
    case .session: "start a session"
    case .signals: "reset signals"
    case .descriptors: "arrange descriptors"
    case .userMap: "map the user"
    case .directory: "enter an empty root directory"
    case .hostName: "set the host name"
    case .limits: "set resource limits"
    case .secureBits: "lock the rules for uid 0"
    case .identity: "give up privileges"
    case .verification: "verify that privileges are gone"
    case .noNewPrivileges: "refuse new privileges"
    case .parentDeath: "bind its life to the supervisor's"
    case .exec: "execute the program"
    case .undumpable: "forbid memory dumps"
    case .acquisition: "acquire its resources"
    case .landlock: "restrict access by Landlock"
    case .systemCallFilter: "filter system calls"
    case .restriction: "restrict files and system calls"
    }
  }
}
