// A process that stands above a supervisor and outlives it: its child shares its table of descriptors, so that everything
// that was open when the child is killed still is, under the same numbers.
#ifndef CSANDBOX_KEEPER_H
#define CSANDBOX_KEEPER_H

#include <stddef.h>
#include <stdint.h>

// Zeroed memory that the caller shares with the children it forks from here on; NULL when there is none.
void *csandbox_shared_memory(size_t size);

// clone3(CLONE_FILES) of a process with one thread. In the child, which is killed with the caller: 0. In the caller: the
// child's process id, or -errno.
int csandbox_fork_sharing(void);

// The caller gets the children of its children when these die, and keeps no memory for others to look at.
int csandbox_become_keeper(void);

// Killed when its parent ends, which must be `parent` now; also after a change of ids, which takes that away. 0 or errno.
int csandbox_die_with(int parent);

// Collects a child that has ended: its process id, and how (CLD_..., status). 0: none has. -errno: there is no child.
int csandbox_collect_any(int *code, int *status);

// Becomes the program behind `fd`, with the caller's environment. -errno when that does not work.
int csandbox_become_program(int fd, char *const *arguments);

// Waits for one of SIGCHLD, SIGTERM, SIGINT, SIGHUP and SIGWINCH, which must be blocked; *is_terminal: the kernel sent it, to
// the whole foreground group.
int csandbox_wait_signal(int *is_terminal);

#endif
