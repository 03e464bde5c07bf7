"""What was answered as durable is durable: the storage below a disk is cut off at every flush, or holds a dead process's write back."""

import json
import struct
import time
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from . import FILE_SYSTEM, TOOLS, Disk, Failure, command, scenario
from .mapper import DMSETUP, loop, mapped

SECTOR = 512
FLUSH, FUA, DISCARD, MARK = 1, 2, 4, 8  # drivers/md/dm-log-writes.c
FILES = 6

# Files and one that is overwritten, each synced before it is told; beside them what nobody syncs.
SYNCED = "vd=/dev/$(disk cut)" + FILE_SYSTEM + """
(while [ ! -e /tmp/stop ]; do
  dd if=/dev/urandom of=/mnt/noise bs=3000 count=20 2>/dev/null; mv /mnt/noise /mnt/noise2; cp /mnt/noise2 /mnt/noise; rm /mnt/noise2
done) &
i=1
while [ $i -le {files} ]; do
  yes "file $i" | dd of=/mnt/f$i bs=1000 count=$((i * 17 % 40 + 1)) iflag=fullblock conv=fsync 2>/dev/null || echo bad >/tmp/bad
  printf %08d $i | dd of=/mnt/state conv=notrunc,fsync 2>/dev/null || echo bad >/tmp/bad
  echo "MARTLET-SYNCED $i"
  i=$((i + 1))
done
equal writes none "$(cat /tmp/bad 2>/dev/null || echo none)"
touch /tmp/stop
wait
succeeds umount umount /mnt
"""


@dataclass
class Entry:
    """One line of a log of writes: where, how long and what, in sectors of 512 bytes."""
    sector: int
    count: int
    flags: int
    data: bytes


def entries(log):
    """The log of dm-log-writes, in the order in which the device's cache was flushed."""
    with open(log, "rb") as file:
        magic, version, number, size = struct.unpack("<QQQI", file.read(28))
        if (magic, version, size) != (0x6A736677736872, 1, SECTOR):
            raise Failure(f"not a log of writes: {magic:x}, version {version}, sectors of {size}")
        file.seek(SECTOR)
        for _ in range(number):
            head = file.read(SECTOR)
            sector, count, flags, length = struct.unpack("<QQQQ", head[:32])
            data = head[32:32 + length] if flags & MARK else b"" if flags & DISCARD else file.read(count * SECTOR)
            yield Entry(sector, count, flags, data)


def content(number):
    return (f"file {number}\n".encode() * 40000)[:1000 * (number * 17 % 40 + 1)]


@contextmanager
def mounted(image, kind, place):
    # Each has the identity of the one before.
    command("mount", "-t", kind, "-o", "loop" + (",nouuid" if kind == "xfs" else ""), image, place)
    try:
        yield place
    finally:
        command("umount", place)


def check_cut(image, kind, check, synced, what, place):
    """A machine that comes up with this disk finds a sound file system, and in it what was told to be synced."""
    with mounted(image, kind, place):
        state = (place / "state").read_text() if synced else "0"
        if int(state or "0") < synced:
            raise Failure(f"{kind}, {what}: {synced} was told to be synced, found is {state!r}")
        for number in range(1, synced + 1):
            path = place / f"f{number}"
            if not path.exists() or path.read_bytes() != content(number):
                raise Failure(f"{kind}, {what}: f{number}, told to be synced, is not what was written")
    command(*check, image)


def cut_everywhere(trial, kind, check, log, size):
    """Replays the log onto an empty image and looks at it after every flush; the number of looks."""
    image, copy, place = trial.image(f"replayed-{kind}", size), trial.place / "cut.img", trial.place / "cut"
    place.mkdir(exist_ok=True)
    synced, looks, has_file_system, changed = 0, 0, False, False
    with open(image, "r+b", buffering=0) as file:
        for entry in entries(log):
            if entry.flags & MARK:
                # The log's own last word is one as well.
                if entry.data.startswith(b"synced-"):
                    synced = int(entry.data.decode().removeprefix("synced-"))
                    has_file_system = changed = True
            elif entry.flags & DISCARD:
                # What is discarded may be anything: something that a file system would stumble over.
                file.seek(entry.sector * SECTOR)
                file.write(b"\xA5" * (entry.count * SECTOR) if entry.count * SECTOR <= 1 << 20 else b"")
            elif entry.data:
                file.seek(entry.sector * SECTOR)
                file.write(entry.data)
                changed = True
            if entry.flags & (FLUSH | FUA | MARK) and has_file_system and changed:
                command("cp", "--sparse=always", image, copy)
                check_cut(copy, kind, check, synced, f"cut {looks}", place)
                looks += 1
                changed = False
    if synced != FILES:
        raise Failure(f"the log tells of {synced} of {FILES} files")
    return looks


