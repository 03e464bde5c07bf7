// test=boot: what the loader and the ACPI tables promise. Each line is one promise, so a failing one names itself.
#include "micro.h"

static u16 get16(u64 a) { return *(volatile u16 *)a; }
static u32 get32(u64 a) { return *(volatile u32 *)a; }
static u64 get64(u64 a) { return *(volatile u64 *)a; }

static void check_pvh(void) {
  u32 magic = get32(boot_pointer), version = get32(boot_pointer + 4);
  report("boot.start-info", magic == 0x336ec578 && version >= 1, "magic %x version %u flags %x modules %u", magic,
         version, get32(boot_pointer + 8), get32(boot_pointer + 12));
  u32 modules = get32(boot_pointer + 12);
  u64 list = get64(boot_pointer + 16);
  for (u32 i = 0; i < modules && i < 4; i++)
    report("boot.module", get64(list + 32 * i) != 0, "at %lx size %lu", get64(list + 32 * i), get64(list + 32 * i + 8));
}

static void check_zero_page(void) {
  u64 z = boot_pointer;
  report("boot.zero-page", get16(z + 0x1fe) == 0xaa55 && get32(z + 0x202) == 0x53726448 && *(u8 *)(z + 0x1ef) == 0,
         "flag %x magic %x sentinel %x", get16(z + 0x1fe), get32(z + 0x202), *(u8 *)(z + 0x1ef));
  report("boot.loader", *(u8 *)(z + 0x210) != 0 && get16(z + 0x206) >= 0x20c, "type %x protocol %x loadflags %x",
         *(u8 *)(z + 0x210), get16(z + 0x206), *(u8 *)(z + 0x211));
  if (get32(z + 0x218))
    report("boot.module", get32(z + 0x21c) != 0, "at %x size %u", get32(z + 0x218), get32(z + 0x21c));
}

// Ranges ascend without overlap; RAM covers our image and the command line, and nothing of the hole that ACPI's ECAM and
// the interrupt controllers live in.
static void check_memory_map(void) {
  u64 last = 0, ram = 0;
  bool ordered = true, image = false, hole = true;
  for (u32 i = 0; i < machine.memory_map_entries; i++) {
    struct memory_range r = memory_map_entry(i);
    if (r.address < last || r.address + r.size < r.address) ordered = false;
    last = r.address + r.size;
    if (r.type != 1) continue;
    ram += r.size;
    if (r.address <= IMAGE_BASE && last >= (u64)image_end) image = true;
    if (r.address < 1ul << 32 && last > 0xfec00000) hole = false;
  }
  report("boot.memory-map", machine.memory_map_entries && ordered && image && hole,
         "%u entries ordered %d image %d hole %d RAM %lu KiB", machine.memory_map_entries, ordered, image, hole, ram >> 10);
  if (option("mib")) {
    u64 mib = option_number("mib", 0);
    report("boot.ram-size", ram <= mib << 20 && ram + 0x100000 >= mib << 20, "%lu KiB of %lu MiB", ram >> 10, mib);
  }
}

static bool check_table(const char *name, u64 table) {
  if (!table) return report(name, false, "missing");
  u32 length = get32(table + 4);
  bool sane = length >= 36 && length <= 0x100000;
  return report(name, sane && checksum_ok(table, length), "at %lx length %u revision %u", table, length, *(u8 *)(table + 8));
}

static void check_acpi(void) {
  if (!machine.rsdp || memcmp((void *)machine.rsdp, "RSD PTR ", 8)) {
    report("boot.rsdp", false, "none at %lx", machine.rsdp);
    return;
  }
  u8 revision = *(u8 *)(machine.rsdp + 15);
  bool whole = revision < 2 || checksum_ok(machine.rsdp, get32(machine.rsdp + 20));
  report("boot.rsdp", checksum_ok(machine.rsdp, 20) && whole, "at %lx revision %u", machine.rsdp, revision);
  if (revision >= 2) check_table("boot.xsdt", get64(machine.rsdp + 24));
  check_table("boot.madt", machine.madt);
  if (check_table("boot.fadt", machine.fadt)) check_table("boot.dsdt", machine.dsdt);
  check_table("boot.mcfg", machine.mcfg);
  u64 cpus = option_number("cpus", machine.cpu_count);
  report("boot.cpus", machine.cpu_count >= 1 && machine.cpu_count == cpus, "%u of %lu in the MADT, IOAPIC at %lx",
         machine.cpu_count, cpus, machine.ioapic);
  report("boot.power", machine.reset_port && (machine.sleep_port || machine.pm1a_control_port),
         "reset port %x value %x sleep port %x", machine.reset_port, machine.reset_value, machine.sleep_port);
  report("boot.ecam", machine.ecam != 0, "at %lx", machine.ecam);
}

void test_boot(void) {
  if (boot_path == 1) check_pvh();
  else check_zero_page();
  // The host puts mark=TEXT last and looks for it in our line: then the whole command line arrived.
  const char *mark = option("mark");
  report("boot.command-line", machine.command_line != 0, "at %lx mark %s", machine.command_line, mark ? mark : "-");
  check_memory_map();
  check_acpi();
}
