"""`scripts/bench neighbours`: what a VM that misbehaves costs the VM beside it."""

import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager

import pages

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
MICRO = os.path.join(ROOT, ".build/micro")
BUILD = os.environ.get("MARTLET_BUILD", os.path.join(ROOT, ".build/release"))
TAP = "benchtap0"
OURS, THEIRS = "0", "1"

# What the neighbour does, and how much slower the other VM's requests may become beside it than beside a processor that is merely busy.
BARS = {"registers": 1.05, "frames": 1.10, "requests": 1.10}
FLOOD = """
import os, socket
s = socket.socket(socket.AF_PACKET, socket.SOCK_RAW)
s.bind((%r, 0))
frame = b"\\xff" * 6 + b"\\x52\\x54\\x00\\x77\\x00\\x01" + b"\\x88\\xb5" + bytes(46)
while True:
    try: s.send(frame)
    except OSError: pass
"""

said = []


def say(line):
    print(line, flush=True)
    said.append(line)


def run_vm(scratch, name, guest, *options):
    """A VM with all its processes on one processor."""
    place = os.path.join(scratch, name)
    os.makedirs(place, exist_ok=True)
    with open(os.path.join(place, "disk.raw"), "ab") as file:
        file.truncate(64 << 20)
    command = ["taskset", "-c", OURS if name == "ours" else THEIRS, os.path.join(BUILD, "martlet"), "run", "--kernel", f"{MICRO}/micro.elf",
               "--cmdline", guest, "--memory", "size=64M", "--disk", f"path={place}/disk.raw", "--console", "off", "--serial", "tty",
               "--control", os.path.join(place, "control"), "--deadline", "ready=60000,reply=60000", *options]
    return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, errors="replace")


def request_ns(scratch, count):
    """Nanoseconds of one request at depth 1, of a VM that sleeps meanwhile."""
    text = run_vm(scratch, "ours", f"test=blk span=8 depth=1 wait=halt n={count}").communicate(timeout=120)[0]
    found = re.search(r"MICRO blk.speed ok .*?(\d+) ns each", text)
    if not found:
        sys.exit(f"scripts/bench: the VM that is measured failed: {text[-300:]}")
    return int(found[1])


@contextmanager
def neighbour(scratch, what):
    """Somebody busy with `what` on the other processor."""
    started = []
    if what == "loop":
        started.append(subprocess.Popen(["taskset", "-c", THEIRS, sys.executable, "-c", "while True: pass"]))
    elif what == "registers":
        started.append(run_vm(scratch, "theirs", "test=fuzz n=1000000000", "--cpus", "boot=4"))
    elif what == "requests":
        started.append(run_vm(scratch, "theirs", "test=blk span=32 depth=64 wait=poll op=write n=1000000000"))
    elif what == "frames":
        # Its guest never gives the card a buffer.
        started.append(run_vm(scratch, "theirs", "test=idle ms=600000", "--net", f"tap={TAP}"))
        time.sleep(0.3)
        started.append(subprocess.Popen(["taskset", "-c", THEIRS, sys.executable, "-c", FLOOD % TAP]))
    try:
        time.sleep(0.7 if started else 0)
        for process in started:
            if process.poll() is not None:
                sys.exit(f"scripts/bench: the neighbour with its {what} ended at once")
        yield
    finally:
        for process in reversed(started):
            process.terminate()
            process.wait()


def frames_sent():
    shown = subprocess.run(["ip", "-s", "-j", "link", "show", TAP], capture_output=True, text=True, check=True).stdout
    sent = json.loads(shown)[0]["stats64"]["tx"]
    return sent["packets"] + sent["dropped"]


def run(arguments):
    if os.cpu_count() < 2 or os.geteuid() != 0:
        print("scripts/bench neighbours needs two processors and root")
        return 2
    if "MARTLET_BENCH_NAMESPACE" not in os.environ:
        # A network namespace of our own: the tap vanishes with it.
        os.environ["MARTLET_BENCH_NAMESPACE"] = "1"
        os.execvp("unshare", ["unshare", "--net", sys.executable, *sys.argv])
    subprocess.run([f"{ROOT}/scripts/micro-guests"], check=True)
    subprocess.run(["ip", "tuntap", "add", "dev", TAP, "mode", "tap", "vnet_hdr"], check=True)
    subprocess.run(["ip", "link", "set", TAP, "up"], check=True)
    times = {name: [] for name in ["nobody", "loop", *BARS]}
    rate = 0
    with tempfile.TemporaryDirectory() as scratch:
        os.chmod(scratch, 0o755)
        load = os.getloadavg()[0]
        request_ns(scratch, 2000)
        for turn in range(arguments.rounds):
            for what in list(times)[:: 1 if turn % 2 == 0 else -1]:
                with neighbour(scratch, what):
                    before, begin = frames_sent(), time.monotonic()
                    times[what].append(request_ns(scratch, arguments.requests))
                    if what == "frames":
                        rate = max(rate, (frames_sent() - before) / (time.monotonic() - begin))
    say(f"{pages.machine()}, load {load:.1f} before")
    say(f"a request of 4 KiB at depth 1 (guest sleeps until it is answered), ns, {arguments.rounds} rounds of {arguments.requests} by turns;")
    say("all of one VM on one processor, the neighbour on the other")
    within = True
    for name, values in times.items():
        line = f"  beside {name:10} median {statistics.median(values):7.0f}, least {min(values):7d}, most {max(values):7d}"
        if name in BARS:
            # Neighbours in time: of each round its own.
            ratio = statistics.median(value / base for value, base in zip(values, times["loop"]))
            ok = ratio <= BARS[name]
            within &= ok
            line += f"; of that beside a loop {ratio:.2f}  {'ok ' if ok else 'BAD'} at most {BARS[name]:.2f}"
        say(line)
    say(f"frames: {rate / 1e6:.2f} million a second at the card of a guest that gives no buffers")
    if arguments.docs:
        pages.write_docs("neighbours", f"$ scripts/bench neighbours --rounds {arguments.rounds} --requests {arguments.requests} --docs\n" + "\n".join(said))
    return 0 if within else 1
