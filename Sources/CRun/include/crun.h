// `martlet run` becomes the supervisor before anything else has happened.
#ifndef CRUN_H
#define CRUN_H

// What the linker is told to enter the program at, in place of `_start`.
void crun_entry(void);

#endif
