"""Virtual machines for the guest tests: what they consist of, and how Martlet or QEMU is told to run them."""

import ctypes
import fcntl
import json
import os
import pty
import re
import select
import signal
import socket
import struct
import subprocess
import termios
import time
import tty
from dataclasses import dataclass, field
from pathlib import Path


# What every time limit is multiplied by (guest-tests --slow).
patience = 1


PANIC = b"end Kernel panic - not syncing"


class Failure(Exception):
    """The scenario failed; the text says what was expected and what was found."""


class Skip(Exception):
    """The scenario cannot run here; the text says why."""


@dataclass
class Disk:
    """A disk from an image file, or served by a back end that listens on `socket`."""
    path: Path = None
    serial: str = None
    readonly: bool = False
    socket: Path = None
    # A back end for `path` that Martlet starts in a jail: its words, and the profile.
    program: str = None
    jail: Path = None
    # More keys of Martlet's option, with a comma in front; other VMMs do without.
    keys: str = ""


@dataclass
class Card:
    """A network card at a tap that exists, or served by a back end that listens on `socket`."""
    tap: str = None
    mac: str = None
    socket: Path = None
    # More keys of Martlet's option.
    keys: str = ""


@dataclass
class Share:
    """A directory behind a file system daemon that listens on `socket`."""
    tag: str
    socket: Path


@dataclass
class Generic:
    """Any device behind a back end that listens on `socket`."""
    socket: Path
    device_type: str
    queue_sizes: str


@dataclass
class Machine:
    """What a virtual machine consists of."""
    kernel: Path
    initramfs: Path = None
    cmdline: str = ""
    cpus: int = 1
    memory: str = "256M"
    disks: list = field(default_factory=list)
    cards: list = field(default_factory=list)
    shares: list = field(default_factory=list)
    generics: list = field(default_factory=list)
    # True, or the socket of a back end (QEMU only; for Martlet that is a `Generic`).
    rng: object = False
    no_reboot: bool = False
    # QEMU goes on, and connects again, when the back end of a disk or a card has ended.
    reconnects: bool = False
    # More options of Martlet's; other VMMs do without.
    options: list = field(default_factory=list)
    # Where Martlet's console and serial port go; by default a terminal of this side's and the file `serial`.
    console: str = "tty"
    serial: str = None


class Martlet:
    """The programs of a build directory, by the command line people type."""
    name = "martlet"

    def __init__(self, binaries, accelerator):
        self.binaries = Path(binaries)

    def start(self, machine, place, prefix=()):
        """`prefix`: words of a program that runs it, such as one that becomes another user first."""
        words = [str(self.binaries / "martlet"), "run", "--kernel", str(machine.kernel)]
        if machine.initramfs:
            words += ["--initramfs", str(machine.initramfs)]
        words += ["--cmdline", machine.cmdline, "--cpus", f"boot={machine.cpus}", "--memory", f"size={machine.memory}"]
        for disk in machine.disks:
            if disk.socket:
                words += ["--disk", f"vhost_user=on,socket={disk.socket}"]
                continue
            if disk.program:
                words += ["--disk", f'vhost_user=on,path={disk.path},jail={disk.jail},program="{disk.program}"{disk.keys}']
                continue
            keys = f"path={disk.path}"
            keys += ",readonly=on" if disk.readonly else ""
            keys += f",serial={disk.serial}" if disk.serial else ""
            words += ["--disk", keys + disk.keys]
        for card in machine.cards:
            keys = f"vhost_user=on,socket={card.socket}" if card.socket else f"tap={card.tap}"
            words += ["--net", keys + (f",mac={card.mac}" if card.mac else "") + card.keys]
        for share in machine.shares:
            words += ["--fs", f"tag={share.tag},socket={share.socket}"]
        for one in machine.generics:
            words += ["--generic-vhost-user", f"socket={one.socket},device_type={one.device_type},queue_sizes={one.queue_sizes}"]
        words += ["--rng", "on"] if machine.rng else []
        words += ["--console", machine.console, "--serial", machine.serial or f"file={place / 'serial'}"]
        # Emulated and on a busy machine, loading a kernel takes longer than the few seconds that are patience enough elsewhere.
        words += ["--control", str(place / "control"), "--deadline", "ready=60000,reply=60000"]
        words += ["--no-reboot"] if machine.no_reboot else []
        return Running(list(prefix) + words + machine.options, place, self)

    def control(self, running, verb, patience=30):
        """`martlet ctl VERB`; its output."""
        done = subprocess.run([str(self.binaries / "martlet"), "ctl", "--control", str(running.place / "control"),
                               *verb.split()], capture_output=True, text=True, timeout=patience)
        if done.returncode != 0:
            raise Failure(f"martlet ctl {verb} ended with {done.returncode}: {(done.stdout + done.stderr).strip()}")
        return done.stdout

    def ask(self, running, verb):
        """The JSON answer to `martlet ctl VERB`."""
        return json.loads(self.control(running, f"--json {verb}"))

    def processes(self, running):
        """Process numbers of a running machine by id: core, serial and the devices, without those that have ended."""
        return {one["id"]: one["pid"] for one in self.ask(running, "info")["processes"] if one["process"] in ("starting", "running")}

    def kill(self, running, name):
        """Kills a process by its id; False when there is none at the moment, because it ended and is not started again yet."""
        victim = self.processes(running).get(name)
        if victim is None:
            return False
        try:
            os.kill(victim, signal.SIGKILL)
        except ProcessLookupError:
            return False
        return True

    def power_button(self, running):
        self.control(running, "power-button")


