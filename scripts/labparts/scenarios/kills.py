"""Device processes that are killed again and again while a stock kernel checks what goes through them.

How often: MARTLET_KILL_ROUNDS, or a piece that fits into every run of the tests.
"""

import os
import random
import signal
import socket
import threading
import time

from .. import vmm
from . import TOOLS, Disk, Failure, pattern, scenario, sum_of

ROUNDS = int(os.environ.get("MARTLET_KILL_ROUNDS", "12"))
SIZE = 1 << 20


class Killer:
    """Kills the process of one device at random moments, as long as it is asked to."""

    def __init__(self, trial, running, name):
        self.control, self.running, self.name = trial.martlet, running, name
        self.kills = 0
        self.counts = []

    def descriptors(self):
        """Open descriptors of the processes that live as long as the VM, once a moment has passed without a change."""
        core = self.control.processes(self.running)["core"]
        return [len(os.listdir(f"/proc/{pid}/fd")) for pid in (self.running.process.pid, core)]

    def state(self):
        return next(one for one in self.control.ask(self.running, "devices")["devices"] if one["id"] == self.name)

    def kill(self):
        """One kill, and service after it."""
        before = self.state()["restarts"]
        if not self.control.kill(self.running, self.name):
            return time.sleep(0.05)
        self.kills += 1
        deadline = time.monotonic() + 60
        while self.state()["restarts"] == before:
            if time.monotonic() > deadline:
                raise Failure(f"{self.name} is not served again after kill {self.kills}")
            self.running.read_on(0.02)
        self.running.read_on(random.uniform(0, 0.6))
        if self.kills in (3, ROUNDS):
            self.counts.append(self.descriptors())

    def judge(self):
        if self.kills < ROUNDS:
            raise Failure(f"only {self.kills} kills fell into the load")
        if self.counts[0] != self.counts[-1]:
            raise Failure(f"descriptors of supervisor and core: {self.counts[0]} after three kills, {self.counts[-1]} after {ROUNDS}")
        return f"{self.kills} kills"


class Peer:
    """This side of the transfers: takes and sums, gives, and says whether to go on."""

    def __init__(self, address):
        self.address, self.goes_on, self.problem = address, True, None
        self.turns = 0
        for port, function in (7001, self._take), (7002, self._give), (7003, self._say):
            threading.Thread(target=self._serve, args=(port, function), daemon=True).start()

    def _serve(self, port, function):
        with socket.create_server((self.address, port)) as listener:
            while True:
                # That of a guest that is no more hinders no other.
                threading.Thread(target=self._answer, args=(port, function, listener.accept()[0]), daemon=True).start()

    def _answer(self, port, function, connection):
        try:
            with connection:
                connection.settimeout(120)
                function(connection)
        except OSError as error:
            self.problem = f"port {port}: {error}"

    def _take(self, connection):
        received = b""
        while data := connection.recv(65536):
            received += data
        connection.sendall(sum_of(received).encode())

    def _give(self, connection):
        connection.sendall(pattern("host to guest", SIZE))

    def _say(self, connection):
        self.turns += 1
        connection.sendall(b"go" if self.goes_on else b"stop")


TRANSFERS = f"""
mount -t tmpfs -o size=100m tmpfs /tmp
c=$(card 52:54:00:77:00:01)
ip addr add 10.77.1.2/24 dev $c
ip link set $c up
succeeds ping ping -c 3 -w 20 10.77.1.1
dd if=/dev/urandom of=/tmp/out bs=64k count={SIZE >> 16} 2>/dev/null
before=$(sum /tmp/out)
echo MARTLET-READY
turn=0
while [ $turn -lt 100000 ]; do
  turn=$((turn + 1))
  answer=$(nc 10.77.1.1 7001 </tmp/out)
  [ "$answer" = $before ] || equal to-host-$turn $before "$answer"
  nc 10.77.1.1 7002 </dev/null >/tmp/in
  answer=$(sum /tmp/in)
  [ "$answer" = {sum_of(pattern("host to guest", SIZE))} ] || equal from-host-$turn {sum_of(pattern("host to guest", SIZE))} "$answer"
  [ "$(nc 10.77.1.1 7003 </dev/null)" = go ] || break
done
between turns 2 100000 $turn
"""


@scenario("the network card's process is killed again and again under checked TCP both ways", 120 + 6 * ROUNDS)
def net_killed(trial):
    trial.only_martlet()
    card = trial.tap(1)
    card.keys = ",restart-limit=100000"
    peer = Peer("10.77.1.1")
    running = trial.start(trial.machine(TRANSFERS, cards=[card], cpus=2))
    running.wait_for("MARTLET-READY", 100)
    killer = Killer(trial, running, "net0")
    while killer.kills < ROUNDS:
        killer.kill()
    peer.goes_on = False
    trial.finish(running, 120, "ping turns")
    if peer.problem:
        raise Failure(peer.problem)
    return killer.judge()


