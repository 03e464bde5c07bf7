// KVM: the kernel's own structures, and the three things Swift cannot say about running a processor.
#ifndef CLINUX_KVM_H
#define CLINUX_KVM_H

#include <linux/kvm.h>
#include <stdint.h>

// sigaction with an empty handler and without SA_RESTART, so that a signal makes KVM_RUN return EINTR.
int clinux_install_kick_handler(int signal);

// The first real-time signal that libc leaves to programs (SIGRTMIN is a function call).
int clinux_kick_signal(void);

// CPUID of the host: eax, ebx, ecx, edx of a leaf.
void clinux_cpuid(uint32_t leaf, uint32_t subleaf, uint32_t registers[4]);

#endif
