"""Block devices made of files, and what the device mapper makes of them."""

import os
import subprocess
from contextlib import contextmanager

from . import Skip, command

_numbers = iter(range(1 << 16))
DMSETUP = ("dmsetup", "--noudevrules", "--noudevsync")


@contextmanager
def loop(image):
    """The path of a loop device over an image file."""
    device = command("losetup", "-f", "--show", image).strip()
    try:
        yield device
    finally:
        subprocess.run(["losetup", "-d", device])


@contextmanager
def mapped(table, *modules):
    """Name and path of a device with this table of the device mapper."""
    subprocess.run(["modprobe", "-a", "dm_mod", *modules], capture_output=True)
    if not os.path.exists("/dev/mapper/control") or subprocess.run(["dmsetup", "version"], capture_output=True).returncode:
        raise Skip("this machine has no device mapper")
    kinds = {line.split()[2] for line in table.strip().splitlines()}
    offered = {line.split()[0] for line in command("dmsetup", "targets").splitlines() if line.strip()}
    if not kinds <= offered:
        raise Skip(f"this machine's device mapper lacks {', '.join(sorted(kinds - offered))}")
    name = f"martlet-{os.getpid()}-{next(_numbers)}"
    subprocess.run([*DMSETUP, "create", name], input=table, text=True, check=True)
    try:
        # By the kernel's own name: without udev nobody makes the one below /dev/mapper.
        minor = command("dmsetup", "info", "-c", "--noheadings", "-o", "minor", name).strip()
        yield name, f"/dev/dm-{minor}"
        command(*DMSETUP, "remove", "--retry", name)
    except BaseException:
        # Whoever has it open still is ended later.
        subprocess.run([*DMSETUP, "remove", "--deferred", name], capture_output=True)
        raise
