// From fork to exec: what happens in a new process before its own program runs. This stretch is C because nothing may
// allocate, take a lock or call into the Swift runtime between fork and exec.
#ifndef CSANDBOX_H
#define CSANDBOX_H

#include <stdint.h>

#include "jail.h"

// In the order in which they are done; the order is explained in Sandbox/Stage.swift. The numbers are reported.
enum csandbox_step {
  CSANDBOX_FORK = 1,
  CSANDBOX_SESSION,
  CSANDBOX_SIGNALS,
  CSANDBOX_DESCRIPTORS,
  CSANDBOX_USER_MAP,
  CSANDBOX_DIRECTORY,
  CSANDBOX_HOST_NAME,
  CSANDBOX_LIMITS,
  CSANDBOX_SECURE_BITS,
  CSANDBOX_IDENTITY,
  CSANDBOX_VERIFICATION,
  CSANDBOX_NO_NEW_PRIVILEGES,
  CSANDBOX_PARENT_DEATH,
  CSANDBOX_EXEC,
  // Only with a jail, before exec: Landlock, then the filter.
  CSANDBOX_RESTRICTION = 19,
};

struct csandbox_launch {
  // The program, opened with O_PATH or O_RDONLY: no path is walked in the child.
  int executable;
  // NULL-terminated. The environment is empty.
  char *const *arguments;
  // descriptors[i] becomes number i, -1 leaves number i closed; everything else is closed.
  const int *descriptors;
  int descriptor_count;
  // With change_identity: all three uids, all three gids, no supplementary groups, empty bounding set.
  int change_identity;
  uint32_t uid;
  uint32_t gid;
  // RLIMIT_NOFILE, soft and hard.
  uint64_t file_limit;
  // RLIMIT_NPROC, soft and hard; 0: as it is. Counts all of the uid's threads, so only for a uid or user namespace of its own.
  uint64_t process_limit;
  // CLONE_NEW... of linux/sched.h. With CLONE_NEWUSER the launcher's ids are mapped to themselves and nothing else is;
  // with CLONE_NEWNS the child gets an empty read-only root; with CLONE_NEWUTS a host name that says nothing. With
  // CLONE_PARENT beside them the new process is the caller's sibling: its parent is the caller's.
  uint64_t namespaces;
  // Sent to the child when the launching thread ends.
  int parent_death_signal;
  // Directory of the control group that the child is born in, or -1.
  int group;
  // For somebody else's program: what it sees and keeps, and its filter. NULL: nothing, and an empty root.
  const struct csandbox_jail *jail;
  // Without a jail: struct sock_filter, installed before exec, and the sixth argument of execveat that it wants; NULL: none.
  const void *filter;
  unsigned short filter_length;
  uint64_t cookie;
  // One that stands where the caller stands: descriptors are arranged and the parent-death signal is set; identity, rights,
  // root, directory, limits and environment stay the caller's.
  int is_helper;
};

// What the child writes to the report pipe when a step fails. Nothing is written when exec succeeds: the pipe just ends.
struct csandbox_report {
  int32_t step;
  int32_t error;
  // The place of the jail concerned, or -1.
  int32_t detail;
};

// clone3(CLONE_PIDFD). Returns the process id; the pidfd and the reading end of the report pipe are stored and owned by
// the caller, both close-on-exec. -errno when there is no child.
// With executable < 0 nothing is executed: the child exits with 0 when every step before has worked.
int csandbox_start(const struct csandbox_launch *launch, int *pidfd, int *report);

#endif
