// Ends waits that a peer can cause: a write to an eventfd whose description the peer shares waits when the peer has filled the
// counter and made the description blocking, and no call can ask for less (eventfds take no RWF_NOWAIT for writes). One
// thread of the process is protected: while it writes, a timer sends it a signal every few milliseconds, which ends the
// write with EINTR. The timer runs on for a moment, so that frequent writes cost no system call more.
#ifndef CLINUX_BREAKER_H
#define CLINUX_BREAKER_H

// Protects the calling thread, for the life of the process. 0 or -errno. Needs timer_create, which no list allows.
int clinux_breaker_prepare(void);
// Around what may wait; not nested. False: the calling thread is not the protected one, and nothing ends its wait.
int clinux_breaker_begin(void);
void clinux_breaker_end(void);

#endif
