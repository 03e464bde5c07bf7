"""`scripts/bench boot`: start, memory and idleness of a VM with one disk, one NIC and one console."""

import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
MICRO = os.path.join(ROOT, ".build/micro")
BUILD = os.environ.get("MARTLET_BUILD", os.path.join(ROOT, ".build/release"))
MEMORY_MIB = 128
TAP = "benchtap0"
# A block process that has ended keeps its image locked until the kernel has taken its ring down: images by turns.
IMAGES = 8

BAR_RATIO, BAR_ABOVE_MS, BAR_MEMORY_KIB = 0.5, 5.0, 5 * 1024


class Subjects:
    """Command lines of the sides, all with the same devices."""

    def __init__(self, scratch, kernel, sandbox):
        self.scratch, self.kernel = scratch, kernel
        self.sandbox = ["--sandbox", sandbox] if sandbox else []
        self.martlet = self.install()
        self.names = ["bare"]
        if os.access(self.martlet, os.X_OK):
            self.names.append("martlet")
        if shutil.which("qemu-system-x86_64"):
            self.names.append("qemu")

    def install(self):
        """The programs as a copy, as installing makes one. A linker writes its file page by page, in which way it also lies in
        the page cache, and every start of a process then takes 0.1 ms longer; QEMU's program was installed by copying too."""
        place = os.path.join(self.scratch, "programs")
        os.mkdir(place)
        programs = [os.path.join(BUILD, f"martlet{name}") for name in ("", "-supervisor", "-core", "-block", "-net", "-console")]
        if all(os.access(program, os.X_OK) for program in programs):
            subprocess.run(["cp", *programs, place], check=True)
        return os.path.join(place, "martlet")

    def image(self, name):
        path = os.path.join(self.scratch, name)
        if not os.path.exists(path):
            with open(path, "wb") as file:
                file.truncate(64 << 20)
        return path

    def command(self, name, turn, guest):
        disk = self.image(f"{name}{turn % IMAGES}.raw")
        if name == "bare":
            return [f"{MICRO}/bare-kvm", "--memory", str(MEMORY_MIB), "--devices", "7", self.kernel, guest]
        if name == "martlet":
            return [self.martlet, "run", "--kernel", self.kernel, "--cmdline", guest, "--memory", f"size={MEMORY_MIB}M",
                    "--cpus", "boot=1", "--disk", f"path={disk}", "--net", f"tap={TAP}", "--console", "null",
                    "--serial", "tty", *self.sandbox]
        return ["qemu-system-x86_64", "-M", "microvm,rtc=off,pit=off,pic=off", "-accel", "kvm", "-m", str(MEMORY_MIB),
                "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot", "-serial", "stdio",
                "-kernel", f"{MICRO}/micro.elf", "-append", guest,
                "-drive", f"if=none,id=d,file={disk},format=raw", "-device", "virtio-blk-device,drive=d",
                "-netdev", f"tap,id=n,ifname={TAP},script=no,downscript=no",
                "-device", "virtio-net-device,netdev=n", "-device", "virtio-serial-device",
                "-chardev", "null,id=c", "-device", "virtconsole,chardev=c"]


def one_start(command):
    """Ticks from exec to the first guest instruction, or a sentence why not."""
    try:
        done = subprocess.run([f"{MICRO}/bare-kvm", "--stamp", *command], capture_output=True, text=True,
                              errors="replace", timeout=30, stdin=subprocess.DEVNULL)
    except subprocess.TimeoutExpired:
        return "no end within 30 s"
    stamp = re.search(r"^STAMP (\d+)", done.stderr, re.M)
    start = re.search(r"MICRO start ok path \S+ first (\d+) tsc \d+ khz (\d+)", done.stdout)
    if not stamp or not start:
        return f"no start line (exit {done.returncode}): {done.stderr.strip().splitlines()[-1:]}"
    ticks = int(start[1]) - int(stamp[1])
    # A guest counter with an offset starts near zero: far before the stamp.
    return ticks if ticks >= 0 else "the guest's time stamp counter has an offset here"


