#define _GNU_SOURCE
#include "guardian.h"

#include <clinux_title.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/close_range.h>
#include <linux/sched.h>
#include <signal.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

enum { most_files = 16 };

static void guard(const char *title, int pipe, int terminal, const struct termios *settings) __attribute__((noreturn));

static void guard(const char *title, int pipe, int terminal, const struct termios *settings) {
  sigset_t all;
  sigfillset(&all);
  sigprocmask(SIG_SETMASK, &all, NULL);
  setsid();
  clinux_set_title(title);
  // 0 becomes the pipe, 1 the terminal; everything else goes, so that nobody waits for an end of file on our account.
  int high_pipe = fcntl(pipe, F_DUPFD, 3);
  int high_terminal = terminal >= 0 ? fcntl(terminal, F_DUPFD, 3) : -1;
  if (high_pipe < 0 || dup2(high_pipe, 0) < 0) _exit(1);
  unsigned first_closed = 1;
  if (high_terminal >= 0 && dup2(high_terminal, 1) == 1) first_closed = 2;
  syscall(SYS_close_range, first_closed, ~0u, 0);

  struct csandbox_guarded files[most_files];
  int count = 0;
  for (;;) {
    struct csandbox_guarded file; // shorter than PIPE_BUF: written and read in one piece
    ssize_t got = read(0, &file, sizeof file);
    if (got < 0 && errno == EINTR) continue;
    if (got != (ssize_t)sizeof file) break;
    file.path[sizeof file.path - 1] = 0;
    if (count < most_files) files[count++] = file;
  }
  for (int i = 0; i < count; i++) {
    struct stat now;
    if (lstat(files[i].path, &now) == 0 && now.st_dev == files[i].device && now.st_ino == files[i].inode)
      unlink(files[i].path);
  }
  if (first_closed == 2) tcsetattr(1, TCSANOW, settings);
  _exit(0);
}

int csandbox_start_guardian(const char *title, int terminal, const struct termios *settings, int *pidfd, int *pipe) {
  int ends[2];
  if (pipe2(ends, O_CLOEXEC) < 0) return -errno;
  int handle = -1;
  struct clone_args arguments = {
      .flags = CLONE_PIDFD, .pidfd = (uint64_t)(uintptr_t)&handle, .exit_signal = SIGCHLD};
  long pid = syscall(SYS_clone3, &arguments, sizeof arguments);
  if (pid == 0) guard(title, ends[0], terminal, settings);
  int error = errno;
  close(ends[0]);
  if (pid < 0) {
    close(ends[1]);
    return -error;
  }
  *pidfd = handle;
  *pipe = ends[1];
  return (int)pid;
}
