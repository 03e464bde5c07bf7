#include "clinux_heap.h"

#include <malloc.h>

void clinux_use_one_heap(void) { mallopt(M_ARENA_MAX, 1); }