def quartiles(values):
    ordered = sorted(values)
    return ordered[len(ordered) // 4], statistics.median(ordered), ordered[(3 * len(ordered)) // 4]


def stolen():
    return int(open("/proc/stat").readline().split()[8])


# ---- start

def start_times(subjects, runs, khz):
    """Milliseconds by subject, one entry per round; A B C, then C B A."""
    times = {name: [] for name in subjects.names}
    for turn in range(-1, runs):
        for name in subjects.names[:: 1 if turn % 2 == 0 else -1]:
            ticks = one_start(subjects.command(name, turn, "test=idle ms=1"))
            if isinstance(ticks, str):
                print(f"{name}: {ticks}")
                return None
            if turn >= 0:  # the round before the first warms the caches
                times[name].append(ticks / khz)
    return times


def report_start(times, runs, kernel, verdict):
    print(f"\nExec to first guest instruction, ms; {runs} rounds, interleaved, {kernel}")
    print(f"  {'':8} {'median':>8} {'quartiles':>16} {'least':>8} {'most':>8}")
    for name, values in times.items():
        low, middle, high = quartiles(values)
        print(f"  {name:8} {middle:8.2f} {low:8.2f} -{high:6.2f} {min(values):8.2f} {max(values):8.2f}")
    if "martlet" not in times:
        return
    above = [m - b for m, b in zip(times["martlet"], times["bare"])]
    low, middle, high = quartiles(above)
    least = min(times["martlet"]) - min(times["bare"])
    verdict(f"own work above the bare ioctls: median of rounds {middle:.2f} ms (quartiles {low:.2f} - {high:.2f}), "
            f"least minus least {least:.2f} ms", f"at most {BAR_ABOVE_MS:g} ms", max(middle, least) <= BAR_ABOVE_MS)
    if "qemu" not in times:
        return
    ratio = [m / q for m, q in zip(times["martlet"], times["qemu"])]
    low, middle, high = quartiles(ratio)
    least = min(times["martlet"]) / min(times["qemu"])
    verdict(f"of QEMU's time: median of rounds {middle:.2f} (quartiles {low:.2f} - {high:.2f}), least by least {least:.2f}",
            f"at most {BAR_RATIO:g}", max(middle, least) <= BAR_RATIO)


# ---- memory and idleness, of a VM that stands still

def processes_of(parent):
    found = [parent]
    for pid in found:
        for task in os.listdir(f"/proc/{pid}/task"):
            found += [int(p) for p in open(f"/proc/{pid}/task/{task}/children").read().split()]
    return found


def memory_of(pid):
    """KiB of one process above guest RAM: private (anonymous, or written), and page tables."""
    private = 0
    for entry in re.split(r"^(?=[0-9a-f]+-[0-9a-f]+ )", open(f"/proc/{pid}/smaps").read(), flags=re.M):
        if not entry:
            continue
        value = {key: int(number) for key, number in re.findall(r"^(\w+):\s+(\d+) kB", entry, re.M)}
        head = entry.split("\n", 1)[0]
        # Guest RAM: our memory file; QEMU's anonymous mapping of just that size.
        if "martlet-guest" in head or value["Size"] == MEMORY_MIB << 10:
            continue
        # What is written to a private mapping becomes anonymous; a dirty page of a program's file is the build's, not ours.
        private += value["Anonymous"] if head.split()[1].endswith("p") else value["Private_Dirty"]
    tables = int(re.search(r"^VmPTE:\s+(\d+) kB", open(f"/proc/{pid}/status").read(), re.M)[1])
    return private, tables


def ran(pid):
    """(ns on a processor, times scheduled) of every thread."""
    state = {}
    for task in os.listdir(f"/proc/{pid}/task"):
        on_processor, _, times = map(int, open(f"/proc/{pid}/task/{task}/schedstat").read().split())
        state[task] = (on_processor, times)
    return state


def standing(subjects, name):
    """Starts a VM whose guest sleeps, and looks at it: rows (process, private, tables, faults, CPU ms), who ran in 1 s."""
    vm = subprocess.Popen(subjects.command(name, 0, "test=idle ms=8000"), stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                          stderr=subprocess.DEVNULL)
    try:
        time.sleep(2)
        if vm.poll() is not None:
            return None
        rows, busy, pids = [], [], processes_of(vm.pid)
        for pid in pids:
            title = open(f"/proc/{pid}/cmdline").read().split("\0")[0].rsplit(" ", 1)[0]
            faults = int(open(f"/proc/{pid}/stat").read().rsplit(")", 1)[1].split()[7])
            cpu = sum(t for t, _ in ran(pid).values()) / 1e6
            rows.append((os.path.basename(title), *memory_of(pid), faults, cpu))
        before = {pid: ran(pid) for pid in pids}
        time.sleep(1)
        for pid, row in zip(pids, rows):
            for task, state in ran(pid).items():
                if before[pid].get(task) != state:
                    busy.append(f"{row[0]} thread {open(f'/proc/{pid}/task/{task}/comm').read().strip()}")
        return rows, busy, sum(len(tasks) for tasks in before.values())
    finally:
        vm.terminate()
        try:
            vm.wait(10)
        except subprocess.TimeoutExpired:
            vm.kill()
            vm.wait()


def report_standing(subjects, verdict):
    for name in subjects.names[1:]:
        seen = standing(subjects, name)
        if not seen:
            print(f"{name}: the VM did not stay up")
            return False
        rows, busy, threads = seen
        print(f"\n{name}: private memory above guest RAM, KiB, and what the start took")
        print(f"  {'process':12} {'private':>8} {'tables':>7} {'sum':>7} {'faults':>7} {'CPU ms':>7}")
        for title, private, tables, faults, cpu in rows:
            print(f"  {title:12} {private:8} {tables:7} {private + tables:7} {faults:7} {cpu:7.2f}")
        total = sum(row[1] + row[2] for row in rows)
        if len(rows) > 1:
            print(f"  {'together':12} {sum(r[1] for r in rows):8} {sum(r[2] for r in rows):7} {total:7} "
                  f"{sum(r[3] for r in rows):7} {sum(r[4] for r in rows):7.2f}")
        if name == "martlet":
            verdict(f"private memory of all processes together: {total / 1024:.2f} MiB", f"at most {BAR_MEMORY_KIB >> 10} MiB",
                    total <= BAR_MEMORY_KIB)
            # A thread that was not scheduled made no system call.
            verdict(f"idle guest: of {threads} threads {len(busy)} ran within 1 s {busy if busy else ''}".rstrip(), "none",
                    not busy)
        elif busy:
            print(f"  idle guest: of {threads} threads {len(busy)} ran within 1 s")
    return True


def run(arguments):
    subprocess.run([f"{ROOT}/scripts/micro-guests"], check=True)
    kernel = f"{MICRO}/micro.{'elf' if arguments.kernel == 'elf' else 'bzimage'}"
    if os.geteuid() == 0 and "MARTLET_BENCH_NAMESPACE" not in os.environ:
        # A network namespace of our own: the tap vanishes with it.
        os.environ["MARTLET_BENCH_NAMESPACE"] = "1"
        os.execvp("unshare", ["unshare", "--net", sys.executable, *sys.argv])
    subprocess.run(["ip", "tuntap", "add", "dev", TAP, "mode", "tap"], check=True)
    subprocess.run(["ip", "link", "set", TAP, "up"], check=True)
    # QEMU's guest sees no timing leaf; bare-kvm's does, and the host's counter is the same for both.
    probe = subprocess.run([f"{MICRO}/bare-kvm", kernel, "test=idle ms=1"], capture_output=True, text=True, timeout=30)
    khz = re.search(r"khz (\d+)", probe.stdout)
    if not khz:
        print(f"scripts/bench: no micro guest runs here: {probe.stderr.strip()}")
        return 2
    scheduling = "as usual"
    if not arguments.plain:
        try:
            os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(10))
            scheduling = "real time, all sides"
        except OSError:
            pass
    results = []

    def verdict(sentence, bar, is_within):
        results.append(is_within)
        print(f"  {'ok ' if is_within else 'BAD'} {sentence}; bar: {bar}")

    with tempfile.TemporaryDirectory() as scratch:
        os.chmod(scratch, 0o755)
        subjects = Subjects(scratch, kernel, arguments.sandbox)
        load, steal, begin = os.getloadavg()[0], stolen(), time.monotonic()
        times = start_times(subjects, arguments.runs, int(khz[1]))
        if times is None:
            return 2
        share = (stolen() - steal) / os.sysconf("SC_CLK_TCK") / (time.monotonic() - begin) / os.cpu_count()
        print(f"{os.cpu_count()} processors, load {load:.1f} before, stolen {share:.1%}, scheduling {scheduling}")
        report_start(times, arguments.runs, arguments.kernel, verdict)
        if not report_standing(subjects, verdict):
            return 2
        missing = [name for name in ("martlet", "qemu") if name not in times]
        if missing:
            print(f"not measured: {', '.join(missing)} (not built, or not installed)")
            return 2
    return 0 if all(results) else 1
