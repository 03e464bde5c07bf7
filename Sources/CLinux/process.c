#define _GNU_SOURCE
#include "clinux_process.h"

#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <net/if.h>
#include <netpacket/packet.h>
#include <sched.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/ptrace.h>
#include <sys/socket.h>
#include <sys/time.h>
#include <sys/uio.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

static void become(char *const arguments[], int output, int extra, int processor, pid_t parent, int report) {
  sigset_t none;
  sigemptyset(&none);
  sigprocmask(SIG_SETMASK, &none, NULL);
  signal(SIGPIPE, SIG_DFL);
  setpgid(0, 0);
  prctl(PR_SET_PDEATHSIG, SIGKILL);
  if (getppid() != parent) _exit(127);
  int null = open("/dev/null", O_RDONLY | O_CLOEXEC);
  // `report` must not be where `extra` goes.
  int kept = fcntl(report, F_DUPFD_CLOEXEC, 10);
  if (null >= 0) dup2(null, 0);
  dup2(output, 1);
  dup2(output, 2);
  // Last, as it may cover one of the others.
  if (extra >= 0 && extra != 3) dup2(extra, 3);
  if (extra == 3) fcntl(3, F_SETFD, 0);
  if (processor >= 0) clinux_pin(processor);
  execvp(arguments[0], arguments);
  int error = errno;
  if (write(kept, &error, sizeof error) < 0) _exit(126);
  _exit(127);
}

int clinux_spawn_tied(char *const arguments[], int output, int extra, int processor) {
  int report[2];
  if (pipe2(report, O_CLOEXEC) < 0) return -errno;
  pid_t parent = getpid();
  pid_t child = fork();
  if (child == 0) become(arguments, output, extra, processor, parent, report[1]);
  int error = child < 0 ? errno : 0;
  close(report[1]);
  if (child > 0) {
    int cause = 0;
    if (read(report[0], &cause, sizeof cause) == sizeof cause) {
      error = cause;
      waitpid(child, NULL, 0);
    }
  }
  close(report[0]);
  return error ? -error : child;
}

int clinux_packet_socket(const char *interface, unsigned short type) {
  struct sockaddr_ll address = {.sll_family = AF_PACKET, .sll_protocol = htons(type)};
  address.sll_ifindex = (int)if_nametoindex(interface);
  if (address.sll_ifindex == 0) return -errno;
  int packets = socket(AF_PACKET, SOCK_RAW | SOCK_CLOEXEC, htons(type));
  if (packets < 0) return -errno;
  // So that a thread that waits for frames looks whether it is to end.
  struct timeval patience = {.tv_usec = 50000};
  if (bind(packets, (struct sockaddr *)&address, sizeof address) < 0 ||
      setsockopt(packets, SOL_SOCKET, SO_RCVTIMEO, &patience, sizeof patience) < 0) {
    int error = errno;
    close(packets);
    return -error;
  }
  return packets;
}

int clinux_pin(int processor) {
  cpu_set_t set;
  CPU_ZERO(&set);
  if (processor < 0 || processor >= CPU_SETSIZE) return -EINVAL;
  CPU_SET(processor, &set);
  return sched_setaffinity(0, sizeof set, &set) < 0 ? -errno : 0;
}

int clinux_cpu_time(int process, uint64_t *nanoseconds) {
  clockid_t clock;
  struct timespec time;
  int error = clock_getcpuclockid(process, &clock);
  if (error) return -error;
  if (clock_gettime(clock, &time) < 0) return -errno;
  *nanoseconds = (uint64_t)time.tv_sec * 1000000000u + (uint64_t)time.tv_nsec;
  return 0;
}

int clinux_ptrace(int request, int thread, unsigned long address, unsigned long data) {
  long result = ptrace((enum __ptrace_request)request, thread, address, data);
  return result < 0 ? -errno : (int)result;
}

int clinux_wait_thread(int thread, int *status, int blocking) {
  int result = waitpid(thread, status, __WALL | __WNOTHREAD | (blocking ? 0 : WNOHANG));
  return result < 0 ? -errno : result;
}

int clinux_spawn_traced(char *const arguments[]) {
  pid_t child = fork();
  if (child < 0) return -errno;
  if (child == 0) {
    sigset_t none;
    sigemptyset(&none);
    sigprocmask(SIG_SETMASK, &none, NULL);
    if (ptrace(PTRACE_TRACEME, 0, 0, 0) < 0) _exit(126);
    raise(SIGSTOP);
    execvp(arguments[0], arguments);
    _exit(errno == ENOENT ? 127 : 126);
  }
  return (int)child;
}

int clinux_trace_call(int thread, uint64_t words[7]) {
  struct {
    uint8_t kind;
    uint8_t padding[3];
    uint32_t architecture;
    uint64_t instruction, stack;
    uint64_t words[8];
  } info;
  memset(&info, 0, sizeof info);
  long got = ptrace((enum __ptrace_request)0x420e, thread, (void *)sizeof info, &info); // PTRACE_GET_SYSCALL_INFO
  if (got < 0) return -errno;
  for (int i = 0; i < 7; i++) words[i] = info.words[i];
  return info.kind;
}

long clinux_read_memory(int process, uint64_t address, void *buffer, unsigned long capacity) {
  unsigned long done = 0;
  while (done < capacity) {
    unsigned long part = 4096 - ((address + done) & 4095);
    if (part > capacity - done) part = capacity - done;
    struct iovec ours = {(char *)buffer + done, part};
    struct iovec theirs = {(void *)(uintptr_t)(address + done), part};
    ssize_t got = process_vm_readv(process, &ours, 1, &theirs, 1, 0);
    if (got < 0) return done ? (long)done : -errno;
    done += (unsigned long)got;
    if ((unsigned long)got < part || memchr((char *)buffer + done - got, 0, (size_t)got)) break;
  }
  return (long)done;
}
