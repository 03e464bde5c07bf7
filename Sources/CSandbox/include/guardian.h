// A process that outlives its parent by a moment, to take away what the parent could not any more.
#ifndef CSANDBOX_GUARDIAN_H
#define CSANDBOX_GUARDIAN_H

#include <stdint.h>
#include <termios.h>

// What the parent writes into the guardian's pipe for every socket file it has made.
struct csandbox_guarded {
  uint64_t device;
  uint64_t inode;
  char path[108];
};

// Forks the guardian. It holds a pipe and, with terminal >= 0, that descriptor and its settings, nothing else. When the
// writing end of the pipe is closed - the parent is dead, however it died - it unlinks the files it was told of, as long
// as they are the same files, puts the terminal right and exits. The parent that cleans up itself kills it before.
// Returns the process id; pidfd and the pipe's writing end are stored, close-on-exec. -errno when there is none.
int csandbox_start_guardian(const char *title, int terminal, const struct termios *settings, int *pidfd, int *pipe);

#endif
