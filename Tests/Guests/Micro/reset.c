// test=reset: restarts in one way, by=cf9|i8042|acpi|triple, or, by=nowhere, crashes where no memory is; `MICRO reset FAIL` follows if the guest lives on. The next
// start, if the VMM reboots in place, runs the same command line again: the host counts the starts.
#include "micro.h"

void test_reset(void) {
  print("MICRO reset ok trying\n");
  if (option_is("by", "cf9")) out8(0xcf9, 6);
  else if (option_is("by", "i8042")) out8(0x64, 0xfe);
  else if (option_is("by", "acpi"))
    out8(machine.reset_port ? machine.reset_port : 0x600, machine.reset_port ? machine.reset_value : 1);
  else if (option_is("by", "nowhere")) ((void (*)(void))0xd8000000ul)();
  else triple_fault();
  wait_nanoseconds(200000000);
  report("reset", false, "still running");
}
