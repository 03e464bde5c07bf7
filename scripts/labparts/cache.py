"""The cache directory `.lab/` of the clone: things are made once, whole or not at all, by one process at a time."""

import fcntl
import os
import shutil
import sys
import time
from contextlib import contextmanager
from pathlib import Path

CLONE = Path(__file__).resolve().parent.parent.parent
ROOT = CLONE / ".lab"

_quiet = False
_started = time.monotonic()


def set_quiet(quiet):
    """With -q only errors are said."""
    global _quiet
    _quiet = quiet


def say(text):
    """A progress line on stderr, with the seconds since the start."""
    if not _quiet:
        print(f"lab {time.monotonic() - _started:6.1f}s: {text}", file=sys.stderr, flush=True)


class LabError(Exception):
    """Something the person at the keyboard can do something about; the text says what."""


@contextmanager
def lock(name):
    """Held by one process at a time; the kernel releases it when the holder dies, however it dies."""
    ROOT.mkdir(parents=True, exist_ok=True)
    with open(ROOT / f"{name}.lock", "w") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say(f"waiting: another run is preparing {name}")
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def made(path, make, what):
    """`path`, made by `make(temporary)` if it is not there. Only call with the lock held.

    The temporary is renamed when complete, so that a maker killed half-way leaves nothing that looks finished;
    its remains are removed by the next one.
    """
    path = Path(path)
    if path.exists():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".unfinished")
    remove(temporary)
    say(what)
    make(temporary)
    os.replace(temporary, path)
    return path


def remove(path):
    """Removes a file or a tree, if there is one."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
