// test=idle: hlt for ms=N (default 1000) by the LAPIC timer, so that the host can count its system calls meanwhile.
#include "micro.h"

#define TIMER_VECTOR 0x40

void test_idle(void) {
  u64 ms = option_number("ms", 1000);
  apic_enable();
  interrupt_count[TIMER_VECTOR] = 0;
  apic_write(0x3e0, 0xb);              // divide by 1
  apic_write(0x320, TIMER_VECTOR);     // one shot
  u64 begin = tsc();
  // KVM's APIC timer counts nanoseconds at divide by 1.
  apic_write(0x380, (u32)(ms * 1000000));
  halt_until_interrupt();
  u64 took = nanoseconds(tsc() - begin) / 1000;
  report("idle", interrupt_count[TIMER_VECTOR] == 1 && took >= ms * 1000, "%lu us halted", took);
}
