// The process title: what ps and /proc/PID/cmdline show.
#ifndef CLINUX_TITLE_H
#define CLINUX_TITLE_H

// Overwrites the argument area (cut to its length) and sets the thread name (cut to 15 bytes). The program's arguments
// must not be read afterwards. Returns how many bytes of the title fitted.
int clinux_set_title(const char *title);

// The first half alone: a store to memory, no system call.
int clinux_change_title(const char *title);

// The program's arguments as the kernel laid them out; NULL from argc on. Not to be read after a title was set. Swift's own
// list comes from /proc/self/cmdline, which a process in an empty root does not have.
const char *clinux_argument(int index);

#endif
