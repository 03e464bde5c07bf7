// test=kick: what a doorbell write costs the guest. test=irq: from doorbell to handler, spinning and halted.
//   doorbell=A   its address; default that of the first disk's queue 0, enabled but empty (kick only)
//   vector=V     the vector that comes back (bare-kvm --loopback: doorbell=0xd0000000 vector=0x50)
//   n=N          turns (default 1000)
#include "virtio.h"

void test_kick(void) {
  u64 doorbell = option_number("doorbell", 0);
  u32 n = (u32)option_number("n", 1000);
  static struct virtio disk;
  static struct virtqueue queue;
  if (!doorbell) {
    if (!virtio_open(&disk, VIRTIO_BLK, 0) || !virtio_negotiate(&disk, 0) || !virtio_queue(&disk, &queue, 0, 16, NO_VECTOR)) {
      report("kick", false, "no disk");
      return;
    }
    virtio_start(&disk);
    doorbell = queue.doorbell;
  }
  write16(doorbell, 0);  // the first access may have to build a mapping
  u64 begin = tsc();
  for (u32 i = 0; i < n; i++) write16(doorbell, 0);
  u64 narrow = tsc() - begin;
  begin = tsc();
  for (u32 i = 0; i < n; i++) write32(doorbell, 0);
  u64 wide = tsc() - begin;
  report("kick", true, "n %u 16 bits %lu 32 bits %lu ns", n, nanoseconds(narrow / n), nanoseconds(wide / n));
  if (disk.common) report("kick.status", virtio_reset(&disk), "status %x", virtio_status(&disk));
}

static void sort(u64 *a, u32 n) {
  for (u32 i = 1; i < n; i++)
    for (u32 k = i; k && a[k - 1] > a[k]; k--) {
      u64 t = a[k];
      a[k] = a[k - 1], a[k - 1] = t;
    }
}

void test_irq(void) {
  u64 doorbell = option_number("doorbell", 0);
  u32 vector = (u32)option_number("vector", 0x50) & 0xff, n = (u32)option_number("n", 1000);
  if (!doorbell || n < 1 || n > 10000) {
    report("irq", false, "needs doorbell= and n= from 1 to 10000");
    return;
  }
  u64 *spin = arena(8ul * n, 8), *halt = arena(8ul * n, 8);
  apic_enable();
  u32 start = interrupt_count[vector], lost = 0;
  for (u32 i = 0; i < n && !lost; i++) {
    u32 before = interrupt_count[vector];
    interrupts(true);
    u64 begin = tsc();
    write16(doorbell, 0);
    while (tsc() - begin < 1000 * tsc_khz() && *(volatile u32 *)&interrupt_count[vector] == before) pause();
    interrupts(false);
    lost += interrupt_count[vector] == before;
    spin[i] = lost ? 0 : interrupt_tsc[vector] - begin;
  }
  for (u32 i = 0; i < n && !lost; i++) {
    u64 begin = tsc();
    write16(doorbell, 0);  // stays pending with interrupts off: measures entry to hlt and out of it, not a sleeping thread
    halt_until_interrupt();
    halt[i] = interrupt_tsc[vector] - begin;
  }
  u32 counted = interrupt_count[vector] - start;
  sort(spin, n), sort(halt, n);
  report("irq", !lost && counted == 2 * n, "n %u counted %u lost %u doorbell to handler spinning p50 %lu p99 %lu ns, by hlt p50 %lu p99 %lu ns",
         n, counted, lost, nanoseconds(spin[n / 2]), nanoseconds(spin[n * 99 / 100]), nanoseconds(halt[n / 2]),
         nanoseconds(halt[n * 99 / 100]));
}
