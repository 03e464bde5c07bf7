// Single, untearable accesses to memory that another process changes (virtqueues, io_uring rings): the compiler may
// neither repeat nor split them. Swift's own loads through pointers promise neither.
#ifndef CLINUX_ATOMICS_H
#define CLINUX_ATOMICS_H

#include <stdint.h>

#define CLINUX_ATOMIC_ACCESS(name, type)                                                                              \
  static inline type clinux_load_relaxed_##name(const void *p) { return __atomic_load_n((const type *)p, __ATOMIC_RELAXED); }   \
  static inline type clinux_load_acquire_##name(const void *p) { return __atomic_load_n((const type *)p, __ATOMIC_ACQUIRE); }   \
  static inline void clinux_store_relaxed_##name(void *p, type v) { __atomic_store_n((type *)p, v, __ATOMIC_RELAXED); }         \
  static inline void clinux_store_release_##name(void *p, type v) { __atomic_store_n((type *)p, v, __ATOMIC_RELEASE); }

CLINUX_ATOMIC_ACCESS(u8, uint8_t)
CLINUX_ATOMIC_ACCESS(u16, uint16_t)
CLINUX_ATOMIC_ACCESS(u32, uint32_t)
CLINUX_ATOMIC_ACCESS(u64, uint64_t)
#undef CLINUX_ATOMIC_ACCESS

// The StoreLoad barrier of the virtqueue notification rules.
static inline void clinux_fence_full(void) { __atomic_thread_fence(__ATOMIC_SEQ_CST); }
static inline void clinux_fence_acquire(void) { __atomic_thread_fence(__ATOMIC_ACQUIRE); }
static inline void clinux_pause(void) { __builtin_ia32_pause(); }

#endif
