// PCI configuration space by both mechanisms, BARs, and test=pci: everything on bus 0 is sane, whichever way one looks.
#include "virtio.h"

u32 pci_read_ports(u32 function, u32 offset, u32 width) {
  out32(0xcf8, 0x80000000u | function << 8 | (offset & 0xfc));
  u16 port = (u16)(0xcfc + (offset & 3));
  return width == 1 ? in8(port) : width == 2 ? in16(port) : in32(port);
}
void pci_write_ports(u32 function, u32 offset, u32 width, u32 value) {
  out32(0xcf8, 0x80000000u | function << 8 | (offset & 0xfc));
  u16 port = (u16)(0xcfc + (offset & 3));
  if (width == 1) out8(port, (u8)value);
  else if (width == 2) out16(port, (u16)value);
  else out32(port, value);
}
u32 pci_read(u32 function, u32 offset, u32 width) {
  if (!machine.ecam) return pci_read_ports(function, offset, width);
  u64 at = machine.ecam + ((u64)function << 12) + offset;
  return width == 1 ? read8(at) : width == 2 ? read16(at) : read32(at);
}
void pci_write(u32 function, u32 offset, u32 width, u32 value) {
  u64 at = machine.ecam + ((u64)function << 12) + offset;
  if (!machine.ecam) pci_write_ports(function, offset, width, value);
  else if (width == 1) write8(at, (u8)value);
  else if (width == 2) write16(at, (u16)value);
  else write32(at, value);
}

static bool multifunction(u32 device) { return pci_read(device << 3, 0xe, 1) & 0x80; }

// Calls for every present function, in order.
static u32 next_function(u32 after) {
  for (u32 f = after + 1; f < 256; f++) {
    if ((f & 7) && !multifunction(f >> 3)) {
      f |= 7;
      continue;
    }
    if (pci_read(f, 0, 2) != 0xffff) return f;
    if (!(f & 7)) f |= 7;
  }
  return PCI_NONE;
}

u32 pci_find(u32 vendor, u32 device, u32 nth) {
  for (u32 f = next_function(PCI_NONE); f != PCI_NONE; f = next_function(f))
    if (pci_read(f, 0, 4) == (device << 16 | vendor) && !nth--) return f;
  return PCI_NONE;
}

u32 pci_capability(u32 function, u32 id, u32 after) {
  if (!(pci_read(function, 6, 2) & 0x10)) return 0;
  u32 at = pci_read(function, after ? after + 1 : 0x34, 1) & 0xfc;
  for (u32 turns = 0; at >= 0x40 && turns < 48; turns++) {
    if (pci_read(function, at, 1) == id) return at;
    at = pci_read(function, at + 1, 1) & 0xfc;
  }
  return 0;
}

struct bar pci_bar(u32 function, u32 index) {
  u32 at = 0x10 + 4 * index, low = pci_read(function, at, 4);
  struct bar b = {.memory = !(low & 1), .wide = (low & 7) == 4};
  u32 high = b.wide ? pci_read(function, at + 4, 4) : 0;
  u32 command = pci_read(function, 4, 2);
  pci_write(function, 4, 2, command & ~3u);
  pci_write(function, at, 4, 0xffffffff);
  if (b.wide) pci_write(function, at + 4, 4, 0xffffffff);
  u32 mask = pci_read(function, at, 4), high_mask = b.wide ? pci_read(function, at + 4, 4) : 0xffffffff;
  pci_write(function, at, 4, low);
  if (b.wide) pci_write(function, at + 4, 4, high);
  pci_write(function, 4, 2, command);
  u32 type_bits = b.memory ? 15 : 3;
  b.address = (u64)high << 32 | (low & ~type_bits);
  if (mask & ~type_bits) b.size = ~((u64)high_mask << 32 | (mask & ~type_bits)) + 1;
  if (!b.wide) b.size &= 0xffffffff;
  return b;
}

void pci_set_bar(u32 function, u32 index, u64 address) {
  u32 command = pci_read(function, 4, 2);
  pci_write(function, 4, 2, command & ~2u);
  pci_write(function, 0x10 + 4 * index, 4, (u32)address);
  if ((pci_read(function, 0x10 + 4 * index, 4) & 7) == 4) pci_write(function, 0x14 + 4 * index, 4, (u32)(address >> 32));
  pci_write(function, 4, 2, command | 2);
}

// Gives memory BARs that have no address one, from `next` on: for machines whose firmware leaves that to the kernel.
void pci_assign(u64 next) {
  for (u32 f = next_function(PCI_NONE); f != PCI_NONE; f = next_function(f))
    for (u32 index = 0; index < 6; index++) {
      struct bar b = pci_bar(f, index);
      if (b.memory && b.size && !b.address) {
        next = (next + b.size - 1) & ~(b.size - 1);
        pci_set_bar(f, index, next);
        next += b.size;
      }
      index += b.wide;
    }
}

