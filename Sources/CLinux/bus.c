#define _GNU_SOURCE
#include "clinux_bus.h"

#include <errno.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdint.h>
#include <sys/mman.h>
#include <sys/socket.h>

static atomic_int peer = -1;

static void replace_page(int number, siginfo_t *info, void *context) {
  (void)context;
  int error = errno;
  uintptr_t page = (uintptr_t)info->si_addr & ~(uintptr_t)4095;
  if (info->si_code == BUS_ADRERR &&
      mmap((void *)page, 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0) != MAP_FAILED) {
    int socket = atomic_load(&peer);
    if (socket >= 0) shutdown(socket, SHUT_RDWR);
    errno = error;
    return;
  }
  // Something else, or a huge page: the instruction is repeated and ends the process.
  signal(number, SIG_DFL);
}

void clinux_bus_guard(void) {
  struct sigaction action = {.sa_sigaction = replace_page, .sa_flags = SA_SIGINFO};
  sigemptyset(&action.sa_mask);
  sigaction(SIGBUS, &action, NULL);
}

void clinux_bus_peer(int socket) { atomic_store(&peer, socket); }
