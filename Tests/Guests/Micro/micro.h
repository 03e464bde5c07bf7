// What the micro guests share: a freestanding guest of a few KiB that runs at CPL 3 (see start.S) and reports by lines on
// the serial port, `MICRO name ok|FAIL detail`.
#pragma once
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

typedef uint8_t u8;
typedef uint16_t u16;
typedef uint32_t u32;
typedef uint64_t u64;

// ---- start.S
extern u64 first_tsc, boot_pointer, ap_stacks, interrupt_tsc[256];
extern u32 boot_path, x2apic, ap_next, interrupt_count[256];
extern u64 pml4[512], gdt[];
extern u8 ap_trampoline[], ap_trampoline_end[], image_end[];
#define IMAGE_BASE 0x100000ul
#define TRAMPOLINE 0x10000ul

// ---- ports, memory-mapped registers, time
static inline u8 in8(u16 port) { u8 v; __asm__ volatile("inb %1, %0" : "=a"(v) : "Nd"(port)); return v; }
static inline u16 in16(u16 port) { u16 v; __asm__ volatile("inw %1, %0" : "=a"(v) : "Nd"(port)); return v; }
static inline u32 in32(u16 port) { u32 v; __asm__ volatile("inl %1, %0" : "=a"(v) : "Nd"(port)); return v; }
static inline void out8(u16 port, u8 v) { __asm__ volatile("outb %0, %1" ::"a"(v), "Nd"(port) : "memory"); }
static inline void out16(u16 port, u16 v) { __asm__ volatile("outw %0, %1" ::"a"(v), "Nd"(port) : "memory"); }
static inline void out32(u16 port, u32 v) { __asm__ volatile("outl %0, %1" ::"a"(v), "Nd"(port) : "memory"); }

// The machine's generic event register; reading it clears what it tells.
enum { EVENT_PORT = 0x604, EVENT_POWER_BUTTON = 1, EVENT_HOT_PLUG = 2 };

// Register accesses are single plain `mov`s of the width named; the compiler must neither merge nor widen them.
#define ACCESSORS(bits, suffix)                                                                          \
  static inline u##bits read##bits(u64 a) {                                                              \
    u##bits v;                                                                                           \
    __asm__ volatile("mov" suffix " (%1), %0" : "=a"(v) : "r"(a) : "memory");                            \
    return v;                                                                                            \
  }                                                                                                      \
  static inline void write##bits(u64 a, u##bits v) {                                                     \
    __asm__ volatile("mov" suffix " %0, (%1)" ::"a"(v), "r"(a) : "memory");                              \
  }
ACCESSORS(8, "b")
ACCESSORS(16, "w")
ACCESSORS(32, "l")
ACCESSORS(64, "q")

static inline u64 tsc(void) {
  u32 low, high;
  __asm__ volatile("lfence; rdtsc; lfence" : "=a"(low), "=d"(high)::"memory");
  return (u64)high << 32 | low;
}
static inline void pause(void) { __asm__ volatile("pause"); }
static inline void compiler_barrier(void) { __asm__ volatile("" ::: "memory"); }
// A locked operation rather than mfence: as strong for ordinary memory, and every CPU and emulator has it.
static inline void full_barrier(void) { __asm__ volatile("lock addl $0, -8(%%rsp)" ::: "memory", "cc"); }

// ---- cpu.c: the gate into CPL 0, interrupts, mappings, time
u64 read_msr(u32 index);
void write_msr(u32 index, u64 value);
void halt_until_interrupt(void);  // call with interrupts off
void interrupts(bool on);
void cpuid(u32 leaf, u32 subleaf, u32 out[4]);
_Noreturn void triple_fault(void);
_Noreturn void park(void);

void map(u64 physical, u64 size);  // identity-maps what lies above 4 GiB; below, all is mapped
void *arena(u64 size, u64 alignment);  // zeroed memory from 4 MiB up, never given back

void apic_enable(void);
u32 apic_id(void);
u32 apic_read(u32 reg);  // xAPIC offset, e.g. 0x20
void apic_write(u32 reg, u32 value);
void apic_send(u32 destination, u32 command);

u64 tsc_khz(void);
u64 nanoseconds(u64 ticks);
void wait_nanoseconds(u64 ns);
bool wait_for_count(u32 vector, u32 at_least, u64 timeout_ns);  // spins with interrupts on, leaves them off

// ---- print.c
void print(const char *format, ...) __attribute__((format(printf, 1, 2)));  // %s %c %d %u %x %lu %lx %ld
bool report(const char *name, bool ok, const char *format, ...) __attribute__((format(printf, 3, 4)));
extern u32 failures, reports;

// ---- main.c: the command line
const char *option(const char *name);  // text after "name=", up to a blank; NULL when absent
u64 option_number(const char *name, u64 otherwise);
bool option_is(const char *name, const char *value);

// ---- memory and strings
void *memset(void *, int, size_t);
void *memcpy(void *, const void *, size_t);
int memcmp(const void *, const void *, size_t);
size_t strlen(const char *);

// Deterministic numbers (splitmix64): one seed, one sequence, so a failing run can be repeated.
static inline u64 next_random(u64 *state) {
  u64 z = (*state += 0x9e3779b97f4a7c15ul);
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ul;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebul;
  return z ^ (z >> 31);
}

// ---- machine.c: what the loader told us, and what ACPI tells
struct machine {
  u64 command_line, rsdp, memory_map;
  u32 memory_map_entries, memory_map_stride;
  u64 madt, fadt, mcfg, dsdt;          // 0 when absent
  u64 ecam;                            // base for bus 0, 0 without MCFG
  u32 cpu_count;
  u32 cpu_apic_ids[256];
  u16 reset_port, sleep_port, pm1a_control_port;
  u8 reset_value;
  u64 ioapic;
};
extern struct machine machine;
struct memory_range { u64 address, size; u32 type; };
struct memory_range memory_map_entry(u32 index);
void machine_read(void);               // trusts nothing but the checksums; missing things stay 0
bool checksum_ok(u64 address, u32 length);
_Noreturn void power_off(void);

// ---- tests (one per file); each reports lines of its own
void test_boot(void), test_exits(void), test_memory(void), test_smp(void), test_idle(void), test_reset(void);
void test_registers(void), test_pci(void), test_msix(void), test_kick(void), test_irq(void), test_fuzz(void);
void test_ring(void), test_blk(void), test_net(void), test_console(void), test_rng(void), test_hotplug(void);
