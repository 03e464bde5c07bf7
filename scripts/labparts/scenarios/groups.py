"""Control groups of version 2: each process in its own, limits that bite, nothing left of them however the machine ends."""

import errno
import os
import re
import signal
import subprocess
import time
from contextlib import contextmanager
from pathlib import Path

from . import Disk, Failure, Skip, command, pattern, scenario
from .. import vmm

ROOT = Path("/sys/fs/cgroup")
NAMES = ("cpu", "memory", "io", "pids")
READING = """
echo MARTLET-READY
while true; do dd if=/dev/vda of=/dev/null bs=64k iflag=direct 2>/dev/null || dd if=/dev/vda of=/dev/null bs=64k 2>/dev/null; done
"""
LIMITS = {"cpu.max": "20000 100000", "cpu.weight": "50", "pids.max": "60", "memory.max": str(300 << 20), "memory.swap.max": "0",
          "memory.oom.group": "1", "io.weight": "default 200"}
KEYS = ",id=small,cpu-limit=20%,cpu-weight=50,pids-limit=60,memory-limit=300M,io-weight=200,spare=on"


@contextmanager
def _parent(trial):
    """A group for the scenario, with all controllers."""
    trial.only_martlet()
    offered = (ROOT / "cgroup.controllers").read_text().split() if (ROOT / "cgroup.controllers").exists() else []
    if not set(NAMES) <= set(offered):
        raise Skip(f"control groups of version 2 have only '{' '.join(offered)}' here")
    for name in NAMES:
        (ROOT / "cgroup.subtree_control").write_text(f"+{name}")
    parent = ROOT / f"martlet-test-{os.getpid()}"
    parent.mkdir()
    try:
        yield parent
        _wait("no group is left", lambda: not _groups(parent))
        _remove(parent)
    finally:
        _kill_all(parent)


def _remove(group):
    """What has ended in a group leaves it a moment later."""
    def is_gone():
        try:
            group.rmdir()
        except OSError as error:
            if error.errno != errno.EBUSY:
                raise
            return False
        return True

    _wait(f"{group.name} can be removed", is_gone)


@contextmanager
def _file_system(trial, size):
    """An ext4 with a block device of its own."""
    store = trial.image("store", size)
    command("mkfs.ext4", "-q", "-F", store)
    place = trial.place / "disks"
    place.mkdir()
    command("mount", "-o", "loop", store, place)
    try:
        yield place
    finally:
        subprocess.run(["umount", "-l", str(place)])


def _expect(what, found, expected):
    if found != expected:
        raise Failure(f"{what} is {found}, expected {expected}")


def _wait(what, condition, seconds=15):
    deadline = time.monotonic() + seconds * vmm.patience
    while not (value := condition()):
        if time.monotonic() > deadline:
            raise Failure(f"not so within {seconds * vmm.patience:g} s: {what}")
        time.sleep(0.05)
    return value


def _kill_all(parent):
    """Whatever the scenario left in its groups, when it failed."""
    for directory, _, _ in os.walk(parent, topdown=False):
        try:
            (Path(directory) / "cgroup.kill").write_text("1")
            time.sleep(0.1)
            os.rmdir(directory)
        except OSError:
            pass


def _below(parent):
    return ["sh", "-c", 'exec "$@" --cgroup ' + str(parent), "sh"]


def _inside(parent):
    """As a service manager starts it: alone in a group that was delegated to it."""
    return ["sh", "-c", f'echo $$ > {parent}/cgroup.procs && exec "$@"', "sh"]


def _groups(parent):
    return sorted(one.name for one in parent.iterdir() if one.is_dir())


def _table(path):
    """Lines of a name and a number."""
    return {name: int(value) for name, value in (line.split() for line in path.read_text().splitlines())}


def _title(pid):
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")[0].decode()
    except OSError:
        return ""


def _supervisor_and_guardian(running):
    """Of this machine: others of the same name may run at the same time, and all are seen in /proc."""
    supervisor = running.process.pid
    _expect("the machine's first process", _title(supervisor), "vm/vm/supervisor")
    guardian = next((pid for pid, words in vmm.children(supervisor).items() if words == "vm/vm/guardian"), None)
    if guardian is None:
        raise Failure(f"the supervisor has no guardian: {vmm.children(supervisor)}")
    return supervisor, guardian


def _device(trial, running, name):
    return next((one for one in trial.martlet.ask(running, "devices")["devices"] if one["id"] == name), {})


