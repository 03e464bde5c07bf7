// Copies from memory that may vanish: a mapped file that is cut short, or a page the host cannot read.
#ifndef CLINUX_COPY_H
#define CLINUX_COPY_H

#include <stddef.h>

// Copies n bytes; 0, or -1 when an access ended in SIGBUS, and then how much was copied is not said. Only in threads that
// called clinux_guard_copies.
int clinux_copy_guarded(void *to, const void *from, size_t n);

// Asks for the cache lines from `first` up to `end` behind an address that is read soon. Never a fault, whatever the address is.
static inline void clinux_prefetch(const void *from, int first, int end) {
  for (int line = first; line < end; line++) __builtin_prefetch((const char *)from + line * 64);
}

// Installs the handler for SIGBUS, process-wide, and unblocks the signal in this thread; -errno or 0. A SIGBUS elsewhere than in
// clinux_copy_guarded goes to the handler that was there before, or ends the process.
int clinux_guard_copies(void);

#endif
