#define _GNU_SOURCE
#include "csandbox.h"
#include "confine.h"

#include <cap-ng.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/close_range.h>
#include <linux/capability.h>
#include <linux/filter.h>
#include <linux/sched.h>
#include <linux/seccomp.h>
#include <linux/securebits.h>
#include <poll.h>
#include <signal.h>
#include <stddef.h>
#include <stdio.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

static void fail_at(int pipe, enum csandbox_step step, int error, int detail) __attribute__((noreturn));
static void fail(int pipe, enum csandbox_step step, int error) __attribute__((noreturn));

static void fail(int pipe, enum csandbox_step step, int error) { fail_at(pipe, step, error, -1); }

static void fail_at(int pipe, enum csandbox_step step, int error, int detail) {
  struct csandbox_report report = {.step = step, .error = error, .detail = detail};
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
  // Without a program (a trial of the walls) the pipe stands for it here and is closed with the rest.
  int high_executable = fcntl(*executable >= 0 ? *executable : *pipe, F_DUPFD_CLOEXEC, floor);
  int high_pipe = fcntl(*pipe, F_DUPFD_CLOEXEC, floor);
  if (high_executable < 0 || high_pipe < 0) return errno;
  *pipe = high_pipe;
  for (int i = 0; i < count; i++) {
    moved[i] = -1;
    if (launch->descriptors[i] < 0) continue;
    moved[i] = fcntl(launch->descriptors[i], F_DUPFD_CLOEXEC, floor);
    if (moved[i] < 0) return errno;
  }
  for (int i = 0; i < count; i++) {
    if (moved[i] < 0) close(i);
    else if (dup3(moved[i], i, 0) < 0) return errno;
  }
  if (dup3(high_executable, count, O_CLOEXEC) < 0) return errno;
  if (dup3(high_pipe, count + 1, O_CLOEXEC) < 0) return errno;
  if (*executable >= 0) *executable = count;
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

static int write_file(const char *path, const char *text) {
  int fd = open(path, O_WRONLY | O_CLOEXEC);
  if (fd < 0) return errno;
  ssize_t written = write(fd, text, strlen(text));
  int error = written < 0 ? errno : 0;
  close(fd);
  return error;
}

// In a new user namespace: our own ids stand for themselves, no other exists, and groups cannot be changed.
static int map_user(uid_t uid, gid_t gid) {
  char map[32];
  int error;
  // The files of a process that cannot be dumped belong to root; exec decides about it anew.
  if (prctl(PR_SET_DUMPABLE, 1, 0, 0, 0) < 0) return errno;
  if ((error = write_file("/proc/self/setgroups", "deny"))) return error;
  snprintf(map, sizeof map, "%u %u 1", (unsigned)uid, (unsigned)uid);
  if ((error = write_file("/proc/self/uid_map", map))) return error;
  snprintf(map, sizeof map, "%u %u 1", (unsigned)gid, (unsigned)gid);
  return write_file("/proc/self/gid_map", map);
}

// An empty, read-only tmpfs becomes the root and everything that was mounted goes. What is open stays usable.
static int enter_empty_root(void) {
  // Nothing that happens to mounts here is seen outside.
  if (mount("none", "/", NULL, MS_SLAVE | MS_REC, NULL) < 0) return errno;
  unsigned long flags = MS_RDONLY | MS_NOSUID | MS_NODEV | MS_NOEXEC;
  const char *options = "size=4k,nr_inodes=2,mode=0555";
  // Any directory will do; these exist wherever a process can be started.
  const char *places[] = {"/proc", "/dev", "/sys", "/tmp"};
  const char *place = NULL;
  int error = ENOENT;
  for (unsigned i = 0; i < sizeof places / sizeof *places && !place; i++) {
    if (mount("martlet", places[i], "tmpfs", flags, options) == 0) place = places[i];
    else error = errno;
  }
  if (!place) return error;
  if (chdir(place) < 0) return errno;
  if (syscall(SYS_pivot_root, ".", ".") == 0) {
    // The old root now lies on top of the new one at the same place; taking it away leaves the new one.
    if (umount2(".", MNT_DETACH) < 0) return errno;
  } else {
    // The initial RAM file system cannot be pivoted. The new root covers it instead; going back needs CAP_SYS_CHROOT.
    if (errno != EINVAL || mount(".", "/", NULL, MS_MOVE, NULL) < 0 || chroot(".") < 0) return errno;
  }
  return chdir("/") < 0 ? errno : 0;
}

static int has_effective_capability(int number) {
  struct __user_cap_header_struct header = {.version = _LINUX_CAPABILITY_VERSION_3, .pid = 0};
  struct __user_cap_data_struct data[2] = {{0}, {0}};
  if (syscall(SYS_capget, &header, data) < 0) return 0;
  return (data[number / 32].effective >> (number % 32)) & 1;
}

static uint64_t kept(const struct csandbox_launch *launch) { return launch->jail ? launch->jail->capabilities : 0; }

// uid 0 means nothing, and no ambient capability can be had, for ever. Keep-caps stays open: libcap-ng uses it next, and
// exec clears it.
static int lock_secure_bits(const struct csandbox_launch *launch) {
  if (!has_effective_capability(CAP_SETPCAP)) return 0; // an ordinary user: no_new_privs does the same
  unsigned long bits = SECBIT_NOROOT | SECBIT_NOROOT_LOCKED | SECBIT_NO_SETUID_FIXUP_LOCKED | SECBIT_NO_CAP_AMBIENT_RAISE |
                       SECBIT_NO_CAP_AMBIENT_RAISE_LOCKED;
  // Capabilities that are kept reach the program by the ambient set only.
  if (kept(launch)) bits &= ~(unsigned long)(SECBIT_NO_CAP_AMBIENT_RAISE | SECBIT_NO_CAP_AMBIENT_RAISE_LOCKED);
  return prctl(PR_SET_SECUREBITS, bits, 0, 0, 0) < 0 ? errno : 0;
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
  if (has_effective_capability(CAP_SETPCAP)) set = CAPNG_SELECT_ALL;
  if (capng_apply(set) != 0) return errno ? errno : EPERM;
  return 0;
}

// A program of others that keeps some: libcap-ng would empty the bounding set, where the kept ones must stay, because a
// program that lays them down itself wants to take them out.
static int drop_all_but_kept(const struct csandbox_launch *launch) {
  uint64_t wanted = kept(launch);
  if (has_effective_capability(CAP_SETPCAP))
    for (int number = 0; number < 64; number++)
      if (!(wanted >> number & 1) && prctl(PR_CAPBSET_DROP, number, 0, 0, 0) < 0) {
        if (errno == EINVAL) break; // beyond the last one
        return errno;
      }
  if (launch->change_identity) {
    if (prctl(PR_SET_KEEPCAPS, 1, 0, 0, 0) < 0 || syscall(SYS_setgroups, 0, NULL) < 0) return errno;
    if (setresgid(launch->gid, launch->gid, launch->gid) < 0 || setresuid(launch->uid, launch->uid, launch->uid) < 0) return errno;
  }
  if (prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0) < 0) return errno;
  struct __user_cap_header_struct header = {.version = _LINUX_CAPABILITY_VERSION_3, .pid = 0};
  struct __user_cap_data_struct data[2];
  for (int i = 0; i < 2; i++)
    data[i].effective = data[i].permitted = data[i].inheritable = (uint32_t)(wanted >> (32 * i));
  return syscall(SYS_capset, &header, data) < 0 ? errno : 0;
}

