// test=blk: the first disk (nth=K for another) under real traffic.
//   n=N        timed requests (default 2000)          depth=D   in flight (default 1)
//   size=B     bytes per request (default 4096)       op=read|write  what is timed (default read)
//   wait=poll|spin|halt   look at the ring, or take interrupts while spinning or halted (default poll)
//   span=MIB   area used from sector 0 on (default 8)  readonly=1   no writes; the device must refuse them
//   move=A     before the timed requests, moves the BAR to A with the queue live: kicks and interrupts must follow
//   plain=1    without EVENT_IDX and indirect descriptors
// Every sector holds a pattern of its number and seed=S; `sum` is that of all 64-bit words, for the host to compare.
#include "virtio.h"

enum { READ = 0, WRITE = 1, FLUSH = 4, GET_ID = 8 };
#define F_READ_ONLY (1ul << 5)
#define F_FLUSH (1ul << 9)
#define VECTOR 0x58
#define GUARD_VECTOR 0x41  // LAPIC timer: ends a hlt whose interrupt never came
#define MAXIMUM_DEPTH 128

static struct virtio disk;
static struct virtqueue queue;
static u32 depth, size;
static u64 seed;
static struct header { u32 type, reserved; u64 sector; } *headers;  // one slot per request in flight
static u8 *data, *statuses;
static u16 slot_of_head[32768];
static bool by_interrupt, by_halt;

static bool submit(u32 slot, u32 type, u64 sector, u32 length) {
  headers[slot] = (struct header){type, 0, sector};
  statuses[slot] = 0xff;
  struct buffer b[3] = {{&headers[slot], 16, false},
                        {data + (u64)slot * size, length, type == READ || type == GET_ID},
                        {&statuses[slot], 1, true}};
  if (!length) b[1] = b[2];
  int head = queue_add(&queue, b, length ? 3 : 2);
  if (head < 0) return false;
  slot_of_head[head] = (u16)slot;
  return true;
}

// Waits for the next completion; -1 after five seconds without one.
static int complete(u32 *written) {
  u64 end = 0;
  for (;;) {
    int head = queue_take(&queue, written);
    if (head >= 0) return slot_of_head[head];
    if (by_halt) {
      queue_interrupts(&queue, true);
      // The index may have moved before the wish was seen; an interrupt that came meanwhile stays pending while
      // interrupts are off, and ends the hlt at once.
      if (queue.used[1] != queue.last_used) continue;
      halt_until_interrupt();
      if (interrupt_count[GUARD_VECTOR]) return -1;
    } else if (by_interrupt) {
      queue_interrupts(&queue, true);
      if (queue.used[1] != queue.last_used) continue;
      if (!wait_for_count(VECTOR, interrupt_count[VECTOR] + 1, 5000000000ul) && queue.used[1] == queue.last_used) return -1;
    } else {
      pause();
      if (!end) end = tsc() + 5000 * tsc_khz();
      else if (tsc() > end) return -1;
    }
  }
}

static int one(u32 type, u64 sector, u32 length, u32 *written) {
  if (!submit(0, type, sector, length)) return -1;
  queue_kick(&queue);
  return complete(written) == 0 ? statuses[0] : -1;
}

static u64 word(u64 sector, u32 i) {
  u64 state = seed ^ sector << 8 ^ i;
  return next_random(&state);
}
static void fill(u64 *to, u64 sector, u32 length) {
  for (u32 i = 0; i < length / 8; i++) to[i] = word(sector + i / 64, i % 64);
}
static u32 differing(const u64 *from, u64 sector, u32 length) {
  u32 wrong = 0;
  for (u32 i = 0; i < length / 8; i++) wrong += from[i] != word(sector + i / 64, i % 64);
  return wrong;
}

static void check_requests(u64 capacity, bool read_only) {
  u32 written = 0;
  int s = one(GET_ID, 0, 20, &written);
  char id[21] = {0};
  memcpy(id, data, 20);
  report("blk.id", s == 0, "status %d id %s", s, id);
  if (disk.features & F_FLUSH) s = one(FLUSH, 0, 0, &written), report("blk.flush", s == 0 && written == 1, "status %d written %u", s, written);
  s = one(READ, capacity, 512, &written);
  report("blk.beyond-end", s == 1 && written <= 513, "status %d written %u", s, written);
  s = one(READ, ~0ul - 3, 512, &written);
  report("blk.absurd-sector", s == 1, "status %d", s);
  s = one(0x77, 0, 512, &written);
  report("blk.unknown-type", s == 2, "status %d", s);
  if (read_only) s = one(WRITE, 0, 512, &written), report("blk.read-only", s == 1, "write status %d", s);
}

// Runs *count requests over [0, sectors) in order with `depth` in flight; in verifying passes the data is checked or made. With
// `until=button` the others are over when the power button has been pressed, and *count becomes what was done.
static u64 pass(u32 type, u64 *count, u64 sectors, bool verify, u64 *failed) {
  u64 n = *count;
  u64 per = size / 512, places = sectors / per, submitted = 0, done = 0;
  *failed = 0;
  bool by_button = !verify && option_is("until", "button");
  u64 begin = tsc();
  u32 idle[MAXIMUM_DEPTH], idle_count = depth;
  for (u32 i = 0; i < depth; i++) idle[i] = i;
  while (done < n) {
    // Some are done in any case: it may have been pressed long before.
    if (by_button && done && !(done & 1023) && in8(EVENT_PORT) & EVENT_POWER_BUTTON) n = submitted;
    bool added = false;
    while (idle_count && submitted < n) {
      u64 sector = submitted % places * per;
      u32 slot = idle[--idle_count];
      if (verify && type == WRITE) fill((u64 *)(data + (u64)slot * size), sector, size);
      if (!submit(slot, type, sector, size)) {
        idle[idle_count++] = slot;
        break;
      }
      submitted++, added = true;
    }
    if (added) queue_kick(&queue);
    u32 written = 0;
    int slot = complete(&written);
    if (slot < 0) {
      *failed += n - done;
      break;
    }
    bool bad = statuses[slot] != 0 || written != (type == READ ? size + 1 : 1);
    if (verify && type == READ && !bad) bad = differing((u64 *)(data + (u64)slot * size), headers[slot].sector, size);
    *failed += bad;
    idle[idle_count++] = (u32)slot;
    done++;
  }
  *count = n;
  return tsc() - begin;
}

