// A process that outlives its parent by a moment, to take away what the parent may not, or cannot any more.
#ifndef CSANDBOX_GUARDIAN_H
#define CSANDBOX_GUARDIAN_H

#include <stdint.h>
#include <termios.h>

// What the parent writes into the guardian's pipe for every socket file it has made. One with an empty path ends the list:
// nothing that comes after it is looked at.
struct csandbox_guarded {
  uint64_t device;
  uint64_t inode;
  char path[108];
};

struct csandbox_guardian {
  const char *title;
  // The terminal whose settings are put back, or -1.
  int terminal;
  const struct termios *settings;
  // struct sock_filter: the calls it is left with; NULL: all.
  const void *filter;
  unsigned short filter_length;
  // NULL: there are none.
  const struct csandbox_guarded_groups *groups;
  // Gives up all capabilities but those it needs to unlink.
  int drops_privileges;
  // Its parent is the caller's parent.
  int is_sibling;
};

// The control groups it takes away. The descriptors are of directories and files that were opened for it; -1: there is none.
struct csandbox_guarded_groups {
  // The VM's directory, its cgroup.kill and its parent.
  int directory;
  int kill;
  int parent;
  // The parent's cgroup.subtree_control and cgroup.procs, where the guardian itself has to leave a group.
  int control;
  int members;
  // In the parent.
  const char *name;
  const char *own_name;
};

// Forks the guardian. It holds a pipe and, with terminal >= 0, that descriptor and its settings, and those of the groups, nothing else. When the
// writing end of the pipe is closed - by the parent at its end, or because the parent is dead, however it died - it
// unlinks the files it was told of, as long as they are the same files, ends what still runs in the control groups, takes
// these away, puts the terminal right and exits.
// Returns the process id; pidfd and the pipe's writing end are stored, close-on-exec. -errno when there is none.
int csandbox_start_guardian(const struct csandbox_guardian *guardian, int *pidfd, int *pipe);

#endif
