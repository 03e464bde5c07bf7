#define _GNU_SOURCE
#include "jail.h"

#include <clinux_calls.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/mount.h>
#include <linux/openat2.h>
#include <linux/sched.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

// sys/mount.h and linux/mount.h cannot be had together; these are of the first.
extern int mount(const char *source, const char *target, const char *type, unsigned long flags, const void *data);
extern int umount2(const char *target, int flags);
enum { detach = 2 /* MNT_DETACH */ };

enum { landlock_create = 444, landlock_add = 445, landlock_restrict = 446 };

// LANDLOCK_ACCESS_FS_... of linux/landlock.h, and what a level knows.
enum {
  fs_execute = 1 << 0, fs_write_file = 1 << 1, fs_read_file = 1 << 2, fs_read_dir = 1 << 3, fs_make_char = 1 << 6,
  fs_make_block = 1 << 11, fs_all = 0x1FFF, fs_refer = 1 << 13, fs_truncate = 1 << 14, fs_ioctl_device = 1 << 15,
};

struct ruleset {
  uint64_t file_system;
  uint64_t network;
  uint64_t scopes;
};

struct path_rule {
  uint64_t rights;
  int parent;
} __attribute__((packed));

static int is_directory(const struct csandbox_place *place) {
  return place->kind == CSANDBOX_PLACE_DIRECTORY || place->kind == CSANDBOX_PLACE_PROC || place->kind == CSANDBOX_PLACE_TEMPORARY;
}

// Everything a place is mounted on, while there is nothing in the new root but what we make: no link can lead us out.
static int make_target(int root, const struct csandbox_place *place) {
  char path[4096];
  size_t length = strlen(place->path);
  if (length < 2 || length >= sizeof path || place->path[0] != '/') return EINVAL;
  memcpy(path, place->path + 1, length);
  for (char *slash = strchr(path, '/'); slash; slash = strchr(slash + 1, '/')) {
    *slash = 0;
    if (mkdirat(root, path, 0755) < 0 && errno != EEXIST) return errno;
    *slash = '/';
  }
  if (is_directory(place)) return mkdirat(root, path, 0755) < 0 && errno != EEXIST ? errno : 0;
  int fd = openat(root, path, O_WRONLY | O_CREAT | O_NOFOLLOW | O_CLOEXEC, 0444);
  if (fd < 0) return errno;
  close(fd);
  return 0;
}

static int open_inside(int root, const char *path) {
  struct open_how how = {
      .flags = O_PATH | O_CLOEXEC | O_NOFOLLOW, .resolve = RESOLVE_IN_ROOT | RESOLVE_NO_SYMLINKS | RESOLVE_NO_MAGICLINKS};
  return (int)syscall(SYS_openat2, root, path, &how, sizeof how);
}

static int attach(int root, const struct csandbox_place *place) {
  int error = 0;
  int target = open_inside(root, place->path);
  if (target < 0) return errno;
  char target_path[32];
  snprintf(target_path, sizeof target_path, "/proc/self/fd/%d", target);
  if (place->kind == CSANDBOX_PLACE_PROC) {
    const char *options = place->size ? "hidepid=2" : "hidepid=2,subset=pid";
    if (mount("proc", target_path, "proc", MS_RDONLY | MS_NOSUID | MS_NODEV | MS_NOEXEC, options) < 0) error = errno;
  } else if (place->kind == CSANDBOX_PLACE_TEMPORARY) {
    char options[64];
    snprintf(options, sizeof options, "size=%llu,nr_inodes=1024,mode=1777", (unsigned long long)place->size);
    if (mount("martlet", target_path, "tmpfs", MS_NOSUID | MS_NODEV | MS_NOEXEC, options) < 0) error = errno;
  } else {
    // Recursive, because part of a tree must not be shown that something is mounted over.
    unsigned recursive = place->kind == CSANDBOX_PLACE_DIRECTORY ? AT_RECURSIVE : 0;
    int found = clinux_open_named(place->path, O_PATH, 0);
    int tree = found < 0 ? -1 : (int)syscall(SYS_open_tree, found, "", OPEN_TREE_CLONE | OPEN_TREE_CLOEXEC | AT_EMPTY_PATH | recursive);
    if (tree < 0) error = found < 0 ? -found : errno;
    if (found >= 0) close(found);
    struct mount_attr attributes = {.attr_set = MOUNT_ATTR_NOSUID};
    if (!(place->rights & CSANDBOX_PLACE_WRITABLE)) attributes.attr_set |= MOUNT_ATTR_RDONLY;
    if (!(place->rights & CSANDBOX_PLACE_EXECUTABLE)) attributes.attr_set |= MOUNT_ATTR_NOEXEC;
    if (place->kind != CSANDBOX_PLACE_DEVICE) attributes.attr_set |= MOUNT_ATTR_NODEV;
    if (!error && syscall(SYS_mount_setattr, tree, "", AT_EMPTY_PATH | recursive, &attributes, sizeof attributes) < 0) error = errno;
    if (!error && place->id_map >= 0) {
      struct mount_attr mapping = {.attr_set = MOUNT_ATTR_IDMAP, .userns_fd = (uint64_t)place->id_map};
      if (syscall(SYS_mount_setattr, tree, "", AT_EMPTY_PATH | recursive, &mapping, sizeof mapping) < 0) error = errno;
    }
    if (!error && syscall(SYS_move_mount, tree, "", target, "", MOVE_MOUNT_F_EMPTY_PATH | MOVE_MOUNT_T_EMPTY_PATH) < 0) error = errno;
    if (tree >= 0) close(tree);
  }
  close(target);
  return error;
}

