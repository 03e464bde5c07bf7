"""`scripts/bench block`: martlet-block beside qemu-storage-daemon, one front end (`martlet probe bench`) for both."""

import json
import os
import re
import resource
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time

import pages
from pages import DOCS

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
BUILD = os.environ.get("MARTLET_BUILD", os.path.join(ROOT, ".build/release"))
PROBE, BLOCK = os.path.join(BUILD, "martlet-probe"), os.path.join(BUILD, "martlet-block")
GIB = 1 << 30


class Case:
    """One load, the same for both sides.

    bars: (label, function of the case's figures -> (value, ok, bar text)) in the order they are printed.
    """

    def __init__(self, name, title, load, bars, *, image="cached", ours=(), theirs=("file",), pin="0", cpus="1", queues=1, spin=True, ramp=0.2):
        self.name, self.title, self.load, self.bars = name, title, load, bars
        self.image, self.ours, self.theirs, self.pin, self.cpus, self.queues = image, list(ours), theirs, pin, cpus, queues
        self.wait = "spin" if spin else "sleep"
        self.ramp = ramp


def rate_at_least(factor):
    return ("rate", lambda f: (f["rate"], f["rate"] >= factor, f"at least {factor}{error_text(f, 'rate_error')}"))


def cpu_at_most(factor):
    return ("CPU per request", lambda f: (f["cpu"], f["cpu"] <= factor, f"at most {factor}{error_text(f, 'cpu_error')}"))


def error_text(f, key):
    """How far the rounds differ among themselves. It is shown and judges nothing: else the noisier a run is, the more would pass."""
    return f" (standard error of the rounds: {f[key]:.3f})" if key in f else ""


def standard_error(ratios):
    return statistics.stdev(ratios) / len(ratios) ** 0.5 if len(ratios) > 1 else 0.0


def latency_at_most(factor):
    return ("median latency", lambda f: (f["p50"], f["p50"] <= factor, f"at most {factor}"))


def own_cpu_at_most(microseconds):
    return ("own CPU per request, µs", lambda f: (f["ours"]["cpu_ns"] / 1e3, f["ours"]["cpu_ns"] <= microseconds * 1e3, f"at most {microseconds}"))


RANDOM = ["--rw", "randread", "--bs", "4k"]
CASES = [
    Case("null-32", "no storage, depth 32, both sides spinning", [*RANDOM, "--iodepth", "32"], [rate_at_least(1.5), cpu_at_most(0.5)],
         image="null", ours=["--poll=1000000"], theirs=("null", "null-poll")),
    Case("null-1", "no storage, depth 1, both sides spinning", [*RANDOM, "--iodepth", "1"], [rate_at_least(1.0)],
         image="null", ours=["--poll=1000000"], theirs=("null-poll",)),
    Case("read-32", "4 KiB random reads, 1 GiB cached, depth 32", [*RANDOM, "--iodepth", "32"],
         [rate_at_least(3.0), own_cpu_at_most(1.7)], theirs=("file", "file-threads"), ramp=1.5),
    Case("read-32-ring", "the same without the mapping (--cache-map=off)", [*RANDOM, "--iodepth", "32"], [rate_at_least(1.0)],
         ours=["--cache-map=off"]),
    Case("read-1", "4 KiB random reads, cached, depth 1, one processor for both, sleeping", [*RANDOM, "--iodepth", "1"],
         # Most of the image has been read once after so long, on every side.
         [latency_at_most(0.9)], cpus="0", spin=False, theirs=("file", "file-threads"), ramp=4),
    Case("read-1-apart", "4 KiB random reads, cached, depth 1, two processors, sleeping", [*RANDOM, "--iodepth", "1"],
         [latency_at_most(0.9)], spin=False),
    Case("read-1-spin", "4 KiB random reads, cached, depth 1, two processors, front end spinning", [*RANDOM, "--iodepth", "1"],
         [latency_at_most(0.9)]),
    Case("write-32", "4 KiB random writes, buffered, depth 32", ["--rw", "randwrite", "--bs", "4k", "--iodepth", "32", "--size", "256m"],
         [rate_at_least(1.0), cpu_at_most(1.0)], image="scratch", theirs=("file", "file-threads")),
    Case("write-32-direct", "4 KiB random writes, direct, depth 32", ["--rw", "randwrite", "--bs", "4k", "--iodepth", "32", "--size", "256m"],
         [rate_at_least(1.0), cpu_at_most(1.0)], image="scratch", ours=["--direct"], theirs=("direct",)),
    Case("seq-read", "256 KiB sequential reads, buffered, cached, depth 8", ["--rw", "read", "--bs", "256k", "--iodepth", "8"],
         [rate_at_least(1.0), cpu_at_most(1.0)]),
    Case("seq-read-direct", "256 KiB sequential reads, direct, depth 8", ["--rw", "read", "--bs", "256k", "--iodepth", "8"],
         [rate_at_least(1.0), cpu_at_most(1.0)], ours=["--direct"], theirs=("direct",)),
    Case("seq-write", "256 KiB sequential writes, buffered, depth 8", ["--rw", "write", "--bs", "256k", "--iodepth", "8", "--size", "256m"],
         [rate_at_least(1.0), cpu_at_most(1.0)], image="scratch", theirs=("file", "file-threads")),
    Case("seq-write-direct", "256 KiB sequential writes, direct, depth 8",
         ["--rw", "write", "--bs", "256k", "--iodepth", "8", "--size", "256m"],
         [rate_at_least(1.0), cpu_at_most(1.0)], image="scratch", ours=["--direct"], theirs=("direct",)),
]


