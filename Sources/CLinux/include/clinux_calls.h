// Kernel calls that Swift cannot make itself, because libc declares them variadic or hides them behind macros. Each
// function is the call of its name and nothing more: the result is the call's, errors are returned as -errno.
#ifndef CLINUX_CALLS_H
#define CLINUX_CALLS_H

#include <errno.h>
#include <fcntl.h>
#include <linux/memfd.h>
#include <poll.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdint.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/signalfd.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/timerfd.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <sys/un.h>
#include <unistd.h>

int clinux_open(const char *path, int flags, unsigned mode);
// open(2) of a path that a person has named: a symbolic link on the way that belongs neither to root nor to the caller is not followed,
// because its owner could lead us anywhere by it: -EXDEV, which open(2) never says. Calls nothing but the kernel.
int clinux_open_named(const char *path, int flags, unsigned mode);
int clinux_openat(int directory, const char *path, int flags, unsigned mode);
// Processors that this process may run on; 1 if that cannot be known.
int clinux_processor_count(void);
int clinux_ioctl(int fd, unsigned long request, unsigned long argument);
int clinux_ioctl_pointer(int fd, unsigned long request, void *argument);
int clinux_fcntl(int fd, int command, long argument);
// fcntl(F_OFD_SETLK): kind is F_RDLCK, F_WRLCK or F_UNLCK over the whole file.
int clinux_ofd_lock(int fd, int kind);
// The same over `length` bytes from `start` on; a length of 0 reaches as far as files can.
int clinux_ofd_lock_range(int fd, int kind, int64_t start, int64_t length);
// fcntl(F_OFD_GETLK): where a lock of another open file begins that this one would meet; -ENOENT if there is none.
int64_t clinux_ofd_lock_find(int fd, int kind, int64_t start, int64_t length);
// Bits 1 << CAP_...: what is left of the caller's capabilities, in its bounding set too where it may change that. 0 or errno.
int clinux_keep_only(uint64_t capabilities);
int clinux_prctl(int option, unsigned long a, unsigned long b, unsigned long c, unsigned long d);
// pipe2: reading end first.
int clinux_pipe(int *ends, int flags);
int clinux_memfd_create(const char *name, unsigned flags);
int clinux_pidfd_open(int pid);
int clinux_pidfd_send_signal(int pidfd, int signal);
// waitid(P_PIDFD, WEXITED|WNOHANG): 1 = ended (code and status filled), 0 = still running, -errno.
int clinux_pidfd_wait(int pidfd, int *code, int *status, int blocking);
int clinux_tgkill(int process, int thread, int signal);
int clinux_epoll_ctl(int epoll, int operation, int fd, uint32_t events, uint64_t data);
// fstat(2) by its own number; glibc makes newfstatat of it.
int clinux_fstat(int fd, struct stat *status);
// dup3(O_CLOEXEC): puts the object behind `fd` under `number`, atomically closing what was there.
int clinux_dup3(int fd, int number);
int clinux_fallocate(int fd, int mode, off_t offset, off_t length);
ssize_t clinux_pwritev2(int fd, const struct iovec *parts, int count, off_t offset, int flags);
// accept4(SOCK_CLOEXEC), the address not wanted.
int clinux_accept(int listener);
// accept4(SOCK_CLOEXEC | SOCK_NONBLOCK).
int clinux_accept_nonblocking(int listener);
// st_size of fstat(2), or -errno.
int64_t clinux_file_size(int fd);
// The unit of offsets and lengths past the page cache (STATX_DIOALIGN), 0 where there is no such access, -ENOSYS where nobody says.
int clinux_direct_unit(int fd);
// f_type of fstatfs(2), or -errno.
long clinux_file_system(int fd);
// fallocate(FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE)
int clinux_punch_hole(int fd, off_t offset, off_t length);

// One sendmsg/recvmsg with descriptors (SCM_RIGHTS). `fds` is an array of `fd_count` descriptors.
ssize_t clinux_send_with_fds(int socket, const struct iovec *parts, int part_count, const int *fds, int fd_count, int flags);
// Receives with MSG_CMSG_CLOEXEC. Up to `fd_capacity` (at most 253) descriptors are stored, `*fd_count` says how many;
// `*truncated` is 1 when the kernel dropped control or payload bytes (MSG_CTRUNC, MSG_TRUNC).
ssize_t clinux_receive_with_fds(int socket, void *buffer, size_t capacity, int *fds, int fd_capacity, int *fd_count,
                                int *truncated, int flags);
// struct ucred of the peer of a connected Unix socket.
int clinux_peer_credentials(int socket, int *pid, unsigned *uid, unsigned *gid);
// bind/connect/listen on a path; -ENAMETOOLONG when it does not fit sun_path.
int clinux_unix_bind(int socket, const char *path);
int clinux_unix_connect(int socket, const char *path);

// execveat(AT_EMPTY_PATH): becomes the program behind `fd`. `number` is a sixth argument, which the kernel ignores and a
// filter can ask for. -errno when it fails.
int clinux_become(int fd, char *const *arguments, char *const *environment, uint64_t number);

const char *clinux_errno_name(int error);

#endif
