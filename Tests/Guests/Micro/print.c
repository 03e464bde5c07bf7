// Lines on the serial port. Each byte is a port exit (about 30 us on a KVM without hardware virtualization), so tests
// measure first and print afterwards.
#include "micro.h"
#include <stdarg.h>

u32 failures, reports;

static void put(char c) {
  // A real UART needs its holding register empty; ours always says so at once. The bound keeps a missing UART harmless.
  for (u32 i = 0; i < 1000 && !(in8(0x3fd) & 0x20); i++) pause();
  out8(0x3f8, (u8)c);
}

static void put_number(u64 value, u32 base) {
  char digits[20];
  u32 n = 0;
  do {
    digits[n++] = "0123456789abcdef"[value % base];
    value /= base;
  } while (value);
  while (n) put(digits[--n]);
}

static void format_to_serial(const char *f, va_list arguments) {
  for (; *f; f++) {
    if (*f != '%') {
      put(*f);
      continue;
    }
    bool is_long = f[1] == 'l';
    f += is_long ? 2 : 1;
    switch (*f) {
    case 's': {
      const char *s = va_arg(arguments, const char *);
      while (*s) put(*s++);
      break;
    }
    case 'c': put((char)va_arg(arguments, int)); break;
    case 'd': {
      int64_t v = is_long ? va_arg(arguments, long) : va_arg(arguments, int);
      if (v < 0) put('-');
      put_number(v < 0 ? -(u64)v : (u64)v, 10);
      break;
    }
    case 'u': put_number(is_long ? va_arg(arguments, u64) : va_arg(arguments, u32), 10); break;
    case 'x': put_number(is_long ? va_arg(arguments, u64) : va_arg(arguments, u32), 16); break;
    default: put('?');
    }
  }
}

void print(const char *format, ...) {
  va_list arguments;
  va_start(arguments, format);
  format_to_serial(format, arguments);
  va_end(arguments);
}

bool report(const char *name, bool ok, const char *format, ...) {
  va_list arguments;
  va_start(arguments, format);
  reports++;
  failures += !ok;
  print("MICRO %s %s ", name, ok ? "ok" : "FAIL");
  format_to_serial(format, arguments);
  print("\n");
  va_end(arguments);
  return ok;
}

// The compiler calls these four for structure copies and initialisers.
void *memset(void *to, int value, size_t n) {
  void *d = to;
  __asm__ volatile("rep stosb" : "+D"(d), "+c"(n) : "a"(value) : "memory");
  return to;
}
void *memcpy(void *to, const void *from, size_t n) {
  void *d = to;
  __asm__ volatile("rep movsb" : "+D"(d), "+S"(from), "+c"(n)::"memory");
  return to;
}
int memcmp(const void *a, const void *b, size_t n) {
  const u8 *x = a, *y = b;
  for (size_t i = 0; i < n; i++)
    if (x[i] != y[i]) return x[i] - y[i];
  return 0;
}
size_t strlen(const char *s) {
  size_t n = 0;
  while (s[n]) n++;
  return n;
}
