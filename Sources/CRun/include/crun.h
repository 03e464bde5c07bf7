// `martlet run` becomes the supervisor before Swift's runtime has started.
#ifndef CRUN_H
#define CRUN_H

// Does nothing; a program that calls it has the constructor of become.c linked in.
void crun_is_linked(void);

#endif
