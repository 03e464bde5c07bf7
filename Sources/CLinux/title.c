#define _GNU_SOURCE
#include "clinux_title.h"

#include <string.h>
#include <sys/prctl.h>

static char **all;
static int all_count;
static char *area;
static size_t area_size;

// glibc hands argc and argv to constructors; no /proc is needed, so it works inside an empty root as well.
__attribute__((constructor)) static void remember_arguments(int count, char **arguments) {
  all = arguments;
  all_count = count;
  if (count < 1 || !arguments || !arguments[0]) return;
  char *end = arguments[0];
  for (int i = 0; i < count; i++) {
    if (arguments[i] != end) break; // the kernel lays them out one behind the other
    end += strlen(arguments[i]) + 1;
  }
  area = arguments[0];
  area_size = (size_t)(end - area);
}

int clinux_set_title(const char *title) {
  const char *name = strrchr(title, '/');
  prctl(PR_SET_NAME, name ? name + 1 : title, 0, 0, 0);
  return clinux_change_title(title);
}

int clinux_change_title(const char *title) {
  if (area_size < 2) return 0;
  size_t length = strlen(title);
  if (length > area_size - 1) length = area_size - 1;
  memset(area, 0, area_size);
  memcpy(area, title, length);
  return (int)length;
}

const char *clinux_argument(int index) { return index >= 0 && index < all_count ? all[index] : NULL; }
