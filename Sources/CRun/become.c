#include "crun.h"

#include <stddef.h>
#include <sys/syscall.h>

// Relocating this program, Swift's start-up, and building arguments and verbs only to give them away cost 0.7 ms, a tenth
// of what passes until the guest runs. So `martlet run` without a wish for help goes over to the supervisor here, at the
// very entry of the program. Whatever does not work is left to the verb `run`, which tries again and says what is wrong.
//
// Nothing is relocated yet and no thread pointer set: system calls by hand, no call into libc, no address in data. The
// package compiles this file freestanding (so that no loop becomes a call of memcpy) and without stack protector.

static long call3(long number, const void *a, const void *b, const void *c) {
  long result;
  __asm__ volatile("syscall" : "=a"(result) : "a"(number), "D"(a), "S"(b), "d"(c) : "rcx", "r11", "memory");
  return result;
}

static int is(const char *text, const char *word) {
  while (*text && *text == *word) text++, word++;
  return *text == *word;
}

// `stack` as the kernel left it: count, arguments, NULL, environment.
__attribute__((used)) static void become_supervisor(long *stack) {
  long count = stack[0];
  char **arguments = (char **)(stack + 1);
  if (count < 2 || !is(arguments[1], "run")) return;
  for (long i = 2; i < count; i++)
    if (is(arguments[i], "--help") || is(arguments[i], "-h")) return;
  static const char name[] = "martlet-supervisor";
  char path[4096];
  long length = call3(SYS_readlink, "/proc/self/exe", path, (const void *)sizeof path);
  if (length <= 0 || length >= (long)sizeof path) return;
  while (length > 0 && path[length - 1] != '/') length--;
  if (length == 0 || length + sizeof name > sizeof path) return;
  for (size_t i = 0; i < sizeof name; i++) path[length + (long)i] = name[i];
  char *run = arguments[1];
  arguments[1] = path + length;
  call3(SYS_execve, path, arguments + 1, arguments + count + 1);
  arguments[1] = run;
}

// The entry of the program: rdx (for `_start`) and the stack pass through unchanged.
__attribute__((naked, noreturn)) void crun_entry(void) {
  __asm__("movq %rsp, %rdi\n\t"
          "pushq %rdx\n\t"
          "subq $8, %rsp\n\t"
          "call become_supervisor\n\t"
          "addq $8, %rsp\n\t"
          "popq %rdx\n\t"
          "jmp _start");
}
