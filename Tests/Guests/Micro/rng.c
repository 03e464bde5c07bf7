// test=rng: n=N buffers (default 200) of size=S bytes (64) filled by the entropy device nth=K; no two alike, none of one byte
// only, nothing written beyond what is reported.
#include "virtio.h"

static struct virtio device;
static struct virtqueue queue;

void test_rng(void) {
  u64 n = option_number("n", 200), size = option_number("size", 64), total = 0;
  if (size < 16 || size > 65536) size = 64;
  if (!virtio_open(&device, VIRTIO_RNG, (u32)option_number("nth", 0)) || !virtio_negotiate(&device, F_EVENT_IDX | F_INDIRECT) ||
      !virtio_queue(&device, &queue, 0, 32, NO_VECTOR)) {
    report("rng", false, "no entropy device");
    return;
  }
  u8 *in = arena(size, 4096), *last = arena(16, 16);
  virtio_start(&device);
  for (u64 i = 0; i < n; i++) {
    memset(in, 0xa5, size);
    struct buffer b = {in, (u32)size, true};
    if (queue_add(&queue, &b, 1) < 0) return (void)report("rng.add", false, "buffer %lu", i);
    queue_kick(&queue);
    u64 end = tsc() + 10000 * tsc_khz();
    u32 length = 0;
    while (queue_take(&queue, &length) < 0)
      if (tsc() > end) return (void)report("rng.answer", false, "buffer %lu does not come back", i);
    u32 same = 0;
    for (u32 k = 1; k < length && k < size; k++) same += in[k] == in[0];
    bool beyond = false;
    for (u64 k = length; k < size; k++) beyond |= in[k] != 0xa5;
    if (length < 16 || length > size || same + 1 == length || beyond || !memcmp(in, last, 16))
      return (void)report("rng.bytes", false, "buffer %lu: %u bytes", i, length);
    memcpy(last, in, 16);
    total += length;
  }
  report("rng.filled", true, "%lu buffers %lu bytes", n, total);
  report("rng.reset", virtio_reset(&device), "status %x", virtio_status(&device));
}
