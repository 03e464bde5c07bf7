// test=net: raw Ethernet frames through the first network card (nth=K for another) to a peer that sends each back with
// the addresses swapped (frame-echo.c, or a test).
//   n=N frames (default 1000)   window=W in flight (default 16, at most 64)   size=B bytes (default 512, 64 to 1514)
//   patience=MS without any frame back (default 5000)
// Frames carry EtherType 0x88B5 (local experiments), a number and a pattern; those with another type are ignored.
#include "virtio.h"

#define F_MAC (1ul << 5)
#define F_MERGEABLE (1ul << 15)
#define HEADER 12
#define SLOT 2048
#define ETHERTYPE 0xb588  // 0x88B5 as it lies in memory

static struct virtio card;
static struct virtqueue receive, transmit;
static u16 slot_of_head[2][1024];

static void offer(u8 *slots, u32 slot) {
  struct buffer b = {slots + slot * SLOT, SLOT, true};
  int head = queue_add(&receive, &b, 1);
  if (head >= 0) slot_of_head[0][head] = (u16)slot;
}

static u8 pattern(u32 number, u32 i) { return (u8)(number * 31 + i * 7 + (i >> 8)); }

void test_net(void) {
  u32 n = (u32)option_number("n", 1000), window = (u32)option_number("window", 16), size = (u32)option_number("size", 512);
  if (window < 1 || window > 64 || size < 64 || size > 1514 ||
      !virtio_open(&card, VIRTIO_NET, (u32)option_number("nth", 0)) || !virtio_negotiate(&card, F_EVENT_IDX | F_MAC) ||
      !virtio_queue(&card, &receive, 0, 128, NO_VECTOR) || !virtio_queue(&card, &transmit, 1, 128, NO_VECTOR)) {
    report("net", false, "no network card, or options out of range");
    return;
  }
  u8 mac[6];
  for (u32 i = 0; i < 6; i++) mac[i] = read8(card.config + i);
  report("net.mac", card.features & F_MAC && !(mac[0] & 1), "%x:%x:%x:%x:%x:%x", mac[0], mac[1], mac[2], mac[3], mac[4], mac[5]);
  u8 *in = arena(128 * SLOT, 4096), *out = arena(64 * SLOT, 4096);
  for (u32 i = 0; i < 128; i++) offer(in, i);
  virtio_start(&card);
  queue_kick(&receive);

  u32 sent = 0, returned = 0, wrong = 0, other = 0, flying = 0, free_slots[64];
  for (u32 i = 0; i < window; i++) free_slots[i] = i;
  u32 free_count = window;
  u64 patience = option_number("patience", 5000) * tsc_khz(), begin = tsc(), deadline = begin + patience;
  static u8 seen[1 << 16];
  if (n > sizeof seen) n = sizeof seen;
  memset(seen, 0, sizeof seen);
  while (returned < n && tsc() < deadline) {
    int head;
    while ((head = queue_take(&transmit, NULL)) >= 0) free_slots[free_count++] = slot_of_head[1][head];
    bool added = false;
    while (sent < n && flying < window && free_count) {
      u32 slot = free_slots[--free_count];
      u8 *f = out + slot * SLOT;
      memset(f, 0, HEADER + 14);
      memset(f + HEADER, 0xff, 6);
      memcpy(f + HEADER + 6, mac, 6);
      *(u16 *)(f + HEADER + 12) = ETHERTYPE;
      *(u32 *)(f + HEADER + 14) = sent;
      for (u32 i = 18; i < size; i++) f[HEADER + i] = pattern(sent, i);
      struct buffer b[2] = {{f, HEADER, false}, {f + HEADER, size, false}};
      head = queue_add(&transmit, b, 2);
      if (head < 0) {
        free_slots[free_count++] = slot;
        break;
      }
      slot_of_head[1][head] = (u16)slot;
      sent++, flying++, added = true;
    }
    if (added) queue_kick(&transmit);
    u32 length;
    added = false;
    while ((head = queue_take(&receive, &length)) >= 0) {
      u32 slot = slot_of_head[0][head];
      u8 *f = in + slot * SLOT + HEADER;
      if (length < HEADER + 18 || *(u16 *)(f + 12) != ETHERTYPE || memcmp(f, mac, 6)) {
        other++;
      } else {
        u32 number = *(u32 *)(f + 14);
        bool bad = length != HEADER + size || number >= n || seen[number];
        for (u32 i = 18; i < size && !bad; i++) bad = f[i] != pattern(number, i);
        wrong += bad;
        if (!bad) seen[number] = 1;
        returned++, flying -= flying > 0;
        deadline = tsc() + patience;
      }
      offer(in, slot);
      added = true;
    }
    if (added) queue_kick(&receive);
    if (!added) pause();
  }
  u64 ns = nanoseconds(tsc() - begin);
  report("net.echo", returned == n && !wrong, "%u sent %u returned %u wrong %u others, %u bytes window %u: %lu per second, %lu and %lu kicks",
         sent, returned, wrong, other, size, window, ns ? (u64)returned * 1000000000 / ns : 0, transmit.kicks, receive.kicks);
  report("net.reset", virtio_reset(&card), "status %x", virtio_status(&card));
}
