// Memory of a peer's that is cut off while we use it (SIGBUS, BUS_ADRERR).
#ifndef CLINUX_BUS_H
#define CLINUX_BUS_H

// From here on a page that is no more is replaced by one of ours, full of zeros, and the connection named last is shut down:
// the peer that cut its memory loses its service, and we go on. Only for programs that accept memory without seals.
void clinux_bus_guard(void);
// The connection whose peer lends the memory; -1: none.
void clinux_bus_peer(int socket);

#endif