static int lies_in(const char *path, const char *directory) {
  size_t length = strlen(directory);
  return strncmp(path, directory, length) == 0 && (path[length] == '/' || path[length] == 0);
}

static const char *free_spot(const struct csandbox_jail *jail) {
  static const char *const candidates[] = {"/sys", "/mnt", "/media", "/srv", "/opt", "/home", "/var", "/tmp", "/run"};
  for (unsigned i = 0; i < sizeof candidates / sizeof *candidates; i++) {
    struct stat status;
    int used = lstat(candidates[i], &status) < 0 || !S_ISDIR(status.st_mode);
    for (int j = 0; j < jail->place_count && !used; j++) used = lies_in(jail->places[j].path, candidates[i]);
    if (!used) return candidates[i];
  }
  return NULL;
}

int csandbox_enter_jail(const struct csandbox_jail *jail, int *detail) {
  *detail = -1;
  if (mount("none", "/", NULL, MS_SLAVE | MS_REC, NULL) < 0) return errno;
  umask(0);
  // Nothing of this mount is seen outside. It lies over some directory, of which nothing can be a place then.
  const char *spot = free_spot(jail);
  if (!spot) return EBUSY;
  if (mount("martlet", spot, "tmpfs", MS_NOSUID | MS_NODEV | MS_NOEXEC, "size=1m,nr_inodes=8192,mode=0755") < 0) return errno;
  int root = open(spot, O_PATH | O_DIRECTORY | O_CLOEXEC);
  if (root < 0) return errno;
  int error = 0;
  for (int i = 0; i < jail->place_count && !error; i++) {
    *detail = i;
    error = make_target(root, &jail->places[i]);
  }
  for (int i = 0; i < jail->place_count && !error; i++) {
    *detail = i;
    error = attach(root, &jail->places[i]);
  }
  if (error) return error;
  *detail = -1;
  if (fchdir(root) < 0) return errno;
  close(root);
  if (syscall(SYS_pivot_root, ".", ".") == 0) {
    if (umount2(".", detach) < 0) return errno;
  } else {
    if (errno != EINVAL || mount(".", "/", NULL, MS_MOVE, NULL) < 0 || chroot(".") < 0) return errno;
  }
  if (chdir("/") < 0) return errno;
  // What was mounted into it keeps its own rights.
  struct mount_attr closed = {.attr_set = MOUNT_ATTR_RDONLY};
  if (syscall(SYS_mount_setattr, AT_FDCWD, "/", 0, &closed, sizeof closed) < 0) return errno;
  return chdir(jail->directory ? jail->directory : "/") < 0 ? errno : 0;
}

