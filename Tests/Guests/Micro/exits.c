// test=exits: what leaves the guest. Unclaimed ports and addresses read all ones at every width and swallow writes; the
// cost of one exit. n=N turns per measurement (default 1000).
#include "micro.h"

// Nothing is promised at these places, in any of our machines.
#define UNCLAIMED_PORT 0xa00
#define UNCLAIMED_ADDRESS 0xd8000000ul

void test_exits(void) {
  u32 n = (u32)option_number("n", 1000);
  u32 p8 = in8(UNCLAIMED_PORT), p16 = in16(UNCLAIMED_PORT), p32 = in32(UNCLAIMED_PORT);
  report("exits.port-ones", p8 == 0xff && p16 == 0xffff && p32 == 0xffffffff, "%x %x %x", p8, p16, p32);
  out8(UNCLAIMED_PORT, 1);
  out16(UNCLAIMED_PORT, 2);
  out32(UNCLAIMED_PORT, 3);

  u64 m8 = read8(UNCLAIMED_ADDRESS), m16 = read16(UNCLAIMED_ADDRESS + 2), m32 = read32(UNCLAIMED_ADDRESS + 4),
      m64 = read64(UNCLAIMED_ADDRESS + 8);
  report("exits.mmio-ones", m8 == 0xff && m16 == 0xffff && m32 == 0xffffffff && m64 == ~0ul, "%lx %lx %lx %lx", m8, m16,
         m32, m64);
  write8(UNCLAIMED_ADDRESS, 1);
  write16(UNCLAIMED_ADDRESS, 2);
  write32(UNCLAIMED_ADDRESS, 3);
  write64(UNCLAIMED_ADDRESS, 4);
  // An access that is not aligned, and one across a page: KVM splits the latter into two exits.
  u32 unaligned = read32(UNCLAIMED_ADDRESS + 3);
  u64 across = read64(UNCLAIMED_ADDRESS + 0xffc);
  report("exits.mmio-unaligned", unaligned == 0xffffffff && across == ~0ul, "%x %lx", unaligned, across);

  u64 a = tsc();
  for (u32 i = 0; i < n; i++) in8(UNCLAIMED_PORT);
  u64 b = tsc();
  for (u32 i = 0; i < n; i++) out8(UNCLAIMED_PORT, 0);
  u64 c = tsc();
  for (u32 i = 0; i < n; i++) read32(UNCLAIMED_ADDRESS);
  u64 d = tsc();
  for (u32 i = 0; i < n; i++) write32(UNCLAIMED_ADDRESS, 0);
  u64 e = tsc();
  report("exits.cost", true, "n %u in %lu out %lu read %lu write %lu ns", n, nanoseconds((b - a) / n),
         nanoseconds((c - b) / n), nanoseconds((d - c) / n), nanoseconds((e - d) / n));
}
