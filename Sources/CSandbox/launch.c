#define _GNU_SOURCE
#include "csandbox.h"

#include <cap-ng.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/close_range.h>
#include <linux/sched.h>
#include <signal.h>
#include <stddef.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

static void fail(int pipe, enum csandbox_step step, int error) __attribute__((noreturn));

static void fail(int pipe, enum csandbox_step step, int error) {
  struct csandbox_report report = {.step = step, .error = error};
  ssize_t ignored = write(pipe, &report, sizeof report);
  (void)ignored;
  _exit(127);
}

// exec keeps ignored signals and the mask; handlers it resets by itself. By system call, because glibc's function refuses
// the two numbers it uses itself, and a parent may have left those ignored. An all-zero kernel sigaction is SIG_DFL.
static int reset_signals(void) {
  struct { void *handler; unsigned long flags; void *restorer; uint64_t mask; } standard = {0};
  for (int number = 1; number < NSIG; number++) syscall(SYS_rt_sigaction, number, &standard, NULL, sizeof standard.mask);
  sigset_t none;
  sigemptyset(&none);
  return sigprocmask(SIG_SETMASK, &none, NULL);
}

// Sources and targets may overlap, so everything first moves above the targets. Afterwards: 0..<count as asked, count is
// the executable, count + 1 the report pipe, nothing else.
static int arrange(const struct csandbox_launch *launch, int *executable, int *pipe) {
  int count = launch->descriptor_count;
  int moved[32];
  if (count < 0 || count > (int)(sizeof moved / sizeof *moved)) return E2BIG;
  int floor = count + 2;
  int high_executable = fcntl(*executable, F_DUPFD_CLOEXEC, floor);
  int high_pipe = fcntl(*pipe, F_DUPFD_CLOEXEC, floor);
  if (high_executable < 0 || high_pipe < 0) return errno;
  *pipe = high_pipe;
  for (int i = 0; i < count; i++) {
    moved[i] = fcntl(launch->descriptors[i], F_DUPFD_CLOEXEC, floor);
    if (moved[i] < 0) return errno;
  }
  for (int i = 0; i < count; i++)
    if (dup3(moved[i], i, 0) < 0) return errno;
  if (dup3(high_executable, count, O_CLOEXEC) < 0) return errno;
  if (dup3(high_pipe, count + 1, O_CLOEXEC) < 0) return errno;
  *executable = count;
  *pipe = count + 1;
  if (syscall(SYS_close_range, (unsigned)floor, ~0u, CLOSE_RANGE_UNSHARE) < 0) return errno;
  return 0;
}

static int set_limit(int resource, uint64_t value) {
  struct rlimit current;
  if (getrlimit(resource, &current) < 0) return errno;
  if (value > current.rlim_max) value = current.rlim_max;
  struct rlimit limit = {.rlim_cur = value, .rlim_max = value};
  return setrlimit(resource, &limit) < 0 ? errno : 0;
}

// Every capability, the bounding set where that is allowed, ambient ones, groups, gid, uid: by libcap-ng.
static int drop_privileges(const struct csandbox_launch *launch) {
  capng_clear(CAPNG_SELECT_ALL);
  errno = 0;
  if (launch->change_identity) {
    int outcome = capng_change_id((int)launch->uid, (int)launch->gid,
                                  CAPNG_DROP_SUPP_GRP | CAPNG_CLEAR_BOUNDING | CAPNG_CLEAR_AMBIENT);
    if (outcome != 0) return errno ? errno : EPERM;
    return 0;
  }
  // Without CAP_SETPCAP the bounding set stays; no_new_privs makes it worthless.
  capng_select_t set = CAPNG_SELECT_CAPS | CAPNG_SELECT_AMBIENT;
  if (prctl(PR_CAPBSET_READ, 8 /* CAP_SETPCAP */) == 1 && geteuid() == 0) set = CAPNG_SELECT_ALL;
  if (capng_apply(set) != 0) return errno ? errno : EPERM;
  return 0;
}

static int verify(const struct csandbox_launch *launch) {
  capng_clear(CAPNG_SELECT_ALL); // forget what we asked for; read what we have
  if (capng_get_caps_process() != 0) return EPERM;
  if (capng_have_capabilities(CAPNG_SELECT_CAPS) != CAPNG_NONE) return EPERM;
  if (!launch->change_identity) return 0;
  uid_t real, effective, saved;
  gid_t real_group, effective_group, saved_group;
  if (getresuid(&real, &effective, &saved) < 0 || getresgid(&real_group, &effective_group, &saved_group) < 0) return errno;
  if (real != launch->uid || effective != launch->uid || saved != launch->uid) return EPERM;
  if (real_group != launch->gid || effective_group != launch->gid || saved_group != launch->gid) return EPERM;
  if (getgroups(0, NULL) != 0) return EPERM;
  if (setresuid(0, 0, 0) == 0 || setresgid(0, 0, 0) == 0) return EPERM; // it could be regained
  return 0;
}

static void child(const struct csandbox_launch *launch, int pipe, pid_t parent) __attribute__((noreturn));

static void child(const struct csandbox_launch *launch, int pipe, pid_t parent) {
  int executable = launch->executable;
  int error;
  if (setsid() < 0) fail(pipe, CSANDBOX_SESSION, errno);
  if (reset_signals() < 0) fail(pipe, CSANDBOX_SIGNALS, errno);
  if ((error = arrange(launch, &executable, &pipe))) fail(pipe, CSANDBOX_DESCRIPTORS, error);
  umask(077);
  if (chdir("/") < 0) fail(pipe, CSANDBOX_DIRECTORY, errno);
  if ((error = set_limit(RLIMIT_CORE, 0)) || (error = set_limit(RLIMIT_MSGQUEUE, 0)) ||
      (error = set_limit(RLIMIT_NOFILE, launch->file_limit)))
    fail(pipe, CSANDBOX_LIMITS, error);
  if ((error = drop_privileges(launch))) fail(pipe, CSANDBOX_IDENTITY, error);
  if ((error = verify(launch))) fail(pipe, CSANDBOX_VERIFICATION, error);
  if (prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) < 0) fail(pipe, CSANDBOX_NO_NEW_PRIVILEGES, errno);
  // A change of identity clears this setting and exec does not (no set-user-ID program is run), so it stands here.
  if (prctl(PR_SET_PDEATHSIG, launch->parent_death_signal, 0, 0, 0) < 0) fail(pipe, CSANDBOX_PARENT_DEATH, errno);
  if (getppid() != parent) fail(pipe, CSANDBOX_PARENT_DEATH, ESRCH); // it died before we asked to be told
  char *const nothing[] = {NULL};
  syscall(SYS_execveat, executable, "", launch->arguments, nothing, 0x1000 /* AT_EMPTY_PATH */);
  fail(pipe, CSANDBOX_EXEC, errno);
}

int csandbox_start(const struct csandbox_launch *launch, int *pidfd, int *report) {
  int ends[2];
  if (pipe2(ends, O_CLOEXEC | O_NONBLOCK) < 0) return -errno;
  int handle = -1;
  pid_t parent = getpid();
  struct clone_args arguments = {
      .flags = CLONE_PIDFD,
      .pidfd = (uint64_t)(uintptr_t)&handle,
      .exit_signal = SIGCHLD,
  };
  long pid = syscall(SYS_clone3, &arguments, sizeof arguments);
  if (pid == 0) child(launch, ends[1], parent);
  int error = errno;
  close(ends[1]);
  if (pid < 0) {
    close(ends[0]);
    return -error;
  }
  *pidfd = handle;
  *report = ends[0];
  return (int)pid;
}
