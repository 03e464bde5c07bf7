// The process title: what ps and /proc/PID/cmdline show.
#ifndef CLINUX_TITLE_H
#define CLINUX_TITLE_H

// Overwrites the argument area (cut to its length) and sets the thread name (cut to 15 bytes). The program's arguments
// must not be read afterwards. Returns how many bytes of the title fitted.
int clinux_set_title(const char *title);

#endif