def daemon(kind, image, queues):
    """A command line of the storage daemon; {socket} is where it is to listen."""
    iothread = []
    if kind.startswith("null"):
        node = "driver=null-co,node-name=n,size=1073741824,read-zeroes=off"
        if kind == "null-poll":
            iothread = ["--object", "iothread,id=t,poll-max-ns=1000000"]
    else:
        aio = {"file": "io_uring", "file-threads": "threads", "direct": "io_uring"}[kind]
        node = f"driver=file,node-name=n,filename={image},aio={aio},locking=off,cache.direct={'on' if kind == 'direct' else 'off'}"
    export = "type=vhost-user-blk,id=e,node-name=n,writable=on,addr.type=unix,addr.path={socket}" + f",num-queues={queues}"
    if iothread:
        export += ",iothread=t"
    return ["qemu-storage-daemon", *iothread, "--blockdev", node, "--export", export]


def ours(case, image):
    storage = "--blk-null=1073741824" if case.image == "null" else f"--blk-file={image}"
    return [BLOCK, "--socket-path={socket}", storage, f"--num-queues={case.queues}", *case.ours]


class Images:
    def __init__(self, directory):
        self.directory = directory

    def path(self, kind):
        path = os.path.join(self.directory, f"bench-{kind}.raw")
        if kind == "null":
            return None
        if not os.path.exists(path) or os.path.getsize(path) != GIB:
            with open(path, "wb") as file:
                for _ in range(GIB >> 20):
                    file.write(os.urandom(1 << 20))
                file.flush()
                os.fsync(file.fileno())
        if kind == "cached":
            with open(path, "rb", buffering=0) as file:
                while file.read(1 << 22):
                    pass
        return path


def bench(case, command, seconds, limit=None, extra=()):
    """One run against one back end: the job's JSON, and the machine's limits where asked for."""
    backend = command if case.cpus is None else ["taskset", "-c", case.cpus, *command]
    words = [PROBE, "bench", *case.load, "--wait", case.wait, "--pin", case.pin, "--runtime", str(seconds), "--ramp-time", str(case.ramp),
             "--numjobs", str(case.queues), "--threads", str(case.queues), "--output-format", "json", "--no-syscalls", *extra]
    if limit:
        words += ["--limit-file", limit, "--rounds", "1"]
    done = subprocess.run([*words, "--", *backend], capture_output=True, text=True, timeout=60 + 4 * seconds)
    if done.returncode != 0:
        raise RuntimeError(f"{case.name}: {' '.join(command)}: {done.stderr.strip()}")
    return json.loads(done.stdout)


