// test=console: says `MICRO-CONSOLE READY` on the virtio console, then sends back what it receives until bytes=N have come
// (default 1000), and reports their sum on the serial line.
//   lines=N   instead writes the lines `LINE 0` to `LINE N-1`, each when the one before has been taken
#include "virtio.h"

static struct virtio console;
static struct virtqueue receive, transmit;

static bool send(const void *text, u32 length) {
  struct buffer b = {(void *)text, length, false};
  if (queue_add(&transmit, &b, 1) < 0) return false;
  queue_kick(&transmit);
  u64 end = tsc() + 5000 * tsc_khz();
  while (queue_take(&transmit, NULL) < 0)
    if (tsc() > end) return false;
  return true;
}

static bool write_line(u8 *out, u64 number) {
  u8 digits[20];
  u32 count = 0, length = 5;
  do digits[count++] = (u8)('0' + number % 10);
  while (number /= 10);
  memcpy(out, "LINE ", 5);
  while (count) out[length++] = digits[--count];
  out[length++] = '\n';
  return send(out, length);
}

void test_console(void) {
  u64 wanted = option_number("bytes", 1000), got = 0, sum = 0;
  if (!virtio_open(&console, VIRTIO_CONSOLE, 0) || !virtio_negotiate(&console, F_EVENT_IDX | 1) ||
      !virtio_queue(&console, &receive, 0, 32, NO_VECTOR) || !virtio_queue(&console, &transmit, 1, 32, NO_VECTOR)) {
    report("console", false, "no virtio console");
    return;
  }
  u8 *in = arena(16 * 256, 4096), *out = arena(4096, 4096);
  u8 *buffer_of_head[32];
  for (u32 i = 0; i < 16; i++) {
    struct buffer b = {in + 256 * i, 256, true};
    int head = queue_add(&receive, &b, 1);
    if (head >= 0) buffer_of_head[head] = b.address;
  }
  virtio_start(&console);
  queue_kick(&receive);
  if (console.features & 1) report("console.size", true, "%u columns %u rows", read16(console.config), read16(console.config + 2));
  u64 lines = option_number("lines", 0), line = 0;
  if (lines) {
    while (line < lines && write_line(out, line)) line++;
    report("console.lines", line == lines, "%lu of %lu", line, lines);
    report("console.reset", virtio_reset(&console), "status %x", virtio_status(&console));
    return;
  }
  memcpy(out, "MICRO-CONSOLE READY\r\n", 21);
  bool sent = send(out, 21);
  u64 deadline = tsc() + 10000 * tsc_khz();
  while (sent && got < wanted && tsc() < deadline) {
    u32 length;
    int head = queue_take(&receive, &length);
    if (head < 0) {
      pause();
      continue;
    }
    u8 *from = buffer_of_head[head];
    if (length > 256) length = 0;
    memcpy(out, from, length);
    for (u32 i = 0; i < length; i++) sum += from[i];
    got += length;
    struct buffer b = {from, 256, true};
    head = queue_add(&receive, &b, 1);
    if (head >= 0) buffer_of_head[head] = from;
    queue_kick(&receive);
    sent = !length || send(out, length);
  }
  report("console.echo", sent && got == wanted, "%lu of %lu bytes sum %lu", got, wanted, sum);
  report("console.reset", virtio_reset(&console), "status %x", virtio_status(&console));
}
