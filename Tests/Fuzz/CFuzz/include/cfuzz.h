// What the fuzz targets need of C and the address sanitizer.
#pragma once
#include <stddef.h>
#include <stdint.h>

/// From here on every instrumented access to these bytes is a finding (8-byte granules).
void cfuzz_poison(const volatile void *start, size_t size);
void cfuzz_unpoison(const volatile void *start, size_t size);

/// Descriptors this process has open, by /proc/self/fd.
int cfuzz_open_descriptors(void);

/// Writes to standard error.
void cfuzz_say(const char *text);

/// A pipe, both ends non-blocking; 0 or -1.
int cfuzz_pipe(int ends[2]);

/// Writes one byte past the end of an array; for the target that proves that such a thing is found.
void cfuzz_planted_overflow(const uint8_t *data, size_t size);