def figures(report):
    job = report["jobs"][0]
    side = max((job["read"], job["write"]), key=lambda s: s["total_ios"])
    percentile = {round(float(k), 2): v for k, v in side["clat_ns"].get("percentile", {}).items()}
    return {"iops": side["iops"], "bytes": side["bw_bytes"], "p50": percentile.get(50.0, 0), "p99": percentile.get(99.0, 0),
            "cpu_ns": job["martlet"]["back_end_cpu_ns_per_request"], "kicks": job["martlet"]["kicks_per_request"],
            "calls": job["martlet"]["calls_per_request"]}


def middle(runs):
    return {key: statistics.median(run[key] for run in runs) for key in runs[0]}


def steal():
    with open("/proc/stat") as file:
        return [int(word) for word in file.readline().split()[1:]]


def measure(case, images, arguments):
    """All figures of one case: the rounds A B B A, against each of the daemon's ways; the best of them is the one to beat."""
    image = images.path(case.image)
    limit = image if case.name.startswith("read-32") else None
    before = steal()
    kinds = {"ours": ours(case, image)} | {kind: daemon(kind, image, case.queues) for kind in case.theirs}
    runs = {name: [] for name in kinds}
    floors = []
    for _ in range(arguments.rounds):
        for name in [*kinds, *reversed(list(kinds))]:
            report = bench(case, kinds[name], arguments.seconds, limit if name == "ours" else None)
            if limit and name == "ours":
                floors += [f["io_uring_iops"] for f in report["limits"] if f["io_uring_iops"]]
            runs[name].append(figures(report))
    after = steal()
    total = sum(after) - sum(before)
    result = {"title": case.title, "ours": middle(runs["ours"]), "theirs": {kind: middle(runs[kind]) for kind in case.theirs},
              "rounds": arguments.rounds, "seconds": arguments.seconds, "stolen": (after[7] - before[7]) / max(1, total)}
    best = max(case.theirs, key=lambda kind: result["theirs"][kind]["iops"])
    # Ratios of neighbours in time, then their median.
    pairs = list(zip(runs["ours"], runs[best]))
    rates, costs = [a["iops"] / b["iops"] for a, b in pairs], [a["cpu_ns"] / b["cpu_ns"] for a, b in pairs]
    result |= {"best": best, "rate": statistics.median(rates), "rate_error": standard_error(rates),
               "cpu": statistics.median(costs), "cpu_error": standard_error(costs),
               "p50": statistics.median(a["p50"] / max(1, b["p50"]) for a, b in pairs)}
    if floors:
        result["floor_iops"] = statistics.median(floors)
    return result


WALLS_BAR = 1.05


def walls(directory, rounds, seconds):
    """What the walls cost a request: martlet-block with --sandbox=on and off, A B B A. True within the bar."""
    images, within = Images(directory), True
    print(f"martlet-block with and without walls, {rounds} rounds of {seconds} s, A B B A; CPU of its process a request, in ns")
    for name in ("null-32", "read-32", "read-1", "write-32"):
        case = next(c for c in CASES if c.name == name)
        image = images.path(case.image)
        runs = {"on": [], "off": []}
        for _ in range(rounds):
            for mode in ("on", "off", "off", "on"):
                runs[mode].append(figures(bench(case, [*ours(case, image), f"--sandbox={mode}"], seconds)))
        costs = [a["cpu_ns"] / b["cpu_ns"] for a, b in zip(runs["on"], runs["off"])]
        rates = [a["iops"] / b["iops"] for a, b in zip(runs["on"], runs["off"])]
        cost = statistics.median(costs)
        within = within and cost <= WALLS_BAR
        print(f"  {'ok ' if cost <= WALLS_BAR else 'BAD'} {case.title}: {middle(runs['on'])['cpu_ns']:.0f} against {middle(runs['off'])['cpu_ns']:.0f}, "
              f"ratio {cost:.3f} (standard error {standard_error(costs):.3f}); rate {statistics.median(rates):.3f} ({standard_error(rates):.3f}); "
              f"bar: CPU at most {WALLS_BAR}")
    return within


