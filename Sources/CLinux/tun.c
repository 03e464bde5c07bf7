#include "clinux_tun.h"

#include <errno.h>
#include <linux/if.h>
#include <linux/if_tun.h>
#include <string.h>
#include <sys/ioctl.h>

_Static_assert(clinux_tun_tap == IFF_TAP && clinux_tun_no_packet_info == IFF_NO_PI, "if_tun.h");
_Static_assert(clinux_tun_vnet_header == IFF_VNET_HDR && clinux_tun_multi_queue == IFF_MULTI_QUEUE, "if_tun.h");

static int result(int value) { return value < 0 ? -errno : value; }

int clinux_tun_attach(int fd, const char *name, unsigned flags) {
  struct ifreq request;
  memset(&request, 0, sizeof request);
  size_t length = strlen(name);
  if (length == 0 || length >= IFNAMSIZ) return -ENAMETOOLONG;
  memcpy(request.ifr_name, name, length);
  request.ifr_flags = (short)flags;
  return result(ioctl(fd, TUNSETIFF, &request));
}

int clinux_tun_interface(int fd, char *name, unsigned *flags) {
  struct ifreq request;
  memset(&request, 0, sizeof request);
  int outcome = result(ioctl(fd, TUNGETIFF, &request));
  if (outcome < 0) return outcome;
  memcpy(name, request.ifr_name, IFNAMSIZ);
  name[IFNAMSIZ - 1] = 0;
  *flags = (unsigned short)request.ifr_flags;
  return 0;
}

int clinux_tun_set_header_size(int fd, int byte_count) { return result(ioctl(fd, TUNSETVNETHDRSZ, &byte_count)); }

int clinux_tun_set_little_endian(int fd) {
  int one = 1;
  return result(ioctl(fd, TUNSETVNETLE, &one));
}

int clinux_tun_set_offload(int fd, unsigned flags) { return result(ioctl(fd, TUNSETOFFLOAD, (unsigned long)flags)); }
