// Written by scripts/rules from protocol/system-calls; change the lists there, where each entry has its reason.

/// The lists of system calls, by the names of their files.
package enum SystemCallList: String, CaseIterable, Sendable {
  case base
  case blockCalls = "block-calls"
  case blockControl = "block-control"
  case block
  case byHand = "by-hand"
  case console
  case core
  case device
  case guardianGroups = "guardian-groups"
  case guardian
  case net
  case processor
  case supervisor

  package var rules: [SystemCallRule] {
    switch self {
    case .base:
      [
        SystemCallRule(number: 0, reason: "read"),
        SystemCallRule(number: 1, reason: "write"),
        SystemCallRule(number: 232, reason: "epoll_wait"),
        SystemCallRule(number: 47, reason: "recvmsg"),
        SystemCallRule(number: 46, reason: "sendmsg"),
        SystemCallRule(number: 3, reason: "close"),
        SystemCallRule(number: 202, reason: "futex"),
        SystemCallRule(number: 7, reason: "poll"),
        SystemCallRule(number: 233, reason: "epoll_ctl"),
        SystemCallRule(number: 5, reason: "fstat"),
        SystemCallRule(
          number: 72, conditions: [.init(argument: 1, test: .anyOf([1030, 1034]))], reason: "fcntl"),
        SystemCallRule(
          number: 9, conditions: [.init(argument: 2, test: .masked(0x4, equals: 0))], reason: "mmap"),
        SystemCallRule(number: 11, reason: "munmap"),
        SystemCallRule(
          number: 10, conditions: [.init(argument: 2, test: .masked(0x4, equals: 0))], reason: "mprotect"),
        SystemCallRule(
          number: 28, conditions: [.init(argument: 2, test: .masked(.max, equals: 4))], reason: "madvise"),
        SystemCallRule(number: 12, reason: "brk"),
        SystemCallRule(number: 14, reason: "rt_sigprocmask"),
        SystemCallRule(number: 228, reason: "clock_gettime"),
        SystemCallRule(number: 39, reason: "getpid"),
        SystemCallRule(number: 186, reason: "gettid"),
        SystemCallRule(
          number: 234, conditions: [.init(argument: 0, test: .ownProcess)], reason: "tgkill"),
        SystemCallRule(number: 219, reason: "restart_syscall"),
        SystemCallRule(number: 60, reason: "exit"),
        SystemCallRule(number: 231, reason: "exit_group"),
      ]
    case .blockCalls:
      [
        SystemCallRule(number: 295, reason: "preadv"),
        SystemCallRule(
          number: 328, conditions: [.init(argument: 5, test: .masked(.max, equals: 0))], reason: "pwritev2"),
        SystemCallRule(number: 75, reason: "fdatasync"),
        SystemCallRule(
          number: 285, conditions: [.init(argument: 1, test: .anyOf([1, 3, 17]))], reason: "fallocate"),
        SystemCallRule(
          number: 16, conditions: [.init(argument: 1, test: .masked(.max, equals: 0x80081272))], reason: "ioctl"),
        SystemCallRule(
          number: 28, conditions: [.init(argument: 2, test: .masked(.max, equals: 1))], reason: "madvise"),
        SystemCallRule(
          number: 332,
          conditions: [.init(argument: 2, test: .masked(.max, equals: 0x1000)), .init(argument: 3, test: .masked(.max, equals: 0x200))],
          reason: "statx"),
      ]
    case .blockControl:
      [
        SystemCallRule(
          number: 16, conditions: [.init(argument: 1, test: .anyOf([0x1277, 0x127d]))], reason: "ioctl"),
        SystemCallRule(number: 75, reason: "fdatasync"),
      ]
    case .block:
      [
        SystemCallRule(number: 426, reason: "io_uring_enter"),
        SystemCallRule(
          number: 16, conditions: [.init(argument: 1, test: .masked(.max, equals: 0x80081272))], reason: "ioctl"),
        SystemCallRule(number: 24, reason: "sched_yield"),
        SystemCallRule(
          number: 28, conditions: [.init(argument: 2, test: .masked(.max, equals: 1))], reason: "madvise"),
        SystemCallRule(
          number: 332,
          conditions: [.init(argument: 2, test: .masked(.max, equals: 0x1000)), .init(argument: 3, test: .masked(.max, equals: 0x200))],
          reason: "statx"),
      ]
    case .byHand:
      [
        SystemCallRule(number: 288, reason: "accept4"),
        SystemCallRule(
          number: 48, conditions: [.init(argument: 1, test: .masked(.max, equals: 2))], reason: "shutdown"),
      ]
    case .console:
      [
        SystemCallRule(number: 288, reason: "accept4"),
        SystemCallRule(
          number: 16, conditions: [.init(argument: 1, test: .masked(.max, equals: 0x5413))], reason: "ioctl"),
        SystemCallRule(
          number: 16, conditions: [.init(argument: 1, test: .anyOf([0x5401, 0x5402]))], reason: "ioctl"),
      ]
    case .core:
      [
        SystemCallRule(
          number: 16, conditions: [.init(argument: 1, test: .anyOf([0x4020ae76, 0x4040ae79, 0x4008ae6a, 0x4020aea5]))], reason: "ioctl"),
        SystemCallRule(
          number: 16, conditions: [.init(argument: 1, test: .anyOf([0x8090ae81, 0x4090ae82, 0x8138ae83, 0x4138ae84]))], reason: "ioctl"),
        SystemCallRule(
          number: 16, conditions: [.init(argument: 1, test: .anyOf([0x5000aea5, 0x4188aea7, 0x4080aea2, 0x4040aea0]))], reason: "ioctl"),
        SystemCallRule(
          number: 16, conditions: [.init(argument: 1, test: .anyOf([0x4400ae8f, 0xc008ae88, 0x4008ae89, 0x4004ae99]))], reason: "ioctl"),
        SystemCallRule(
          number: 16, conditions: [.init(argument: 1, test: .anyOf([0x8030ae7c, 0x4030ae7b, 0xaead]))], reason: "ioctl"),
        SystemCallRule(
          number: 16, conditions: [.init(argument: 1, test: .masked(.max, equals: 0xae80))], reason: "ioctl"),
        SystemCallRule(number: 290, reason: "eventfd2"),
        SystemCallRule(number: 286, reason: "timerfd_settime"),
        SystemCallRule(number: 223, reason: "timer_settime"),
        SystemCallRule(number: 15, reason: "rt_sigreturn"),
        SystemCallRule(number: 17, reason: "pread64"),
        SystemCallRule(
          number: 285, conditions: [.init(argument: 1, test: .masked(.max, equals: 3))], reason: "fallocate"),
        SystemCallRule(
          number: 53, conditions: [.init(argument: 0, test: .masked(.max, equals: 1))], reason: "socketpair"),
      ]
    case .device:
      [
        SystemCallRule(number: 292, reason: "dup3"),
        SystemCallRule(number: 223, reason: "timer_settime"),
        SystemCallRule(number: 15, reason: "rt_sigreturn"),
      ]
    case .guardianGroups:
      [
        SystemCallRule(number: 1, reason: "write"),
        SystemCallRule(number: 217, reason: "getdents64"),
        SystemCallRule(number: 8, reason: "lseek"),
        SystemCallRule(
          number: 263, conditions: [.init(argument: 2, test: .masked(.max, equals: 0x200))], reason: "unlinkat"),
        SystemCallRule(number: 7, reason: "poll"),
      ]
    case .guardian:
      [
        SystemCallRule(number: 0, reason: "read"),
        SystemCallRule(number: 262, reason: "newfstatat"),
        SystemCallRule(number: 87, reason: "unlink"),
        SystemCallRule(
          number: 16, conditions: [.init(argument: 1, test: .anyOf([0x5401, 0x5402]))], reason: "ioctl"),
        SystemCallRule(number: 231, reason: "exit_group"),
      ]
    case .net:
      [
        SystemCallRule(number: 19, reason: "readv"),
        SystemCallRule(number: 20, reason: "writev"),
        SystemCallRule(
          number: 16, conditions: [.init(argument: 1, test: .masked(.max, equals: 0x400454d0))], reason: "ioctl"),
      ]
    case .processor:
      [
        SystemCallRule(
          number: 16, conditions: [.init(argument: 1, test: .masked(.max, equals: 0xae80))], reason: "ioctl"),
        SystemCallRule(number: 202, reason: "futex"),
        SystemCallRule(number: 1, reason: "write"),
        SystemCallRule(number: 7, reason: "poll"),
        SystemCallRule(
          number: 16, conditions: [.init(argument: 1, test: .anyOf([0x4020ae76, 0x4040ae79, 0x4008ae6a, 0x4020aea5]))], reason: "ioctl"),
        SystemCallRule(
          number: 16, conditions: [.init(argument: 1, test: .anyOf([0x8090ae81, 0x8138ae83]))], reason: "ioctl"),
        SystemCallRule(number: 15, reason: "rt_sigreturn"),
        SystemCallRule(number: 14, reason: "rt_sigprocmask"),
        SystemCallRule(number: 39, reason: "getpid"),
        SystemCallRule(number: 186, reason: "gettid"),
        SystemCallRule(
          number: 234, conditions: [.init(argument: 0, test: .ownProcess)], reason: "tgkill"),
        SystemCallRule(number: 3, reason: "close"),
        SystemCallRule(number: 228, reason: "clock_gettime"),
        SystemCallRule(
          number: 9, conditions: [.init(argument: 2, test: .masked(0x4, equals: 0))], reason: "mmap"),
        SystemCallRule(number: 11, reason: "munmap"),
        SystemCallRule(
          number: 28, conditions: [.init(argument: 2, test: .masked(.max, equals: 4))], reason: "madvise"),
        SystemCallRule(number: 12, reason: "brk"),
        SystemCallRule(number: 60, reason: "exit"),
      ]
    case .supervisor:
      [
        SystemCallRule(number: 232, reason: "epoll_wait"),
        SystemCallRule(number: 47, reason: "recvmsg"),
        SystemCallRule(number: 0, reason: "read"),
        SystemCallRule(number: 46, reason: "sendmsg"),
        SystemCallRule(number: 1, reason: "write"),
        SystemCallRule(number: 288, reason: "accept4"),
        SystemCallRule(
          number: 72, conditions: [.init(argument: 1, test: .anyOf([2, 3, 4, 37]))], reason: "fcntl"),
        SystemCallRule(number: 233, reason: "epoll_ctl"),
        SystemCallRule(number: 3, reason: "close"),
        SystemCallRule(number: 293, reason: "pipe2"),
        SystemCallRule(
          number: 53, conditions: [.init(argument: 0, test: .masked(.max, equals: 1))], reason: "socketpair"),
        SystemCallRule(
          number: 247, conditions: [.init(argument: 0, test: .masked(.max, equals: 3))], reason: "waitid"),
        SystemCallRule(
          number: 424, conditions: [.init(argument: 3, test: .masked(.max, equals: 0))], reason: "pidfd_send_signal"),
        SystemCallRule(number: 7, reason: "poll"),
        SystemCallRule(number: 39, reason: "getpid"),
        SystemCallRule(number: 228, reason: "clock_gettime"),
        SystemCallRule(
          number: 9, conditions: [.init(argument: 2, test: .masked(0x4, equals: 0))], reason: "mmap"),
        SystemCallRule(number: 11, reason: "munmap"),
        SystemCallRule(number: 12, reason: "brk"),
        SystemCallRule(number: 14, reason: "rt_sigprocmask"),
        SystemCallRule(number: 186, reason: "gettid"),
        SystemCallRule(
          number: 234, conditions: [.init(argument: 0, test: .ownProcess)], reason: "tgkill"),
        SystemCallRule(number: 219, reason: "restart_syscall"),
        SystemCallRule(number: 231, reason: "exit_group"),
        SystemCallRule(
          number: 157,
          conditions: [.init(argument: 0, test: .masked(.max, equals: 4)), .init(argument: 1, test: .masked(.max, equals: 0))],
          reason: "prctl"),
        SystemCallRule(
          number: 157, conditions: [.init(argument: 0, test: .masked(.max, equals: 15))], reason: "prctl"),
        SystemCallRule(number: 157, reason: "prctl", failure: 22),
        SystemCallRule(number: 291, reason: "epoll_create1"),
        SystemCallRule(
          number: 158, conditions: [.init(argument: 0, test: .masked(.max, equals: 0x1002))], reason: "arch_prctl"),
        SystemCallRule(number: 218, reason: "set_tid_address"),
        SystemCallRule(number: 273, reason: "set_robust_list"),
        SystemCallRule(number: 334, reason: "rseq"),
        SystemCallRule(
          number: 302, conditions: [.init(argument: 2, test: .masked(.max, equals: 0))], reason: "prlimit64"),
        SystemCallRule(number: 318, reason: "getrandom"),
        SystemCallRule(
          number: 10, conditions: [.init(argument: 2, test: .masked(0x4, equals: 0))], reason: "mprotect"),
        SystemCallRule(
          number: 16, conditions: [.init(argument: 1, test: .masked(.max, equals: 0x5401))], reason: "ioctl"),
        SystemCallRule(number: 89, reason: "readlink", failure: 2),
        SystemCallRule(number: 257, reason: "openat", failure: 2),
      ]
    }
  }
}