// Each register read as one dword, two words and four bytes, and by the other mechanism, must be the same bytes.
static u32 width_differences(u32 function) {
  u32 differences = 0;
  for (u32 at = 0; at < 256; at += 4) {
    u32 whole = pci_read(function, at, 4), words = 0, bytes = 0;
    for (u32 i = 0; i < 2; i++) words |= pci_read(function, at + 2 * i, 2) << 16 * i;
    for (u32 i = 0; i < 4; i++) bytes |= pci_read(function, at + i, 1) << 8 * i;
    differences += words != whole || bytes != whole || pci_read_ports(function, at, 4) != whole;
  }
  return differences;
}

static void check_function(u32 f) {
  u32 id = pci_read(f, 0, 4), header = pci_read(f, 0xe, 1) & 0x7f, capabilities = 0, bars = 0;
  bool list_ok = true, bars_ok = true;
  if (pci_read(f, 6, 2) & 0x10) {
    u32 at = pci_read(f, 0x34, 1);
    for (; at && capabilities < 48; capabilities++) {
      if (at < 0x40 || at & 3) list_ok = false;
      at = pci_read(f, (at & 0xfc) + 1, 1);
    }
    if (at) list_ok = false;  // a ring of capabilities would hang a careless driver
  }
  for (u32 i = 0; i < 6 && header == 0; i++) {
    struct bar b = pci_bar(f, i);
    if (!b.size) continue;
    bars++;
    if (b.size & (b.size - 1) || b.address & (b.size - 1) || !b.address) bars_ok = false;
    i += b.wide;
  }
  u32 differences = width_differences(f);
  report("pci.function", list_ok && bars_ok && !differences, "%u.%u id %x class %x bars %u capabilities %u differences %u",
         f >> 3, f & 7, id, pci_read(f, 8, 4) >> 8, bars, capabilities, differences);
}

// Moves BAR 0 of the first virtio device away and back; the registers follow, and nothing is left behind.
static void check_move(void) {
  struct virtio v;
  u32 f = pci_find(0x1af4, 0x1040 + (u32)option_number("device", VIRTIO_BLK), 0);
  if (f == PCI_NONE || !virtio_locate(&v, f)) {
    report("pci.move", false, "no virtio device to move");
    return;
  }
  u32 index = v.bar;
  struct bar b = pci_bar(f, index);
  u64 to = option_number("to", 0xdf000000);
  u64 old_common = v.common;
  u32 queues = read16(v.common + C_QUEUES), dead = 0;
  if (to >= 1ul << 32) map(to, b.size);
  pci_set_bar(f, index, to);
  virtio_locate(&v, f);
  u32 there = read16(v.common + C_QUEUES), gone = read32(old_common + C_QUEUES - 2);
  // Decoding off: neither place answers.
  pci_write(f, 4, 2, pci_read(f, 4, 2) & ~2u);
  dead = read32(to);
  pci_set_bar(f, index, b.address);
  virtio_locate(&v, f);
  u32 back = read16(v.common + C_QUEUES);
  report("pci.move", there == queues && back == queues && queues && (gone == 0xffffffff || option_is("holes", "any")),
         "from %lx to %lx: queues %u there %u back %u, left behind %x", b.address, to, queues, there, back, gone);
  report("pci.decode-off", dead == 0xffffffff || option_is("holes", "any"), "%x", dead);
}

void test_pci(void) {
  u32 count = 0;
  for (u32 f = next_function(PCI_NONE); f != PCI_NONE; f = next_function(f)) check_function(f), count++;
  u32 bridge = pci_read(0, 8, 4) >> 8;
  report("pci.bridge", bridge == 0x060000, "class %x", bridge);
  // An absent function, an absent bus, and the address register with its enable bit off.
  u32 absent = pci_read_ports(31 << 3 | 6, 0, 4);
  out32(0xcf8, 0x80ff0000);
  u32 no_bus = in32(0xcfc);
  out32(0xcf8, 0);
  u32 disabled = in32(0xcfc);
  report("pci.absent", absent == 0xffffffff && no_bus == 0xffffffff && disabled == 0xffffffff, "%x %x %x", absent, no_bus,
         disabled);
  out32(0xcf8, 0x80000008);
  report("pci.address", in32(0xcf8) == 0x80000008, "%x", in32(0xcf8));
  report("pci.count", count == option_number("functions", count), "%u functions", count);
  check_move();
}
