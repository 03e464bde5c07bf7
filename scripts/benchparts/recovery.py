"""`scripts/bench recovery`: how long a guest's disk stands still when the process that serves it is killed, or replaced.

What is measured is seen by the front end: the used index of the guest's ring, read from the guest's memory some ten thousand
times a second while the guest writes. The gap is the longest time without a completion around the kill.
"""

import json
import mmap
import os
import signal
import socket
import statistics
import struct
import subprocess
import sys
import tempfile
import time

import pages
from pages import DOCS

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
BUILD = os.environ.get("MARTLET_BUILD", os.path.join(ROOT, ".build/release"))
MICRO = os.path.join(ROOT, ".build/micro")

# Where the core's addresses for back ends begin.
SHARED_BASE = 1 << 46
BEFORE, AFTER = 0.03, 0.4
SIDES = {
    "spare": "martlet-block, a spare waiting", "plain": "martlet-block, started again", "daemon": "qemu-storage-daemon, started again",
    "replaced": "martlet-block, replaced as planned"}
BARS = {"spare": 10.0, "plain": 25.0, "replaced": 5.0}


class Daemon:
    """The storage daemon, listening, started again by us as soon as it has ended."""

    def __init__(self, scratch):
        self.path = os.path.join(scratch, "daemon.sock")
        self.command = [
            "qemu-storage-daemon", "--blockdev", f"driver=file,node-name=n,filename={scratch}/disk.raw,aio=io_uring", "--export",
            f"type=vhost-user-blk,id=e,node-name=n,writable=on,addr.type=unix,addr.path={self.path}"]
        self.start()

    def start(self):
        self.process = subprocess.Popen(self.command, stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def kill_and_restart(self):
        self.process.kill()
        killed = time.monotonic()
        self.process.wait()
        # Nobody listens at the old socket any more.
        try:
            os.unlink(self.path)
        except FileNotFoundError:
            pass
        self.start()
        return killed

    def end(self):
        self.process.kill()
        self.process.wait()


class VM:
    """A micro guest at work on one disk, and a view of its ring."""

    def __init__(self, side, depth, scratch):
        self.side, self.scratch = side, scratch
        self.control = os.path.join(scratch, "control")
        self.daemon = self.order = None
        if side == "daemon":
            self.daemon = Daemon(scratch)
            disk = f"vhost_user=on,socket={self.daemon.path}"
            for _ in range(2000):
                if os.path.exists(self.daemon.path):
                    break
                time.sleep(0.005)
        else:
            disk = f"path={scratch}/disk.raw,num_queues=1,restart-limit=100000,spare={'on' if side == 'spare' else 'off'}"
        self.process = subprocess.Popen(
            [os.path.join(BUILD, "martlet"), "run", "--kernel", f"{MICRO}/micro.elf", "--cmdline",
             f"test=blk op=write depth={depth} n=1000000000 span=8 plain=1 wait=halt", "--memory", "size=64M", "--disk", disk, "--console",
             "null", "--serial", "null", "--control", self.control, "--name", "bench"],
            stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        self.wait_until(lambda d: d["state"] == "active" and (side != "spare" or d.get("spare", {}).get("ready")))
        self.find_ring()

    def ask(self, request):
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(10)
            connection.connect(self.control)
            connection.sendall(request.encode() + b"\n")
            answer = json.loads(connection.makefile().readline())
        if not answer["ok"]:
            raise RuntimeError(f"{request}: {answer['error']}")
        return answer

    def device(self):
        return self.ask("devices")["devices"][0]

    def wait_until(self, condition):
        end = time.monotonic() + 20
        while time.monotonic() < end and self.process.poll() is None:
            try:
                device = self.device()
                if condition(device):
                    return device
            except (OSError, ValueError, RuntimeError, IndexError):
                pass
            time.sleep(0.005)
        self.process.kill()
        raise RuntimeError(f"the VM does not come so far: {self.process.stderr.read()[-500:]}")

    def find_ring(self):
        """From what was said to the back end: the used ring's address; from the core: guest memory."""
        used, end = None, time.monotonic() + 10
        # The core tells of the driver a moment before the back end hears of its rings.
        while used is None and time.monotonic() < end:
            for line in self.ask("conversation blk0")["conversation"].splitlines():
                words = line.split()
                if len(words) > 2 and words[1] == "f" and words[2].startswith("09000000"):  # SET_VRING_ADDR
                    used = struct.unpack("<QQQQ", bytes.fromhex(words[2])[20:52])[1] - SHARED_BASE
        core = next(p["pid"] for p in self.ask("info")["processes"] if p["id"] == "core")
        for fd in os.listdir(f"/proc/{core}/fd"):
            path = f"/proc/{core}/fd/{fd}"
            if "memfd:martlet-guest" in os.readlink(path):
                with open(path, "rb") as file:
                    self.memory = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
        if used is None:
            raise RuntimeError("the used ring is not where it should be")
        self.used_index = used + 2

    def sample(self, seconds, action=None, at=0.0):
        """Times and numbers of completions; `action` is done on the way. Times are relative to what it returns."""
        read = struct.Struct("<H").unpack_from
        times, counts, total = [], [], 0
        last = read(self.memory, self.used_index)[0]
        begin = time.monotonic()
        zero = None
        while True:
            now = time.monotonic()
            # Not before it is served again.
            if now - begin > seconds and (times and now - times[-1] < 0.05 or now - begin > 20):
                break
            if action and zero is None and now - begin >= at:
                zero = action()
            index = read(self.memory, self.used_index)[0]
            if index != last:
                total += (index - last) & 0xFFFF
                last = index
                times.append(now)
                counts.append(total)
            # Leaves the processors to those who are measured.
            time.sleep(0.00005)
        return [t - (zero or begin) for t in times], counts

    def disturb(self):
        """Kills what serves the disk, or begins to replace it; the time."""
        if self.daemon:
            return self.daemon.kill_and_restart()
        if self.side == "replaced":
            self.order = subprocess.Popen(
                [os.path.join(BUILD, "martlet"), "ctl", "--control", self.control, "replace", "blk0"], stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
            return time.monotonic()
        os.kill(self.pid, signal.SIGKILL)
        return time.monotonic()

    def round(self):
        """The gap around one kill in seconds, and what was completed when."""
        if not self.daemon:
            device = self.wait_until(
                lambda d: d["state"] == "active" and (self.side != "spare" or d.get("spare", {}).get("ready")))
            self.pid = device["pid"]
        # A back end at a socket that is lost within a second of its coming is not looked for at once.
        time.sleep(1.1 if self.daemon else 0.03)
        times, counts = self.sample(BEFORE + AFTER, self.disturb, BEFORE)
        if self.order:
            said = self.order.communicate(timeout=20)[0]
            if self.order.returncode:
                raise RuntimeError(f"the replacement failed: {said.strip()}")
        if not times or times[-1] < AFTER - 0.05:
            raise RuntimeError("the disk is not served again")
        gap = max(b - a for a, b in zip(times, times[1:]) if b > 0)
        return gap, list(zip(times, counts))

    def end(self):
        self.memory.close()
        self.process.terminate()
        self.process.wait()
        if self.daemon:
            self.daemon.end()


def measure(side, depth, kills):
    with tempfile.TemporaryDirectory(dir="/var/tmp") as scratch:
        os.chmod(scratch, 0o755)
        with open(os.path.join(scratch, "disk.raw"), "wb") as file:
            file.write(bytes(16 << 20))
        vm = VM(side, depth, scratch)
        try:
            return [vm.round() for _ in range(kills)]
        finally:
            vm.end()


def inflight_cost(rounds, seconds):
    """Time a request of martlet-block without storage, with and without the record of requests in flight, by turns; nanoseconds by
    kind of ring."""
    found = {}
    for turn in range(rounds):
        for ring in ("split", "packed"):
            for inflight in ([True, False, False, True] if turn % 2 == 0 else [False, True, True, False]):
                words = [os.path.join(BUILD, "martlet-probe"), "bench", "--rw", "randread", "--bs", "4k", "--iodepth", "32", "--pin", "0",
                         "--runtime", str(seconds), "--output-format", "json", "--no-syscalls", *(["--inflight"] if inflight else []),
                         *(["--packed"] if ring == "packed" else []), "--", "taskset", "-c", "1", os.path.join(BUILD, "martlet-block"),
                         "--socket-path={socket}", "--blk-null=1073741824", "--num-queues=1"]
                done = subprocess.run(words, capture_output=True, text=True)
                if done.returncode:
                    raise RuntimeError(done.stderr.strip())
                job = json.loads(done.stdout)["jobs"][0]
                found.setdefault((ring, inflight), []).append(1e9 / job["read"]["iops"])
    return {key: statistics.median(values) for key, values in found.items()}


def plot(curves):
    """Completions since 30 ms before the kill, by side and depth."""
    width, height, left, top = 760, 250, 70, 40
    colours = {"spare": "#1b7837", "plain": "#2166ac", "daemon": "#b2182b", "replaced": "#8c510a"}
    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" width="{width + 2 * left}" height="{2 * (height + 90)}" font-family="sans-serif" font-size="13">',
             '<rect width="100%" height="100%" fill="white"/>']
    for row, depth in enumerate(sorted({d for _, d in curves})):
        y0 = top + row * (height + 85)
        shown = {side: [(t, c) for t, c in points if -BEFORE <= t <= AFTER] for (side, d), points in curves.items() if d == depth}
        most = max(points[-1][1] for points in shown.values())
        span = BEFORE + AFTER
        x = lambda t: left + (t + BEFORE) / span * width
        y = lambda c: y0 + height - c / most * height
        parts.append(f'<text x="{left}" y="{y0 - 12}">Requests answered around the kill, depth {depth}</text>')
        parts.append(f'<rect x="{left}" y="{y0}" width="{width}" height="{height}" fill="none" stroke="#999"/>')
        parts.append(f'<line x1="{x(0):.1f}" y1="{y0}" x2="{x(0):.1f}" y2="{y0 + height}" stroke="#999" stroke-dasharray="4 3"/>')
        for t in range(0, int(AFTER * 1000) + 1, 100):
            parts.append(f'<text x="{x(t / 1000):.1f}" y="{y0 + height + 17}" text-anchor="middle">{t} ms</text>')
        parts.append(f'<text x="{left - 6}" y="{y0 + 12}" text-anchor="end">{most}</text>')
        for number, (side, points) in enumerate(shown.items()):
            line, last = [], 0
            for t, c in points:
                line += [f"{x(t):.1f},{y(last):.1f}", f"{x(t):.1f},{y(c):.1f}"]
                last = c
            thin = line if len(line) < 3000 else line[::2 * (len(line) // 3000 + 1)] + line[-1:]
            parts.append(f'<polyline fill="none" stroke="{colours[side]}" stroke-width="1.6" points="{" ".join(thin)}"/>')
            parts.append(f'<text x="{left + 12}" y="{y0 + 20 + 18 * number}" fill="{colours[side]}">{SIDES[side]}</text>')
    parts.append("</svg>")
    with open(os.path.join(DOCS, "recovery.svg"), "w") as file:
        file.write("\n".join(parts) + "\n")


def table(gaps, sides, arguments, cost):
    """What was measured as text, and whether it is within the bars."""
    lines = [pages.machine(), f"time without a completion, ms; {arguments.rounds} rounds A B B A of {arguments.kills} kills or replacements, "
             f"load {os.getloadavg()[0]:.1f} at the end"]
    within = True
    for depth in (1, 32):
        for side in sides:
            values = sorted(gaps[side, depth])
            median = statistics.median(values)
            bar = BARS.get(side)
            ok = bar is None or median <= bar
            within = within and ok
            lines.append(
                f"  {'   ' if bar is None else 'ok ' if ok else 'BAD'} depth {depth:2}  {SIDES[side]:36} median {median:6.1f}  least {values[0]:6.1f}"
                f"  nine in ten {values[len(values) * 9 // 10]:6.1f}  most {values[-1]:6.1f}  of {len(values)}"
                + (f"; bar: at most {bar:g}" if bar else ""))
    if cost:
        lines.append("time of a request without storage, depth 32, both sides spinning, with and without the record of requests in flight")
        for ring in ("split", "packed"):
            yes, no = cost[ring, True], cost[ring, False]
            lines.append(f"      {ring:6} ring  {yes:5.1f} ns with, {no:5.1f} ns without: {yes - no:+.1f} ns")
    return "\n".join(lines), within


def run(arguments):
    subprocess.run([f"{ROOT}/scripts/micro-guests"], check=True)
    gaps, curves = {}, {}
    # Whoever looks must not be kept from it by those who are looked at: both processors are busy. Nobody inherits it.
    os.sched_setscheduler(0, os.SCHED_FIFO | os.SCHED_RESET_ON_FORK, os.sched_param(1))
    sides = [s for s in SIDES if not arguments.only or s in arguments.only.split(",")]
    try:
        for turn in range(arguments.rounds):
            for depth in (1, 32):
                for side in sides + sides[::-1]:
                    results = measure(side, depth, arguments.kills)
                    gaps.setdefault((side, depth), []).extend(1e3 * gap for gap, _ in results)
                    middle = sorted(results, key=lambda r: r[0])[len(results) // 2]
                    curves[side, depth] = middle[1]
        cost = None if arguments.only else inflight_cost(max(5, arguments.rounds), 0.4)
    except (RuntimeError, OSError, subprocess.TimeoutExpired) as error:
        print(f"scripts/bench recovery: {error}", file=sys.stderr)
        return 2
    text, within = table(gaps, sides, arguments, cost)
    print(text)
    if arguments.docs:
        plot(curves)
        pages.write_docs("recovery", text, "![Requests answered around the kill](recovery.svg)")
    return 0 if within else 1