class Qemu:
    """QEMU q35 with the same devices: shows that the scenarios themselves are right."""
    name = "qemu"

    def __init__(self, binaries, accelerator):
        self.accelerator = accelerator

    def start(self, machine, place, prefix=()):
        words = [
            "qemu-system-x86_64", "-nodefaults", "-no-user-config", "-display", "none", "-machine", "q35,memory-backend=ram",
            "-accel", self.accelerator, "-cpu", "host" if self.accelerator == "kvm" else "max",
            "-smp", str(machine.cpus), "-m", machine.memory,
            "-object", f"memory-backend-memfd,id=ram,size={machine.memory},share=on",
            "-kernel", str(machine.kernel), "-append", machine.cmdline,
            "-serial", f"file:{place / 'serial'}", "-qmp", f"unix:{place / 'qmp'},server=on,wait=off",
            "-chardev", "stdio,id=console,signal=off", "-device", "virtio-serial-pci", "-device", "virtconsole,chardev=console",
        ]
        if machine.initramfs:
            words += ["-initrd", str(machine.initramfs)]
        words += ["-no-reboot"] if machine.no_reboot else []
        again = ",reconnect=1" if machine.reconnects else ""
        if isinstance(machine.rng, Path):
            words += ["-chardev", f"socket,id=rng,path={machine.rng}", "-device", "vhost-user-rng-pci,chardev=rng"]
        elif machine.rng:
            words += ["-device", "virtio-rng-pci,disable-legacy=on"]
        for number, share in enumerate(machine.shares):
            words += ["-chardev", f"socket,id=fs{number},path={share.socket}",
                      "-device", f"vhost-user-fs-pci,chardev=fs{number},tag={share.tag}"]
        for number, disk in enumerate(machine.disks):
            if disk.socket:
                words += ["-chardev", f"socket,id=blk{number},path={disk.socket}{again}",
                          "-device", f"vhost-user-blk-pci,chardev=blk{number},disable-legacy=on"]
                continue
            mode = "on" if disk.readonly else "off"
            words += ["-blockdev", f"driver=raw,node-name=d{number},read-only={mode},file.driver=file,file.filename={disk.path}",
                      "-device", f"virtio-blk-pci,drive=d{number},disable-legacy=on"
                      + (f",serial={disk.serial}" if disk.serial else "")]
        for number, card in enumerate(machine.cards):
            mac = f",mac={card.mac}" if card.mac else ""
            if card.socket:
                words += ["-chardev", f"socket,id=net{number},path={card.socket}{again}",
                          "-netdev", f"vhost-user,id=n{number},chardev=net{number}"]
            else:
                words += ["-netdev", f"tap,id=n{number},ifname={card.tap},script=no,downscript=no"]
            words += ["-device", f"virtio-net-pci,netdev=n{number},disable-legacy=on,romfile={mac}"]
        return Running(list(prefix) + words, place, self)

    def power_button(self, running):
        with socket.socket(socket.AF_UNIX) as control:
            control.settimeout(10)
            control.connect(str(running.place / "qmp"))
            stream = control.makefile("rw")
            stream.readline()
            for command in ("qmp_capabilities", "system_powerdown"):
                stream.write(json.dumps({"execute": command}) + "\n")
                stream.flush()
                while "return" not in json.loads(stream.readline()):
                    pass


