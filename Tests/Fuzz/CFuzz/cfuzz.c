#define _GNU_SOURCE
#include "cfuzz.h"

#include <dirent.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

extern void __asan_poison_memory_region(const volatile void *start, size_t size);
extern void __asan_unpoison_memory_region(const volatile void *start, size_t size);

void cfuzz_poison(const volatile void *start, size_t size) { __asan_poison_memory_region(start, size); }
void cfuzz_unpoison(const volatile void *start, size_t size) { __asan_unpoison_memory_region(start, size); }

int cfuzz_open_descriptors(void) {
  DIR *directory = opendir("/proc/self/fd");
  if (!directory) return -1;
  int count = 0;
  struct dirent *entry;
  while ((entry = readdir(directory)) != NULL)
    if (entry->d_name[0] != '.') count++;
  closedir(directory);
  return count - 1;
}

void cfuzz_say(const char *text) { fputs(text, stderr); }

int cfuzz_pipe(int ends[2]) { return pipe2(ends, O_CLOEXEC | O_NONBLOCK); }

void cfuzz_planted_overflow(const uint8_t *data, size_t size) {
  uint8_t *copy = malloc(size);
  if (!copy) return;
  memcpy(copy, data, size);
  volatile uint8_t *end = copy + size;
  *end = 0;
  free(copy);
}