// What exec would take away goes into the ambient set.
static int keep_capabilities(const struct csandbox_launch *launch) {
  for (int number = 0; number < 64; number++) {
    if (!(kept(launch) >> number & 1)) continue;
    if (prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_RAISE, number, 0, 0) < 0) return errno;
  }
  return 0;
}

// By system calls and not by libcap-ng: a second reader, which needs no /proc.
static int verify(const struct csandbox_launch *launch, int could_clear_bounding) {
  struct __user_cap_header_struct header = {.version = _LINUX_CAPABILITY_VERSION_3, .pid = 0};
  struct __user_cap_data_struct data[2] = {{0}, {0}};
  if (syscall(SYS_capget, &header, data) < 0) return errno;
  for (int i = 0; i < 2; i++) {
    uint32_t wanted = (uint32_t)(kept(launch) >> (32 * i));
    if ((data[i].effective | data[i].permitted | data[i].inheritable) & ~wanted || data[i].permitted != wanted) return EPERM;
  }
  for (int number = 0; number < 64; number++) {
    int bounding = prctl(PR_CAPBSET_READ, number, 0, 0, 0);
    if (bounding < 0) break; // beyond the last one
    if (kept(launch) >> number & 1) continue;
    if (could_clear_bounding && bounding == 1) return EPERM;
    if (prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_IS_SET, number, 0, 0) == 1) return EPERM;
  }
  if (!launch->change_identity) return 0;
  uid_t real, effective, saved;
  gid_t real_group, effective_group, saved_group;
  if (getresuid(&real, &effective, &saved) < 0 || getresgid(&real_group, &effective_group, &saved_group) < 0) return errno;
  if (real != launch->uid || effective != launch->uid || saved != launch->uid) return EPERM;
  if (real_group != launch->gid || effective_group != launch->gid || saved_group != launch->gid) return EPERM;
  if (getgroups(0, NULL) != 0) return EPERM;
  if (launch->uid == 0 || kept(launch) >> CAP_SETUID & 1 || kept(launch) >> CAP_SETGID & 1) return 0; // as the profile says
  if (setresuid(0, 0, 0) == 0 || setresgid(0, 0, 0) == 0) return EPERM; // it could be regained
  return 0;
}

