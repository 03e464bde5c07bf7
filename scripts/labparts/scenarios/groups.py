"""Control groups of version 2: each process in its own, limits kept, nothing left of them however the machine ends."""

import os
import signal
import time
from pathlib import Path

from . import Disk, Failure, Skip, scenario
from .. import vmm

ROOT = Path("/sys/fs/cgroup")
READING = """
echo MARTLET-READY
while true; do dd if=/dev/vda of=/dev/null bs=64k iflag=direct 2>/dev/null || dd if=/dev/vda of=/dev/null bs=64k 2>/dev/null; done
"""
LIMITS = ",id=small,cpu-limit=5%,cpu-weight=50,pids-limit=60,memory-limit=300M,io-weight=200,on-death=restart"


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


def _title(pid):
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")[0].decode()
    except OSError:
        return ""


def _pid_of(name):
    return next((int(one.name) for one in Path("/proc").iterdir() if one.name.isdigit() and _title(one.name) == name), None)


def _check_group(groups, parent, device):
    group = groups / f"process-{device['id']}"
    _expect(f"the group of {device['id']}", Path(f"/proc/{device['pid']}/cgroup").read_text().strip().splitlines()[-1],
            f"0::/{group.relative_to(ROOT)}")
    usage = device["usage"]
    for key in ("cpu_ns", "memory_rss", "memory_anonymous", "memory_pss", "threads", "group_cpu_ns", "group_memory", "group_pids"):
        if not usage.get(key):
            raise Failure(f"ctl devices tells no {key} of {device['id']}: {usage}")
    return group


@scenario("control groups: limits of a device are the kernel's, usage is told, groups go at every end", 420, by_hand=True)
def control_groups(trial):
    trial.only_martlet()
    offered = (ROOT / "cgroup.controllers").read_text().split() if (ROOT / "cgroup.controllers").exists() else []
    if not {"cpu", "memory", "io", "pids"} <= set(offered):
        raise Skip(f"control groups of version 2 have only '{' '.join(offered)}' here")
    for name in ("cpu", "memory", "io", "pids"):
        (ROOT / "cgroup.subtree_control").write_text(f"+{name}")
    parent = ROOT / f"martlet-test-{os.getpid()}"
    parent.mkdir()
    try:
        _limits(trial, parent)
        _death_of_supervisor(trial, parent)
        _alone(trial, parent)
        _refusals(trial, parent)
        parent.rmdir()
    finally:
        _kill_all(parent)


def _limits(trial, parent):
    disk = Disk(trial.image("a", 8 << 20, random=True), keys=LIMITS)
    running = trial.start(trial.machine(READING, disks=[disk]), prefix=_below(parent))
    running.wait_for("MARTLET-READY", 80)
    info = trial.martlet.ask(running, "info")
    _expect("the controllers", info["controllers"], ["cpu", "memory", "io", "pids"])
    groups = Path(info["cgroup"])
    _expect("the groups", _groups(groups), ["process-con0", "process-core", "process-serial", "process-small"])
    devices = {one["id"]: one for one in trial.martlet.ask(running, "devices")["devices"]}
    _check_group(groups, parent, devices["con0"])
    group = _check_group(groups, parent, devices["small"])
    for name, text in (("cpu.max", "5000 100000"), ("cpu.weight", "50"), ("pids.max", "60"), ("memory.max", str(300 << 20)),
                       ("memory.swap.max", "0"), ("io.weight", "default 200")):
        _expect(name, (group / name).read_text().strip(), text)

    def throttled():
        return dict(line.split() for line in (group / "cpu.stat").read_text().splitlines())["nr_throttled"] != "0"
    _wait("its processor time is limited", throttled, 60)
    # The new process of a device that died is in the same group.
    os.kill(devices["small"]["pid"], signal.SIGKILL)
    _wait("another process serves", lambda: trial.martlet.processes(running).get("small") not in (None, devices["small"]["pid"])
          and trial.martlet.ask(running, "devices")["devices"][0]["restarts"] == 1, 60)
    _check_group(groups, parent, trial.martlet.ask(running, "devices")["devices"][0])
    trial.martlet.control(running, "shutdown")
    _expect("the exit code", running.wait_for_end(30), 0)
    _wait("no group is left", lambda: not _groups(parent))