# MARK: What is not a comparison of rates

def traced_calls(pid, seconds):
    """System calls a process makes in that time, counted by the kernel's tracepoint, which costs it nothing to speak of; nil without perf."""
    done = subprocess.run(["perf", "stat", "-x", ",", "-e", "raw_syscalls:sys_enter", "-p", str(pid), "--", "sleep", str(seconds)],
                          capture_output=True, text=True)
    found = re.search(r"^(\d+),[^,]*,raw_syscalls", done.stderr, re.M)
    return int(found[1]) if found else None


CALL_CASES = [("no storage, front end spinning", "null", ["--poll=1000000"], "spin"), ("cached reads", "cached", [], "spin"),
              ("cached reads, front end sleeping", "cached", [], "sleep"), ("cached reads, --cache-map=off", "cached", ["--cache-map=off"], "spin"),
              ("cached reads, --cache-map=off, front end sleeping", "cached", ["--cache-map=off"], "sleep")]


def system_calls(images):
    """Calls of the back end per request at depth 32."""
    result = {}
    for name, kind, options, wait in CALL_CASES:
        case = Case(name, name, [], [], image=kind, ours=options)
        with tempfile.TemporaryDirectory() as scratch:
            socket = os.path.join(scratch, "s")
            process = start(["taskset", "-c", "1", *ours(case, images.path(kind))], socket)
            try:
                load = subprocess.Popen([PROBE, "bench", *RANDOM, "--iodepth", "32", "--runtime", "2.5", "--ramp-time", "1.5", "--wait", wait,
                                         "--pin", "0", "--output-format", "json", "--no-syscalls", "--socket", socket], stdout=subprocess.PIPE, text=True)
                time.sleep(2.3)
                calls = traced_calls(process.pid, 1)
                job = json.loads(load.communicate(timeout=60)[0])["jobs"][0]
                result[name] = None if calls is None else calls / job["read"]["iops"]
            finally:
                process.terminate()
                process.wait()
    return result


def start(command, socket):
    process = subprocess.Popen([word.replace("{socket}", socket) for word in command], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                               stderr=subprocess.DEVNULL)
    for _ in range(500):
        if os.path.exists(socket):
            return process
        time.sleep(0.01)
    process.kill()
    raise RuntimeError("a back end did not listen: " + " ".join(command))


def context_switches(pid):
    total = 0
    for task in os.listdir(f"/proc/{pid}/task"):
        with open(f"/proc/{pid}/task/{task}/status") as file:
            total += sum(int(n) for n in re.findall(r"ctxt_switches:\s+(\d+)", file.read()))
    return total


def private_memory(pid):
    """KiB that only this process has: anonymous memory, and its page tables."""
    with open(f"/proc/{pid}/smaps_rollup") as file:
        anonymous = int(re.search(r"^Anonymous:\s+(\d+)", file.read(), re.M)[1])
    with open(f"/proc/{pid}/status") as file:
        return anonymous, int(re.search(r"^VmPTE:\s+(\d+)", file.read(), re.M)[1])


def memory_and_idleness(images):
    """Private memory after load with one queue of 256, and whether any thread runs while nothing is asked."""
    result = {}
    image = images.path("cached")
    case = Case("memory", "", [], [])
    for name, command in [("ours", ours(case, image) + ["--queue-size=256"]),
                          ("ours, --cache-map=off", ours(case, image) + ["--queue-size=256", "--cache-map=off"]), ("theirs", daemon("file", image, 1))]:
        with tempfile.TemporaryDirectory() as scratch:
            socket = os.path.join(scratch, "s")
            process = start(command, socket)
            try:
                load = subprocess.Popen([PROBE, "bench", *RANDOM, "--iodepth", "32", "--ring-size", "256", "--runtime", "1", "--no-syscalls",
                                         "--output-format", "json", "--socket", socket], stdout=subprocess.DEVNULL)
                time.sleep(0.9)
                anonymous, tables = private_memory(process.pid)
                load.wait(timeout=30)
                time.sleep(0.3)
                before = context_switches(process.pid)
                time.sleep(1)
                result[name] = {"anonymous_kib": anonymous, "tables_kib": tables, "idle_switches": context_switches(process.pid) - before}
            finally:
                process.terminate()
                process.wait()
    return result


