#define _GNU_SOURCE
#include "keeper.h"

#include <errno.h>
#include <linux/sched.h>
#include <signal.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

void *csandbox_shared_memory(size_t size) {
  void *memory = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
  return memory == MAP_FAILED ? NULL : memory;
}

int csandbox_die_with(int parent) {
  if (prctl(PR_SET_PDEATHSIG, SIGKILL, 0, 0, 0) < 0) return errno;
  return getppid() == parent ? 0 : ESRCH;
}

// libc's fork cannot share descriptors. What it would do beyond the call is for locks and threads, of which there are none.
int csandbox_fork_sharing(void) {
  int parent = getpid();
  struct clone_args arguments = {.flags = CLONE_FILES, .exit_signal = SIGCHLD};
  long pid = syscall(SYS_clone3, &arguments, sizeof arguments);
  if (pid < 0) return -errno;
  if (pid == 0 && csandbox_die_with(parent) != 0) _exit(1);
  return (int)pid;
}

int csandbox_become_keeper(void) {
  if (prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) < 0 || prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) < 0 ||
      prctl(PR_SET_DUMPABLE, 0, 0, 0, 0) < 0)
    return errno;
  return 0;
}

int csandbox_collect_any(int *code, int *status) {
  siginfo_t info;
  memset(&info, 0, sizeof info);
  if (waitid(P_ALL, 0, &info, WEXITED | WNOHANG) < 0) return -errno;
  *code = info.si_code;
  *status = info.si_status;
  return info.si_pid;
}

int csandbox_become_program(int fd, char *const *arguments) {
  syscall(SYS_execveat, fd, "", arguments, environ, 0x1000 /* AT_EMPTY_PATH */);
  return -errno;
}

int csandbox_wait_signal(int *is_terminal) {
  sigset_t set;
  sigemptyset(&set);
  const int numbers[] = {SIGCHLD, SIGTERM, SIGINT, SIGHUP, SIGWINCH};
  for (unsigned i = 0; i < sizeof numbers / sizeof *numbers; i++) sigaddset(&set, numbers[i]);
  siginfo_t info;
  int number = sigwaitinfo(&set, &info);
  *is_terminal = number > 0 && info.si_code > 0;
  return number;
}