static void move(u64 to) {
  u64 from = pci_bar(disk.function, disk.bar).address, difference = to - from;
  if (to >= 1ul << 32) map(to, 0x100000);
  pci_set_bar(disk.function, disk.bar, to);
  disk.common += difference, disk.notify += difference, disk.isr += difference, disk.config += difference;
  queue.doorbell += difference;
  // The table may lie in a BAR of its own, which stays.
  u32 table_bar = pci_read(disk.function, disk.msix.capability + 4, 4) & 7;
  if (table_bar == disk.bar) disk.msix.table += difference, disk.msix.pending += difference;
  report("blk.moved", virtio_status(&disk) == (ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK), "from %lx to %lx status %x",
         from, to, virtio_status(&disk));
}

void test_blk(void) {
  depth = (u32)option_number("depth", 1), size = (u32)option_number("size", 4096) & ~511u;
  seed = option_number("seed", 1);
  by_halt = option_is("wait", "halt"), by_interrupt = by_halt || option_is("wait", "spin");
  if (!depth || depth > MAXIMUM_DEPTH || !size || size > 1 << 20) {
    report("blk", false, "depth or size out of range");
    return;
  }
  u64 extra = option_number("plain", 0) ? 0 : F_EVENT_IDX | F_INDIRECT;
  if (!virtio_open(&disk, VIRTIO_BLK, (u32)option_number("nth", 0)) ||
      !virtio_negotiate(&disk, extra | F_READ_ONLY | F_FLUSH)) {
    report("blk", false, "no disk, or no features; status %x", disk.common ? virtio_status(&disk) : 0);
    return;
  }
  apic_enable();
  if (by_interrupt) {
    msix_control(&disk.msix, true, false);
    msix_set(&disk.msix, 0, VECTOR);
  }
  if (by_halt) {
    interrupt_count[GUARD_VECTOR] = 0;
    apic_write(0x3e0, 3);  // divide by 16: 30 seconds of KVM's nanosecond ticks
    apic_write(0x320, GUARD_VECTOR);
    apic_write(0x380, 1875000000);
  }
  headers = arena(16ul * MAXIMUM_DEPTH, 16), statuses = arena(MAXIMUM_DEPTH, 1), data = arena((u64)depth * size, 4096);
  if (!virtio_queue(&disk, &queue, 0, 256, by_interrupt ? 0 : NO_VECTOR)) {
    report("blk", false, "no queue");
    return;
  }
  virtio_start(&disk);
  u64 capacity = read32(disk.config) | (u64)read32(disk.config + 4) << 32;
  bool read_only = disk.features & F_READ_ONLY;
  report("blk.config", capacity > 0 && read_only == (option_number("readonly", 0) != 0),
         "%lu sectors read-only %d features %lx of %lx queue %u", capacity, read_only, disk.features, disk.offered, queue.size);
  check_requests(capacity, read_only);

  u64 sectors = option_number("span", 8) << 11, failed;
  if (sectors > capacity) sectors = capacity;
  u64 places = sectors / (size / 512);
  if (!read_only) {
    pass(WRITE, &places, sectors, true, &failed);
    report("blk.write", failed == 0, "%lu requests %lu failed", places, failed);
    if (disk.features & F_FLUSH) report("blk.flushed", one(FLUSH, 0, 0, NULL) == 0, "after writing");
  }
  pass(READ, &places, sectors, true, &failed);
  u64 sum = 0;
  for (u64 s = 0; s < places * (size / 512); s++)
    for (u32 i = 0; i < 64; i++) sum += word(s, i);
  report("blk.verify", failed == 0, "%lu requests %lu failed sum %lx", places, failed, sum);

  if (option("move")) move(option_number("move", 0));
  u64 n = option_number("n", 2000), kicks = queue.kicks, interrupts_before = interrupt_count[VECTOR];
  bool writes = option_is("op", "write") && !read_only;
  u64 ns = nanoseconds(pass(writes ? WRITE : READ, &n, sectors, false, &failed));
  report("blk.speed", failed == 0 && n > 0, "%s %u bytes depth %u wait %s: %lu per second, %lu ns each, %lu kicks %lu interrupts %lu failed",
         writes ? "write" : "read", size, depth, by_halt ? "halt" : by_interrupt ? "spin" : "poll",
         ns ? n * 1000000000 / ns : 0, n ? ns / n : 0, queue.kicks - kicks, interrupt_count[VECTOR] - interrupts_before, failed);
  if (option_number("flush", 0)) report("blk.flushed-again", one(FLUSH, 0, 0, NULL) == 0, "at the end");
  if (by_halt) apic_write(0x380, 0);
  report("blk.reset", virtio_reset(&disk), "status %x", virtio_status(&disk));
  if (by_interrupt) msix_control(&disk.msix, false, false);
}
