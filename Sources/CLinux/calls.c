#define _GNU_SOURCE
#include "clinux_calls.h"

#include <linux/capability.h>
#include <stddef.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/syscall.h>
#include <sys/vfs.h>
#include <sys/wait.h>

static int result(long value) { return value < 0 ? -errno : (int)value; }

int clinux_open(const char *path, int flags, unsigned mode) { return result(open(path, flags, mode)); }

int clinux_openat(int directory, const char *path, int flags, unsigned mode) {
  return result(openat(directory, path, flags, mode));
}

int clinux_processor_count(void) {
  cpu_set_t set;
  return sched_getaffinity(0, sizeof set, &set) < 0 ? 1 : CPU_COUNT(&set);
}

int clinux_ioctl(int fd, unsigned long request, unsigned long argument) { return result(ioctl(fd, request, argument)); }

int clinux_ioctl_pointer(int fd, unsigned long request, void *argument) { return result(ioctl(fd, request, argument)); }

int clinux_fcntl(int fd, int command, long argument) { return result(fcntl(fd, command, argument)); }

int clinux_ofd_lock(int fd, int kind) { return clinux_ofd_lock_range(fd, kind, 0, 0); }

int clinux_ofd_lock_range(int fd, int kind, int64_t start, int64_t length) {
  struct flock lock = {.l_type = (short)kind, .l_whence = SEEK_SET, .l_start = start, .l_len = length, .l_pid = 0};
  return result(fcntl(fd, F_OFD_SETLK, &lock));
}

int64_t clinux_ofd_lock_find(int fd, int kind, int64_t start, int64_t length) {
  struct flock lock = {.l_type = (short)kind, .l_whence = SEEK_SET, .l_start = start, .l_len = length, .l_pid = 0};
  if (fcntl(fd, F_OFD_GETLK, &lock) < 0) return -errno;
  return lock.l_type == F_UNLCK ? -ENOENT : lock.l_start;
}

int clinux_prctl(int option, unsigned long a, unsigned long b, unsigned long c, unsigned long d) {
  return result(prctl(option, a, b, c, d));
}

int clinux_pipe(int *ends, int flags) { return result(pipe2(ends, flags)); }

int clinux_memfd_create(const char *name, unsigned flags) { return result(syscall(SYS_memfd_create, name, flags)); }

int clinux_pidfd_open(int pid) { return result(syscall(SYS_pidfd_open, pid, 0)); }

int clinux_pidfd_send_signal(int pidfd, int signal) {
  return result(syscall(SYS_pidfd_send_signal, pidfd, signal, NULL, 0));
}

int clinux_pidfd_wait(int pidfd, int *code, int *status, int blocking) {
  siginfo_t info;
  memset(&info, 0, sizeof info);
  int outcome = waitid((idtype_t)3 /* P_PIDFD */, (id_t)pidfd, &info, WEXITED | (blocking ? 0 : WNOHANG));
  if (outcome < 0) return -errno;
  if (info.si_pid == 0) return 0;
  *code = info.si_code;
  *status = info.si_status;
  return 1;
}

int clinux_tgkill(int process, int thread, int signal) { return result(syscall(SYS_tgkill, process, thread, signal)); }

int clinux_epoll_ctl(int epoll, int operation, int fd, uint32_t events, uint64_t data) {
  struct epoll_event event = {.events = events, .data = {.u64 = data}};
  return result(epoll_ctl(epoll, operation, fd, &event));
}

int clinux_fstat(int fd, struct stat *status) { return result(syscall(SYS_fstat, fd, status)); }

int clinux_dup3(int fd, int number) { return result(dup3(fd, number, O_CLOEXEC)); }

int clinux_fallocate(int fd, int mode, off_t offset, off_t length) { return result(fallocate(fd, mode, offset, length)); }

ssize_t clinux_pwritev2(int fd, const struct iovec *parts, int count, off_t offset, int flags) {
  ssize_t written = pwritev2(fd, parts, count, offset, flags);
  return written < 0 ? -errno : written;
}

int clinux_accept_nonblocking(int listener) {
  return result(accept4(listener, NULL, NULL, SOCK_CLOEXEC | SOCK_NONBLOCK));
}

int clinux_accept(int listener) { return result(accept4(listener, NULL, NULL, SOCK_CLOEXEC)); }

int clinux_punch_hole(int fd, off_t offset, off_t length) {
  return result(fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, offset, length));
}

enum { most_descriptors = 253 /* SCM_MAX_FD */ };

union control_space {
  char bytes[CMSG_SPACE(sizeof(int) * most_descriptors)];
  struct cmsghdr alignment;
};

ssize_t clinux_send_with_fds(int socket, const struct iovec *parts, int part_count, const int *fds, int fd_count,
                             int flags) {
  if (fd_count < 0 || fd_count > most_descriptors) return -EINVAL;
  union control_space control;
  struct msghdr message;
  memset(&message, 0, sizeof message);
  message.msg_iov = (struct iovec *)parts;
  message.msg_iovlen = (size_t)part_count;
  if (fd_count > 0) {
    size_t length = sizeof(int) * (size_t)fd_count;
    memset(&control, 0, CMSG_SPACE(length));
    message.msg_control = control.bytes;
    message.msg_controllen = CMSG_SPACE(length);
    struct cmsghdr *header = CMSG_FIRSTHDR(&message);
    header->cmsg_level = SOL_SOCKET;
    header->cmsg_type = SCM_RIGHTS;
    header->cmsg_len = CMSG_LEN(length);
    memcpy(CMSG_DATA(header), fds, length);
  }
  ssize_t sent = sendmsg(socket, &message, flags | MSG_NOSIGNAL);
  return sent < 0 ? -errno : sent;
}

