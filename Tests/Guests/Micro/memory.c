// test=memory: every RAM range of the memory map holds a pattern at its ends and at steps=N places between (default 16),
// above 4 GiB too, and no two places are the same memory.
#include "micro.h"

static u64 pattern(u64 address) {
  u64 seed = address;
  return next_random(&seed);
}

// Below this lie our image, the arena's beginning and the loader's data.
#define FREE_FROM 0x2000000ul

void test_memory(void) {
  u64 steps = option_number("steps", 16), places = 0, wrong = 0, high = 0, bytes = 0;
  for (int pass = 0; pass < 2; pass++)
    for (u32 i = 0; i < machine.memory_map_entries; i++) {
      struct memory_range r = memory_map_entry(i);
      if (r.type != 1) continue;
      u64 from = r.address < FREE_FROM ? FREE_FROM : r.address, end = r.address + r.size;
      if (pass == 0) bytes += r.size;
      // The command line or an initramfs may lie at the end of low RAM: leave the top 2 MiB below 4 GiB alone.
      if (end <= 1ul << 32) end = end > 0x200000 ? end - 0x200000 : 0;
      if (end <= from + 8) continue;
      if (end > 1ul << 32) map(from, end - from);
      u64 step = ((end - 8 - from) / steps) & ~7ul;
      for (u64 k = 0; k <= steps; k++) {
        u64 at = k == steps ? end - 8 : from + k * step;
        if (pass == 0)
          write64(at, pattern(at)), places++, high += at >= 1ul << 32;
        else
          wrong += read64(at) != pattern(at);
      }
    }
  report("memory", wrong == 0 && places > 0, "%lu places, %lu above 4 GiB, %lu wrong, %lu MiB RAM", places, high, wrong,
         bytes >> 20);
}
