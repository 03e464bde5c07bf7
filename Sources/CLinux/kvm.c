#include "clinux_kvm.h"

#include <cpuid.h>
#include <errno.h>
#include <signal.h>
#include <stddef.h>
#include <string.h>
#include <sys/ioctl.h>

static void kick_handler(int signal) { (void)signal; }

int clinux_install_kick_handler(int signal) {
  struct sigaction action;
  memset(&action, 0, sizeof action);
  action.sa_handler = kick_handler;
  return sigaction(signal, &action, NULL) < 0 ? -errno : 0;
}

int clinux_kick_signal(void) { return SIGRTMIN; }

void clinux_cpuid(uint32_t leaf, uint32_t subleaf, uint32_t registers[4]) {
  __cpuid_count(leaf, subleaf, registers[0], registers[1], registers[2], registers[3]);
}

// The module KVM writes these numbers as literals, because Swift does not import them; here the kernel's headers agree.
#define AGREE(name, value) _Static_assert((name) == (value), #name)
AGREE(KVM_GET_API_VERSION, 0xAE00);
AGREE(KVM_CREATE_VM, 0xAE01);
AGREE(KVM_GET_MSR_INDEX_LIST, 0xC004AE02);
AGREE(KVM_CHECK_EXTENSION, 0xAE03);
AGREE(KVM_GET_VCPU_MMAP_SIZE, 0xAE04);
AGREE(KVM_GET_SUPPORTED_CPUID, 0xC008AE05);
AGREE(KVM_CREATE_VCPU, 0xAE41);
AGREE(KVM_SET_USER_MEMORY_REGION, 0x4020AE46);
AGREE(KVM_SET_TSS_ADDR, 0xAE47);
AGREE(KVM_SET_IDENTITY_MAP_ADDR, 0x4008AE48);
AGREE(KVM_SET_GSI_ROUTING, 0x4008AE6A);
AGREE(KVM_IRQFD, 0x4020AE76);
AGREE(KVM_IOEVENTFD, 0x4040AE79);
AGREE(KVM_SET_CLOCK, 0x4030AE7B);
AGREE(KVM_GET_CLOCK, 0x8030AE7C);
AGREE(KVM_RUN, 0xAE80);
AGREE(KVM_GET_REGS, 0x8090AE81);
AGREE(KVM_SET_REGS, 0x4090AE82);
AGREE(KVM_GET_SREGS, 0x8138AE83);
AGREE(KVM_SET_SREGS, 0x4138AE84);
AGREE(KVM_GET_MSRS, 0xC008AE88);
AGREE(KVM_SET_MSRS, 0x4008AE89);
AGREE(KVM_GET_LAPIC, 0x8400AE8E);
AGREE(KVM_SET_LAPIC, 0x4400AE8F);
AGREE(KVM_SET_CPUID2, 0x4008AE90);
AGREE(KVM_GET_MP_STATE, 0x8004AE98);
AGREE(KVM_SET_MP_STATE, 0x4004AE99);
AGREE(KVM_NMI, 0xAE9A);
AGREE(KVM_GET_VCPU_EVENTS, 0x8040AE9F);
AGREE(KVM_SET_VCPU_EVENTS, 0x4040AEA0);
AGREE(KVM_GET_DEBUGREGS, 0x8080AEA1);
AGREE(KVM_SET_DEBUGREGS, 0x4080AEA2);
AGREE(KVM_GET_TSC_KHZ, 0xAEA3);
AGREE(KVM_ENABLE_CAP, 0x4068AEA3);
AGREE(KVM_GET_XSAVE, 0x9000AEA4);
AGREE(KVM_SET_XSAVE, 0x5000AEA5);
AGREE(KVM_SIGNAL_MSI, 0x4020AEA5);
AGREE(KVM_GET_XCRS, 0x8188AEA6);
AGREE(KVM_SET_XCRS, 0x4188AEA7);
AGREE(KVM_KVMCLOCK_CTRL, 0xAEAD);

AGREE(offsetof(struct kvm_run, immediate_exit), 1);
AGREE(offsetof(struct kvm_run, exit_reason), 8);
AGREE(offsetof(struct kvm_run, io.direction), 32);
AGREE(offsetof(struct kvm_run, io.size), 33);
AGREE(offsetof(struct kvm_run, io.port), 34);
AGREE(offsetof(struct kvm_run, io.count), 36);
AGREE(offsetof(struct kvm_run, io.data_offset), 40);
AGREE(offsetof(struct kvm_run, mmio.phys_addr), 32);
AGREE(offsetof(struct kvm_run, mmio.data), 40);
AGREE(offsetof(struct kvm_run, mmio.len), 48);
AGREE(offsetof(struct kvm_run, mmio.is_write), 52);
AGREE(offsetof(struct kvm_run, eoi.vector), 32);
AGREE(offsetof(struct kvm_run, system_event.type), 32);
AGREE(offsetof(struct kvm_run, internal.suberror), 32);
AGREE(offsetof(struct kvm_run, internal.ndata), 36);
AGREE(offsetof(struct kvm_run, internal.data), 40);
AGREE(offsetof(struct kvm_run, fail_entry.hardware_entry_failure_reason), 32);