ALLOCATORS = ["malloc", "calloc", "realloc", "posix_memalign", "swift_allocObject", "swift_slowAlloc"]


def allocations(images):
    """How often a back end under load allocates, counted by a debugger at every allocating function; nil without gdb."""
    if not shutil.which("gdb"):
        return None
    result = {}
    for name, options in [("cached reads", []), ("cached reads, --cache-map=off", ["--cache-map=off"]), ("writes and flushes", [])]:
        image = images.path("scratch")
        case = Case("allocations", "", [], [], ours=options)
        load = ["--rw", "randwrite", "--fsync", "100", "--size", "64m"] if name.startswith("writes") else [*RANDOM, "--size", "64m"]
        with tempfile.TemporaryDirectory() as scratch:
            socket = os.path.join(scratch, "s")
            process = start(ours(case, image), socket)
            try:
                bench_run = subprocess.Popen([PROBE, "bench", *load, "--iodepth", "32", "--runtime", "5", "--no-syscalls", "--timeout", "60",
                                              "--output-format", "json", "--socket", socket], stdout=subprocess.PIPE, text=True)
                time.sleep(1)
                words = ["gdb", "-batch", "-nx", "-p", str(process.pid), "-ex", "set breakpoint pending off"]
                for number, function in enumerate(ALLOCATORS, 1):
                    words += ["-ex", f"break {function}", "-ex", f"ignore {number} 100000000"]
                debugger = subprocess.Popen([*words, "-ex", "echo counting\\n", "-ex", "continue", "-ex", "info breakpoints", "-ex", "detach"],
                                            stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, bufsize=1)
                lines = []
                for line in debugger.stdout:
                    lines.append(line)
                    if line.startswith("counting"):
                        break
                time.sleep(1.5)
                os.kill(process.pid, signal.SIGSTOP)
                text = "".join(lines) + debugger.communicate(timeout=60)[0]
                os.kill(process.pid, signal.SIGCONT)
                done = json.loads(bench_run.communicate(timeout=60)[0])["jobs"][0]
                hits = sum(int(n) for n in re.findall(r"breakpoint already hit (\d+) time", text))
                set_up = len(re.findall(r"^Breakpoint \d+ at", text, re.M))
                if set_up < 3:
                    raise RuntimeError(f"the debugger set {set_up} breakpoints: {text[-300:]}")
                result[name] = {"hits": hits, "requests": done["read"]["total_ios"] + done["write"]["total_ios"]}
            finally:
                process.kill()
                process.wait()
    return result


def scaling(images, arguments):
    """One queue with its front end on one processor, against two queues, each with its front end on a processor of its own."""
    image = images.path("cached")
    rates = {1: [], 2: []}
    for _ in range(arguments.rounds):
        for queues in (1, 2, 2, 1):
            case = Case("scaling", "", [*RANDOM, "--iodepth", "16"], [], queues=queues, pin="0" if queues == 1 else "0,1",
                        cpus="0" if queues == 1 else "0,1", spin=False)
            rates[queues].append(figures(bench(case, ours(case, image), arguments.seconds))["iops"])
    one, two = statistics.median(rates[1]), statistics.median(rates[2])
    return {"one": one, "two": two, "factor": statistics.median(b / a for a, b in zip(rates[1], rates[2]))}


GUEST_LOADS = [(depth, wait) for depth in (1, 32) for wait in ("poll", "halt")]


