// test=smp: starts every other processor that the MADT names (or cpus=N with ids 1..N-1) by INIT and SIPI, from real
// mode below 1 MiB to C code at CPL 3, where each counts and checks its own APIC id. x2apic=1 uses x2APIC mode;
// patience=MS is the longest wait (default 10000).
#include "micro.h"

static u32 total;
static u32 seen[256];
#define TURNS 1000

// Entered from start.S at CPL 3 on an application processor.
_Noreturn void ap_main(u64 index);
_Noreturn void ap_main(u64 index) {
  u32 id = x2apic ? 0 : read32(0xfee00020) >> 24;
  for (u32 i = 0; i < TURNS; i++) __atomic_fetch_add(&total, 1, __ATOMIC_SEQ_CST);
  if (x2apic) {
    // The mode is per processor: ours starts in xAPIC mode unless the VMM chose otherwise.
    u64 base = read_msr(0x1b);
    if (!(base & 0x400)) write_msr(0x1b, base | 0x400);
    id = (u32)read_msr(0x802);
  }
  __atomic_store_n(&seen[index], id + 1, __ATOMIC_RELEASE);
  park();
}

static void prepare_stacks_and_tss(u32 count) {
  ap_stacks = (u64)arena((u64)(count + 1) * 8192, 8192);
  for (u32 i = 1; i <= count; i++) {
    u8 *tss = arena(104, 128);
    *(u64 *)(tss + 4) = ap_stacks + (u64)i * 8192 + 4096;
    *(u16 *)(tss + 102) = 104;  // no I/O bitmap: application processors touch no port
    u64 a = (u64)tss;
    gdt[8 + 2 * i] = 103 | (a & 0xffffff) << 16 | 0x89ul << 40 | (a >> 24 & 0xff) << 56;
    gdt[9 + 2 * i] = a >> 32;
  }
}

void test_smp(void) {
  u32 ids[256], count = 0;
  if (option_number("x2apic", 0)) write_msr(0x1b, read_msr(0x1b) | 0x400);
  apic_enable();
  u32 self = apic_id();
  if (machine.cpu_count) {
    for (u32 i = 0; i < machine.cpu_count; i++)
      if (machine.cpu_apic_ids[i] != self) ids[count++] = machine.cpu_apic_ids[i];
  } else {
    for (u32 i = 1; i < option_number("cpus", 1) && i < 256; i++) ids[count++] = i;
  }
  if (count > 255) count = 255;
  prepare_stacks_and_tss(count);
  memcpy((void *)TRAMPOLINE, ap_trampoline, (size_t)(ap_trampoline_end - ap_trampoline));

  u64 begin = tsc();
  for (u32 i = 0; i < count; i++) {
    apic_send(ids[i], 0x4500);                       // INIT
    apic_send(ids[i], 0x4600 | TRAMPOLINE >> 12);    // start-up IPI, vector = page of the trampoline
  }
  u64 deadline = tsc() + option_number("patience", 10000) * tsc_khz();
  u32 alive = 0;
  while (alive < count && tsc() < deadline) {
    alive = 0;
    for (u32 i = 1; i <= count; i++) alive += __atomic_load_n(&seen[i], __ATOMIC_ACQUIRE) != 0;
    pause();
  }
  u64 end = tsc();
  report("smp.started", count > 0 && alive == count, "%u of %u in %lu us", alive, count, nanoseconds(end - begin) / 1000);

  // Every id exactly once, whatever the order of arrival.
  u32 matched = 0;
  for (u32 i = 0; i < count; i++)
    for (u32 k = 1; k <= count; k++) matched += seen[k] == ids[i] + 1;
  report("smp.ids", matched == count, "%u of %u APIC ids answered", matched, count);
  report("smp.counter", total == count * TURNS, "%u", total);
}