class Running:
    """A virtual machine that runs. Its console is a terminal whose other end is here."""

    rows, columns = 37, 111

    def __init__(self, words, place, vmm):
        self.place, self.vmm, self.words = place, vmm, words
        self.output = b""
        self._master, slave = pty.openpty()
        self._terminal = os.ttyname(slave)
        tty.setraw(slave)
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", self.rows, self.columns, 0, 0))
        with open(place / "stderr", "ab") as errors:
            self.process = subprocess.Popen(words, stdin=slave, stdout=slave, stderr=errors, start_new_session=True)
        os.close(slave)

    def _read(self, seconds):
        if not select.select([self._master], [], [], max(0, seconds))[0]:
            return False
        try:
            data = os.read(self._master, 65536)
        except OSError:
            return None
        self.output += data
        return True if data else None

    def _read_or_panic(self, seconds):
        """Like _read; but a guest whose kernel has panicked, and was not told to restart then, is not waited for."""
        found = self._read(seconds)
        if found is False and not any("panic=" in word for word in self.words):
            serial = self.place / "serial"
            if PANIC in self.output or serial.exists() and PANIC in serial.read_bytes():
                raise Failure(f"the guest's kernel panicked; {self.tail()}")
        return found

    def wait_for(self, pattern, seconds, start=0):
        """Waits until the console has shown `pattern` (a regular expression) after byte `start`; its match."""
        deadline = time.monotonic() + seconds * patience
        while True:
            match = re.search(pattern.encode(), self.output[start:])
            if match:
                return match
            left = deadline - time.monotonic()
            if left <= 0:
                raise Failure(f"the console did not show '{pattern}' within {seconds * patience:g} s; {self.tail()}")
            if self._read_or_panic(min(left, 1)) is None:
                raise Failure(f"the machine ended before its console showed '{pattern}'; {self.tail()}")

    def wait_for_stderr(self, pattern, seconds):
        """Waits until the program has said `pattern` on standard error; its match."""
        deadline = time.monotonic() + seconds * patience
        while True:
            match = re.search(pattern, (self.place / "stderr").read_text(errors="replace"))
            if match:
                return match
            if time.monotonic() > deadline or self.process.poll() is not None:
                raise Failure(f"standard error did not show '{pattern}'; {self.tail()}")
            self.read_on(0.02)

    def read_on(self, seconds):
        """Reads the console for so long."""
        deadline = time.monotonic() + seconds
        while (left := deadline - time.monotonic()) > 0:
            if self._read(left) is None:
                break

    def type(self, text):
        """Types on the console; what it shows from now on begins at the returned byte."""
        start = len(self.output)
        os.write(self._master, text.encode())
        return start

    def wait_for_end(self, seconds):
        """Reads the console until all of the machine's processes have closed it; the exit code."""
        deadline = time.monotonic() + seconds * patience
        while True:
            left = deadline - time.monotonic()
            if left <= 0:
                raise Failure(f"the machine did not end within {seconds * patience:g} s; {self.holders()}; {self.tail()}")
            if self._read_or_panic(min(left, 1)) is None:
                break
        try:
            return self.process.wait(max(1, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            raise Failure(f"the console is closed but {self.words[0]} still runs")

    def holders(self):
        """Who still has the console's terminal open, and where in the kernel it waits."""
        name = self._terminal
        found = []
        for one in Path("/proc").iterdir():
            try:
                if one.name.isdigit() and int(one.name) != os.getpid() and any(os.readlink(fd) == name for fd in (one / "fd").iterdir()):
                    title = (one / "cmdline").read_bytes().split(b"\0")[0].decode(errors="replace")
                    state = (one / "stat").read_text().rpartition(")")[2].split()[0]
                    found.append(f"{title} ({one.name}, {state}, {(one / 'wchan').read_text()})")
            except OSError:
                pass
        return "its console is open in " + (", ".join(found) or "none that can be seen")

    def tail(self):
        """The last words, for error messages."""
        pieces = []
        errors = (self.place / "stderr").read_bytes()
        serial = (self.place / "serial").read_bytes() if (self.place / "serial").exists() else b""
        for name, data in (("console", self.output), ("serial", serial), ("stderr", errors)):
            lines = data.decode(errors="replace").replace("\r", "").strip().splitlines()[-6:]
            if lines:
                pieces.append(f"{name}: " + " / ".join(lines))
        return "; ".join(pieces) or "it said nothing"

    def close(self):
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
        os.close(self._master)
        (self.place / "console").write_bytes(self.output)


def adopt_orphans():
    """From now on processes whose parent died belong to this one, so that none goes unseen."""
    ctypes.CDLL(None).prctl(36, 1)  # PR_SET_CHILD_SUBREAPER


def die_with_parent():
    """Asked to end when the parent is gone."""
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


def children(pid=None):
    """Command lines of the living children of this process, by pid."""
    found = {}
    for task in Path(f"/proc/{pid or os.getpid()}/task").iterdir():
        for child in (task / "children").read_text().split():
            try:
                state = Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()[0]
                if state != "Z":
                    words = Path(f"/proc/{child}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                    found[int(child)] = words.strip()
            except OSError:
                pass
    return found