def _serves(trial, running, name, not_pid):
    """The device, once another process serves it."""
    def other():
        device = _device(trial, running, name)
        return device if device.get("pid") not in (None, not_pid) and device.get("state") == "active" else None
    return _wait(f"another process serves {name}", other, 60)


def _order(trial, running, verb):
    """An order that is refused while a device is on its way back."""
    def accepted():
        try:
            trial.martlet.control(running, verb, patience=30 * vmm.patience)
        except Failure as failure:
            if "ask again" not in str(failure):
                raise
            time.sleep(0.2)
            return False
        return True
    _wait(f"{verb} is done", accepted, 60)


def _check_group(groups, device):
    """The group of a device's process; and what is told of its use."""
    group = groups / f"process-{device['id']}"
    _expect(f"the group of {device['id']}", Path(f"/proc/{device['pid']}/cgroup").read_text().strip().splitlines()[-1],
            f"0::/{group.relative_to(ROOT)}")
    usage = device["usage"]
    for key in ("cpu_ns", "memory_rss", "memory_anonymous", "memory_pss", "threads", "group_cpu_ns", "group_memory", "group_pids"):
        if not usage.get(key):
            raise Failure(f"ctl devices tells no {key} of {device['id']}: {usage}")
    return group


def _check_limits(group):
    for name, text in LIMITS.items():
        _expect(name, (group / name).read_text().strip(), text)


@scenario("control groups: limits hold for a device, its spare, and after death, want of memory, replace and upgrade", 240)
def control_groups(trial):
    with _parent(trial) as parent:
        disk = Disk(trial.image("a", 8 << 20, random=True), keys=KEYS)
        running = trial.start(trial.machine(READING, disks=[disk]), prefix=_below(parent))
        running.wait_for("MARTLET-READY", 80)
        info = trial.martlet.ask(running, "info")
        _expect("the controllers", info["controllers"], list(NAMES))
        groups = Path(info["cgroup"])
        _expect("the groups", _groups(groups), ["process-con0", "process-core", "process-serial", "process-small"])
        _check_group(groups, _device(trial, running, "con0"))
        device = _device(trial, running, "small")
        group = _check_group(groups, device)
        _check_limits(group)
        _wait("its processor time is limited", lambda: _table(group / "cpu.stat")["nr_throttled"] > 0, 60)
        _wait("the spare is in the group", lambda: len((group / "cgroup.procs").read_text().split()) == 2, 60)

        # A death like any other; then one for want of memory, of the whole group.
        os.kill(device["pid"], signal.SIGKILL)
        device = _serves(trial, running, "small", device["pid"])
        _check_limits(_check_group(groups, device))
        # Whoever is started gets its limits anew.
        _wait("there is a spare again", lambda: len((group / "cgroup.procs").read_text().split()) == 2, 60)
        kills = _table(group / "memory.events")["oom_kill"]
        (group / "memory.max").write_text("65536")
        device = _serves(trial, running, "small", device["pid"])
        if _table(group / "memory.events")["oom_kill"] <= kills:
            raise Failure(f"the kernel killed nobody: {(group / 'memory.events').read_text()}")
        _check_limits(_check_group(groups, device))

        for verb in ("replace small", "upgrade"):
            _order(trial, running, verb)
            device = _serves(trial, running, "small", device["pid"])
            _check_limits(_check_group(groups, device))
        _expect("the groups", _groups(groups), ["process-con0", "process-core", "process-serial", "process-small"])

        # A device that is added has limits; another one under its id has not.
        image = trial.image("late", 1 << 20)
        trial.martlet.control(running, f"add disk path={image},id=late,pids-limit=50,cpu-limit=30%")
        late = groups / "process-late"
        _expect("pids.max of the added", (late / "pids.max").read_text().strip(), "50")
        trial.martlet.control(running, "remove late")
        _wait("the group of the removed is gone", lambda: not late.exists())
        trial.martlet.control(running, f"add disk path={image},id=late")
        _expect("pids.max of the next", (late / "pids.max").read_text().strip(), "max")
        trial.martlet.control(running, "shutdown")
        _expect("the exit code", running.wait_for_end(30), 0)


