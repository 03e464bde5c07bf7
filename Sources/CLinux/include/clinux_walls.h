// Landlock (linux/landlock.h) and seccomp (linux/seccomp.h), whose structures older headers do not know whole.
#ifndef CLINUX_WALLS_H
#define CLINUX_WALLS_H

#include <stdint.h>

// The Landlock level of the kernel (1 and up), 0 without Landlock, -errno.
int clinux_landlock_abi(void);
// Takes every right Landlock knows at `abi` from this thread and what it starts: an empty rule set that handles all
// file-system and network accesses and both scopes; that of signals not with keeps_signals. With programs >= 0, a directory,
// one rule: files below it can be executed. Needs no_new_privs.
int clinux_landlock_restrict(int abi, int keeps_signals, int programs);
// 1 when SECCOMP_RET_KILL_PROCESS is available, 0 without filters.
int clinux_seccomp_can_kill(void);
// 1 with CAP_SYS_ADMIN in our user namespace, CAP_SETPCAP and CAP_SETUID beside it.
int clinux_may_administer(void);
// Installs a filter of `count` struct sock_filter for the calling thread only.
int clinux_seccomp_install_thread(const void *instructions, unsigned short count, int log);
// Installs a filter of `count` struct sock_filter for all threads of the process (SECCOMP_FILTER_FLAG_TSYNC, and LOG when
// `log` is set). A positive result is the thread that could not be synchronised.
int clinux_seccomp_install(const void *instructions, unsigned short count, int log);

#endif
