// What a tool needs to run another program beside itself and to measure it.
#ifndef CLINUX_PROCESS_H
#define CLINUX_PROCESS_H

#include <stdint.h>

// fork and execvp in a process group of its own, tied to the calling thread: SIGKILL when that ends (PR_SET_PDEATHSIG).
// Standard input is /dev/null, `output` becomes standard output and error, `extra` becomes descriptor 3 (-1: none); all
// else that is not close-on-exec stays. `processor` -1 leaves the affinity alone. The pid, or -errno of the failed exec.
int clinux_spawn_tied(char *const arguments[], int output, int extra, int processor);
// sched_setaffinity(0): the calling thread on one processor.
int clinux_pin(int processor);
// CPU time of a process with all its threads in nanoseconds (clock_getcpuclockid); 0 or -errno.
int clinux_cpu_time(int process, uint64_t *nanoseconds);
// ptrace(2) and waitpid(2) with __WALL | __WNOTHREAD.
int clinux_ptrace(int request, int thread, unsigned long address, unsigned long data);
int clinux_wait_thread(int thread, int *status, int blocking);
// fork, PTRACE_TRACEME, a stop by SIGSTOP, execvp; standard input and output stay. The pid or -errno.
int clinux_spawn_traced(char *const arguments[]);
// PTRACE_GET_SYSCALL_INFO: 1 at the entry of a call (words[0] its number, 1 to 6 its arguments), 2 at the exit (words[0] its
// result), 0 elsewhere, -errno.
int clinux_trace_call(int thread, uint64_t words[7]);
// Copies at most `capacity` bytes of another process's memory, ending at the first page that is not there.
long clinux_read_memory(int process, uint64_t address, void *buffer, unsigned long capacity);
// A raw packet socket (AF_PACKET) bound to an interface, for frames of one type; its descriptor or -errno.
int clinux_packet_socket(const char *interface, unsigned short type);
// The time stamp counter.
static inline uint64_t clinux_cycles(void) { return __builtin_ia32_rdtsc(); }

#endif
