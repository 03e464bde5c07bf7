// test=ring: nonsense in the first disk's ring (nth=K for another). The device may answer with an error, ask for a reset
// or do nothing; it must not touch memory it was not given, must accept a reset, and must serve a good request afterwards.
#include "virtio.h"

static struct virtio disk;
static struct virtqueue queue;
static struct { u32 type, reserved; u64 sector; } *header;
static u8 *data, *status;
static struct descriptor *table;
#define SIZE 16

static bool set_up(u64 features) {
  if (!virtio_reset(&disk)) return false;
  disk.offered = 0;
  return virtio_negotiate(&disk, features) && virtio_queue(&disk, &queue, 0, SIZE, NO_VECTOR);
}

// A read of sector 0 as descriptors 0, 1, 2, published as head 0 but not yet kicked.
static void good_chain(void) {
  header->type = header->reserved = 0, header->sector = 0;
  *status = 0xff;
  queue.descriptors[0] = (struct descriptor){(u64)header, 16, 1, 1};
  queue.descriptors[1] = (struct descriptor){(u64)data, 512, 3, 2};
  queue.descriptors[2] = (struct descriptor){(u64)status, 1, 2, 0};
  queue.available[2] = 0;
}

static void kick(u16 index) {
  compiler_barrier();
  queue.available[1] = index;
  full_barrier();
  write16(queue.doorbell, 0);
}

static const char *reaction(void) {
  u64 end = tsc() + 100 * tsc_khz();
  while (tsc() < end) {
    if (queue.used[1]) return *status == 0 ? "served" : *status == 0xff ? "returned" : "error status";
    if (virtio_status(&disk) & NEEDS_RESET) return "needs reset";
  }
  return "nothing";
}

enum { INDEX_JUMP, HEAD_BEYOND, NEXT_BEYOND, LOOP, OUTSIDE, WRAPPING, HOLE, NO_STATUS, SHORT_HEADER, ORDER, EMPTY, HUGE_LENGTH,
       NESTED, ODD_TABLE, EMPTY_TABLE, TABLE_OUTSIDE, TABLE_AND_NEXT, TABLE_LOOP, CASES };
static const char *const names[CASES] = {
    "ring.index-jump", "ring.head-beyond", "ring.next-beyond", "ring.loop", "ring.outside", "ring.wrapping", "ring.hole", "ring.no-status", "ring.short-header", "ring.order",
    "ring.empty", "ring.huge-length", "ring.nested", "ring.odd-table", "ring.empty-table", "ring.table-outside", "ring.table-and-next", "ring.table-loop"};

static u16 spoil(u32 which) {
  struct descriptor *d = queue.descriptors;
  if (which >= NESTED) {
    memcpy(table, d, 48);
    d[0] = (struct descriptor){(u64)table, 48, 4, 0};
  }
  switch (which) {
  case INDEX_JUMP: return SIZE * 3;
  case HEAD_BEYOND: queue.available[2] = 0xffff; break;
  case NEXT_BEYOND: d[1].next = 0x8000; break;
  case LOOP: d[1].next = 0; break;
  case OUTSIDE: d[1].address = 1ul << 50; break;
  case WRAPPING: d[1].address = ~0ul - 100; break;
  case HOLE: d[1].address = 0xd8000000; break;
  case NO_STATUS: d[1].flags = 2; break;
  case SHORT_HEADER: d[0].length = 7; break;
  case ORDER: d[0].flags = 3; break;
  case EMPTY: d[1].length = 0; break;
  case HUGE_LENGTH: d[1].length = 0xffffffff; break;
  case NESTED: table[1].flags = 4; table[1].length = 16; break;
  case ODD_TABLE: d[0].length = 47; break;
  case EMPTY_TABLE: d[0].length = 0; break;
  case TABLE_OUTSIDE: d[0].address = 1ul << 50; break;
  case TABLE_AND_NEXT: d[0].flags = 5; d[0].next = 1; break;
  case TABLE_LOOP: table[1].next = 0; break;
  }
  return 1;
}

void test_ring(void) {
  header = arena(16, 16), data = arena(8192, 4096), status = arena(1, 1), table = arena(64, 16);
  u8 *guard = data + 512;  // memory behind the buffer, never given to the device
  if (!virtio_open(&disk, VIRTIO_BLK, (u32)option_number("nth", 0))) {
    report("ring", false, "no disk");
    return;
  }
  for (u32 i = 0; i < CASES; i++) {
    if (!set_up(i >= NESTED ? F_INDIRECT : 0)) {
      report("ring", false, "%s: the device does not start", names[i]);
      continue;
    }
    virtio_start(&disk);
    memset(data, 0x5a, 8192);
    good_chain();
    kick(spoil(i));
    const char *what = reaction();
    bool reset = virtio_reset(&disk);
    u32 touched = 0;
    for (u32 k = 0; k < 4096; k++) touched += guard[k] != 0x5a;
    // A request of 4 GiB from guest memory that exists is the driver's own business.
    bool works = reset && set_up(0);
    if (works) {
      virtio_start(&disk);
      good_chain();
      kick(1);
      reaction();
      works = *status == 0;
    }
    report(names[i], reset && works && (!touched || i == HUGE_LENGTH), "%s, reset %d, works %d, touched %u", what, reset,
           works, touched);
  }
  // Queue registers that point nowhere: enabling or starting may be refused, the next set-up must work.
  static const u64 nowhere[] = {1ul << 50, ~0ul & ~15ul, 0xd8000000, 8};
  for (u32 i = 0; i < sizeof nowhere / sizeof *nowhere; i++) {
    bool started = set_up(0);
    virtio_reset(&disk);
    disk.offered = 0;
    virtio_negotiate(&disk, 0);
    write16(disk.common + C_QUEUE_SELECT, 0);
    for (u32 at = C_QUEUE_DESC; at <= C_QUEUE_DEVICE; at += 8) {
      write32(disk.common + at, (u32)nowhere[i]);
      write32(disk.common + at + 4, (u32)(nowhere[i] >> 32));
    }
    write16(disk.common + C_QUEUE_ENABLE, 1);
    virtio_start(&disk);
    write16(queue.doorbell, 0);
    wait_nanoseconds(10000000);
    u8 after = virtio_status(&disk);
    bool reset = virtio_reset(&disk), works = set_up(0);
    if (works) {
      virtio_start(&disk);
      good_chain();
      kick(1);
      reaction();
      works = *status == 0;
    }
    report("ring.nowhere", started && reset && works, "at %lx status %x, reset %d, works %d", nowhere[i], after, reset, works);
  }
  virtio_reset(&disk);
}
