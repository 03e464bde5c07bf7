#define _GNU_SOURCE
#include "clinux_walls.h"

#include <errno.h>
#include <linux/capability.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

#ifndef SYS_landlock_create_ruleset
#define SYS_landlock_create_ruleset 444
#define SYS_landlock_add_rule 445
#define SYS_landlock_restrict_self 446
#endif

// struct landlock_ruleset_attr as of ABI 6; older kernels accept the longer form when what they do not know is zero.
struct ruleset {
  uint64_t file_system;
  uint64_t network;
  uint64_t scopes;
};

enum { version_query = 1 /* LANDLOCK_CREATE_RULESET_VERSION */ };

int clinux_landlock_abi(void) {
  long abi = syscall(SYS_landlock_create_ruleset, NULL, 0, version_query);
  if (abi >= 0) return (int)abi;
  return errno == ENOSYS || errno == EOPNOTSUPP ? 0 : -errno;
}

int clinux_landlock_restrict(int abi, int keeps_signals, int programs) {
  struct ruleset rules;
  memset(&rules, 0, sizeof rules);
  // LANDLOCK_ACCESS_FS_EXECUTE .. MAKE_SYM are bits 0 to 12; REFER, TRUNCATE and IOCTL_DEV came later.
  rules.file_system = 0x1FFF;
  if (abi >= 2) rules.file_system |= 1u << 13;
  if (abi >= 3) rules.file_system |= 1u << 14;
  if (abi >= 5) rules.file_system |= 1u << 15;
  if (abi >= 4) rules.network = 0x3;  // bind and connect TCP
  if (abi >= 6) rules.scopes = keeps_signals ? 0x1 : 0x3;  // abstract Unix sockets, signals
  int fd = (int)syscall(SYS_landlock_create_ruleset, &rules, sizeof rules, 0);
  if (fd < 0) return -errno;
  // struct landlock_path_beneath_attr; EXECUTE and READ_FILE, which exec asks for as well.
  struct { uint64_t rights; int32_t directory; } __attribute__((packed)) rule = {0x1 | 0x4, programs};
  if (programs >= 0 && syscall(SYS_landlock_add_rule, fd, 1 /* LANDLOCK_RULE_PATH_BENEATH */, &rule, 0) < 0) {
    int error = errno;
    close(fd);
    return -error;
  }
  long result = syscall(SYS_landlock_restrict_self, fd, 0);
  int error = errno;
  close(fd);
  return result < 0 ? -error : 0;
}

int clinux_seccomp_can_kill(void) {
  uint32_t action = SECCOMP_RET_KILL_PROCESS;
  return syscall(SYS_seccomp, SECCOMP_GET_ACTION_AVAIL, 0, &action) == 0;
}

int clinux_may_administer(void) {
  struct __user_cap_header_struct header = {.version = _LINUX_CAPABILITY_VERSION_3, .pid = 0};
  struct __user_cap_data_struct data[2];
  memset(data, 0, sizeof data);
  if (syscall(SYS_capget, &header, data) < 0) return 0;
  uint32_t wanted = 1u << CAP_SYS_ADMIN | 1u << CAP_SETPCAP | 1u << CAP_SETUID | 1u << CAP_SETGID;
  return (data[0].effective & wanted) == wanted;
}

static int install(const void *instructions, unsigned short count, unsigned flags) {
  struct sock_fprog program = {.len = count, .filter = (struct sock_filter *)instructions};
  long result = syscall(SYS_seccomp, SECCOMP_SET_MODE_FILTER, flags, &program);
  return result < 0 ? -errno : (int)result;
}

int clinux_seccomp_install_thread(const void *instructions, unsigned short count, int log) {
  return install(instructions, count, log ? SECCOMP_FILTER_FLAG_LOG : 0);
}

int clinux_seccomp_install(const void *instructions, unsigned short count, int log) {
  return install(instructions, count, SECCOMP_FILTER_FLAG_TSYNC | (log ? SECCOMP_FILTER_FLAG_LOG : 0));
}
