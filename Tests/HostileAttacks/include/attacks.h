// What a process that has been taken over would try. Each attack is a plain call to the kernel.
#ifndef ATTACKS_H
#define ATTACKS_H

// Name of attack `index`, or NULL behind the last.
const char *attack_name(int index);
// Carries it out. -errno, or what the kernel gave: 0 and above mean that it succeeded.
// `memory` is a sealed memory file, `socket` a connected socket, `victim` a process id of the host.
long attack_run(int index, int memory, int socket, int victim);
// One raw system call.
long attack_call(long number, const unsigned long *arguments);
// fork(2); the child dies after two seconds.
int attack_fork(void);
// Waits for a child: its signal, or 0 and its exit code in `code`.
int attack_wait(int child, int *code);

// From here on, for this process and all that it starts, the calls of these numbers fail with ENOSYS, as if the kernel did
// not have them. 0, or -errno.
int attack_forget(const int *calls, int count);
// Executes a program in this process's place; returns only when that fails.
int attack_execute(const char *path, char *const *arguments);

#endif
