// What the loader and ACPI tell about the machine, read with as little trust as a kernel has.
#include "micro.h"

struct machine machine;

bool checksum_ok(u64 address, u32 length) {
  u8 sum = 0;
  for (u32 i = 0; i < length; i++) sum += *(u8 *)(address + i);
  return sum == 0;
}

// Tables may be unaligned in memory; x86 does not mind.
static u16 get16(u64 a) { return *(volatile u16 *)a; }
static u32 get32(u64 a) { return *(volatile u32 *)a; }
static u64 get64(u64 a) { return *(volatile u64 *)a; }

struct memory_range memory_map_entry(u32 index) {
  u64 a = machine.memory_map + (u64)index * machine.memory_map_stride;
  return (struct memory_range){get64(a), get64(a + 8), get32(a + 16)};
}

static u64 table_if(u64 address, const char *signature) {
  return address && !memcmp((void *)address, signature, 4) ? address : 0;
}

static void read_madt(void) {
  u64 end = machine.madt + get32(machine.madt + 4);
  for (u64 e = machine.madt + 44; e + 2 <= end && *(u8 *)(e + 1) >= 2; e += *(u8 *)(e + 1)) {
    u8 type = *(u8 *)e;
    bool enabled = false;
    u32 id = 0;
    if (type == 0) id = *(u8 *)(e + 3), enabled = get32(e + 4) & 1;
    if (type == 9) id = get32(e + 4), enabled = get32(e + 8) & 1;
    if (type == 1) machine.ioapic = get32(e + 4);
    if (enabled && machine.cpu_count < 256) machine.cpu_apic_ids[machine.cpu_count++] = id;
  }
}

static void read_fadt(void) {
  u32 flags = get32(machine.fadt + 112);
  machine.dsdt = get64(machine.fadt + 140);
  if (!machine.dsdt) machine.dsdt = get32(machine.fadt + 40);
  if (flags & 1 << 10) {
    machine.reset_port = get16(machine.fadt + 120);
    machine.reset_value = *(u8 *)(machine.fadt + 128);
  }
  if (flags & 1 << 20)
    machine.sleep_port = get16(machine.fadt + 248);
  else
    machine.pm1a_control_port = get16(machine.fadt + 64);
}

void machine_read(void) {
  if (boot_path == 1) {
    machine.command_line = get64(boot_pointer + 24);
    machine.rsdp = get64(boot_pointer + 32);
    machine.memory_map = get64(boot_pointer + 40);
    machine.memory_map_entries = get32(boot_pointer + 48);
    machine.memory_map_stride = 24;
  } else {
    machine.command_line = (u64)get32(boot_pointer + 0xc8) << 32 | get32(boot_pointer + 0x228);
    machine.rsdp = get64(boot_pointer + 0x70);
    machine.memory_map = boot_pointer + 0x2d0;
    machine.memory_map_entries = *(u8 *)(boot_pointer + 0x1e8);
    machine.memory_map_stride = 20;
  }
  machine.ioapic = 0xfec00000;
  if (!machine.rsdp || memcmp((void *)machine.rsdp, "RSD PTR ", 8)) return;
  u64 xsdt = *(u8 *)(machine.rsdp + 15) >= 2 ? get64(machine.rsdp + 24) : 0;
  u64 root = xsdt ? xsdt : get32(machine.rsdp + 16);
  u32 width = xsdt ? 8 : 4;
  if (!table_if(root, xsdt ? "XSDT" : "RSDT")) return;
  u64 end = root + get32(root + 4);
  for (u64 p = root + 36; p + width <= end; p += width) {
    u64 table = width == 8 ? get64(p) : get32(p);
    if (table_if(table, "APIC")) machine.madt = table;
    if (table_if(table, "FACP")) machine.fadt = table;
    if (table_if(table, "MCFG")) machine.mcfg = table;
  }
  if (machine.madt) read_madt();
  if (machine.fadt) read_fadt();
  if (machine.mcfg) machine.ecam = get64(machine.mcfg + 44);
}

// Off by the way ACPI names; without tables by the port all our machines have. If nothing helps, a triple fault at least
// ends the run (QEMU with -no-reboot).
_Noreturn void power_off(void) {
  if (machine.pm1a_control_port) out16(machine.pm1a_control_port, 0x2000);
  out8(machine.sleep_port ? machine.sleep_port : 0x600, 0x34);
  wait_nanoseconds(1000000000);
  triple_fault();
}
