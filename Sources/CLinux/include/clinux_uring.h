// io_uring (linux/io_uring.h): the three calls, which libc does not wrap, and the layouts that Swift mirrors.
#ifndef CLINUX_URING_H
#define CLINUX_URING_H

#include <linux/io_uring.h>
#include <stdint.h>

// io_uring_setup(2): the ring's descriptor or -errno.
int clinux_io_uring_setup(unsigned entries, struct io_uring_params *parameters);
// io_uring_enter(2) without a signal mask: how many entries were taken, or -errno.
int clinux_io_uring_enter(int ring, unsigned to_submit, unsigned min_complete, unsigned flags);
// io_uring_register(2)
int clinux_io_uring_register(int ring, unsigned operation, void *argument, unsigned count);

// struct io_uring_restriction, whose unions Swift sees only in parts.
static inline struct io_uring_restriction clinux_allow_operation(uint8_t operation) {
  struct io_uring_restriction restriction = {.opcode = IORING_RESTRICTION_SQE_OP, .sqe_op = operation};
  return restriction;
}
static inline struct io_uring_restriction clinux_allow_register(uint8_t operation) {
  struct io_uring_restriction restriction = {.opcode = IORING_RESTRICTION_REGISTER_OP, .register_op = operation};
  return restriction;
}
static inline struct io_uring_restriction clinux_allow_flags(uint8_t flags) {
  struct io_uring_restriction restriction = {.opcode = IORING_RESTRICTION_SQE_FLAGS_ALLOWED, .sqe_flags = flags};
  return restriction;
}

#endif