// Whether the launcher still lives. In a new pid namespace nobody has a parent; a report pipe without reader says the same.
static int is_orphan(const struct csandbox_launch *launch, int pipe, pid_t parent) {
  if (!(launch->namespaces & CLONE_NEWPID)) return getppid() != parent;
  struct pollfd entry = {.fd = pipe, .events = 0};
  return poll(&entry, 1, 0) > 0 && (entry.revents & POLLERR);
}

struct parent {
  pid_t pid;
  uid_t uid;
  gid_t gid;
};

static void child(const struct csandbox_launch *launch, int pipe, struct parent parent) __attribute__((noreturn));

static void helper(const struct csandbox_launch *launch, int executable, int pipe, struct parent parent) __attribute__((noreturn));

static void helper(const struct csandbox_launch *launch, int executable, int pipe, struct parent parent) {
  int error;
  if ((error = arrange(launch, &executable, &pipe))) fail(pipe, CSANDBOX_DESCRIPTORS, error);
  if (prctl(PR_SET_PDEATHSIG, launch->parent_death_signal, 0, 0, 0) < 0) fail(pipe, CSANDBOX_PARENT_DEATH, errno);
  if (is_orphan(launch, pipe, parent.pid)) fail(pipe, CSANDBOX_PARENT_DEATH, ESRCH);
  syscall(SYS_execveat, executable, "", launch->arguments, environ, 0x1000 /* AT_EMPTY_PATH */);
  fail(pipe, CSANDBOX_EXEC, errno);
}

