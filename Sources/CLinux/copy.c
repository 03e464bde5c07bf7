#define _GNU_SOURCE
#include "clinux_copy.h"

#include <errno.h>
#include <pthread.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <ucontext.h>

// One instruction touches memory, so one address tells the handler that the fault is ours. The stack is as at entry there.
__asm__(".text\n"
        ".p2align 4\n"
        ".globl clinux_copy_guarded\n"
        ".type clinux_copy_guarded,@function\n"
        "clinux_copy_guarded:\n"
        ".cfi_startproc\n"
        "  movq %rdx, %rcx\n"
        "  cld\n"
        ".Lclinux_copying:\n"
        "  rep movsb\n"
        "  xorl %eax, %eax\n"
        "  ret\n"
        ".Lclinux_copy_failed:\n"
        "  movl $-1, %eax\n"
        "  ret\n"
        ".cfi_endproc\n"
        ".size clinux_copy_guarded, . - clinux_copy_guarded\n"
        ".globl clinux_copy_places\n"
        ".hidden clinux_copy_places\n"
        ".type clinux_copy_places,@function\n"
        "clinux_copy_places:\n"
        ".cfi_startproc\n"
        "  leaq .Lclinux_copying(%rip), %rax\n"
        "  leaq .Lclinux_copy_failed(%rip), %rdx\n"
        "  ret\n"
        ".cfi_endproc\n"
        ".size clinux_copy_places, . - clinux_copy_places\n");

// Two results in two registers.
struct places {
  unsigned long copying, failed;
};
struct places clinux_copy_places(void);

// Who was told of such signals before (bus.c).
static struct sigaction earlier;

static void on_bus_error(int signal, siginfo_t *info, void *context) {
  ucontext_t *state = context;
  struct places places = clinux_copy_places();
  if ((unsigned long)state->uc_mcontext.gregs[REG_RIP] != places.copying) {
    if (!(earlier.sa_flags & SA_SIGINFO)) abort();
    earlier.sa_sigaction(signal, info, context);
    return;
  }
  state->uc_mcontext.gregs[REG_RIP] = (greg_t)places.failed;
}

int clinux_guard_copies(void) {
  struct sigaction action;
  memset(&action, 0, sizeof action);
  action.sa_sigaction = on_bus_error;
  action.sa_flags = SA_SIGINFO;
  sigemptyset(&action.sa_mask);
  struct sigaction old;
  if (sigaction(SIGBUS, &action, &old) != 0) return -errno;
  if (old.sa_sigaction != on_bus_error) earlier = old;
  sigset_t set;
  sigemptyset(&set);
  sigaddset(&set, SIGBUS);
  return -pthread_sigmask(SIG_UNBLOCK, &set, NULL);
}
