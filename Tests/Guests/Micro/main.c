// Entry at CPL 3: read the command line, run the tests it names, report, power off.
//
//   test=A,B,...   which tests, in this order (see the table below); default boot
//   end=off|hang   power off when done (default), or stop all work with interrupts off
// Further options belong to single tests and are explained there.
#include "virtio.h"

static const struct {
  const char *name;
  void (*run)(void);
} tests[] = {
    {"boot", test_boot}, {"exits", test_exits}, {"smp", test_smp}, {"memory", test_memory},
    {"idle", test_idle}, {"reset", test_reset}, {"pci", test_pci}, {"msix", test_msix}, {"blk", test_blk},
    {"kick", test_kick}, {"irq", test_irq}, {"registers", test_registers}, {"fuzz", test_fuzz}, {"net", test_net},
    {"console", test_console}, {"ring", test_ring}, {"rng", test_rng}, {"hotplug", test_hotplug},
};

// The loader's copy may lie where a test writes; ours is safe.
static char command_line[2048];

const char *option(const char *name) {
  size_t n = strlen(name);
  for (const char *p = command_line; *p; p++)
    if ((p == command_line || p[-1] == ' ') && !memcmp(p, name, n) && p[n] == '=') return p + n + 1;
  return NULL;
}

u64 option_number(const char *name, u64 otherwise) {
  const char *p = option(name);
  if (!p) return otherwise;
  u64 value = 0, base = 10;
  if (p[0] == '0' && p[1] == 'x') base = 16, p += 2;
  for (;; p++) {
    u32 digit = (u8)*p - '0';
    if (digit > 9) digit = ((u8)*p | 32) - 'a' < 6u ? ((u8)*p | 32) - 'a' + 10 : 99;
    if (digit >= base) return value;
    value = value * base + digit;
  }
}

bool option_is(const char *name, const char *value) {
  const char *p = option(name);
  size_t n = strlen(value);
  return p && !memcmp(p, value, n) && (p[n] == 0 || p[n] == ' ');
}

_Noreturn void exception_report(u64 vector, u64 error, u64 rip, u64 address) {
  report("exception", false, "vector %lu error %lx rip %lx cr2 %lx", vector, error, rip, address);
  power_off();
}

static bool run_named(const char *name, size_t length) {
  for (u32 i = 0; i < sizeof tests / sizeof *tests; i++)
    if (strlen(tests[i].name) == length && !memcmp(tests[i].name, name, length)) {
      tests[i].run();
      return true;
    }
  return false;
}

_Noreturn void micro_main(void) {
  u64 user_tsc = tsc();
  extern u8 bss_start[], bss_end[];
  if (boot_path == 2) memset(bss_start, 0, (size_t)(bss_end - bss_start));  // a flat image has no zero-fill
  machine_read();
  for (u32 i = 0; machine.command_line && i < sizeof command_line - 1; i++)
    if (!(command_line[i] = *(char *)(machine.command_line + i))) break;
  // What a machine without firmware tables does not say.
  if (!machine.ecam) machine.ecam = option_number("ecam", 0);
  if (option("bars")) pci_assign(option_number("bars", 0));

  // The time stamp counter at the very first instruction, and at the first one at CPL 3.
  print("MICRO start ok path %s first %lu tsc %lu khz %lu\n", boot_path == 1 ? "pvh" : "linux64", first_tsc, user_tsc,
        tsc_khz());
  const char *p = option("test");
  if (!p) p = "boot";
  while (*p && *p != ' ') {
    size_t n = 0;
    while (p[n] && p[n] != ' ' && p[n] != ',') n++;
    if (!run_named(p, n)) report("main", false, "no test of this name at %s", p);
    p += n + (p[n] == ',');
  }
  print("MICRO done %s %u of %u failed\n", failures ? "FAIL" : "ok", failures, reports);
  if (option_is("end", "hang")) park();
  power_off();
}
