// The tun/tap driver's calls (linux/if_tun.h), whose argument is `struct ifreq` or a number behind a pointer.
#ifndef CLINUX_TUN_H
#define CLINUX_TUN_H

// TUNSETIFF: attaches the open /dev/net/tun to the interface of this name (at most 15 bytes). -errno on failure.
int clinux_tun_attach(int fd, const char *name, unsigned flags);
// TUNGETIFF: the flags an attached descriptor was made with, its interface's name in `name` (16 bytes).
int clinux_tun_interface(int fd, char *name, unsigned *flags);
// TUNSETVNETHDRSZ, TUNSETVNETLE, TUNSETOFFLOAD
int clinux_tun_set_header_size(int fd, int byte_count);
int clinux_tun_set_little_endian(int fd);
int clinux_tun_set_offload(int fd, unsigned flags);

enum {
  clinux_tun_tap = 0x0002,            // IFF_TAP
  clinux_tun_multi_queue = 0x0100,    // IFF_MULTI_QUEUE
  clinux_tun_no_packet_info = 0x1000, // IFF_NO_PI
  clinux_tun_vnet_header = 0x4000,    // IFF_VNET_HDR
};

#endif
