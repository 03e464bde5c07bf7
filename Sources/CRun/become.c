#define _GNU_SOURCE
#include "crun.h"

#include <string.h>
#include <unistd.h>

void crun_is_linked(void) {}

// Swift's start-up, and building arguments and verbs only to give them away, costs 0.3 ms, a twentieth of what passes
// until the guest runs. So `martlet run` without a wish for help goes over to the supervisor here, in the first of the
// constructors. Whatever does not work is left to the verb `run`, which tries again and says what is wrong.
__attribute__((constructor(101))) static void become_supervisor(int count, char **arguments, char **environment) {
  if (count < 2 || strcmp(arguments[1], "run") != 0) return;
  for (int i = 2; i < count; i++)
    if (strcmp(arguments[i], "--help") == 0 || strcmp(arguments[i], "-h") == 0) return;
  static const char name[] = "martlet-supervisor";
  char path[4096];
  ssize_t length = readlink("/proc/self/exe", path, sizeof path);
  if (length <= 0 || (size_t)length >= sizeof path) return;
  char *slash = memrchr(path, '/', (size_t)length);
  if (!slash || slash + 1 + sizeof name > path + sizeof path) return;
  memcpy(slash + 1, name, sizeof name);
  char *run = arguments[1];
  arguments[1] = slash + 1;
  execve(path, arguments + 1, environment);
  arguments[1] = run;
}
