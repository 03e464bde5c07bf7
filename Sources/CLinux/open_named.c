#define _GNU_SOURCE
#include "clinux_calls.h"

#include <errno.h>
#include <limits.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/vfs.h>

enum { most_links = 40, process_file_system = 0x9FA0 /* PROC_SUPER_MAGIC */, walking = O_PATH | O_NOFOLLOW | O_CLOEXEC };

// Whoever owns the root directory needs no link to lead us anywhere. In a user namespace that is somebody who has no number there.
static int is_trusted(uid_t owner) {
  struct stat root;
  return owner == 0 || owner == geteuid() || (stat("/", &root) == 0 && owner == root.st_uid);
}

// `step` of `directory` once more, as a link: what is left to walk begins with its target then, and 1 is returned. 2: a link that only the
// kernel can follow. 0: it is no link. -errno; -EXDEV: it is somebody else's.
static int enter_link(int directory, const char *step, char rest[PATH_MAX]) {
  int link = openat(directory, step, walking);
  if (link < 0) return -errno;
  struct stat status;
  struct statfs file_system;
  char target[PATH_MAX];
  ssize_t length = 0;
  int result = 1;
  if (fstat(link, &status) < 0 || fstatfs(link, &file_system) < 0) result = -errno;
  else if (!S_ISLNK(status.st_mode)) result = 0;
  else if (!is_trusted(status.st_uid)) result = -EXDEV;
  else if (file_system.f_type == process_file_system) result = 2;
  else if ((length = readlinkat(link, "", target, sizeof target)) < 0) result = -errno;
  close(link);
  if (result != 1) return result;
  size_t left = strlen(rest);
  if (length == 0) return -ENOENT;
  if ((size_t)length + 1 + left + 1 > PATH_MAX) return -ENAMETOOLONG;
  size_t behind = (size_t)length + (left > 0);
  memmove(rest + behind, rest, left + 1);
  if (left > 0) rest[length] = '/';
  memcpy(rest, target, (size_t)length);
  return 1;
}

// The next step is taken out of `rest`. 1: it is the last. `step` is empty when the path ends in a slash.
static int take_step(char rest[PATH_MAX], char step[NAME_MAX + 1]) {
  size_t start = strspn(rest, "/");
  size_t length = strcspn(rest + start, "/");
  if (length > NAME_MAX) return -ENAMETOOLONG;
  memcpy(step, rest + start, length);
  step[length] = 0;
  int is_last = rest[start + length] == 0;
  // With one slash left, so that "a/" is not "a".
  memmove(rest, rest + start + length, strlen(rest + start + length) + 1);
  return is_last;
}

static int walk(int *directory, char rest[PATH_MAX], int flags, unsigned mode) {
  int follows = !(flags & O_NOFOLLOW);
  for (int links = 0; links <= most_links;) {
    if (rest[0] == '/' && *directory < 0) *directory = open("/", O_PATH | O_DIRECTORY | O_CLOEXEC);
    else if (*directory < 0) *directory = open(".", O_PATH | O_DIRECTORY | O_CLOEXEC);
    if (*directory < 0) return -errno;
    char step[NAME_MAX + 1];
    int is_last = take_step(rest, step);
    if (is_last < 0) return is_last;
    // A directory is asked for as one: that also mounts what is mounted when it is needed.
    const char *name = step[0] ? step : ".";
    int fd = is_last ? openat(*directory, name, flags | O_NOFOLLOW | O_CLOEXEC, mode) : openat(*directory, name, walking | O_DIRECTORY);
    if (fd < 0 && errno != ELOOP && errno != ENOTDIR) return -errno;
    struct stat status;
    int is_link = fd < 0;
    if (fd >= 0 && is_last && flags & O_PATH && follows) is_link = fstat(fd, &status) == 0 && S_ISLNK(status.st_mode);
    if (fd >= 0 && !is_link) {
      if (is_last) return fd;
      close(*directory);
      *directory = fd;
      continue;
    }
    int error = fd < 0 ? errno : ELOOP;
    if (fd >= 0) close(fd);
    if (is_last && !follows) return -error;
    int outcome = enter_link(*directory, name, rest);
    if (outcome < 0) return outcome;
    if (outcome == 0 && error == ENOTDIR) return -ENOTDIR;
    links++;
    if (outcome == 1 && rest[0] == '/') {
      close(*directory);
      *directory = -1;
    }
    if (outcome == 0) { // it was one a moment ago
      memmove(rest + strlen(name), rest, strlen(rest) + 1);
      memcpy(rest, name, strlen(name));
    }
    if (outcome == 2) {
      fd = openat(*directory, name, is_last ? flags | O_CLOEXEC : O_PATH | O_DIRECTORY | O_CLOEXEC, mode);
      if (fd < 0) return -errno;
      if (is_last) return fd;
      close(*directory);
      *directory = fd;
    }
  }
  return -ELOOP;
}

int clinux_open_named(const char *path, int flags, unsigned mode) {
  char rest[PATH_MAX];
  size_t length = strlen(path);
  if (length == 0) return -ENOENT;
  if (length >= sizeof rest) return -ENAMETOOLONG;
  memcpy(rest, path, length + 1);
  int directory = -1;
  int result = walk(&directory, rest, flags, mode);
  if (directory >= 0) close(directory);
  return result;
}
