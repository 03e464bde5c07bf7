#define _GNU_SOURCE
#include "attacks.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <netinet/in.h>
#include <sched.h>
#include <signal.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/prctl.h>
#include <sys/ptrace.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <unistd.h>

struct scene {
  int memory, socket, victim;
};

static long raw(long n, long a, long b, long c, long d, long e, long f) {
  long result = syscall(n, a, b, c, d, e, f);
  return result < 0 ? -errno : result;
}
#define CALL6(n, a, b, c, d, e, f, ...) raw((n), (long)(a), (long)(b), (long)(c), (long)(d), (long)(e), (long)(f))
#define CALL(...) CALL6(__VA_ARGS__, 0, 0, 0, 0, 0, 0, 0)
#define ATTACK(name, ...) static long name(const struct scene *s) { (void)s; __VA_ARGS__ }

ATTACK(open_file, return CALL(SYS_openat, AT_FDCWD, "/etc/passwd", O_RDONLY);)
ATTACK(open_old, return CALL(SYS_open, "/etc/passwd", O_RDONLY);)
ATTACK(open_root, return CALL(SYS_openat, AT_FDCWD, "/..", O_RDONLY | O_DIRECTORY);)
ATTACK(make_file, return CALL(SYS_openat, AT_FDCWD, "/x", O_RDWR | O_CREAT, 0600);)
ATTACK(make_directory, return CALL(SYS_mkdir, "/x", 0700);)
ATTACK(make_device, return CALL(SYS_mknod, "/kvm", 0020600, 10 << 8 | 232);)
ATTACK(open_proc_memory, return CALL(SYS_openat, AT_FDCWD, "/proc/1/mem", O_RDWR);)
ATTACK(open_by_handle, struct file_handle h = {.handle_bytes = 0}; return CALL(SYS_open_by_handle_at, AT_FDCWD, &h, O_RDONLY);)
ATTACK(socket_internet, return CALL(SYS_socket, AF_INET, SOCK_STREAM, 0);)
ATTACK(socket_netlink, return CALL(SYS_socket, AF_NETLINK, SOCK_RAW, 0);)
ATTACK(socket_vsock, return CALL(SYS_socket, 40, SOCK_STREAM, 0);)
static long connect_abstract(const struct scene *s) {
  (void)s;
  long fd = CALL(SYS_socket, AF_UNIX, SOCK_STREAM, 0);
  if (fd < 0) return fd;
  struct sockaddr_un a = {.sun_family = AF_UNIX, .sun_path = "\0martlet-isolation-test"};
  return CALL(SYS_connect, fd, &a, offsetof(struct sockaddr_un, sun_path) + 23);
}
static long connect_loopback(const struct scene *s) {
  (void)s;
  long fd = CALL(SYS_socket, AF_INET, SOCK_STREAM, 0);
  if (fd < 0) return fd;
  struct sockaddr_in a = {.sin_family = AF_INET, .sin_port = htons(22), .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
  return CALL(SYS_connect, fd, &a, sizeof a);
}
ATTACK(bind_socket, struct sockaddr_un a = {.sun_family = AF_UNIX}; return CALL(SYS_bind, s->socket, &a, 2);)
ATTACK(exec_shell, char *const none[] = {NULL}; return CALL(SYS_execve, "/bin/sh", none, none);)
ATTACK(exec_descriptor, char *const none[] = {NULL}; return CALL(SYS_execveat, s->memory, "", none, none, AT_EMPTY_PATH);)
ATTACK(trace_me, return CALL(SYS_ptrace, PTRACE_TRACEME);)
ATTACK(trace_victim, return CALL(SYS_ptrace, PTRACE_SEIZE, s->victim);)
static long read_victim(const struct scene *s) {
  char buffer[8];
  struct iovec mine = {buffer, 8}, theirs = {(void *)0x400000, 8};
  return CALL(SYS_process_vm_readv, s->victim, &mine, 1, &theirs, 1, 0);
}
static long write_victim(const struct scene *s) {
  char buffer[8] = {0};
  struct iovec mine = {buffer, 8}, theirs = {(void *)0x400000, 8};
  return CALL(SYS_process_vm_writev, s->victim, &mine, 1, &theirs, 1, 0);
}
ATTACK(signal_victim, return CALL(SYS_kill, s->victim, 0);)
ATTACK(signal_everyone, return CALL(SYS_kill, -1, 0);)
ATTACK(signal_thread, return CALL(SYS_tgkill, s->victim, s->victim, 0);)
ATTACK(signal_queued, return CALL(SYS_rt_sigqueueinfo, s->victim, SIGUSR1, NULL);)
ATTACK(pidfd_victim, return CALL(SYS_pidfd_open, s->victim, 0);)
ATTACK(pidfd_take, return CALL(SYS_pidfd_getfd, s->socket, 0, 0);)
ATTACK(compare_victim, return CALL(SYS_kcmp, s->victim, s->victim, 0, 0, 0);)
ATTACK(map_executable, return CALL(SYS_mmap, 0, 4096, PROT_READ | PROT_EXEC, MAP_PRIVATE | MAP_ANONYMOUS, -1) > 0 ? 0 : -EPERM;)
ATTACK(make_executable, static char page[8192]; return CALL(SYS_mprotect, ((uintptr_t)page + 4095) & ~4095ul, 4096, PROT_READ | PROT_EXEC);)
ATTACK(make_executable_key, static char page[8192]; return CALL(SYS_pkey_mprotect, ((uintptr_t)page + 4095) & ~4095ul, 4096, PROT_EXEC, -1);)
ATTACK(fork_process, return CALL(SYS_fork) >= 0 ? 0 : -errno;)
ATTACK(clone_thread, struct { uint64_t f[11]; } a = {{CLONE_VM}}; return CALL(SYS_clone3, &a, sizeof a);)
ATTACK(new_user_namespace, return CALL(SYS_unshare, CLONE_NEWUSER);)
ATTACK(new_namespaces, return CALL(SYS_unshare, CLONE_NEWNS | CLONE_NEWNET);)
ATTACK(join_namespace, return CALL(SYS_setns, s->socket, 0);)
ATTACK(mount_proc, return CALL(SYS_mount, "p", "/", "proc", 0, NULL);)
ATTACK(mount_new, return CALL(SYS_fsopen, "proc", 0);)
ATTACK(unmount_root, return CALL(SYS_umount2, "/", MNT_DETACH);)
ATTACK(change_root, return CALL(SYS_chroot, "..");)
ATTACK(pivot, return CALL(SYS_pivot_root, "/", "/");)
ATTACK(become_root, return CALL(SYS_setresuid, 0, 0, 0);)
ATTACK(become_root_group, return CALL(SYS_setresgid, 0, 0, 0);)
ATTACK(join_groups, gid_t g = 0; return CALL(SYS_setgroups, 1, &g);)
static long regain_capabilities(const struct scene *s) {
  (void)s;
  struct { uint32_t version; int pid; } header = {0x20080522, 0};
  uint32_t data[6] = {1u << 21, 1u << 21, 0, 0, 0, 0};
  return CALL(SYS_capset, &header, data);
}
ATTACK(raise_ambient, return CALL(SYS_prctl, PR_CAP_AMBIENT, PR_CAP_AMBIENT_RAISE, 21, 0, 0);)
ATTACK(become_dumpable, return CALL(SYS_prctl, PR_SET_DUMPABLE, 1, 0, 0, 0);)
ATTACK(outlive_parent, return CALL(SYS_prctl, PR_SET_PDEATHSIG, 0, 0, 0, 0);)
ATTACK(change_filter, return CALL(SYS_seccomp, 1, 0, NULL);)
ATTACK(ring_setup, char parameters[120] = {0}; return CALL(SYS_io_uring_setup, 4, parameters);)
ATTACK(ring_register, return CALL(SYS_io_uring_register, s->socket, 2, NULL, 0);)
ATTACK(map_userfault, return CALL(SYS_userfaultfd, 1);)
ATTACK(make_memory, return CALL(SYS_memfd_create, "x", 0);)
ATTACK(load_bpf, return CALL(SYS_bpf, 0, NULL, 0);)
ATTACK(watch_performance, return CALL(SYS_perf_event_open, NULL, 0, -1, -1, 0);)
ATTACK(read_kernel_log, char text[64]; return CALL(SYS_syslog, 3, text, 64);)
ATTACK(add_key_, return CALL(SYS_add_key, "user", "x", "y", 1, -2);)
ATTACK(shared_segment, return CALL(SYS_shmget, 0x4D41, 4096, 0600 | 01000);)
ATTACK(message_queue, return CALL(SYS_mq_open, "x", O_RDWR | O_CREAT, 0600, NULL);)
ATTACK(raise_limit, struct rlimit l = {RLIM_INFINITY, RLIM_INFINITY}; return CALL(SYS_prlimit64, 0, RLIMIT_NOFILE, &l, NULL);)
ATTACK(raise_priority, return CALL(SYS_setpriority, PRIO_PROCESS, 0, -20);)
ATTACK(real_time, int p = 1; return CALL(SYS_sched_setscheduler, 0, SCHED_FIFO, &p);)
ATTACK(rename_host, return CALL(SYS_sethostname, "x", 1);)
ATTACK(reboot_host, return CALL(SYS_reboot, 0xfee1dead, 672274793, 0, NULL);)
ATTACK(port_access, return CALL(SYS_iopl, 3);)
ATTACK(segment_table, return CALL(SYS_modify_ldt, 1, NULL, 0);)
ATTACK(shrink_memory, return CALL(SYS_ftruncate, s->memory, 0);)
ATTACK(grow_memory, return CALL(SYS_ftruncate, s->memory, 1 << 30);)
ATTACK(punch_memory, return CALL(SYS_fallocate, s->memory, 3, 0, 4096);)
ATTACK(seal_memory, return CALL(SYS_fcntl, s->memory, 1033 /* F_ADD_SEALS */, 8 /* F_SEAL_WRITE */);)
ATTACK(make_blocking, return CALL(SYS_fcntl, s->socket, F_SETFL, 0);)
ATTACK(lock_memory, return CALL(SYS_mlockall, 3);)
ATTACK(type_into_terminal, char c = 'x'; return CALL(SYS_ioctl, 0, 0x5412 /* TIOCSTI */, &c);)
ATTACK(make_machine, return CALL(SYS_ioctl, s->socket, 0xAE01 /* KVM_CREATE_VM */, 0);)
ATTACK(other_interface, return CALL(0x40000000 | SYS_getpid);)
static long old_interface(const struct scene *s) {
  (void)s;
  long result;
  __asm__ volatile("int $0x80" : "=a"(result) : "a"(20 /* getpid of i386 */) : "memory", "r8", "r9", "r10", "r11");
  return result;
}

#define ENTRY(name) {#name, name}
static const struct {
  const char *name;
  long (*body)(const struct scene *);
} attacks[] = {
    ENTRY(open_file), ENTRY(open_old), ENTRY(open_root), ENTRY(make_file), ENTRY(make_directory), ENTRY(make_device),
    ENTRY(open_proc_memory), ENTRY(open_by_handle), ENTRY(socket_internet), ENTRY(socket_netlink), ENTRY(socket_vsock),
    ENTRY(connect_abstract), ENTRY(connect_loopback), ENTRY(bind_socket), ENTRY(exec_shell), ENTRY(exec_descriptor),
    ENTRY(trace_me), ENTRY(trace_victim), ENTRY(read_victim), ENTRY(write_victim), ENTRY(signal_victim),
    ENTRY(signal_everyone), ENTRY(signal_thread), ENTRY(signal_queued), ENTRY(pidfd_victim), ENTRY(pidfd_take),
    ENTRY(compare_victim), ENTRY(map_executable), ENTRY(make_executable), ENTRY(make_executable_key), ENTRY(fork_process),
    ENTRY(clone_thread), ENTRY(new_user_namespace), ENTRY(new_namespaces), ENTRY(join_namespace), ENTRY(mount_proc),
    ENTRY(mount_new), ENTRY(unmount_root), ENTRY(change_root), ENTRY(pivot), ENTRY(become_root), ENTRY(become_root_group),
    ENTRY(join_groups), ENTRY(regain_capabilities), ENTRY(raise_ambient), ENTRY(become_dumpable), ENTRY(outlive_parent),
    ENTRY(change_filter), ENTRY(ring_setup), ENTRY(ring_register), ENTRY(map_userfault), ENTRY(make_memory),
    ENTRY(load_bpf), ENTRY(watch_performance), ENTRY(read_kernel_log), ENTRY(add_key_), ENTRY(shared_segment),
    ENTRY(message_queue), ENTRY(raise_limit), ENTRY(raise_priority), ENTRY(real_time), ENTRY(rename_host),
    ENTRY(reboot_host), ENTRY(port_access), ENTRY(segment_table), ENTRY(shrink_memory), ENTRY(grow_memory),
    ENTRY(punch_memory), ENTRY(seal_memory), ENTRY(make_blocking), ENTRY(lock_memory), ENTRY(type_into_terminal),
    ENTRY(make_machine), ENTRY(other_interface), ENTRY(old_interface),
};
enum { attack_count = sizeof attacks / sizeof *attacks };

const char *attack_name(int index) { return index >= 0 && index < attack_count ? attacks[index].name : NULL; }

long attack_run(int index, int memory, int socket, int victim) {
  struct scene scene = {memory, socket, victim};
  return attacks[index].body(&scene);
}

long attack_call(long number, const unsigned long *a) {
  long result = syscall(number, a[0], a[1], a[2], a[3], a[4], a[5]);
  return result < 0 ? -errno : result;
}

int attack_fork(void) {
  int child = fork();
  if (child == 0) alarm(2);
  return child;
}

int attack_wait(int child, int *code) {
  int status = 0;
  while (waitpid(child, &status, 0) < 0 && errno == EINTR) {
  }
  *code = WIFEXITED(status) ? WEXITSTATUS(status) : -1;
  return WIFSIGNALED(status) ? WTERMSIG(status) : 0;
}

int attack_forget(const int *calls, int count) {
  struct sock_filter program[64];
  if (count < 0 || count > 24) return -E2BIG;
  int length = 0;
  program[length++] = (struct sock_filter)BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, nr));
  for (int i = 0; i < count; i++) {
    program[length++] = (struct sock_filter)BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, calls[i], 0, 1);
    program[length++] = (struct sock_filter)BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ERRNO | ENOSYS);
  }
  program[length++] = (struct sock_filter)BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW);
  struct sock_fprog whole = {.len = length, .filter = program};
  if (prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) < 0) return -errno;
  return syscall(SYS_seccomp, SECCOMP_SET_MODE_FILTER, 0, &whole) < 0 ? -errno : 0;
}

int attack_execute(const char *path, char *const *arguments) {
  execv(path, arguments);
  return -errno;
}
