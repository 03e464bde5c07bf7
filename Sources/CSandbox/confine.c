#define _GNU_SOURCE
#include "confine.h"
#include "csandbox.h"
#include "keeper.h"

#include <cap-ng.h>
#include <clinux_title.h>
#include <errno.h>
#include <linux/capability.h>
#include <linux/sched.h>
#include <linux/securebits.h>
#include <sched.h>
#include <signal.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <unistd.h>

// Capabilities that are kept reach the program that we execute by the ambient set only.
static int lock_secure_bits(const struct csandbox_confinement *c) {
  if (!csandbox_has_capability(CAP_SETPCAP)) return 0; // an ordinary user without a namespace: there is nothing to lock
  unsigned long bits = SECBIT_NOROOT | SECBIT_NOROOT_LOCKED | SECBIT_NO_SETUID_FIXUP_LOCKED | SECBIT_NO_CAP_AMBIENT_RAISE |
                       SECBIT_NO_CAP_AMBIENT_RAISE_LOCKED;
  if (c->capabilities) bits &= ~(unsigned long)(SECBIT_NO_CAP_AMBIENT_RAISE | SECBIT_NO_CAP_AMBIENT_RAISE_LOCKED);
  return prctl(PR_SET_SECUREBITS, bits, 0, 0, 0) < 0 ? errno : 0;
}

static int drop_privileges(const struct csandbox_confinement *c) {
  int may_clear_bounding = csandbox_has_capability(CAP_SETPCAP);
  capng_clear(CAPNG_SELECT_ALL);
  for (unsigned number = 0; number < 64; number++)
    if (c->capabilities >> number & 1) capng_update(CAPNG_ADD, CAPNG_EFFECTIVE | CAPNG_PERMITTED | CAPNG_INHERITABLE, number);
  errno = 0;
  if (c->change_identity) {
    if (capng_change_id((int)c->uid, (int)c->gid, CAPNG_DROP_SUPP_GRP | CAPNG_CLEAR_BOUNDING | CAPNG_CLEAR_AMBIENT) == 0) return 0;
  } else if (capng_apply(may_clear_bounding ? CAPNG_SELECT_ALL : CAPNG_SELECT_CAPS | CAPNG_SELECT_AMBIENT) == 0) {
    return 0;
  }
  return errno ? errno : EPERM;
}

static int keep_capabilities(const struct csandbox_confinement *c) {
  for (int number = 0; number < 64; number++)
    if (c->capabilities >> number & 1 && prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_RAISE, number, 0, 0) < 0) return errno;
  return 0;
}

static int verify(const struct csandbox_confinement *c) {
  struct __user_cap_header_struct header = {.version = _LINUX_CAPABILITY_VERSION_3, .pid = 0};
  struct __user_cap_data_struct data[2] = {{0}, {0}};
  if (syscall(SYS_capget, &header, data) < 0) return errno;
  for (int i = 0; i < 2; i++) {
    uint32_t kept = (uint32_t)(c->capabilities >> (32 * i));
    if ((data[i].effective | data[i].permitted) & ~kept || data[i].inheritable & ~kept) return EPERM;
  }
  if (!c->change_identity) return 0;
  uid_t real, effective, saved;
  gid_t real_group, effective_group, saved_group;
  if (getresuid(&real, &effective, &saved) < 0 || getresgid(&real_group, &effective_group, &saved_group) < 0) return errno;
  if (real != c->uid || effective != c->uid || saved != c->uid) return EPERM;
  if (real_group != c->gid || effective_group != c->gid || saved_group != c->gid || getgroups(0, NULL) != 0) return EPERM;
  if (setresuid(0, 0, 0) == 0 || setresgid(0, 0, 0) == 0) return EPERM; // it could be regained
  return 0;
}

int csandbox_confine(const struct csandbox_confinement *c, int *step) {
  int error;
  uid_t uid = geteuid();
  gid_t gid = getegid();
  *step = CSANDBOX_FORK;
  if (c->namespaces && unshare((int)c->namespaces) < 0) return errno;
  *step = CSANDBOX_USER_MAP;
  if (c->namespaces & CLONE_NEWUSER && (error = csandbox_map_user(uid, gid))) return error;
  *step = CSANDBOX_DIRECTORY;
  if (c->namespaces & CLONE_NEWNS && (error = csandbox_enter_empty_root())) return error;
  *step = CSANDBOX_HOST_NAME;
  if (c->namespaces & CLONE_NEWUTS && (sethostname("martlet", 7) < 0 || setdomainname("", 0) < 0)) return errno;
  *step = CSANDBOX_LIMITS;
  if ((error = csandbox_set_limit(RLIMIT_CORE, 0)) || (error = csandbox_set_limit(RLIMIT_MSGQUEUE, 0)) ||
      (error = csandbox_set_limit(RLIMIT_RTPRIO, 0)) || (error = csandbox_set_limit(RLIMIT_NOFILE, c->file_limit)) ||
      (error = csandbox_set_limit(RLIMIT_NPROC, 1)))
    return error;
  *step = CSANDBOX_SECURE_BITS;
  if ((error = lock_secure_bits(c))) return error;
  *step = CSANDBOX_IDENTITY;
  if ((error = drop_privileges(c)) || (error = keep_capabilities(c))) return error;
  *step = CSANDBOX_VERIFICATION;
  if ((error = verify(c))) return error;
  *step = CSANDBOX_NO_NEW_PRIVILEGES;
  if (prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) < 0) return errno;
  // No core file, no ptrace by the same uid. A change of ids has set it already; without one it is still to be done.
  if (prctl(PR_SET_DUMPABLE, 0, 0, 0, 0) < 0) return errno;
  return 0;
}

// As libc's fork, which gives nobody another parent, for a process without threads.
static pid_t fork_sibling(void) {
  // A sibling takes over the caller's signal.
  struct clone_args arguments = {.flags = CLONE_PARENT};
  return (pid_t)syscall(SYS_clone3, &arguments, sizeof arguments);
}

int csandbox_fork_helper(const char *title, const int *kept, int count, int is_sibling) {
  pid_t parent = is_sibling ? getppid() : getpid();
  pid_t pid = is_sibling ? fork_sibling() : fork();
  if (pid < 0) return -errno;
  if (pid > 0) return pid;
  sigset_t all;
  sigfillset(&all);
  sigprocmask(SIG_SETMASK, &all, NULL);
  setsid();
  clinux_set_title(title);
  unsigned next = 0;
  for (int i = 0; i < count; i++) {
    if (kept[i] > (int)next) syscall(SYS_close_range, next, (unsigned)kept[i] - 1, 0);
    next = (unsigned)kept[i] + 1;
  }
  syscall(SYS_close_range, next, ~0u, 0);
  if (csandbox_set_limit(RLIMIT_CORE, 0) || prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) < 0 || prctl(PR_SET_DUMPABLE, 0, 0, 0, 0) < 0 ||
      csandbox_die_with(parent) != 0)
    _exit(1);
  return 0;
}

void csandbox_outlive(void) { prctl(PR_SET_PDEATHSIG, 0, 0, 0, 0); }
