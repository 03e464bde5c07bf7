"""The console: a person logs in; all the places where console and serial port may end."""

import os
import socket
import termios
import time
import tty

from .. import vmm
from . import QUICK, Disk, Failure, scenario


def boot_root_disk(trial, cmdline="", **parts):
    """A machine with the root disk, at its login prompt."""
    root = trial.place / "root.img"
    trial.images.copy_root(root)
    machine = trial.machine(initramfs=trial.images.initramfs, disks=[Disk(root, serial="root")],
                            cmdline=f"{QUICK} martlet.root=/dev/vda {cmdline}", **parts)
    running = trial.start(machine)
    running.wait_for("guest login: ", 90)
    return running


def log_in(running):
    """From the login prompt to the shell."""
    start = running.type("root\r")
    running.wait_for(r"guest:\S*# ", 30, start)


def answer(running, line):
    """Types a command line into the shell; its output."""
    start = running.type(f"{line}\r")
    match = running.wait_for(r"(?s)\r\n(.*?)guest:\S*# ", 30, start)
    return match[1].decode(errors="replace").replace("\r", "").strip()


@scenario("a person logs in on the console of a guest with a root disk, works there, powers off", 150)
def console_login(trial):
    running = boot_root_disk(trial)
    log_in(running)
    for line, expected in (("tty", "/dev/hvc0"), ("id -u", "0"), ("echo $((6 * 7))", "42"),
                           ("cat /proc/1/comm", "init"), ("touch /root/was-here && echo done", "done")):
        found = answer(running, line)
        if found != expected:
            raise Failure(f"'{line}' printed '{found}' instead of '{expected}'")
    # Ctrl-C ends a command: the byte reaches the guest and is not eaten by a terminal on the way.
    start = running.type("sleep 1000; echo sl''ept\r")
    running.wait_for("sleep 1000", 20, start)
    time.sleep(2)
    start = running.type("\x03")
    running.wait_for(r"guest:\S*# ", 20, start)
    # A long output arrives whole. Linux sends each line by itself and spins until the console has taken it: a round trip
    # between two processes, which on two emulated processors that are busy otherwise takes 10 ms.
    found = answer(running, "seq 1 600")
    if found.split() != [str(number) for number in range(1, 601)]:
        raise Failure(f"'seq 1 600' printed {len(found.split())} words")
    size = answer(running, "stty size")
    running.type("poweroff\r")
    code = running.wait_for_end(60)
    if code != 0:
        raise Failure(f"the machine ended with {code}; {running.tail()}")
    expected = f"{running.rows} {running.columns}"
    if size != expected and trial.vmm.name == "martlet":
        raise Failure(f"the terminal is {size} in the guest, {expected} outside")
    return f"terminal size {size}"


# The guest asks on both lines and hears both answers; what comes must be what was typed. The serial port stays open between
# question and answer: Linux empties its receive FIFO with the last close and with the first open.
ASKING = """
echo MARTLET-ASKS
read -r line
equal console-input 'typed on the console' "$line"
exec 5<>/dev/ttyS0
stty raw -echo <&5
echo MARTLET-SERIAL-ASKS >&5
read -r line <&5
equal serial-input 'typed on the serial line' "$line"
i=0
while [ $i -lt 100 ]; do
  i=$((i + 1))
  echo "MARTLET-LINE $i of the console"
done
"""


class Line:
    """This side of a console that is a pseudo-terminal or a socket."""

    def __init__(self, running, kind, name, place):
        self.running, self.output = running, b""
        if kind == "pty":
            running.wait_for_stderr(f"{name}: (/dev/pts/[0-9]+)", 30)
            self.fd = os.open(running.wait_for_stderr(f"{name}: (/dev/pts/[0-9]+)", 1)[1], os.O_RDWR | os.O_NOCTTY)
            tty.setraw(self.fd, termios.TCSANOW)
        else:
            self.socket = socket.socket(socket.AF_UNIX)
            deadline = time.monotonic() + 30
            while True:
                try:
                    self.socket.connect(str(place))
                    break
                except OSError:
                    if time.monotonic() > deadline:
                        raise Failure(f"nobody listens at {place}")
                    time.sleep(0.02)
            self.fd = self.socket.fileno()
        os.set_blocking(self.fd, False)

    def wait_for(self, text, seconds):
        deadline = time.monotonic() + seconds * vmm.patience
        while text.encode() not in self.output:
            try:
                data = os.read(self.fd, 65536)
            except BlockingIOError:
                data = None
            except OSError:
                data = b""
            if data:
                self.output += data
            elif data == b"" or time.monotonic() > deadline:
                raise Failure(f"'{text}' did not come: {self.output[-300:]}; {self.running.tail()}")
            else:
                self.running.read_on(0.02)

    def type(self, text):
        os.write(self.fd, text.encode())


