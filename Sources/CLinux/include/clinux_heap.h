// The heap of a program whose threads allocate during set-up only.
#ifndef CLINUX_HEAP_H
#define CLINUX_HEAP_H

// mallopt(M_ARENA_MAX, 1): one heap for all threads instead of one each.
void clinux_use_one_heap(void);

#endif