@scenario("control groups under a new supervisor: limits stay, hold for whatever starts later, and the groups go at the end", 240)
def control_groups_taken_over(trial):
    with _parent(trial) as parent:
        disk = Disk(trial.image("e", 8 << 20, random=True), keys=KEYS)
        running = trial.start(trial.machine(READING, disks=[disk], options=["--on-supervisor-death", "continue"]), prefix=_below(parent))
        running.wait_for("MARTLET-READY", 80)
        groups = Path(trial.martlet.ask(running, "info")["cgroup"])
        names = ["process-con0", "process-core", "process-serial", "process-small"]
        device = _device(trial, running, "small")
        for takeovers in (1, 2):
            os.kill(trial.martlet.ask(running, "info")["supervisor"], signal.SIGKILL)
            info = trial.martlet.ask(running, "info")
            _expect("takeovers", info["takeovers"], takeovers)
            _expect("the controllers", info["controllers"], list(NAMES))
            _expect("the group", info["cgroup"], str(groups))
            _expect("the groups", _groups(groups), names)
            _expect("who serves", _device(trial, running, "small")["pid"], device["pid"])
            _check_limits(_check_group(groups, _device(trial, running, "small")))
            # What this supervisor starts lives by the same limits, and so does what is started by the one that upgrades it.
            os.kill(device["pid"], signal.SIGKILL)
            device = _serves(trial, running, "small", device["pid"])
            _check_limits(_check_group(groups, device))
            _order(trial, running, "upgrade")
            device = _serves(trial, running, "small", device["pid"])
            _check_limits(_check_group(groups, device))
            trial.martlet.control(running, f"add disk path={trial.image('late', 1 << 20)},id=late,pids-limit=50")
            _expect("pids.max of the added", (groups / "process-late/pids.max").read_text().strip(), "50")
            trial.martlet.control(running, "remove late")
            _wait("the group of the removed is gone", lambda: not (groups / "process-late").exists())
            _expect("the groups", _groups(groups), names)
        trial.martlet.control(running, "shutdown")
        _expect("the exit code", running.wait_for_end(30), 0)


CACHED = """
echo MARTLET-READY
while true; do dd if=/dev/$(disk wide) of=/dev/null bs=1M iflag=direct 2>/dev/null; done
"""
DIRECT = """
echo MARTLET-READY
while true; do dd if=/dev/$(disk slow) of=/dev/null bs=64k iflag=direct 2>/dev/null; done
"""


@scenario("control groups: memory-limit bounds what a disk's process caches, io-read-limit its rate, pids-limit its threads", 240)
def control_groups_bite(trial):
    with _parent(trial) as parent, _file_system(trial, 320 << 20) as place:
        wide = place / "wide.img"
        wide.touch()
        os.truncate(wide, 240 << 20)
        limit = 144 << 20
        keys = f",memory-limit={limit >> 20}M"
        running = trial.start(trial.machine(CACHED, disks=[Disk(wide, serial="wide", keys=keys)], memory="128M"), prefix=_below(parent))
        running.wait_for("MARTLET-READY", 80)
        group = Path(trial.martlet.ask(running, "info")["cgroup"]) / "process-blk0"
        try:
            _wait("its memory is at its limit", lambda: _table(group / "memory.events")["max"] > 0, 40)
        except Failure as failure:
            raise Failure(f"{failure}; {_device(trial, running, 'blk0')['usage']}")
        time.sleep(2)
        usage = _device(trial, running, "blk0")["usage"]
        if not limit // 2 < usage["group_memory_peak"] <= limit or usage["group_memory"] > limit:
            raise Failure(f"the limit of {limit} did not hold: {usage}")
        trial.martlet.control(running, "shutdown")
        _expect("the exit code", running.wait_for_end(30), 0)

        slow = place / "slow.img"
        slow.write_bytes(pattern("slow", 12 << 20))
        os.sync()
        keys = ",direct=on,io-read-limit=1M"
        running = trial.start(trial.machine(DIRECT, disks=[Disk(slow, serial="slow", keys=keys)]), prefix=_below(parent))
        running.wait_for("MARTLET-READY", 80)
        group = Path(trial.martlet.ask(running, "info")["cgroup"]) / "process-blk0"

        def rate(seconds):
            start, before = time.monotonic(), _device(trial, running, "blk0")["usage"]["group_io_read"]
            time.sleep(seconds)
            now = _device(trial, running, "blk0")["usage"]["group_io_read"]
            return (now - before) / (time.monotonic() - start)

        # What the kernel lets through at once comes first. How fast a guest is without the limit depends on the machine; so it is asked
        # until it has once been clearly faster.
        rate(3)
        limited = rate(8)
        if not 0 < limited < 1_400_000:
            raise Failure(f"{limited:.0f} bytes a second with io-read-limit=1M")
        (group / "io.max").write_text(re.sub("rbps=[0-9]+", "rbps=max", (group / "io.max").read_text().strip()))
        free = _wait("without the limit it reads more than 2 MB a second", lambda: (now := rate(2)) > 2_000_000 and now, 30)
        trial.martlet.control(running, "shutdown")
        _expect("the exit code", running.wait_for_end(30), 0)
        _refused(trial, parent, ",pids-limit=1", ["blk0", "pids-limit"], _below(parent))
        return f"{limited / 1e6:.2f} MB/s with io-read-limit=1M, {free / 1e6:.1f} without"


