// Kernel interfaces that Swift cannot import: variadic calls, CMSG macros, fork to exec, fences.
#ifndef CLINUX_H
#define CLINUX_H
#include <stdint.h>
int clinux_placeholder(void);
#endif
