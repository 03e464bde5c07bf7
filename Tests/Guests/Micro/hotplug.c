// test=hotplug: what the ACPI tables' methods do, by hand: waits for the event, reads which slots have something new, drives the
// device that came, and lets go of those it is asked for. Disks and entropy devices.
//   rounds=N    ends after N devices have been let go of (default 1)      seconds=S  and after so long at the latest (60)
//   answer=never  does not let go                   answer=rude  lets go with the device still running
//   busy=1      the next device may come at once
//   alone=1     lets go by itself, unasked, once a device has worked
#include "virtio.h"

enum { CAME = 0x610, ASKED = 0x614, EJECT = 0x618 };
#define VECTOR 0x5a

static struct slot {
  struct virtio device;
  struct virtqueue queue;
  bool is_open, is_disk;
  u64 requests;
} slots[32];
static u8 *memory;  // header, data, status of one request

// One request; true when it was answered well, and with an interrupt.
static bool work(struct slot *s) {
  u32 before = interrupt_count[VECTOR], length = 0;
  struct header { u32 type, reserved; u64 sector; } *header = (void *)memory;
  *header = (struct header){0, 0, s->requests % 8};
  memory[1024] = 0xff;
  struct buffer read[3] = {{header, 16, false}, {memory + 512, 512, true}, {memory + 1024, 1, true}}, random = {memory + 512, 64, true};
  // Before the device can see the request: it looks at the ring by itself, too.
  queue_interrupts(&s->queue, true);
  if (queue_add(&s->queue, s->is_disk ? read : &random, s->is_disk ? 3 : 1) < 0) return false;
  queue_kick(&s->queue);
  // An interrupt without an answer may come at any time, and says nothing.
  bool interrupted = true;
  for (u32 seen = before; interrupted && s->queue.used[1] == s->queue.last_used; seen = interrupt_count[VECTOR])
    interrupted = wait_for_count(VECTOR, seen + 1, 10000000000ul);
  s->requests++;
  bool answered = queue_take(&s->queue, &length) >= 0, good = length > 0 && (!s->is_disk || memory[1024] == 0);
  if (!interrupted || !answered || !good)
    report("hotplug.request", false, "%lu: interrupts %u and %u, answered %d, good %d, used event %u index %u", s->requests, before,
           interrupt_count[VECTOR], answered, good, s->queue.available[2 + s->queue.size], s->queue.used[1]);
  return interrupted && answered && good;
}

static void come(u32 number) {
  struct slot *s = &slots[number];
  u32 function = number << 3, id = pci_read(function, 0, 4);
  if (id == 0xffffffff) return (void)report("hotplug.came", false, "slot %u is empty", number);
  if (id >> 16 != 0x1040 + VIRTIO_BLK && id >> 16 != 0x1040 + VIRTIO_RNG)
    return (void)report("hotplug.other", true, "slot %u id %x", number, id);
  if (s->is_open) return (void)report("hotplug.came", true, "slot %u again", number);
  *s = (struct slot){.is_disk = id >> 16 == 0x1040 + VIRTIO_BLK};
  bool ok = virtio_locate(&s->device, function) && virtio_reset(&s->device) && virtio_negotiate(&s->device, F_EVENT_IDX | F_INDIRECT);
  if (ok) {
    msix_control(&s->device.msix, true, false);
    msix_set(&s->device.msix, 0, VECTOR);
    ok = virtio_queue(&s->device, &s->queue, 0, 16, 0);
    virtio_start(&s->device);
    s->is_open = true;
    ok = ok && work(s) && work(s);
  }
  report("hotplug.came", ok, "slot %u id %x", number, id);
}

static void go(u32 number, bool rude) {
  struct slot *s = &slots[number];
  u32 function = number << 3;
  bool was_there = pci_read(function, 0, 2) != 0xffff, ok = true;
  if (was_there && s->is_open && !rude) {
    ok = work(s) && virtio_reset(&s->device);
    msix_control(&s->device.msix, false, false);
  }
  // Of a device that was taken away the registers read as zero until it is let go of: so a reset ends.
  if (!was_there && s->is_open && !virtio_reset(&s->device)) report("hotplug.reset", false, "slot %u status %x", number, virtio_status(&s->device));
  u64 common = s->is_open ? s->device.common : 0;
  s->is_open = false;
  out32(EJECT, 1u << number);
  u32 id = pci_read(function, 0, 4), reg = common ? read32(common) : 0xffffffff;
  // The host may have put the next device there already (busy=1); its registers answer nowhere yet.
  report("hotplug.went", ok && (id == 0xffffffff || option_is("busy", "1")) && reg == 0xffffffff, "slot %u %s id %x register %x",
         number, was_there ? "ejected" : "was gone", id, reg);
}

void test_hotplug(void) {
  u64 rounds = option_number("rounds", 1), gone = 0;
  bool never = option_is("answer", "never"), rude = option_is("answer", "rude"), alone = option_is("alone", "1");
  memory = arena(4096, 4096);
  apic_enable();
  // What is there from the start counts as come.
  for (u32 i = 1; i < 32; i++)
    if (pci_read(i << 3, 0, 2) == 0x1af4 && (pci_read(i << 3, 2, 2) == 0x1040 + VIRTIO_BLK || pci_read(i << 3, 2, 2) == 0x1040 + VIRTIO_RNG))
      come(i);
  report("hotplug.waits", true, "for events");
  u64 end = tsc() + option_number("seconds", 60) * 1000 * tsc_khz();
  while (gone < rounds && tsc() < end) {
    if (!(in8(EVENT_PORT) & EVENT_HOT_PLUG)) {
      wait_nanoseconds(200000);
      for (u32 i = 1; i < 32 && never; i++)
        if (slots[i].is_open && pci_read(i << 3, 0, 2) != 0xffff && !work(&slots[i])) report("hotplug.work", false, "slot %u", i), slots[i].is_open = false;
      continue;
    }
    u32 came = in32(CAME), asked = in32(ASKED);
    for (u32 i = 0; i < 32; i++)
      if (came >> i & 1) {
        come(i);
        if (alone) go(i, false), gone++;
      }
    for (u32 i = 0; i < 32; i++)
      if (asked >> i & 1) {
        if (never && pci_read(i << 3, 0, 2) != 0xffff) report("hotplug.asked", true, "slot %u stays", i);
        else go(i, rude), gone++;
      }
  }
  report("hotplug.rounds", gone == rounds || never, "%lu", gone);
}