@scenario("control groups go at every end: supervisor killed, guardian killed too, in a service's own group", 200)
def control_groups_ends(trial):
    with _parent(trial) as parent:
        _alone(trial, parent)
        _death_of_supervisor(trial, parent)


def _death_of_supervisor(trial, parent):
    running = trial.start(trial.machine(READING, disks=[Disk(trial.image("b", 1 << 20))]), prefix=_below(parent))
    running.wait_for("MARTLET-READY", 80)
    _wait("there are groups", lambda: _groups(parent))
    os.kill(_supervisor_and_guardian(running)[0], signal.SIGKILL)
    running.wait_for_end(20)
    trial.nothing_left_of(running)
    _wait("no group is left of a machine whose supervisor was killed", lambda: not _groups(parent))
    # With its guardian killed before, nobody is there to take them away, until the next one starts.
    running = trial.start(trial.machine(READING, disks=[Disk(trial.image("c", 1 << 20))]), prefix=_below(parent))
    running.wait_for("MARTLET-READY", 80)
    old = _groups(parent)
    supervisor, guardian = _supervisor_and_guardian(running)
    os.kill(guardian, signal.SIGKILL)
    os.kill(supervisor, signal.SIGKILL)
    running.wait_for_end(20)
    _wait("its processes are gone", lambda: not any(words.startswith("vm/") for words in vmm.children().values()))
    _expect("the groups that nobody took away", _groups(parent), old)
    for left in trial.place.iterdir():
        if left.is_socket():
            left.unlink()
    _refused(trial, parent, ",cpu-limit=0%", ["cpu-limit", "from 1%"], _below(parent))
    running = trial.start(trial.machine("", disks=[Disk(trial.image("c", 1 << 20))]), prefix=_below(parent))
    _wait("the next one has removed them", lambda: _groups(parent) and old[0] not in _groups(parent), 30)
    running.wait_for_end(80)


def _alone(trial, parent):
    """Without --cgroup, in a group of its own: it makes room for itself."""
    (parent / "cgroup.subtree_control").write_text("+cpu +memory +io +pids")
    service = parent / "service"
    service.mkdir()
    running = trial.start(trial.machine(READING, disks=[Disk(trial.image("d", 1 << 20), keys=",cpu-limit=50%")]), prefix=_inside(service))
    running.wait_for("MARTLET-READY", 80)
    info = trial.martlet.ask(running, "info")
    supervisor = info["supervisor"]
    _expect("the controllers", info["controllers"], list(NAMES))
    _expect("the groups", sorted(name.rpartition("-")[0] for name in _groups(service)), ["martlet-supervisor-vm", "martlet-vm"])
    _expect("its own group", Path(f"/proc/{supervisor}/cgroup").read_text().strip().splitlines()[-1],
            f"0::/{service.relative_to(ROOT)}/martlet-supervisor-vm-{supervisor}")
    os.kill(supervisor, signal.SIGKILL)
    running.wait_for_end(20)
    _wait("the service's group is as it was", lambda: not _groups(service))
    _expect("its controllers", (service / "cgroup.subtree_control").read_text().strip(), "")
    _remove(service)
    for name in NAMES:
        (parent / "cgroup.subtree_control").write_text(f"-{name}")


def _refused(trial, parent, keys, words, prefix=(), lines=1):
    image = trial.image("refused", 1 << 20)
    (trial.place / "stderr").write_bytes(b"")
    running = trial.start(trial.machine(READING, disks=[Disk(image, keys=keys)]), prefix=prefix)
    code = running.wait_for_end(30)
    said = [one for one in (trial.place / "stderr").read_text().splitlines() if "warning: Sandbox" not in one]
    if code == 0 or not 1 <= len(said) <= lines or not all(word in " ".join(said) for word in words):
        raise Failure(f"{keys} ended with {code} and {said}, which lacks one of {words}")