def _death_of_supervisor(trial, parent):
    running = trial.start(trial.machine(READING, disks=[Disk(trial.image("b", 1 << 20))]), prefix=_below(parent))
    running.wait_for("MARTLET-READY", 80)
    _wait("there are groups", lambda: _groups(parent))
    os.kill(_pid_of("vm/vm/supervisor"), signal.SIGKILL)
    running.wait_for_end(20)
    trial.nothing_left_of(running)
    _wait("no group is left of a machine whose supervisor was killed", lambda: not _groups(parent))
    # With its guardian killed before, nobody is there to take them away, until the next one starts.
    running = trial.start(trial.machine(READING, disks=[Disk(trial.image("c", 1 << 20))]), prefix=_below(parent))
    running.wait_for("MARTLET-READY", 80)
    old = _groups(parent)
    supervisor = _pid_of("vm/vm/supervisor")
    os.kill(_pid_of("vm/vm/guardian"), signal.SIGKILL)
    os.kill(supervisor, signal.SIGKILL)
    running.wait_for_end(20)
    _wait("its processes are gone", lambda: not any(words.startswith("vm/") for words in vmm.children().values()))
    _expect("the groups that nobody took away", _groups(parent), old)
    for left in trial.place.iterdir():
        if left.is_socket():
            left.unlink()


def _alone(trial, parent):
    """Without --cgroup, in a group of its own: it makes room for itself. The groups left before lie beside it."""
    (parent / "cgroup.subtree_control").write_text("+cpu +memory +io +pids")
    service = parent / "service"
    service.mkdir()
    running = trial.start(trial.machine(READING, disks=[Disk(trial.image("d", 1 << 20), keys=",cpu-limit=50%")]), prefix=_inside(service))
    running.wait_for("MARTLET-READY", 80)
    info = trial.martlet.ask(running, "info")
    supervisor = info["supervisor"]
    _expect("the groups", sorted(name.rpartition("-")[0] for name in _groups(service)), ["martlet-supervisor-vm", "martlet-vm"])
    _expect("its own group", Path(f"/proc/{supervisor}/cgroup").read_text().strip().splitlines()[-1],
            f"0::/{service.relative_to(ROOT)}/martlet-supervisor-vm-{supervisor}")
    os.kill(supervisor, signal.SIGKILL)
    running.wait_for_end(20)
    _wait("the service's group is as it was", lambda: not _groups(service))
    service.rmdir()
    for name in ("cpu", "memory", "io", "pids"):
        (parent / "cgroup.subtree_control").write_text(f"-{name}")


def _refusals(trial, parent):
    image = trial.image("e", 1 << 20)

    def refused(keys, words, prefix=()):
        (trial.place / "stderr").write_bytes(b"")
        running = trial.start(trial.machine(READING, disks=[Disk(image, keys=keys)]), prefix=prefix)
        code = running.wait_for_end(30)
        text = (trial.place / "stderr").read_text().strip()
        if code == 0 or len(text.splitlines()) != 1 or not all(word in text for word in words):
            raise Failure(f"{keys} ended with {code} and '{text}', which lacks one of {words}")
        _wait(f"no group is left after {keys}", lambda: not [name for name in _groups(parent) if name.startswith("martlet-")])

    below = _below(parent)
    refused(",memory-limit=64M", ["memory-limit", "at least 272M"], below)
    refused(",cpu-limit=0%", ["cpu-limit", "from 1%"], below)
    refused(",io-read-limit=1M", ["file system without a disk of its own", "bw_size"], below)
    refused(",cpu-limit=10%", ["--cgroup", "no control group"], _below("/nowhere"))
    # Beside others in its group it is not its own.
    crowded = parent / "crowded"
    crowded.mkdir()
    (parent / "cgroup.subtree_control").write_text("+cpu")
    crowded_prefix = ["sh", "-c", f'echo $$ > {crowded}/cgroup.procs; "$@"; exit $?', "sh"]
    refused(",cpu-limit=10%", ["cannot be kept", "systemd-run"], crowded_prefix)
    (parent / "cgroup.subtree_control").write_text("-cpu")
    crowded.rmdir()