def guest_command(side, image, depth, wait, count):
    words = f"test=blk op=read depth={depth} n={count} span=8 wait={wait}"
    kernel = os.path.join(ROOT, ".build/micro/micro.elf")
    if side == "martlet":
        return [os.path.join(BUILD, "martlet"), "run", "--kernel", kernel, "--cmdline", words, "--memory", "size=128M", "--disk",
                f"path={image}", "--console", "null", "--serial", "tty"]
    return ["qemu-system-x86_64", "-M", "microvm,pcie=on,rtc=on", "-accel", "kvm", "-m", "128", "-nodefaults", "-no-user-config",
            "-display", "none", "-no-reboot", "-serial", "stdio", "-kernel", kernel, "-append", words + " holes=any ecam=0xe0000000 bars=0xc0000000",
            "-object", "iothread,id=t", "-drive", f"if=none,id=d,file={image},format=raw,aio=io_uring,file.locking=off",
            "-device", "virtio-blk-pci,drive=d,iothread=t,disable-legacy=on"]


def guest_run(side, image, depth, wait, count):
    """Requests per second, as the guest counted, and CPU seconds of everything that was started."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(guest_command(side, image, depth, wait, count), capture_output=True, text=True, timeout=120,
                          stdin=subprocess.DEVNULL, errors="replace")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    found = re.search(r"^MICRO blk.speed ok .*: (\d+) per second", done.stdout, re.M)
    if not found:
        raise RuntimeError(f"{side} in a guest, depth {depth}: {done.stdout[-400:]} {done.stderr[-400:]}")
    return int(found[1]), after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def guest(images, arguments):
    """The same disk through a micro guest, ours against QEMU microvm's own virtio-blk; CPU time of all processes, the
    virtual processor's included, as the difference between a long run and a short one."""
    subprocess.run([os.path.join(ROOT, "scripts/micro-guests")], check=True, stdout=subprocess.DEVNULL)
    image = images.path("scratch")
    result = {}
    for depth, wait in GUEST_LOADS:
        few, many = 2000, 20000 if depth == 1 else 60000
        rates, costs = {"martlet": [], "qemu": []}, {"martlet": [], "qemu": []}
        for _ in range(arguments.rounds):
            for side in ("martlet", "qemu", "qemu", "martlet"):
                _, base = guest_run(side, image, depth, wait, few)
                rate, cpu = guest_run(side, image, depth, wait, many)
                rates[side].append(rate)
                costs[side].append((cpu - base) / (many - few) * 1e6)
        result[f"depth {depth}, {'the guest looks at the ring' if wait == 'poll' else 'the guest halts'}"] = {
            "depth": depth, **{f"{side}_rate": statistics.median(rates[side]) for side in rates},
            **{f"{side}_cpu_us": statistics.median(costs[side]) for side in costs},
            "ratio": statistics.median(a / b for a, b in zip(rates["martlet"], rates["qemu"]))}
    return result


# MARK: Report

def microseconds(nanoseconds):
    return f"{nanoseconds / 1e3:.2f}"


def rate_text(value):
    return f"{value / 1e6:.2f} M" if value >= 1e6 else f"{value / 1e3:.1f} k" if value >= 1e3 else f"{value:.0f}"


def bandwidth(value):
    return f"{value / GIB:.2f} GiB/s" if value >= GIB else f"{value / (1 << 20):.0f} MiB/s"


def case_lines(name, f):
    case = next(c for c in CASES if c.name == name)
    sequential = name.startswith("seq")
    lines, within = [f"{name}: {f['title']}"], True
    lines.append(f"  {'':14} {'per second':>12} {'p50 µs':>9} {'p99 µs':>9} {'CPU µs/req':>11} {'calls/req':>10} {'kicks/req':>10}")
    sides = [("martlet-block", f["ours"])] + [(f"daemon {kind}", figure) for kind, figure in f["theirs"].items()]
    for label, s in sides:
        shown = bandwidth(s["bytes"]) if sequential else rate_text(s["iops"])
        lines.append(f"  {label:14} {shown:>12} {microseconds(s['p50']):>9} {microseconds(s['p99']):>9} {microseconds(s['cpu_ns']):>11}"
                     f" {s['calls']:>10.3f} {s['kicks']:>10.3f}")
    if "floor_iops" in f:
        lines.append(f"  bare io_uring  {rate_text(f['floor_iops']):>12} {'':>9} {'':>9} {1e6 / f['floor_iops']:>11.2f}   (the floor of every way"
                     " through io_uring, one processor, no ring of a guest)")
    for label, check in case.bars:
        value, ok, bar = check(f)
        within = within and ok
        versus = "" if label.startswith("own") else f" of the daemon's ({f['best']})"
        lines.append(f"  {'ok ' if ok else 'BAD'} {label}: {value:.3f}{versus}; bar: {bar}")
    return lines, within