@scenario("ext4 and xfs on storage that is cut off at every flush: sound each time, and what was synced is there", 400)
def disk_cut(trial):
    trial.only_martlet()
    told = []
    for kind, mkfs, check, size, keys in [("ext4", "mkfs.ext4 -q", ["/sbin/e2fsck", "-fn"], 32 << 20, ""),
                                          ("xfs", "tool mkfs.xfs -q", ["/sbin/xfs_repair", "-n"], 320 << 20, ",direct=on")]:
        log = trial.image(f"log-{kind}", 160 << 20)
        with loop(trial.image(kind, size)) as below, loop(log) as beside, \
             mapped(f"0 {size // SECTOR} log-writes {below} {beside}", "dm_log_writes") as (name, device):

            def mark(running):
                """Each file that the guest tells to be synced is noted in the log; now and then the disk's process is killed."""
                for number in range(1, FILES + 1):
                    running.wait_for(f"MARTLET-SYNCED {number}\r?\n", 100)
                    command(*DMSETUP, "message", name, "0", "mark", f"synced-{number}")
                    if number % 4 == 2:
                        trial.martlet.kill(running, "blk0")

            trial.run(TOOLS + SYNCED.format(mkfs=mkfs, kind=kind, files=FILES), "mkfs mount writes umount", 150, cpus=2, meanwhile=mark,
                      disks=[Disk(device, serial="cut", keys=keys), trial.tools()])
        told.append(f"{kind} {cut_everywhere(trial, kind, check, log, size)} cuts")
    return ", ".join(told)


HELD = """
vd=/dev/$(disk slow)
put() {
  tool fio --name=w --filename=$vd --rw=write --bs=512 --size=512 --offset=$((($2 * 131072 + 3) * 512)) --direct=1 --ioengine=psync --thread \
    --buffer_pattern=0x$1$2 >/dev/null || echo bad >/tmp/bad
}
i=1
while [ $i -le 3 ]; do
  # Of a page that nobody has read yet: the process waits in the middle of this write until storage has told the rest of the page.
  echo "MARTLET-WRITES $i"
  put 1 $i
  put 2 $i
  i=$((i + 1))
done
echo MARTLET-WRITTEN
read -r line
equal writes none "$(cat /tmp/bad 2>/dev/null || echo none)"
"""


def is_held(pid):
    """A thread of the process sleeps in a write, where no signal wakes it: storage has not told the rest of a page."""
    for task in Path(f"/proc/{pid}/task").iterdir():
        try:
            stack = (task / "stack").read_text()
        except OSError:
            continue
        if "block_write_begin" in stack:
            return True
    return False


@scenario("storage holds up the write of a killed disk process: the next one comes when that is over, and the newer write stays", 150)
def disk_held_up(trial):
    trial.only_martlet()
    sectors, delay, kills, came = (256 << 20) // SECTOR, 2000, [], []
    with loop(trial.image("slow", 256 << 20)) as below, mapped(f"0 {sectors} delay {below} 0 {delay} {below} 0 0\n", "dm_delay") as (_, device):

        def kill_it(running):
            for number in range(1, 4):
                running.wait_for(f"MARTLET-WRITES {number}\r?\n", 100)
                while not is_held(trial.martlet.processes(running)["blk0"]):
                    running.read_on(0.05)
                kills.append(time.time_ns())
                if not trial.martlet.kill(running, "blk0"):
                    raise Failure("there was no process to kill")
            running.wait_for("MARTLET-WRITTEN", 100)
            events = [json.loads(line) for line in trial.martlet.control(running, "--json events").splitlines()]
            came.extend(event["time_ns"] for event in events if event["event"] == "restarted")
            running.type("go\n")

        trial.run(TOOLS + HELD, "writes", 140, meanwhile=kill_it, disks=[Disk(device, serial="slow", keys=",restart-limit=100"), trial.tools()])
        with open(device, "rb") as file:
            for number in range(1, 4):
                file.seek((number * 131072 + 3) * SECTOR)
                found = file.read(SECTOR)
                if found != bytes([0x20 + number]) * SECTOR:
                    raise Failure(f"sector {number * 131072 + 3} holds {found!r}")
    # Most of the delay was left when each was killed; a successor that does not wait is there in a tenth of it.
    gaps = [(new - old) / 1e6 for old, new in zip(kills, came)]
    if len(came) != 3 or min(gaps) < delay / 2:
        raise Failure(f"successors came after {gaps} ms")
    return f"successors {', '.join(f'{gap:.0f}' for gap in gaps)} ms after the kills"
