// test=fuzz: a deterministic storm of accesses at any width to configuration space, device registers, MSI-X tables and
// unclaimed places. The machine must go on answering; that the host lives is the host's part of the test.
//   lowest=D highest=D  PCI devices to fuzz (default 0 to 31; where=config)
//   seed=S (default 1)  n=N accesses (default 20000)  where=config,bar,port,hole  (default all four)
// Later tests of the same run show that devices recover by reset.
#include "virtio.h"

static u64 state;
static u32 below(u32 bound) { return (u32)(next_random(&state) % bound); }

// Values that break things more often than even noise does.
static u64 value(void) {
  static const u64 nasty[] = {0, 1, 0xff, 0xffff, 0x7fffffff, 0x80000000, 0xffffffff, ~0ul, 0xfee00000, 0xfec00000,
                              0xe8000000, 0x100000, 0x8000, 0xfffff000, 1ul << 32, 1ul << 47, 15, 4096};
  return below(2) ? nasty[below(sizeof nasty / sizeof *nasty)] : next_random(&state);
}

static void touch(u64 at) {
  u64 v = value();
  bool write = below(3) != 0;
  switch (below(4)) {
  case 0: write ? write8(at, (u8)v) : (void)read8(at); break;
  case 1: write ? write16(at, (u16)v) : (void)read16(at); break;
  case 2: write ? write32(at, (u32)v) : (void)read32(at); break;
  default: write ? write64(at, v) : (void)read64(at);
  }
}

// The addresses of each function's BARs as they were before anything was touched, to put back.
static u32 saved[32][16];

static void save(void) {
  for (u32 d = 0; d < 32; d++)
    for (u32 i = 0; i < 16; i++) saved[d][i] = pci_read_ports(d << 3, 4 * i, 4);
}
static void restore(void) {
  for (u32 d = 0; d < 32; d++) {
    if (saved[d][0] == 0xffffffff) continue;
    pci_write_ports(d << 3, 4, 2, 0);
    for (u32 i = 4; i < 16; i++) pci_write_ports(d << 3, 4 * i, 4, saved[d][i]);
    pci_write_ports(d << 3, 4, 2, saved[d][1] & 0xffff);
  }
}

static void config(u32 n) {
  u32 lowest = (u32)option_number("lowest", 0) & 31, count = ((u32)option_number("highest", 31) & 31) + 1 - lowest;
  for (u32 i = 0; i < n; i++) {
    // Devices more often than the absent ones; any offset, aligned or not, up to the last byte and across.
    u32 function = (lowest + below(below(4) && count > 6 ? 6 : count)) << 3 | (below(4) ? 0 : below(8)), offset = below(2) ? below(256) : below(4096);
    if (below(2) && machine.ecam) {
      touch(machine.ecam + ((u64)function << 12) + offset);
    } else {
      out32(0xcf8, (below(8) || count < 32 ? 0x80000000u : (u32)value()) | function << 8 | (offset & 0xff));
      u16 port = (u16)(0xcf8 + (count < 32 ? 4 + below(4) : below(8)));
      u32 v = (u32)value();
      if (port == 0xcf9) v = 0;  // as a byte this is the reset control register
      if (below(2)) out8(port, (u8)v);
      else if (port != 0xcf8 && below(2)) out16(port, (u16)v);
      else out32(0xcfc, v);
      in32(0xcfc);
    }
  }
}

static void bars(u32 n) {
  u64 address[32], size[32];
  u32 count = 0;
  for (u32 d = 1; d < 32 && count < 32; d++) {
    struct virtio v;
    if ((pci_read(d << 3, 0, 4) & 0xffff) != 0x1af4 || !virtio_locate(&v, d << 3)) continue;
    struct bar b = pci_bar(d << 3, v.bar);
    address[count] = b.address, size[count++] = b.size;
  }
  if (!count) {
    report("fuzz.bar", false, "no virtio device");
    return;
  }
  for (u32 i = 0; i < n; i++) {
    u32 k = below(count);
    // Half in the common configuration, where writes have the most effect.
    touch(address[k] + (below(2) ? below(64) : below((u32)size[k] - 8)));
  }
}

static bool spared(u32 port) {
  // The ways out of this run, and the line reports are written to.
  return port == 0xcf9 || (port >= 0x60 && port <= 0x64) || (port >= 0x600 && port < 0x610) || (port >= 0x3f8 && port < 0x400) ||
         port == machine.reset_port || port == machine.sleep_port || (port & ~7u) == 0xcf8 || port == 0x92 ||
         (port >= 0xb0 && port <= 0xb3);
}
static void ports(u32 n) {
  for (u32 i = 0; i < n; i++) {
    u32 port = below(65536 - 4), width = below(3);
    bool skip = false;
    for (u32 k = 0; k < 4; k++) skip |= spared(port + k);
    if (skip) continue;
    u32 v = (u32)value();
    bool write = below(2);
    if (width == 0) write ? out8((u16)port, (u8)v) : (void)in8((u16)port);
    else if (width == 1) write ? out16((u16)port, (u16)v) : (void)in16((u16)port);
    else write ? out32((u16)port, v) : (void)in32((u16)port);
  }
}

static void holes(u32 n) {
  // The whole window below the IOAPIC but for configuration space, and the strip between IOAPIC and LAPIC.
  for (u32 i = 0; i < n; i++) {
    u64 at = below(4) ? 0xc0000000 + next_random(&state) % 0x28000000 : 0xfec00100 + below(0x1ff000);
    touch(at);
  }
}

static bool asked(const char *name) {
  const char *p = option("where");
  if (!p) return true;
  size_t n = strlen(name);
  for (; *p && *p != ' '; p++)
    if (!memcmp(p, name, n)) return true;
  return false;
}

void test_fuzz(void) {
  state = option_number("seed", 1);
  u32 n = (u32)option_number("n", 20000);
  save();
  u32 bridge = pci_read_ports(0, 0, 4);
  if (asked("config")) config(n), restore(), report("fuzz.config", pci_read_ports(0, 0, 4) == bridge, "%u accesses", n);
  if (asked("bar")) bars(n), restore(), report("fuzz.bar", pci_read_ports(0, 0, 4) == bridge, "%u accesses", n);
  if (asked("port")) ports(n), restore(), report("fuzz.port", pci_read_ports(0, 0, 4) == bridge, "%u accesses", n);
  if (asked("hole")) holes(n), report("fuzz.hole", pci_read_ports(0, 0, 4) == bridge, "%u accesses", n);
  // Leaves the vectors masked, as at power-up; a virtio reset need not do that.
  for (u32 d = 0; d < 32; d++) {
    struct msix m;
    if ((saved[d][0] & 0xffff) != 0x1af4 || !msix_find(d << 3, &m)) continue;
    msix_control(&m, false, false);
    for (u32 i = 0; i < m.size; i++) msix_mask(&m, i, true);
  }
  u32 changed = 0, deaf = 0;
  for (u32 d = 0; d < 32; d++) {
    for (u32 i = 0; i < 16; i++)
      // Status (word 1) and interrupt line (word 15) may have changed by rights; identity and addresses must not.
      changed += i != 1 && i != 3 && i != 15 && pci_read_ports(d << 3, 4 * i, 4) != saved[d][i];
    struct virtio v;
    if ((saved[d][0] & 0xffff) == 0x1af4) deaf += !virtio_locate(&v, d << 3) || !virtio_reset(&v);
  }
  report("fuzz.after", !changed && !deaf, "%u registers changed, %u devices do not reset", changed, deaf);
}
