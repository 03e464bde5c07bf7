"""The scenarios of scripts/guest-tests, and what each is given to work with."""

import hashlib
import os
import re
import signal
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

from .. import guest, kernel, vmm
from ..vmm import Card, Disk, Failure, Generic, Machine, Share, Skip

_scenarios = {}
TOOLS = """
mkdir -p /tools
mount -t ext4 -o ro /dev/$(disk tools) /tools
tool() { name=$1; shift; /tools/ld.so --library-path /tools/lib /tools/bin/$name "$@"; }
"""
# Makes a file system on the disk $vd and mounts it at /mnt; {mkfs} and {kind} are to be filled in.
FILE_SYSTEM = """
for module in $(cat /tools/modules/order); do insmod /tools/modules/$module 2>/dev/null; done
succeeds mkfs {mkfs} $vd
mkdir -p /mnt
succeeds mount mount -t {kind} $vd /mnt
"""
QUICK = "console=ttyS0 quiet mitigations=off"


@dataclass
class Scenario:
    name: str
    purpose: str
    limit: float
    function: object
    by_hand: bool = False


def scenario(purpose, limit, by_hand=False):
    """Registers a function as the scenario of its name; `limit` is in seconds, for the lab. Those by hand are no part of scripts/test:
    they have not yet been seen to pass everywhere."""
    def register(function):
        name = function.__name__.replace("_", "-")
        _scenarios[name] = Scenario(name, purpose, limit, function, by_hand)
        return function
    return register


def all_scenarios():
    """All scenarios by name, in the order of their files."""
    from . import boot, disk, storage, durability, net, console, power, control, groups, foreign, devices, hotplug, kills  # noqa: F401
    return _scenarios


class Result:
    """What a job in a guest reported."""

    def __init__(self, running, exit_code):
        self.text = running.output.decode(errors="replace").replace("\r", "")
        self.process_exit = exit_code
        self.checks = {}
        for name, verdict, detail in re.findall(r"^MARTLET-CHECK (\S+) (ok|FAIL) ?(.*)$", self.text, re.MULTILINE):
            self.checks[name] = (verdict, detail)
        self.kernel_log = re.findall(r"^MARTLET-DMESG (.*)$", self.text, re.MULTILINE)
        exits = re.findall(r"^MARTLET-EXIT (\d+)$", self.text, re.MULTILINE)
        self.exit_code = int(exits[-1]) if exits else None