def other_lines(kept):
    lines, within = [], True

    def bar(ok, text):
        nonlocal within
        within = within and ok
        lines.append(f"  {'ok ' if ok else 'BAD'} {text}")

    if "calls" in kept:
        lines.append("system calls of the back end per request at depth 32, counted by the kernel (perf)")
        for name, value in kept["calls"].items():
            bar(value is not None and value < 0.1, f"{name}: {value:.3f}; bar: under 0.1" if value is not None else f"{name}: not counted")
    if "memory" in kept:
        lines.append("under load, one queue of 256, then idle for a second")
        for name, m in kept["memory"].items():
            text = f"{name}: {m['anonymous_kib']} KiB of private memory, {m['tables_kib']} KiB of page tables, idle: {m['idle_switches']} wake-ups"
            if name == "ours":
                bar(m["anonymous_kib"] < 1024, text + "; bar: under 1024 KiB of private memory")
                bar(m["idle_switches"] == 0, "ours: no system call while idle")
            elif name.startswith("ours"):
                bar(m["anonymous_kib"] + m["tables_kib"] < 1024, text + "; bar: under 1024 KiB of both")
            else:
                lines.append("      " + text)
    if kept.get("allocations"):
        lines.append("allocations under load, counted by a debugger for 1.5 s in every allocating function")
        for name, a in kept["allocations"].items():
            bar(a["hits"] == 0, f"{name}: {a['hits']}; bar: none")
    if "scaling" in kept:
        s = kept["scaling"]
        lines.append("two queues on two processors, each with its own front end, against one on one")
        bar(s["factor"] >= 1.7, f"{rate_text(s['one'])} to {rate_text(s['two'])}: {s['factor']:.2f}; bar: at least 1.7")
    if "guest" in kept:
        lines.append("4 KiB reads by a micro guest at CPL 3 on /dev/kvm: martlet run against QEMU's microvm and its own virtio-blk (pcie=on, in an iothread)")
        for name, g in kept["guest"].items():
            need = 1.0
            bar(g["ratio"] >= need, f"{name}: {rate_text(g['martlet_rate'])} against {rate_text(g['qemu_rate'])}: {g['ratio']:.2f}; CPU of all"
                f" processes {g['martlet_cpu_us']:.2f} against {g['qemu_cpu_us']:.2f} us a request; bar: {'at least equal' if g['depth'] == 1 else 'ahead'}")
    return lines, within


