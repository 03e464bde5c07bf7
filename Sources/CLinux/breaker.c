#define _GNU_SOURCE
#include "clinux_breaker.h"

#include <errno.h>
#include <signal.h>
#include <string.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

enum { milliseconds = 5 };

// Each protected thread has its own, and its handler runs on it; a thread sees its own signals in order.
static __thread volatile sig_atomic_t is_within, was_within, is_running;
static __thread int timer;
static __thread char is_protected;

static void set_timer(long nanoseconds) {
  struct itimerspec value = {{0, nanoseconds}, {0, nanoseconds}};
  syscall(SYS_timer_settime, timer, 0, &value, NULL);
}

// Stops only between two calls: a write that begins later starts it anew.
static void tick(int number) {
  (void)number;
  int error = errno;
  if (is_within || was_within) {
    was_within = 0;
  } else if (is_running) {
    is_running = 0;
    set_timer(0);
  }
  errno = error;
}

int clinux_breaker_prepare(void) {
  if (is_protected) return 0;
  struct sigaction action = {.sa_handler = tick}; // without SA_RESTART: that is the purpose
  sigemptyset(&action.sa_mask);
  if (sigaction(SIGALRM, &action, NULL) < 0) return -errno;
  struct sigevent event;
  memset(&event, 0, sizeof event);
  event.sigev_notify = SIGEV_THREAD_ID;
  event.sigev_signo = SIGALRM;
  event._sigev_un._tid = (int)syscall(SYS_gettid);
  if (syscall(SYS_timer_create, CLOCK_MONOTONIC, &event, &timer) < 0) return -errno;
  sigset_t set;
  sigemptyset(&set);
  sigaddset(&set, SIGALRM);
  pthread_sigmask(SIG_UNBLOCK, &set, NULL);
  is_protected = 1;
  return 0;
}

int clinux_breaker_begin(void) {
  if (!is_protected) return 0;
  is_within = 1;
  was_within = 1;
  if (!is_running) {
    is_running = 1;
    set_timer(milliseconds * 1000000L);
  }
  return 1;
}

void clinux_breaker_end(void) { is_within = 0; }