@scenario("control groups: what cannot be kept is refused in one line that says what to do", 120)
def control_groups_refusals(trial):
    with _parent(trial) as parent:
        below = _below(parent)
        _refused(trial, parent, ",memory-limit=64M", ["memory-limit", "at least 272M"], below)
        _refused(trial, parent, ",io-read-limit=1M", ["file system without a disk of its own", "bw_size"], below)
        _refused(trial, parent, ",cpu-limit=10%", ["--cgroup", "no control group"], _below("/nowhere"))
        # Beside others in its group it is not its own; and that group stays as it was.
        crowded = parent / "crowded"
        crowded.mkdir()
        (parent / "cgroup.subtree_control").write_text("+cpu +pids")
        prefix = ["sh", "-c", f'echo $$ > {crowded}/cgroup.procs; "$@"; exit $?', "sh"]
        _refused(trial, parent, ",cpu-limit=10%", ["cannot be kept", "systemd-run"], prefix)
        _expect("what the others' group hands down", (crowded / "cgroup.subtree_control").read_text().strip(), "")
        # A controller that the group has not got.
        (parent / "cgroup.subtree_control").write_text("-cpu")
        _remove(crowded)
        poor = parent / "poor"
        poor.mkdir()
        _refused(trial, parent, ",cpu-limit=10%", ["cpu-limit of blk0", "no controller 'cpu'"], _below(poor))
        _remove(poor)
        (parent / "cgroup.subtree_control").write_text("-pids")


@scenario("martlet jail --limits: memory, processor time, threads and transfer of a program are limited, and its group goes", 150)
def jail_limits(trial):
    with _parent(trial) as parent, _file_system(trial, 64 << 20) as place:
        image = place / "image"
        image.write_bytes(pattern("image", 8 << 20))
        os.sync()
        prefix = [trial.options.bin / "martlet", "jail", "--profile", trial.place / "profile", "--define", f"image={image}"]
        zeros = ["/bin/dd", "if=/dev/zero", "of=/dev/null"]
        reading = ["/bin/dd", f"if={image}", "of=/dev/null", "bs=64k", "iflag=direct"]
        for words in ([*zeros, "bs=64M", "count=1"], reading):
            command(*prefix, "--learn", "--", *words)

        def jail(limits, *words):
            done = subprocess.run([*prefix, "--limits", limits, "--cgroup", parent, "--", *words], capture_output=True, text=True)
            _expect(f"the groups after {limits}", _groups(parent), [])
            return done.returncode, " ".join(one for one in done.stderr.splitlines() if "warning: " not in one)

        code, text = jail("memory-limit=32M", *zeros, "bs=64M", "count=1")
        if code != 137 or "memory-limit" not in text:
            raise Failure(f"with more memory than its limit it ended with {code}: {text}")
        _expect("the exit code with enough memory", jail("memory-limit=128M", *zeros, "bs=64M", "count=1")[0], 0)

        # Its processor time: seen from outside while it runs.
        busy = subprocess.Popen([*prefix, "--limits", "cpu-limit=10%,pids-limit=1", "--cgroup", parent, "--", *zeros, "bs=1M",
                                 "count=100000000"], stderr=subprocess.DEVNULL)
        try:
            group = _wait("it has a group", lambda: next(iter(parent.glob("martlet-jail-*/process-program")), None))
            _wait("its processor time is limited", lambda: _table(group / "cpu.stat")["nr_throttled"] > 2, 60)
            _expect("pids.max", (group / "pids.max").read_text().strip(), "1")
            _expect("pids.current", (group / "pids.current").read_text().strip(), "1")
        finally:
            busy.send_signal(signal.SIGTERM)
        _expect("the exit code by SIGTERM", busy.wait(30), 143)

        start = time.monotonic()
        _expect("the exit code of a slow read", jail("io-read-limit=2M", *reading)[0], 0)
        took = time.monotonic() - start
        if took < 2.5:
            raise Failure(f"8 MiB at 2 MiB a second took {took:.1f} s")
        for limits, words in (("cpu-limit=0%", ["cpu-limit", "from 1%"]), ("memory-limit=1M", ["memory-limit", "from 16M"]),
                              ("cpu-limti=5%", ["cpu-limti", "cpu-limit"])):
            code, text = jail(limits, *zeros)
            if code != 125 or not all(word in text for word in words):
                raise Failure(f"{limits} ended with {code} and '{text}', which lacks one of {words}")
        return f"8 MiB at 2 MiB a second took {took:.1f} s"
