// Modern virtio-pci and the split virtqueue, driver side.
#include "virtio.h"

bool virtio_locate(struct virtio *v, u32 function) {
  memset(v, 0, sizeof *v);
  v->function = function;
  pci_write(function, 4, 2, pci_read(function, 4, 2) | 6);  // memory decoding, bus mastering
  u32 at = 0;
  while ((at = pci_capability(function, 9, at))) {
    u32 type = pci_read(function, at + 3, 1), bar = pci_read(function, at + 4, 1);
    if (bar > 5) continue;
    if (type < 1 || type > 4) continue;
    struct bar b = pci_bar(function, bar);
    u64 where = b.address + pci_read(function, at + 8, 4);
    if (b.address >= 1ul << 32) map(b.address, b.size);
    // The first capability of a type is the one to use.
    if (type == 1 && !v->common) v->common = where, v->bar = bar;
    if (type == 2 && !v->notify) v->notify = where, v->notify_multiplier = pci_read(function, at + 16, 4);
    if (type == 3 && !v->isr) v->isr = where;
    if (type == 4 && !v->config) v->config = where;
  }
  msix_find(function, &v->msix);
  return v->common && v->notify && v->isr;
}

u8 virtio_status(const struct virtio *v) { return read8(v->common + C_STATUS); }

bool virtio_reset(struct virtio *v) {
  write8(v->common + C_STATUS, 0);
  u64 end = tsc() + 1000 * tsc_khz();
  while (virtio_status(v))
    if (tsc() > end) return false;
  return true;
}

bool virtio_open(struct virtio *v, u32 device_type, u32 nth) {
  u32 f = pci_find(0x1af4, 0x1040 + device_type, nth);
  return f != PCI_NONE && virtio_locate(v, f) && virtio_reset(v);
}

bool virtio_negotiate(struct virtio *v, u64 wanted) {
  write8(v->common + C_STATUS, ACKNOWLEDGE);
  write8(v->common + C_STATUS, ACKNOWLEDGE | DRIVER);
  for (u32 half = 0; half < 2; half++) {
    write32(v->common + C_DEVICE_SELECT, half);
    v->offered |= (u64)read32(v->common + C_DEVICE_FEATURE) << 32 * half;
  }
  v->features = v->offered & (wanted | F_VERSION_1);
  for (u32 half = 0; half < 2; half++) {
    write32(v->common + C_DRIVER_SELECT, half);
    write32(v->common + C_DRIVER_FEATURE, (u32)(v->features >> 32 * half));
  }
  write8(v->common + C_STATUS, ACKNOWLEDGE | DRIVER | FEATURES_OK);
  return virtio_status(v) & FEATURES_OK && v->features & F_VERSION_1;
}

static void write_address(u64 at, u64 value) {
  write32(at, (u32)value);
  write32(at + 4, (u32)(value >> 32));
}

bool virtio_queue(struct virtio *v, struct virtqueue *q, u16 index, u16 size, u16 msix_entry) {
  write16(v->common + C_QUEUE_SELECT, index);
  u16 maximum = read16(v->common + C_QUEUE_SIZE);
  if (!maximum) return false;
  if (size > maximum) size = maximum;
  memset(q, 0, sizeof *q);
  q->index = index, q->size = q->free_count = size;
  q->event_idx = v->features & F_EVENT_IDX;
  q->descriptors = arena(16ul * size, 16);
  q->available = arena(6 + 2ul * size, 2);
  q->used = arena(6 + 8ul * size, 4);
  if (v->features & F_INDIRECT) q->indirect = arena(64ul * size, 16);
  for (u16 i = 0; i < size; i++) q->descriptors[i].next = (u16)(i + 1);
  q->doorbell = v->notify + (u64)read16(v->common + C_QUEUE_NOTIFY_OFF) * v->notify_multiplier;
  write16(v->common + C_QUEUE_SIZE, size);
  write_address(v->common + C_QUEUE_DESC, (u64)q->descriptors);
  write_address(v->common + C_QUEUE_DRIVER, (u64)q->available);
  write_address(v->common + C_QUEUE_DEVICE, (u64)q->used);
  if (v->msix.capability) {
    write16(v->common + C_QUEUE_VECTOR, msix_entry);
    if (read16(v->common + C_QUEUE_VECTOR) != msix_entry) return false;
  }
  queue_interrupts(q, msix_entry != NO_VECTOR);
  write16(v->common + C_QUEUE_ENABLE, 1);
  return read16(v->common + C_QUEUE_ENABLE) == 1;
}

void virtio_start(struct virtio *v) { write8(v->common + C_STATUS, ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK); }

int queue_add(struct virtqueue *q, const struct buffer *b, u32 count) {
  bool indirect = q->indirect && count > 1 && count <= 4;
  u32 needed = indirect ? 1 : count;
  if (q->free_count < needed) return -1;
  u16 head = q->free_head, at = head;
  if (indirect) {
    struct descriptor *table = q->indirect + 4 * head;
    for (u32 i = 0; i < count; i++)
      table[i] = (struct descriptor){(u64)b[i].address, b[i].length,
                                     (u16)(b[i].device_writes * 2 | (i + 1 < count)), (u16)(i + 1)};
    q->descriptors[head].address = (u64)table;
    q->descriptors[head].length = 16 * count;
    q->descriptors[head].flags = 4;
  } else {
    for (u32 i = 0; i < count; i++) {
      at = i ? q->descriptors[at].next : head;
      q->descriptors[at].address = (u64)b[i].address;
      q->descriptors[at].length = b[i].length;
      q->descriptors[at].flags = (u16)(b[i].device_writes * 2 | (i + 1 < count));
    }
  }
  q->free_head = q->descriptors[at].next;
  q->free_count = (u16)(q->free_count - needed);
  q->available[2 + q->next_available % q->size] = head;
  q->next_available++;
  compiler_barrier();  // x86 keeps stores in order: the ring entry is visible before the index
  q->available[1] = q->next_available;
  return head;
}

void queue_kick(struct virtqueue *q) {
  full_barrier();  // pairs with the device's, between its write of avail_event or flags and its last look at the index
  u16 old = q->kicked_at, now = q->next_available;
  bool wanted;
  if (q->event_idx) {
    u16 event = q->used[2 + 4 * q->size];
    wanted = (u16)(now - event - 1) < (u16)(now - old);
  } else {
    wanted = !(q->used[0] & 1);
  }
  q->kicked_at = now;
  if (!wanted) return;
  q->kicks++;
  write16(q->doorbell, q->index);
}

int queue_take(struct virtqueue *q, u32 *length) {
  if (q->used[1] == q->last_used) return -1;
  compiler_barrier();
  volatile u16 *entry = q->used + 2 + 4 * (q->last_used % q->size);
  u16 head = entry[0];
  if (length) *length = entry[2] | (u32)entry[3] << 16;
  q->last_used++;
  u16 at = head, count = 1;
  while (q->descriptors[at].flags & 1 && count < q->size) at = q->descriptors[at].next, count++;
  q->descriptors[at].next = q->free_head;
  q->descriptors[at].flags = 0;
  q->free_head = head;
  q->free_count = (u16)(q->free_count + count);
  return head;
}

void queue_interrupts(struct virtqueue *q, bool on) {
  if (q->event_idx)
    // "None" under EVENT_IDX is an index just passed: half a turn of 65536 away at most.
    q->available[2 + q->size] = on ? q->last_used : (u16)(q->last_used - 1);
  else
    q->available[0] = !on;
  full_barrier();  // pairs with the device's, between its write of used.idx and its look at the wish
}
