// The walls around the supervisor itself, which nobody started from outside: it gives up what its work so far needed.
#ifndef CSANDBOX_CONFINE_H
#define CSANDBOX_CONFINE_H

#include <stdint.h>

struct csandbox_confinement {
  // CLONE_NEW... without CLONE_NEWPID, which would only be of its children's; as in struct csandbox_launch.
  uint64_t namespaces;
  // With change_identity: all three uids, all three gids, no supplementary groups.
  int change_identity;
  uint32_t uid;
  uint32_t gid;
  // Bits 1 << CAP_...: kept in all sets, ambient included, so that they outlive exec; nothing else is, in any set.
  uint64_t capabilities;
  // RLIMIT_NOFILE, soft and hard.
  uint64_t file_limit;
};

// For a process with one thread. 0, or errno; *step is then the step (enum csandbox_step) that failed. Afterwards: an empty
// read-only root, no process can be started (RLIMIT_NPROC 1: with 0 there is no exec after a change of ids), no_new_privs, not dumpable.
int csandbox_confine(const struct csandbox_confinement *confinement, int *step);

// fork(2) for a process with one thread, to do later what the parent will not be allowed to. In the child: title, signals
// blocked, killed with the parent, no_new_privs, not dumpable, no descriptor but `kept` (ascending); returns 0. In the
// parent the child's process id, or -errno. A sibling is the child of the caller's parent, and killed with that.
int csandbox_fork_helper(const char *title, const int *kept, int count, int is_sibling);

// Such a process ends by itself when the caller is gone, and is not killed then: it has something to put right first.
void csandbox_outlive(void);

// Steps shared with the launch (launch.c): 0 or errno.
int csandbox_map_user(uint32_t uid, uint32_t gid);
int csandbox_enter_empty_root(void);
int csandbox_set_limit(int resource, uint64_t value);
int csandbox_has_capability(int number);

#endif