class Trial:
    """One scenario's run: makes machines, taps and images, and takes them away again."""

    def __init__(self, options, images, place):
        self.options, self.images, self.place = options, images, place
        self.martlet = vmm.Martlet(options.bin, options.accelerator)
        self.qemu = vmm.Qemu(options.bin, options.accelerator)
        self.vmm = self.qemu if options.vmm == "qemu" else self.martlet
        self.running = []
        self._taps = []
        self._others = []

    # Making things

    def image(self, name, size, random=False):
        """An image file: sparse, or full of bytes that depend on its name only."""
        path = self.place / f"{name}.img"
        if random:
            path.write_bytes(pattern(name, size))
        else:
            path.touch()
            os.truncate(path, size)
        return path

    def tap(self, number):
        """A tap with the address 10.77.<number>.1/24 on this side; the guest's is .2. A card for it."""
        name = f"martlet{number}"
        for command in (f"tuntap add {name} mode tap vnet_hdr", f"addr add 10.77.{number}.1/24 dev {name}", f"link set {name} up"):
            done = subprocess.run(["ip", *command.split()], capture_output=True, text=True)
            if done.returncode != 0:
                raise Skip(f"no tap can be made here: {done.stderr.strip()}")
            if name not in self._taps:
                self._taps.append(name)
        return Card(tap=name, mac=f"52:54:00:77:00:{number:02x}")

    def initramfs(self, job, files=None):
        path = self.place / "initramfs"
        path.write_bytes(self.images.initramfs_with(job, files))
        return path

    def only_martlet(self):
        """For scenarios about what QEMU has not, or calls otherwise."""
        if self.vmm is not self.martlet:
            raise Skip("about Martlet's own programs")

    def machine(self, job=None, files=None, cmdline=QUICK, **parts):
        """A machine whose guest runs `job`, a script; /checks.sh is sourced for it."""
        parts.setdefault("kernel", self.images.vmlinux)
        if "initramfs" not in parts:
            parts["initramfs"] = self.initramfs(None if job is None else f". /checks.sh\n{job}\nfinish\n", files)
        return Machine(cmdline=cmdline, **parts)

    def modules(self, *names):
        """Kernel modules that only this scenario needs: the files for `machine`, and the lines of its job that load them."""
        paths = kernel.from_package("linux-image-cloud-amd64").load_order(names)
        return ({f"more-modules/{path.name}": path.read_bytes() for path in paths},
                "".join(f"[ -e /modules/{path.name} ] || insmod /more-modules/{path.name}\n" for path in paths))

    # Running things

    def start(self, machine, on=None, prefix=()):
        running = (on or self.vmm).start(machine, self.place, prefix)
        self.running.append(running)
        return running

    def program(self, words, ready=None, pass_fds=()):
        """Another program of the scenario, such as a back end; waits until the file `ready` exists."""
        log = open(self.place / f"{Path(words[0]).name}.log", "ab")
        try:
            process = subprocess.Popen([str(word) for word in words], stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                                       pass_fds=pass_fds)
        except FileNotFoundError:
            raise Skip(f"{words[0]} is not there")
        self._others.append(process)
        deadline = time.monotonic() + 15 * vmm.patience
        while ready and not ready.exists():
            if process.poll() is not None or time.monotonic() > deadline:
                text = Path(log.name).read_text(errors="replace").strip().splitlines()[-3:]
                raise Failure(f"{words[0]} did not listen at {ready.name} ({process.poll()}): {' / '.join(text)}")
            time.sleep(0.02)
        return process

    def finish(self, running, seconds, checks):
        """Waits for the job's end and for that of the machine; fails unless all is well and all `checks` were made."""
        result = Result(running, running.wait_for_end(seconds))
        for name, (verdict, detail) in result.checks.items():
            if verdict != "ok":
                raise Failure(f"in the guest: {name}: {detail}")
        missing = [name for name in checks.split() if name not in result.checks]
        if missing:
            raise Failure(f"the guest never reported {', '.join(missing)}; {running.tail()}")
        if result.exit_code != 0:
            raise Failure(f"the job ended with {result.exit_code}; {running.tail()}")
        if result.process_exit != 0:
            raise Failure(f"{self.vmm.name} ended with {result.process_exit} after the guest powered off; {running.tail()}")
        return result

    def run(self, job, checks, seconds=60, on=None, meanwhile=None, **parts):
        """Starts a machine with `job` and waits for its good end; `meanwhile` is called with it first."""
        running = self.start(self.machine(job, **parts), on)
        if meanwhile:
            meanwhile(running)
        return self.finish(running, seconds, checks)

    def tools(self):
        """A disk with programs for storage; `tool NAME` runs one in the guest once TOOLS has been done."""
        return Disk(guest.tools(), serial="tools", readonly=True)

    # Ending

    def nothing_left(self):
        """No process of a machine may be alive once it has ended (a moment is granted)."""
        others = {process.pid for process in self._others}
        deadline = time.monotonic() + 2 * vmm.patience
        while True:
            left = {pid: words for pid, words in vmm.children().items() if pid not in others}
            if not left:
                return
            if time.monotonic() > deadline:
                raise Failure(f"left running: {', '.join(left.values())}")
            time.sleep(0.05)

    def nothing_left_of(self, running, seconds=10):
        """Once a machine has ended, however it did: no process of it, and none of the files it made."""
        deadline = time.monotonic() + seconds * vmm.patience
        while True:
            left = [one.name for one in self.place.iterdir() if one.is_socket()]
            left += [words for words in vmm.children().values() if words.startswith("vm/")]
            if not left:
                return
            if time.monotonic() > deadline:
                raise Failure(f"left behind: {', '.join(left)}")
            time.sleep(0.05)

    def tails(self):
        return "; ".join(running.tail() for running in self.running) or "nothing was started"

    def clean_up(self):
        for running in self.running:
            running.close()
        for process in self._others:
            if process.poll() is None:
                process.kill()
            process.wait()
        # Whoever dies leaves its children to this process, so a few turns may be needed.
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline and (left := vmm.children()):
            for pid in left:
                os.kill(pid, signal.SIGKILL)
            time.sleep(0.02)
        for tap in self._taps:
            subprocess.run(["ip", "link", "del", tap], capture_output=True)


def pattern(seed, size):
    """Bytes that look random and are the same for the same seed."""
    block = hashlib.shake_256(str(seed).encode()).digest(min(size, 1 << 20))
    return (block * (size // len(block) + 1))[:size]


def sum_of(data):
    return hashlib.sha256(data).hexdigest()


def command(*words):
    """Runs a program of this machine; its output, or a failure."""
    done = subprocess.run([str(word) for word in words], capture_output=True, text=True)
    if done.returncode != 0:
        raise Failure(f"{' '.join(map(str, words))} ended with {done.returncode}: {(done.stdout + done.stderr).strip()}")
    return done.stdout