def _both_lines(trial, console, serial):
    """Console and serial port at places of these kinds: both carry both ways, nothing is lost."""
    trial.only_martlet()
    places = {name: trial.place / f"{name}.socket" for name in ("console", "serial")}
    words = {name: kind if kind == "pty" else f"socket={places[name]}" for name, kind in (("console", console), ("serial", serial))}
    machine = trial.machine(ASKING, cmdline="console=ttyS0 mitigations=off", **words)
    running = trial.start(machine)
    line = Line(running, console, "console", places["console"])
    wire = Line(running, serial, "serial", places["serial"])
    line.wait_for("MARTLET-ASKS", 80)
    line.type("typed on the console\n")
    wire.wait_for("MARTLET-SERIAL-ASKS", 20)
    wire.type("typed on the serial line\n")
    line.wait_for("MARTLET-EXIT 0", 20)
    code = running.wait_for_end(20)
    if code != 0:
        raise Failure(f"the machine ended with {code}; {running.tail()}")
    text = line.output.decode(errors="replace")
    lines = [f"MARTLET-LINE {number} of the console" for number in range(1, 101)]
    if [one for one in text.replace("\r", "").splitlines() if one.startswith("MARTLET-LINE")] != lines:
        raise Failure("the console's lines did not come whole")
    if b"Linux version 6.1" not in wire.output:
        raise Failure("the serial line did not carry the kernel's first message")
    trial.nothing_left_of(running)


@scenario("console on a pseudo-terminal, serial port on a socket: both ways, whole", 120)
def console_pty(trial):
    _both_lines(trial, "pty", "socket")


@scenario("console on a socket, serial port on a pseudo-terminal: both ways, whole", 120)
def console_socket(trial):
    _both_lines(trial, "socket", "pty")


@scenario("console in a file, nothing on the terminal", 120)
def console_file(trial):
    trial.only_martlet()
    place = trial.place / "console.log"
    running = trial.start(trial.machine("seq 1 300 | sed 's/^/MARTLET-LINE /'", console=f"file={place}"))
    code = running.wait_for_end(90)
    found = [line.split()[1] for line in place.read_text().replace("\r", "").splitlines() if line.startswith("MARTLET-LINE")]
    if code != 0 or found != [str(number) for number in range(1, 301)] or "MARTLET-EXIT 0" not in place.read_text():
        raise Failure(f"{len(found)} lines in the file, exit code {code}; {running.tail()}")
    if running.output:
        raise Failure(f"the terminal got {running.output[:100]}")


@scenario("no console, serial port on the terminal: the guest speaks and hears there", 120)
def console_off(trial):
    trial.only_martlet()
    job = "refused hvc test -e /dev/hvc0\necho MARTLET-ASKS\nread -r line\nequal input 'typed' \"$line\"\n"
    machine = trial.machine(job, cmdline=f"{QUICK} martlet.console=ttyS0", console="off", serial="tty")
    running = trial.start(machine)
    running.wait_for("MARTLET-ASKS", 80)
    running.type("typed\n")
    trial.finish(running, 30, "hvc input")


@scenario("console and serial port at null: the guest's output hinders nobody", 120)
def console_null(trial):
    trial.only_martlet()
    image = trial.image("sign", 1 << 20)
    job = "seq 1 3000\nseq 1 100 >/dev/ttyS0\necho done | dd of=/dev/vda conv=notrunc,fsync 2>/dev/null\n"
    running = trial.start(trial.machine(job, console="null", serial="null", disks=[Disk(image)]))
    code = running.wait_for_end(90)
    if code != 0 or not image.read_bytes().startswith(b"done\n") or running.output:
        raise Failure(f"exit code {code}, disk {image.read_bytes()[:8]}, terminal {running.output[:100]}; {running.tail()}")