static void child(const struct csandbox_launch *launch, int pipe, struct parent parent) {
  int executable = launch->executable;
  int error;
  if (setsid() < 0) fail(pipe, CSANDBOX_SESSION, errno);
  if (reset_signals() < 0) fail(pipe, CSANDBOX_SIGNALS, errno);
  if (launch->is_helper) helper(launch, executable, pipe, parent);
  const struct csandbox_jail *jail = launch->jail;
  int detail = -1;
  if (launch->namespaces & CLONE_NEWUSER && (error = map_user(parent.uid, parent.gid))) fail(pipe, CSANDBOX_USER_MAP, error);
  // The descriptors of its mounts' owners are among those that `arrange` closes.
  if (jail && (error = csandbox_enter_jail(jail, &detail))) fail_at(pipe, CSANDBOX_DIRECTORY, error, detail);
  if ((error = arrange(launch, &executable, &pipe))) fail(pipe, CSANDBOX_DESCRIPTORS, error);
  umask(077);
  if (!jail) {
    error = launch->namespaces & CLONE_NEWNS ? enter_empty_root() : chdir("/") < 0 ? errno : 0;
    if (error) fail(pipe, CSANDBOX_DIRECTORY, error);
  }
  if (launch->namespaces & CLONE_NEWUTS && (sethostname("martlet", 7) < 0 || setdomainname("", 0) < 0))
    fail(pipe, CSANDBOX_HOST_NAME, errno);
  if ((error = set_limit(RLIMIT_CORE, 0)) || (error = set_limit(RLIMIT_MSGQUEUE, 0)) ||
      (error = set_limit(RLIMIT_RTPRIO, 0)) || (error = set_limit(RLIMIT_NOFILE, launch->file_limit)) ||
      (launch->process_limit && (error = set_limit(RLIMIT_NPROC, launch->process_limit))))
    fail(pipe, CSANDBOX_LIMITS, error);
  for (int i = 0; jail && i < jail->limit_count; i++)
    if ((error = set_limit((int)jail->limits[i].resource, jail->limits[i].value))) fail(pipe, CSANDBOX_LIMITS, error);
  if ((error = lock_secure_bits(launch))) fail(pipe, CSANDBOX_SECURE_BITS, error);
  int could_clear_bounding = has_effective_capability(CAP_SETPCAP);
  if ((error = kept(launch) ? drop_all_but_kept(launch) : drop_privileges(launch))) fail(pipe, CSANDBOX_IDENTITY, error);
  if ((error = keep_capabilities(launch))) fail(pipe, CSANDBOX_IDENTITY, error);
  if ((error = verify(launch, could_clear_bounding))) fail(pipe, CSANDBOX_VERIFICATION, error);
  if (prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) < 0) fail(pipe, CSANDBOX_NO_NEW_PRIVILEGES, errno);
  // A change of identity clears this setting and exec does not (no set-user-ID program is run), so it stands here.
  if (prctl(PR_SET_PDEATHSIG, launch->parent_death_signal, 0, 0, 0) < 0) fail(pipe, CSANDBOX_PARENT_DEATH, errno);
  if (is_orphan(launch, pipe, parent.pid)) fail(pipe, CSANDBOX_PARENT_DEATH, ESRCH); // it died before we asked to be told
  if (executable < 0) _exit(0);
  // Swift's runtime would look for its crash reporter by /proc/self/exe, and dies where there is no /proc.
  char *const environment[] = {"SWIFT_BACKTRACE=enable=no,swift-backtrace=/", NULL};
  if (jail && (error = csandbox_restrict_to_jail(jail, &detail))) fail_at(pipe, CSANDBOX_RESTRICTION, error, detail);
  struct sock_fprog program = {.len = launch->filter_length, .filter = (struct sock_filter *)launch->filter};
  if (launch->filter && syscall(SYS_seccomp, SECCOMP_SET_MODE_FILTER, 0, &program) < 0) fail(pipe, CSANDBOX_RESTRICTION, errno);
  syscall(SYS_execveat, executable, "", launch->arguments, jail ? jail->environment : environment, 0x1000 /* AT_EMPTY_PATH */,
          jail ? jail->cookie : launch->cookie);
  fail(pipe, CSANDBOX_EXEC, errno);
}

int csandbox_start(const struct csandbox_launch *launch, int *pidfd, int *report) {
  int ends[2];
  if (pipe2(ends, O_CLOEXEC | O_NONBLOCK) < 0) return -errno;
  int handle = -1;
  int is_sibling = (launch->namespaces & CLONE_PARENT) != 0;
  struct parent parent = {.pid = is_sibling ? getppid() : getpid(), .uid = geteuid(), .gid = getegid()};
  struct clone_args arguments = {
      .flags = CLONE_PIDFD | launch->namespaces | (launch->group >= 0 ? CLONE_INTO_CGROUP : 0),
      .pidfd = (uint64_t)(uintptr_t)&handle,
      // A sibling takes over the caller's.
      .exit_signal = is_sibling ? 0 : SIGCHLD,
      .cgroup = launch->group >= 0 ? (uint64_t)launch->group : 0,
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

// For confine.c, which takes the same steps in a process that exists.
int csandbox_map_user(uint32_t uid, uint32_t gid) { return map_user(uid, gid); }
int csandbox_enter_empty_root(void) { return enter_empty_root(); }
int csandbox_set_limit(int resource, uint64_t value) { return set_limit(resource, value); }
int csandbox_has_capability(int number) { return has_effective_capability(number); }
