// MSI-X, and test=msix: masking latches one pending bit per vector and unmasking delivers it exactly once. Uses the first
// disk: a read is the event.
#include "virtio.h"

bool msix_find(u32 function, struct msix *m) {
  m->function = function;
  m->capability = pci_capability(function, 0x11, 0);
  if (!m->capability) return false;
  m->size = (pci_read(function, m->capability + 2, 2) & 0x7ff) + 1;
  u32 table = pci_read(function, m->capability + 4, 4), pending = pci_read(function, m->capability + 8, 4);
  m->table = pci_bar(function, table & 7).address + (table & ~7u);
  m->pending = pci_bar(function, pending & 7).address + (pending & ~7u);
  if (m->table >= 1ul << 32) map(m->table, 0x10000);
  if (m->pending >= 1ul << 32) map(m->pending, 0x1000);
  return true;
}
void msix_control(const struct msix *m, bool enable, bool mask_function) {
  pci_write(m->function, m->capability + 2, 2, (u32)enable << 15 | (u32)mask_function << 14);
}
void msix_set(const struct msix *m, u32 entry, u32 vector) {
  u64 at = m->table + 16 * entry;
  write32(at + 12, 1);
  write32(at, 0xfee00000 | apic_id() << 12);
  write32(at + 4, 0);
  write32(at + 8, vector);
  write32(at + 12, 0);
}
void msix_mask(const struct msix *m, u32 entry, bool masked) { write32(m->table + 16 * entry + 12, masked); }
bool msix_pending(const struct msix *m, u32 entry) {
  return read32(m->pending + entry / 32 * 4) >> entry % 32 & 1;
}

// ---- the test

enum { QUEUE_ENTRY = 1, VECTOR = 0x60, OTHER_VECTOR = 0x61 };
static struct virtio disk;
static struct virtqueue queue;
static struct { u32 type, reserved; u64 sector; } *header;
static u8 *data, *status;

// One read, completed by polling: the interrupt is what the test watches, so it must not be what it waits for.
static bool read_once(void) {
  header->type = 0;
  header->sector = 0;
  *status = 0xff;
  struct buffer b[3] = {{header, 16, false}, {data, 512, true}, {status, 1, true}};
  queue_interrupts(&queue, true);
  if (queue_add(&queue, b, 3) < 0) return false;
  queue_kick(&queue);
  u64 end = tsc() + 2000 * tsc_khz();
  while (queue_take(&queue, NULL) < 0)
    if (tsc() > end) return false;
  return *status == 0;
}

// Lets an interrupt that is under way arrive, and says how many did since the last call.
static u32 arrived(u32 vector) {
  static u32 before[256];
  wait_for_count(vector, ~0u, 20000000);
  u32 now = interrupt_count[vector], n = now - before[vector];
  before[vector] = now;
  return n;
}

void test_msix(void) {
  if (!virtio_open(&disk, VIRTIO_BLK, 0) || !virtio_negotiate(&disk, F_EVENT_IDX) || !disk.msix.capability) {
    report("msix", false, "no disk with MSI-X");
    return;
  }
  header = arena(16, 16), data = arena(4096, 4096), status = arena(1, 1);
  apic_enable();
  struct msix *m = &disk.msix;
  report("msix.size", m->size >= 2, "%u entries at %lx, pending bits at %lx", m->size, m->table, m->pending);
  u32 masked_at_first = 0;
  for (u32 i = 0; i < m->size && i < 16; i++) masked_at_first += read32(m->table + 16 * i + 12) & 1;
  report("msix.power-up", masked_at_first == (m->size < 16 ? m->size : 16), "%u masked", masked_at_first);

  // A vector outside the table is refused and reads back as none.
  write16(disk.common + C_QUEUE_SELECT, 0);
  write16(disk.common + C_QUEUE_VECTOR, (u16)m->size);
  u32 refused = read16(disk.common + C_QUEUE_VECTOR);
  report("msix.bad-vector", refused == NO_VECTOR, "%x", refused);

  msix_control(m, true, false);
  msix_set(m, QUEUE_ENTRY, VECTOR);
  if (!virtio_queue(&disk, &queue, 0, 64, QUEUE_ENTRY)) {
    report("msix", false, "no queue");
    return;
  }
  virtio_start(&disk);
  // A back end may call once for nothing when it is given its event, which is before its first answer.
  bool ok = read_once();
  arrived(VECTOR), arrived(OTHER_VECTOR);

  ok = ok && read_once();
  u32 n = arrived(VECTOR);
  report("msix.open", ok && n == 1, "%u delivered", n);

  msix_mask(m, QUEUE_ENTRY, true);
  ok = read_once() && read_once();
  u32 while_masked = arrived(VECTOR);
  bool pending = msix_pending(m, QUEUE_ENTRY);
  msix_mask(m, QUEUE_ENTRY, false);
  n = arrived(VECTOR);
  report("msix.entry-mask", ok && !while_masked && pending && n == 1 && !msix_pending(m, QUEUE_ENTRY),
         "masked %u pending %d after %u pending %d", while_masked, pending, n, msix_pending(m, QUEUE_ENTRY));

  msix_control(m, true, true);
  ok = read_once();
  while_masked = arrived(VECTOR);
  pending = msix_pending(m, QUEUE_ENTRY);
  msix_control(m, true, false);
  n = arrived(VECTOR);
  report("msix.function-mask", ok && !while_masked && pending && n == 1, "masked %u pending %d after %u", while_masked,
         pending, n);

  // Masked both ways: only the last unmask delivers.
  msix_mask(m, QUEUE_ENTRY, true);
  msix_control(m, true, true);
  ok = read_once();
  msix_mask(m, QUEUE_ENTRY, false);
  u32 after_first = arrived(VECTOR);
  msix_control(m, true, false);
  n = arrived(VECTOR);
  report("msix.both-masks", ok && !after_first && n == 1, "after entry %u after function %u", after_first, n);

  // Retargeted while pending: the event arrives at the new vector only.
  msix_mask(m, QUEUE_ENTRY, true);
  ok = read_once();
  write32(m->table + 16 * QUEUE_ENTRY + 8, OTHER_VECTOR);
  msix_mask(m, QUEUE_ENTRY, false);
  n = arrived(OTHER_VECTOR);
  u32 old = arrived(VECTOR);
  report("msix.retarget", ok && n == 1 && old == 0, "new %u old %u", n, old);

  // Nothing pending, masked and unmasked: nothing comes.
  msix_mask(m, QUEUE_ENTRY, true);
  msix_mask(m, QUEUE_ENTRY, false);
  n = arrived(OTHER_VECTOR);
  report("msix.quiet", n == 0, "%u", n);

  // The pending bits are read-only.
  write32(m->pending, 0xffffffff);
  report("msix.pending-read-only", !msix_pending(m, QUEUE_ENTRY), "%x", read32(m->pending));
  virtio_reset(&disk);
  msix_control(m, false, false);
}
