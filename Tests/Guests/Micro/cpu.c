// The processor below CPL 3: gate calls, page table growth, local APIC, time.
#include "micro.h"

enum { GATE_RDMSR, GATE_WRMSR, GATE_HALT, GATE_INTERRUPTS, GATE_CPUID, GATE_TRIPLE_FAULT, GATE_PARK };

static u64 gate(u64 function, u64 a, u64 b, u64 c) {
  u64 result;
  register u64 fourth __asm__("r8") = c;
  __asm__ volatile("int3"
                   : "=a"(result), "+S"(a), "+d"(b)
                   : "D"(function), "r"(fourth)
                   : "rcx", "memory", "cc");
  return result;
}

u64 read_msr(u32 index) { return gate(GATE_RDMSR, index, 0, 0); }
void write_msr(u32 index, u64 value) { gate(GATE_WRMSR, index, value, 0); }
void halt_until_interrupt(void) { gate(GATE_HALT, 0, 0, 0); }
void interrupts(bool on) { gate(GATE_INTERRUPTS, on, 0, 0); }
void cpuid(u32 leaf, u32 subleaf, u32 out[4]) { gate(GATE_CPUID, leaf, subleaf, (u64)out); }
_Noreturn void triple_fault(void) { for (;;) gate(GATE_TRIPLE_FAULT, 0, 0, 0); }
_Noreturn void park(void) { for (;;) gate(GATE_PARK, 0, 0, 0); }

// ---- memory

static u64 arena_next = 0x400000;

void *arena(u64 size, u64 alignment) {
  arena_next = (arena_next + alignment - 1) & -alignment;
  void *p = (void *)arena_next;
  arena_next += size;
  return memset(p, 0, size);
}

// Adds 2 MiB pages; only absent entries are filled in, so no TLB flush is needed.
void map(u64 physical, u64 size) {
  u64 end = (physical + size + 0x1fffff) & ~0x1ffffful;
  for (u64 at = physical & ~0x1ffffful; at < end; at += 0x200000) {
    u64 *table = pml4;
    for (int shift = 39; shift > 21; shift -= 9) {
      u64 *entry = &table[at >> shift & 511];
      if (!(*entry & 1)) *entry = (u64)arena(4096, 4096) + 0x67;
      table = (u64 *)(*entry & 0x000ffffffffff000ul);
    }
    if (!(table[at >> 21 & 511] & 1)) table[at >> 21 & 511] = at + 0xe7;
  }
  compiler_barrier();
}

// ---- local APIC, by its page or by MSRs, whichever mode it is in

void apic_enable(void) {
  x2apic = (read_msr(0x1b) >> 10) & 1;
  // A legacy interrupt controller, where there is one, would deliver its timer to vector 8.
  out8(0x21, 0xff);
  out8(0xa1, 0xff);
  apic_write(0xf0, 0x1ff);  // spurious vector 0xff, software enable
  apic_write(0x80, 0);      // task priority: let everything through
}
u32 apic_read(u32 reg) { return x2apic ? (u32)read_msr(0x800 + reg / 16) : read32(0xfee00000 + reg); }
void apic_write(u32 reg, u32 value) {
  if (x2apic)
    write_msr(0x800 + reg / 16, value);
  else
    write32(0xfee00000 + reg, value);
}
u32 apic_id(void) { return x2apic ? apic_read(0x20) : apic_read(0x20) >> 24; }
void apic_send(u32 destination, u32 command) {
  if (x2apic) {
    write_msr(0x830, (u64)destination << 32 | command);
  } else {
    write32(0xfee00310, destination << 24);
    write32(0xfee00300, command);
  }
}

// ---- time

// From the hypervisor's timing leaf, else CPUID 0x15; without either an estimate that reports call an estimate.
u64 tsc_khz(void) {
  static u64 khz;
  if (khz) return khz;
  u32 r[4];
  cpuid(0x40000000, 0, r);
  if (r[0] >= 0x40000010) {
    cpuid(0x40000010, 0, r);
    khz = r[0];
  }
  if (!khz) {
    cpuid(0, 0, r);
    if (r[0] >= 0x15) {
      cpuid(0x15, 0, r);
      if (r[0] && r[1] && r[2]) khz = (u64)r[2] * r[1] / r[0] / 1000;
    }
  }
  if (!khz) khz = option_number("tsc_khz", 2500000);
  return khz;
}
u64 nanoseconds(u64 ticks) { return ticks / tsc_khz() * 1000000 + ticks % tsc_khz() * 1000000 / tsc_khz(); }
void wait_nanoseconds(u64 ns) {
  u64 end = tsc() + ns * tsc_khz() / 1000000;
  while (tsc() < end) pause();
}
bool wait_for_count(u32 vector, u32 at_least, u64 timeout_ns) {
  u64 end = tsc() + timeout_ns * tsc_khz() / 1000000;
  volatile u32 *count = &interrupt_count[vector];
  interrupts(true);
  while (*count < at_least && tsc() < end) pause();
  interrupts(false);
  return *count >= at_least;
}
