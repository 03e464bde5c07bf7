// frame-echo INTERFACE: the peer of test=net. Sends each frame of EtherType 0x88B5 that the interface receives back with
// the addresses swapped; everything else is left alone. Prints READY once it listens; SIGTERM ends it.
// The interface is a tap's host side (up, in whichever network namespace this runs).
#include <arpa/inet.h>
#include <linux/if_packet.h>
#include <net/ethernet.h>
#include <net/if.h>
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

int main(int count, char **arguments) {
  struct sockaddr_ll address = {.sll_family = AF_PACKET, .sll_protocol = htons(0x88b5)};
  if (count != 2 || !(address.sll_ifindex = (int)if_nametoindex(arguments[1]))) {
    fprintf(stderr, "Usage: frame-echo INTERFACE (one that exists)\n");
    return 2;
  }
  int s = socket(AF_PACKET, SOCK_RAW | SOCK_CLOEXEC, htons(0x88b5));
  int room = 4 << 20;
  if (s < 0 || bind(s, (struct sockaddr *)&address, sizeof address)) {
    perror("frame-echo");
    return 1;
  }
  setsockopt(s, SOL_SOCKET, SO_RCVBUF, &room, sizeof room);
  printf("READY\n");
  fflush(stdout);
  for (;;) {
    unsigned char frame[2048], other[6];
    struct sockaddr_ll from;
    socklen_t length = sizeof from;
    ssize_t n = recvfrom(s, frame, sizeof frame, 0, (struct sockaddr *)&from, &length);
    if (n < 0) {
      perror("frame-echo");
      return 1;
    }
    // What we send is seen by the socket too; it must not go round.
    if (n < 14 || from.sll_pkttype == PACKET_OUTGOING) continue;
    memcpy(other, frame, 6);
    memcpy(frame, frame + 6, 6);
    memcpy(frame + 6, other, 6);
    if (frame[6] & 1) memcpy(frame + 6, "\x02\0\0\0\0\x01", 6);  // a broadcast address cannot be a source
    if (send(s, frame, (size_t)n, 0) < 0) perror("frame-echo: send");
  }
}