static uint64_t rights_of(const struct csandbox_place *place, uint64_t known) {
  uint64_t rights = fs_read_file;
  int writable = place->rights & CSANDBOX_PLACE_WRITABLE;
  if (place->rights & CSANDBOX_PLACE_EXECUTABLE) rights |= fs_execute;
  switch (place->kind) {
  case CSANDBOX_PLACE_PROC: rights |= fs_read_dir; break;
  case CSANDBOX_PLACE_DEVICE: rights |= fs_ioctl_device | (writable ? fs_write_file | fs_truncate : 0); break;
  case CSANDBOX_PLACE_FILE: rights |= writable ? fs_write_file | fs_truncate : 0; break;
  case CSANDBOX_PLACE_TEMPORARY: writable = 1; // fallthrough
  case CSANDBOX_PLACE_DIRECTORY:
    rights |= fs_read_dir;
    if (writable) rights |= (fs_all | fs_refer | fs_truncate) & ~(uint64_t)(fs_execute | fs_make_char | fs_make_block);
    break;
  }
  return rights & known;
}

int csandbox_restrict_to_jail(const struct csandbox_jail *jail, int *detail) {
  *detail = -1;
  int level = jail->landlock_level;
  if (level > 0) {
    struct ruleset rules = {.file_system = fs_all};
    if (level >= 2) rules.file_system |= fs_refer;
    if (level >= 3) rules.file_system |= fs_truncate;
    if (level >= 5) rules.file_system |= fs_ioctl_device;
    if (level >= 4 && !jail->keeps_network) rules.network = 0x3;
    if (level >= 6) rules.scopes = jail->keeps_network ? 0x2 : 0x3;
    int set = (int)syscall(landlock_create, &rules, sizeof rules, 0);
    if (set < 0) return errno;
    for (int i = 0; i < jail->place_count; i++) {
      *detail = i;
      struct path_rule rule = {.rights = rights_of(&jail->places[i], rules.file_system)};
      rule.parent = open(jail->places[i].path, O_PATH | O_CLOEXEC);
      if (rule.parent < 0) return errno;
      if (rule.rights && syscall(landlock_add, set, 1 /* LANDLOCK_RULE_PATH_BENEATH */, &rule, 0) < 0) return errno;
      close(rule.parent);
    }
    *detail = -1;
    if (syscall(landlock_restrict, set, 0) < 0) return errno;
    close(set);
  }
  if (jail->filter) {
    struct { unsigned short length; const void *filter; } program = {jail->filter_length, jail->filter};
    if (syscall(SYS_seccomp, 1 /* SECCOMP_SET_MODE_FILTER */, 0, &program) < 0) return errno;
  }
  return 0;
}

static int write_text(const char *path, const char *text) {
  int fd = open(path, O_WRONLY | O_CLOEXEC);
  if (fd < 0) return errno;
  ssize_t written = write(fd, text, strlen(text));
  int error = written < 0 ? errno : 0;
  close(fd);
  return error;
}

int csandbox_make_id_map(uint32_t owner_uid, uint32_t owner_gid, uint32_t uid, uint32_t gid) {
  struct clone_args arguments = {.flags = CLONE_NEWUSER, .exit_signal = SIGCHLD};
  int ends[2];
  if (pipe2(ends, O_CLOEXEC) < 0) return -errno;
  long child = syscall(SYS_clone3, &arguments, sizeof arguments);
  if (child == 0) {
    // Holds the namespace until its descriptor is had.
    char byte;
    close(ends[1]);
    while (read(ends[0], &byte, 1) < 0 && errno == EINTR) {}
    _exit(0);
  }
  int error = child < 0 ? errno : 0;
  close(ends[0]);
  int fd = -1;
  if (!error) {
    char path[48], map[48];
    snprintf(path, sizeof path, "/proc/%ld/uid_map", child);
    snprintf(map, sizeof map, "%u %u 1", owner_uid, uid);
    error = write_text(path, map);
    if (!error) {
      snprintf(path, sizeof path, "/proc/%ld/gid_map", child);
      snprintf(map, sizeof map, "%u %u 1", owner_gid, gid);
      error = write_text(path, map);
    }
    if (!error) {
      snprintf(path, sizeof path, "/proc/%ld/ns/user", child);
      fd = open(path, O_RDONLY | O_CLOEXEC);
      if (fd < 0) error = errno;
    }
  }
  close(ends[1]);
  if (child > 0)
    while (waitpid((pid_t)child, NULL, 0) < 0 && errno == EINTR) {}
  return error ? -error : fd;
}