BOTH = f"""
vd=/dev/$(disk work)
tool fio --name=v --filename=$vd --rw=randrw --bsrange=512-64k --ioengine=libaio --direct=1 --iodepth=16 --size=12m --time_based --runtime=25 \\
  --verify=crc32c --verify_fatal=1 --verify_backlog=32 --fsync=200 --thread --eta=never &
fio=$!
{TRANSFERS}
wait $fio
equal fio 0 $?
equal complaints 0 "$(dmesg -l emerg,alert,crit,err,warn | grep -c -e virtio -e vd[a-z] -e hung -e 'link is')"
"""


@scenario("the supervisor is killed, upgraded, and killed again under fio that verifies and checked TCP; devices die in between", 300)
def supervisor_killed(trial):
    trial.only_martlet()
    card = trial.tap(1)
    card.keys = ",restart-limit=1000"
    peer = Peer("10.77.1.1")
    disks = [Disk(trial.image("work", 16 << 20), serial="work", keys=",restart-limit=1000"), trial.tools()]
    running = trial.start(trial.machine(TOOLS + BOTH, cards=[card], disks=disks, cpus=2, options=["--on-supervisor-death", "continue"]))
    running.wait_for("MARTLET-READY", 100)
    before = trial.martlet.processes(running)
    kills = 0
    for turn in range(9):
        if turn % 3 == 2:
            trial.martlet.control(running, "upgrade-supervisor", 60)
        goal = peer.turns + 1
        os.kill(trial.martlet.ask(running, "info")["supervisor"], signal.SIGKILL)
        kills += 1
        # The next one answers what is asked meanwhile.
        _expect("takeovers", trial.martlet.ask(running, "info")["takeovers"], kills)
        if turn in (3, 6):
            trial.martlet.kill(running, "blk0" if turn == 3 else "net0")
        running.read_on(random.uniform(0.6, 1.2))
        deadline = time.monotonic() + 60 * vmm.patience
        while peer.turns < goal and time.monotonic() < deadline:
            running.read_on(0.05)
    after = trial.martlet.ask(running, "info")
    _expect("upgrades", after["upgrades"], 3)
    _expect("the core", trial.martlet.processes(running)["core"], before["core"])
    _expect("the process that was started", after["keeper"], running.process.pid)
    peer.goes_on = False
    trial.finish(running, 120, "ping turns fio complaints")
    if peer.problem:
        raise Failure(peer.problem)
    trial.nothing_left_of(running)
    return f"{kills} kills"


def _expect(what, found, expected):
    if found != expected:
        raise Failure(f"{what}: {found}, and not {expected}")


LINES = """
echo MARTLET-READY
i=0
while [ $i -lt 1000000 ] && [ ! -e /stop ]; do echo "LINE $i"; i=$((i + 1)); done &
read -r line
touch /stop
wait
equal typed 'that is enough' "$line"
echo MARTLET-END
"""


def check_lines(text):
    """Every line must be there. What was under way when the process was killed may come twice: at most what Linux gives the console
    at a time. Returns how often that was."""
    length = text.count(b"LINE") + 1000
    whole = "".join(f"LINE {number}\n" for number in range(length)).encode()
    # Where the text may be in the whole, with the fewest repetitions.
    places, at = {0: 0}, 0
    while at < len(text):
        if len(places) == 1:
            # In long pieces as far as all is as it should be: byte by byte takes minutes on an emulated processor.
            (place, count), = places.items()
            size = 1 << 16
            while size and at < len(text):
                piece = text[at:at + size]
                if whole.startswith(piece, place):
                    at, place = at + len(piece), place + len(piece)
                else:
                    size //= 2
            places = {place: count}
            if at == len(text):
                break
        byte = text[at]
        at += 1
        steps = {place + 1: count for place, count in places.items() if whole[place] == byte}
        if not steps:
            steps = {place - back + 1: count + 1 for place, count in places.items() for back in range(1, 65)
                     if place >= back and whole[place - back] == byte}
        if not steps:
            raise Failure(f"lines are missing: {text[max(0, min(places) - 40):][:120]!r}")
        places = steps
    return min(places.values())


@scenario("the console's process is killed again and again while the guest writes lines: none is missing", 120 + 6 * ROUNDS)
def console_killed(trial):
    trial.only_martlet()
    running = trial.start(trial.machine(LINES, cpus=2, console="tty,restart-limit=100000"))
    running.wait_for("MARTLET-READY\\s", 100)
    killer = Killer(trial, running, "con0")
    while killer.kills < ROUNDS:
        killer.kill()
    text = running.output[:running.type("that is enough\n")].replace(b"\r", b"")
    lines = text[text.index(b"MARTLET-READY\n") + 14:]
    repeated = check_lines(lines[:lines.rindex(b"LINE")])
    trial.finish(running, 60, "typed")
    if repeated > killer.kills:
        raise Failure(f"{repeated} repetitions by {killer.kills} kills")
    return f"{killer.judge()}, {lines.count(b'LINE')} lines, {repeated} times a piece twice"