def plot(kept):
    """Bars: rate and CPU per request as multiples of the daemon's, logarithmic."""
    rows = [(name, f) for name, f in kept["cases"].items()]
    width, left, line, top = 900, 330, 34, 56
    height = top + line * len(rows) + 30
    import math

    def x(ratio):
        return left + (math.log2(min(max(ratio, 1 / 8), 8)) + 3) / 6 * (width - left - 60)

    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="system-ui,sans-serif" font-size="12">',
             f'<rect width="{width}" height="{height}" fill="#fff"/>',
             '<text x="10" y="20" font-size="15">martlet-block as a multiple of qemu-storage-daemon, same front end, same file</text>',
             f'<rect x="{left}" y="30" width="10" height="10" fill="#1f6fb2"/><text x="{left + 15}" y="39">requests per second (right is better)</text>',
             f'<rect x="{left + 250}" y="30" width="10" height="10" fill="#c2571a"/><text x="{left + 265}" y="39">CPU per request (left is better)</text>']
    for ratio in (1 / 8, 1 / 4, 1 / 2, 1, 2, 4, 8):
        color = "#666" if ratio == 1 else "#ddd"
        parts.append(f'<line x1="{x(ratio):.1f}" x2="{x(ratio):.1f}" y1="{top - 8}" y2="{height - 22}" stroke="{color}"/>')
        label = f"{ratio:g}" if ratio >= 1 else f"1/{round(1 / ratio)}"
        parts.append(f'<text x="{x(ratio):.1f}" y="{height - 8}" text-anchor="middle">{label}</text>')
    for index, (name, f) in enumerate(rows):
        y = top + index * line
        parts.append(f'<text x="{left - 8}" y="{y + 15}" text-anchor="end">{f["title"].split(",")[0]} <tspan fill="#888">{name}</tspan></text>')
        for offset, key, color in ((0, "rate", "#1f6fb2"), (12, "cpu", "#c2571a")):
            begin, end = sorted((x(1), x(f[key])))
            parts.append(f'<rect x="{begin:.1f}" y="{y + offset}" width="{max(1, end - begin):.1f}" height="10" fill="{color}"/>')
            anchor = end + 4 if f[key] >= 1 else begin - 4
            side = "start" if f[key] >= 1 else "end"
            parts.append(f'<text x="{anchor:.1f}" y="{y + offset + 9}" font-size="10" text-anchor="{side}">{f[key]:.2f}</text>')
    return "\n".join(parts + ["</svg>", ""])


def report(kept):
    lines, within = [kept["machine"], ""], True
    for name, f in kept["cases"].items():
        more, ok = case_lines(name, f)
        lines += [*more, ""]
        within = within and ok
    more, ok = other_lines(kept)
    return "\n".join(lines + more), within and ok


def write_docs(kept, text):
    with open(os.path.join(DOCS, "block.svg"), "w") as file:
        file.write(plot(kept))
    pages.write_docs("block", text, "![Ratios](block.svg)")


def run(arguments):
    if not shutil.which("qemu-storage-daemon"):
        print("scripts/bench block: qemu-storage-daemon is missing", file=sys.stderr)
        return 2
    kept = {"machine": pages.machine(), "cases": {}}
    if arguments.keep and os.path.exists(arguments.keep):
        with open(arguments.keep) as file:
            kept = json.load(file)
    names = arguments.only.split(",") if arguments.only else [c.name for c in CASES] + ["calls", "memory", "allocations", "scaling"] + (["guest"] if arguments.guest else [])
    images = Images(arguments.directory)
    try:
        for case in CASES:
            if case.name in names:
                kept["cases"][case.name] = measure(case, images, arguments)
                print("\n".join(case_lines(case.name, kept["cases"][case.name])[0]), flush=True)
        if "calls" in names:
            kept["calls"] = system_calls(images)
        if "memory" in names:
            kept["memory"] = memory_and_idleness(images)
        if "allocations" in names:
            kept["allocations"] = allocations(images)
        if "scaling" in names:
            kept["scaling"] = scaling(images, arguments)
        if "guest" in names:
            kept["guest"] = guest(images, arguments)
    except (RuntimeError, subprocess.TimeoutExpired) as error:
        print(f"scripts/bench block: {error}", file=sys.stderr)
        return 2
    finally:
        if not arguments.keep:
            for kind in ("cached", "scratch"):
                if os.path.exists(images.directory) and os.path.exists(p := os.path.join(images.directory, f"bench-{kind}.raw")):
                    os.unlink(p)
    order = {c.name: index for index, c in enumerate(CASES)}
    kept["cases"] = dict(sorted(kept["cases"].items(), key=lambda item: order.get(item[0], 99)))
    if arguments.keep:
        with open(arguments.keep, "w") as file:
            json.dump(kept, file, indent=1)
    text, within = report(kept)
    print(text)
    if arguments.docs:
        write_docs(kept, text)
    return 0 if within else 1
