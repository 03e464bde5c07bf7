// The walls around somebody else's program: what of the host it sees, and the rights it keeps. Everything is decided
// before the fork; between fork and exec it is only carried out.
#ifndef CSANDBOX_JAIL_H
#define CSANDBOX_JAIL_H

#include <stdint.h>

enum csandbox_place_kind {
  CSANDBOX_PLACE_FILE = 1,
  CSANDBOX_PLACE_DIRECTORY,
  // A device node: a file on whose mount nodes work.
  CSANDBOX_PLACE_DEVICE,
  // A new proc of the process's own pid namespace, read-only; only its process directories, unless size is 1.
  CSANDBOX_PLACE_PROC,
  // A new tmpfs; `size` bytes.
  CSANDBOX_PLACE_TEMPORARY,
};

enum csandbox_place_right {
  CSANDBOX_PLACE_WRITABLE = 1,
  // Programs and libraries: the mount is executable and never writable.
  CSANDBOX_PLACE_EXECUTABLE = 2,
};

// One thing of the host that is seen inside, under the same path.
struct csandbox_place {
  int kind;
  int rights;
  // Absolute, without "..", "." and empty components. Parents stand before what lies in them.
  const char *path;
  // A user namespace whose map makes the file's owner the program's user (mount_setattr, MOUNT_ATTR_IDMAP), or -1.
  int id_map;
  uint64_t size;
};

struct csandbox_limit {
  int resource;
  uint64_t value;
};

struct csandbox_jail {
  const struct csandbox_place *places;
  int place_count;
  const struct csandbox_limit *limits;
  int limit_count;
  // NULL-terminated NAME=VALUE.
  char *const *environment;
  // Inside; "/" when NULL.
  const char *directory;
  // Bits 1 << CAP_...: kept in all sets, ambient included, so that they outlive exec.
  uint64_t capabilities;
  // Landlock level to use, 0 for none; whether TCP stays allowed.
  int landlock_level;
  int keeps_network;
  // struct sock_filter; NULL: no filter.
  const void *filter;
  unsigned short filter_length;
  // The sixth argument of execveat, which the kernel does not look at and the filter does: this one exec is allowed, and
  // the program that has replaced us can neither know nor find the number.
  uint64_t cookie;
};

// A user namespace in which `inside_uid` and `inside_gid` stand for the owner's: as id_map above. Needs privileges.
// A descriptor, close-on-exec, or -errno.
int csandbox_make_id_map(uint32_t owner_uid, uint32_t owner_gid, uint32_t uid, uint32_t gid);

// For launch.c: 0 or errno; *detail is then the index of the place concerned, or -1.
int csandbox_enter_jail(const struct csandbox_jail *jail, int *detail);
int csandbox_restrict_to_jail(const struct csandbox_jail *jail, int *detail);

#endif