ssize_t clinux_receive_with_fds(int socket, void *buffer, size_t capacity, int *fds, int fd_capacity, int *fd_count,
                                int *truncated, int flags) {
  *fd_count = 0;
  *truncated = 0;
  if (fd_capacity < 0 || fd_capacity > most_descriptors) return -EINVAL;
  union control_space control;
  struct iovec part = {buffer, capacity};
  struct msghdr message;
  memset(&message, 0, sizeof message);
  message.msg_iov = &part;
  message.msg_iovlen = 1;
  if (fd_capacity > 0) {
    message.msg_control = control.bytes;
    message.msg_controllen = CMSG_SPACE(sizeof(int) * (size_t)fd_capacity);
  }
  ssize_t received = recvmsg(socket, &message, flags | MSG_CMSG_CLOEXEC);
  if (received < 0) return -errno;
  if (message.msg_flags & (MSG_CTRUNC | MSG_TRUNC)) *truncated = 1;
  if (fd_capacity == 0) return received;
  for (struct cmsghdr *header = CMSG_FIRSTHDR(&message); header != NULL; header = CMSG_NXTHDR(&message, header)) {
    if (header->cmsg_level != SOL_SOCKET || header->cmsg_type != SCM_RIGHTS) continue;
    size_t count = (header->cmsg_len - CMSG_LEN(0)) / sizeof(int);
    for (size_t index = 0; index < count; index++) {
      int fd;
      memcpy(&fd, CMSG_DATA(header) + index * sizeof(int), sizeof fd);
      // CMSG_SPACE rounds up, so one descriptor more than asked for can fit: it is closed, not leaked.
      if (*fd_count < fd_capacity) {
        fds[(*fd_count)++] = fd;
      } else {
        close(fd);
        *truncated = 1;
      }
    }
  }
  return received;
}

int clinux_peer_credentials(int socket, int *pid, unsigned *uid, unsigned *gid) {
  struct ucred {
    pid_t pid;
    uid_t uid;
    gid_t gid;
  } peer;
  socklen_t length = sizeof peer;
  if (getsockopt(socket, SOL_SOCKET, SO_PEERCRED, &peer, &length) < 0) return -errno;
  *pid = peer.pid;
  *uid = peer.uid;
  *gid = peer.gid;
  return 0;
}

static int unix_address(struct sockaddr_un *address, const char *path) {
  memset(address, 0, sizeof *address);
  address->sun_family = AF_UNIX;
  size_t length = strlen(path);
  if (length == 0 || length >= sizeof address->sun_path) return -ENAMETOOLONG;
  memcpy(address->sun_path, path, length);
  return 0;
}

int clinux_unix_bind(int socket, const char *path) {
  struct sockaddr_un address;
  int bad = unix_address(&address, path);
  if (bad) return bad;
  return result(bind(socket, (struct sockaddr *)&address, sizeof address));
}

int clinux_unix_connect(int socket, const char *path) {
  struct sockaddr_un address;
  int bad = unix_address(&address, path);
  if (bad) return bad;
  return result(connect(socket, (struct sockaddr *)&address, sizeof address));
}

const char *clinux_errno_name(int error) { return strerrorname_np(error); }

int64_t clinux_file_size(int fd) {
  struct statx status;
  // Only the size: of the times NFS knows nothing before it has written everything out.
  return statx(fd, "", AT_EMPTY_PATH, STATX_SIZE, &status) == 0 ? (int64_t)status.stx_size : -(int64_t)errno;
}

int clinux_direct_unit(int fd) {
  // struct statx of linux/stat.h, which is older here than the kernels: stx_mask is its first word, stx_dio_offset_align its 40th.
  uint32_t status[64] = {0};
  const unsigned mask = 0x2000;  // STATX_DIOALIGN, since Linux 6.1
  if (syscall(SYS_statx, fd, "", AT_EMPTY_PATH, mask, status) < 0) return -errno;
  return status[0] & mask ? (int)status[39] : -ENOSYS;
}

long clinux_file_system(int fd) {
  struct statfs system;
  return fstatfs(fd, &system) == 0 ? (long)system.f_type : -(long)errno;
}

int clinux_become(int fd, char *const *arguments, char *const *environment, uint64_t number) {
  syscall(SYS_execveat, fd, "", arguments, environment, 0x1000 /* AT_EMPTY_PATH */, number);
  return -errno;
}

int clinux_keep_only(uint64_t capabilities) {
  // Not by libcap-ng, which would remember us as the process it works for: children of clone3 have its memory.
  struct __user_cap_header_struct header = {.version = _LINUX_CAPABILITY_VERSION_3, .pid = 0};
  struct __user_cap_data_struct data[2] = {{0}, {0}};
  if (syscall(SYS_capget, &header, data) < 0) return errno;
  int can_lessen = data[0].effective >> CAP_SETPCAP & 1;
  for (int i = 0; i < 2; i++) {
    data[i].permitted &= (uint32_t)(capabilities >> (32 * i));
    data[i].effective &= data[i].permitted;
    data[i].inheritable = 0;
  }
  if (can_lessen)
    for (int number = 0; number < 64; number++)
      if (!(capabilities >> number & 1) && prctl(PR_CAPBSET_DROP, number, 0, 0, 0) < 0) {
        if (errno == EINVAL) break; // beyond the last one
        return errno;
      }
  if (prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0) < 0) return errno;
  return syscall(SYS_capset, &header, data) < 0 ? errno : 0;
}
