#define _GNU_SOURCE
#include "clinux_uring.h"

#include <errno.h>
#include <stddef.h>
#include <sys/syscall.h>
#include <unistd.h>

static int result(long value) { return value < 0 ? -errno : (int)value; }

int clinux_io_uring_setup(unsigned entries, struct io_uring_params *parameters) {
  return result(syscall(SYS_io_uring_setup, entries, parameters));
}

int clinux_io_uring_enter(int ring, unsigned to_submit, unsigned min_complete, unsigned flags) {
  return result(syscall(SYS_io_uring_enter, ring, to_submit, min_complete, flags, NULL, 0));
}

int clinux_io_uring_register(int ring, unsigned operation, void *argument, unsigned count) {
  return result(syscall(SYS_io_uring_register, ring, operation, argument, count));
}

// HostSystem.SubmissionEntry and HostSystem.IORing read and write these structures by the same offsets.
_Static_assert(sizeof(struct io_uring_sqe) == 64, "sqe");
_Static_assert(offsetof(struct io_uring_sqe, fd) == 4, "sqe");
_Static_assert(offsetof(struct io_uring_sqe, off) == 8, "sqe");
_Static_assert(offsetof(struct io_uring_sqe, addr) == 16, "sqe");
_Static_assert(offsetof(struct io_uring_sqe, len) == 24, "sqe");
_Static_assert(offsetof(struct io_uring_sqe, rw_flags) == 28, "sqe");
_Static_assert(offsetof(struct io_uring_sqe, user_data) == 32, "sqe");
_Static_assert(offsetof(struct io_uring_sqe, personality) == 42, "sqe");
_Static_assert(sizeof(struct io_uring_cqe) == 16, "cqe");
_Static_assert(offsetof(struct io_uring_cqe, res) == 8, "cqe");
_Static_assert(offsetof(struct io_uring_cqe, flags) == 12, "cqe");
