// test=registers: the IOAPIC and the serial port answer as their data sheets say, and the serial port's interrupt
// arrives through the IOAPIC. Console output is held back while the port is in loop mode.
#include "micro.h"

#define VECTOR 0x70

static u32 ioapic_read(u32 index) {
  write32(machine.ioapic, index);
  return read32(machine.ioapic + 0x10);
}
static void ioapic_write(u32 index, u32 value) {
  write32(machine.ioapic, index);
  write32(machine.ioapic + 0x10, value);
}

static void check_ioapic(void) {
  u32 version = ioapic_read(1), pins = (version >> 16 & 0xff) + 1;
  report("ioapic.version", (version & 0xff) >= 0x11 && pins >= 24, "%x", version);
  u32 masked = 0, kept = 0;
  for (u32 pin = 0; pin < 24; pin++) masked += ioapic_read(0x10 + 2 * pin) >> 16 & 1;
  report("ioapic.masked", masked == 24 || option_is("holes", "any"), "%u of 24 pins", masked);
  u32 low = ioapic_read(0x10 + 2 * 23), high = ioapic_read(0x11 + 2 * 23);
  ioapic_write(0x11 + 2 * 23, 0x05000000);
  ioapic_write(0x10 + 2 * 23, 0x0001a0fe);  // masked, level, low active, physical, vector 0xfe
  kept = ioapic_read(0x10 + 2 * 23);
  u32 destination = ioapic_read(0x11 + 2 * 23);
  ioapic_write(0x10 + 2 * 23, 0x000150fe);  // delivery status and remote IRR are not the guest's to set
  u32 status = ioapic_read(0x10 + 2 * 23);
  ioapic_write(0x10 + 2 * 23, low), ioapic_write(0x11 + 2 * 23, high);
  report("ioapic.entry", kept == 0x1a0fe && destination == 0x05000000 && !(status & 0x5000), "%x %x %x", kept, destination,
         status);
  // Past the last entry: reads and writes change nothing that exists.
  u32 beyond = ioapic_read(0x50);
  ioapic_write(0x50, 0xffffffff), ioapic_write(0xff, 0xffffffff), ioapic_write(1, 0xffffffff);
  report("ioapic.beyond", ioapic_read(1) == version && ioapic_read(0x10 + 2 * 23) == low, "%x then version %x", beyond,
         ioapic_read(1));
}

static void check_serial(void) {
  u8 old_line = in8(0x3fb), old_modem = in8(0x3fc), old_enable = in8(0x3f9);
  out8(0x3ff, 0xa5);
  u32 scratch = in8(0x3ff);
  out8(0x3ff, 0x5a);
  scratch = scratch << 8 | in8(0x3ff);
  out8(0x3fb, 0x83);
  u8 divisor_low = in8(0x3f8), divisor_high = in8(0x3f9);
  out8(0x3f8, 0x34), out8(0x3f9, 0x12);
  u32 divisor = in8(0x3f8) | in8(0x3f9) << 8;
  out8(0x3f8, divisor_low), out8(0x3f9, divisor_high);
  out8(0x3fb, 0x03);
  u32 enable;
  out8(0x3f9, 0xff);
  enable = in8(0x3f9);
  out8(0x3f9, 0);
  // Loop mode: what is sent is received, modem outputs come back as inputs.
  out8(0x3fa, 0x07);
  u32 identification = in8(0x3fa);
  out8(0x3fc, 0x1a);
  u32 modem = in8(0x3fe) & 0xf0;
  out8(0x3f8, 0x77);
  u32 status = in8(0x3fd), looped = in8(0x3f8), after = in8(0x3fd);
  out8(0x3fc, old_modem);
  report("serial.scratch", scratch == 0xa55a, "%x", scratch);
  report("serial.divisor", divisor == 0x1234, "%x", divisor);
  report("serial.enable", (enable & 0xf0) == 0, "%x", enable);
  report("serial.fifo", (identification & 0xc1) == 0xc1, "%x", identification);
  report("serial.loop", looped == 0x77 && status & 1 && !(after & 1), "%x status %x after %x", looped, status, after);
  report("serial.modem", modem == 0x90, "%x", modem);
  report("serial.line", (in8(0x3fd) & 0x60) == 0x60, "%x", in8(0x3fd));

  // Transmitter empty: the interrupt comes when enabled, is identified, and reading the identification clears it.
  apic_enable();
  ioapic_write(0x11 + 2 * 4, apic_id() << 24);
  ioapic_write(0x10 + 2 * 4, VECTOR);
  u32 before = interrupt_count[VECTOR];
  out8(0x3fc, 0x0b);  // OUT2 gates the interrupt line on a PC
  out8(0x3f9, 0x02);
  bool came = wait_for_count(VECTOR, before + 1, 100000000);
  u32 cause = in8(0x3fa) & 0xf, none = in8(0x3fa) & 0xf;
  out8(0x3f9, 0);
  // Off and on again: a new edge.
  u32 between = interrupt_count[VECTOR];
  out8(0x3f9, 0x02);
  bool again = wait_for_count(VECTOR, between + 1, 100000000);
  in8(0x3fa);
  out8(0x3f9, 0);
  // Masked pin: nothing arrives.
  ioapic_write(0x10 + 2 * 4, 0x10000 | VECTOR);
  u32 quiet = interrupt_count[VECTOR];
  out8(0x3f9, 0x02);
  bool leaked = wait_for_count(VECTOR, quiet + 1, 20000000);
  in8(0x3fa);
  out8(0x3f9, old_enable), out8(0x3fb, old_line), out8(0x3fc, old_modem);
  report("serial.interrupt", came && cause == 2 && none == 1, "came %d cause %x then %x", came, cause, none);
  report("serial.interrupt-again", again, "%u", interrupt_count[VECTOR] - between);
  report("ioapic.mask", !leaked, "leaked %d", leaked);
}

void test_registers(void) {
  check_ioapic();
  check_serial();
}
