#define _GNU_SOURCE
#include "guardian.h"

#include <cap-ng.h>
#include <clinux_title.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/close_range.h>
#include <linux/filter.h>
#include <linux/sched.h>
#include <linux/seccomp.h>
#include <poll.h>
#include <signal.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

enum { most_files = 16 };

static void guard(const struct csandbox_guardian *guardian, int pipe) __attribute__((noreturn));

// Its files lie in directories of whoever started the VM, and are root's when root did.
static int drop_privileges(void) {
  const unsigned needed[] = {CAP_DAC_OVERRIDE, CAP_FOWNER};
  int has[sizeof needed / sizeof *needed];
  capng_get_caps_process();
  for (unsigned i = 0; i < sizeof needed / sizeof *needed; i++) has[i] = capng_have_capability(CAPNG_EFFECTIVE, needed[i]);
  int may_clear_bounding = capng_have_capability(CAPNG_EFFECTIVE, CAP_SETPCAP);
  capng_clear(CAPNG_SELECT_ALL);
  for (unsigned i = 0; i < sizeof needed / sizeof *needed; i++)
    if (has[i]) capng_update(CAPNG_ADD, CAPNG_EFFECTIVE | CAPNG_PERMITTED, needed[i]);
  return capng_apply(may_clear_bounding ? CAPNG_SELECT_ALL : CAPNG_SELECT_CAPS | CAPNG_SELECT_AMBIENT);
}

// Nobody may use it instead of us. A guardian that cannot close itself in does not start.
static void raise_walls(const struct csandbox_guardian *guardian) {
  if (prctl(PR_SET_DUMPABLE, 0, 0, 0, 0) < 0 || prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) < 0) _exit(1);
  if (guardian->drops_privileges && drop_privileges() < 0) _exit(1);
  struct sock_fprog program = {.len = guardian->filter_length, .filter = (struct sock_filter *)guardian->filter};
  if (guardian->filter && syscall(SYS_seccomp, SECCOMP_SET_MODE_FILTER, 0, &program) < 0) _exit(1);
}

static void tell(int fd, const char *text) {
  ssize_t ignored = write(fd, text, strlen(text));
  (void)ignored;
}

struct entry { // linux_dirent64
  uint64_t inode;
  int64_t offset;
  unsigned short length;
  unsigned char type;
  char name[];
};

static void remove_members(int directory) {
  static const char prefix[] = "process-";
  _Alignas(struct entry) char buffer[4096];
  lseek(directory, 0, SEEK_SET);
  for (;;) {
    long got = syscall(SYS_getdents64, directory, buffer, sizeof buffer);
    if (got <= 0) return;
    for (long at = 0; at < got;) {
      struct entry *entry = (struct entry *)(buffer + at);
      if (strncmp(entry->name, prefix, sizeof prefix - 1) == 0) unlinkat(directory, entry->name, AT_REMOVEDIR);
      at += entry->length;
    }
  }
}

// A process that was just killed is still in its group for a moment.
static void remove_groups(const struct csandbox_guarded_groups *groups) {
  tell(groups->kill, "1");
  for (int round = 0; round < 600; round++) {
    remove_members(groups->directory);
    if (unlinkat(groups->parent, groups->name, AT_REMOVEDIR) == 0 || errno == ENOENT) break;
    poll(NULL, 0, 5);
  }
  if (groups->own_name == NULL) return;
  // A group that hands controllers down takes no process.
  tell(groups->control, "-cpu");
  tell(groups->control, "-memory");
  tell(groups->control, "-io");
  tell(groups->control, "-pids");
  tell(groups->members, "0");
  unlinkat(groups->parent, groups->own_name, AT_REMOVEDIR);
}

// The descriptors become 2, 3 and so on; the first number behind them is returned.
static unsigned keep_groups(struct csandbox_guarded_groups *groups) {
  int *const numbers[] = {&groups->directory, &groups->kill, &groups->parent, &groups->control, &groups->members};
  enum { count = sizeof numbers / sizeof *numbers };
  int high[count];
  for (int i = 0; i < count; i++) high[i] = *numbers[i] < 0 ? -1 : fcntl(*numbers[i], F_DUPFD, 16);
  unsigned next = 2;
  for (int i = 0; i < count; i++) *numbers[i] = high[i] < 0 ? -1 : dup2(high[i], (int)next++);
  return next;
}

static void guard(const struct csandbox_guardian *guardian, int pipe) {
  sigset_t all;
  sigfillset(&all);
  sigprocmask(SIG_SETMASK, &all, NULL);
  setsid();
  clinux_set_title(guardian->title);
  // 0 becomes the pipe, 1 the terminal, then come the groups; everything else goes, so that nobody waits for an end of file on our account.
  int terminal = guardian->terminal;
  int high_pipe = fcntl(pipe, F_DUPFD, 16);
  int high_terminal = terminal >= 0 ? fcntl(terminal, F_DUPFD, 16) : -1;
  struct csandbox_guarded_groups groups;
  if (guardian->groups) groups = *guardian->groups;
  // First these: a number that is written over next may be one of theirs.
  unsigned behind_groups = guardian->groups ? keep_groups(&groups) : 2;
  if (high_pipe < 0 || dup2(high_pipe, 0) < 0) _exit(1);
  int has_terminal = high_terminal >= 0 && dup2(high_terminal, 1) == 1;
  if (!has_terminal) close(1);
  syscall(SYS_close_range, behind_groups, ~0u, 0);
  raise_walls(guardian);

  struct csandbox_guarded files[most_files];
  int count = 0;
  int is_complete = 0;
  for (;;) {
    struct csandbox_guarded file; // shorter than PIPE_BUF: written and read in one piece
    ssize_t got = read(0, &file, sizeof file);
    if (got < 0 && errno == EINTR) continue;
    if (got != (ssize_t)sizeof file) break;
    file.path[sizeof file.path - 1] = 0;
    if (file.path[0] == 0) is_complete = 1;
    if (!is_complete && count < most_files) files[count++] = file;
  }
  for (int i = 0; i < count; i++) {
    struct stat now;
    if (lstat(files[i].path, &now) == 0 && now.st_dev == files[i].device && now.st_ino == files[i].inode)
      unlink(files[i].path);
  }
  if (has_terminal) tcsetattr(1, TCSANOW, guardian->settings);
  if (guardian->groups) remove_groups(&groups);
  _exit(0);
}

int csandbox_start_guardian(const struct csandbox_guardian *guardian, int *pidfd, int *pipe) {
  int ends[2];
  if (pipe2(ends, O_CLOEXEC) < 0) return -errno;
  int handle = -1;
  struct clone_args arguments = {
      .flags = CLONE_PIDFD | (guardian->is_sibling ? CLONE_PARENT : 0),
      .pidfd = (uint64_t)(uintptr_t)&handle,
      // A sibling takes over the caller's.
      .exit_signal = guardian->is_sibling ? 0 : SIGCHLD};
  long pid = syscall(SYS_clone3, &arguments, sizeof arguments);
  if (pid == 0) guard(guardian, ends[0]);
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
