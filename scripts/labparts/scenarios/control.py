"""`martlet ctl`, the ends that nobody wished for, and a machine of an ordinary user."""

import grp
import os
import re
import signal
import time

from . import Disk, Failure, Skip, command, scenario

# Says that it is there, and goes on saying so.
TICKING = """
echo MARTLET-READY
n=0
while true; do
  n=$((n + 1))
  echo "MARTLET-TICK $n"
  sleep 0.3
done
"""


def _ticks(running):
    return [int(number) for number in re.findall(rb"^MARTLET-TICK (\d+)", running.output, re.MULTILINE)]


def _expect(what, found, expected):
    if found != expected:
        raise Failure(f"{what} is {found}, expected {expected}")


def _start_ticking(trial, **parts):
    running = trial.start(trial.machine(TICKING, **parts))
    running.wait_for("MARTLET-TICK 2", 80)
    return running


def _check_devices(devices):
    """What `ctl devices` says, against what /proc says."""
    _expect("the devices", sorted(devices), ["blk0", "blk1", "con0", "net0"])
    uids = set()
    for name, device in devices.items():
        _expect(f"the state of {name}", device["state"], "active")
        _expect(f"the queues of {name}", [queue["enabled"] for queue in device["queues"]], [True] * len(device["queues"]))
        if "VERSION_1" not in device["features"]:
            raise Failure(f"{name} has the features {device['features']}")
        status = dict(line.split(":\t", 1) for line in open(f"/proc/{device['pid']}/status") if ":\t" in line)
        _expect(f"the uid of {name} in /proc", status["Uid"].split(), [str(device["uid"])] * 4)
        _expect(f"the capabilities of {name}", int(status["CapPrm"], 16) | int(status["CapEff"], 16) | int(status["CapBnd"], 16), 0)
        _expect(f"no_new_privs of {name}", status["NoNewPrivs"].strip(), "1")
        program = os.readlink(f"/proc/{device['pid']}/exe").rpartition("/")[2]
        _expect(f"the program of {name}", program, device["program"])
        uids.add(device["uid"])
    if len(uids) != len(devices) or 0 in uids:
        raise Failure(f"the devices' uids are {sorted(uids)}")


@scenario("martlet ctl: info, devices, pause, resume, reboot, shutdown; bad requests are refused", 180)
def control_requests(trial):
    trial.only_martlet()
    ctl = trial.martlet
    disks = [Disk(trial.image("a", 1 << 20)), Disk(trial.image("b", 1 << 20), readonly=True)]
    running = _start_ticking(trial, cpus=2, disks=disks, cards=[trial.tap(1)])
    info = ctl.ask(running, "info")
    _expect("state, cpus, memory, resets", [info[key] for key in ("state", "cpus", "memory", "resets")], ["running", 2, 256 << 20, 0])
    _check_devices({device["id"]: device for device in ctl.ask(running, "devices")["devices"]})
    for verb, word in (("info", "running"), ("devices", "martlet-block")):
        if word not in ctl.control(running, verb):
            raise Failure(f"ctl {verb} does not say '{word}'")

    ctl.control(running, "pause")
    running.read_on(1)
    before = _ticks(running)
    _expect("the state when paused", ctl.ask(running, "info")["state"], "paused")
    running.read_on(3)
    _expect("what a paused guest has said", _ticks(running)[len(before):], [])
    ctl.control(running, "resume")
    running.wait_for(f"MARTLET-TICK {before[-1] + 2}\\D", 20)
    _expect("the state when resumed", ctl.ask(running, "info")["state"], "running")
    _expect("the ticks", _ticks(running), list(range(1, len(_ticks(running)) + 1)))

    start = len(running.output)
    ctl.control(running, "reboot")
    running.wait_for("MARTLET-TICK 2\\D", 80, start)
    _expect("resets after a reboot", ctl.ask(running, "info")["resets"], 1)
    try:
        ctl.control(running, "rebot")
    except Failure as failure:
        if "reboot" not in str(failure):
            raise Failure(f"a mistyped request is refused by '{failure}', without the right word")
    else:
        raise Failure("ctl takes the request 'rebot'")
    ctl.control(running, "shutdown")
    _expect("the exit code after shutdown", running.wait_for_end(30), 0)
    trial.nothing_left_of(running)


@scenario("Ctrl-A x on the console ends the machine; Ctrl-A Ctrl-A is one Ctrl-A for the guest", 120)
def console_escape(trial):
    trial.only_martlet()
    job = "echo MARTLET-ASKS\nhead -c 3 | od -An -tx1 | sed 's/^/MARTLET-HEARD /'\n" + TICKING
    running = trial.start(trial.machine(job))
    running.wait_for("MARTLET-ASKS", 80)
    running.type("\x01\x01\x01q")
    running.wait_for("MARTLET-HEARD  01 01 71", 20)
    running.wait_for("MARTLET-TICK 2", 20)
    running.type("\x01x")
    code = running.wait_for_end(20)
    trial.nothing_left_of(running)
    return f"exit code {code}"


def _killed(trial, victim):
    """Starts a machine with everything, kills one of its processes, looks at what follows."""
    card, image = trial.tap(1), trial.image("a", 1 << 20, random=True)
    running = _start_ticking(trial, disks=[Disk(image)], cards=[card], serial=f"socket={trial.place / 'serial.socket'}")
    processes = trial.martlet.processes(running)
    _expect("the processes", sorted(processes), ["blk0", "con0", "core", "net0", "serial"])
    pid = running.process.pid if victim == "supervisor" else processes[victim]
    os.kill(pid, signal.SIGKILL)
    if victim in ("supervisor", "core"):
        code = running.wait_for_end(20)
        _expect("the exit code", code, -signal.SIGKILL if victim == "supervisor" else 6)
    else:
        said = _ticks(running)[-1]
        running.wait_for(f"MARTLET-TICK {said + 3}\\D", 20)
        errors = (trial.place / "stderr").read_text()
        if f"of {victim} (pid {pid}) was killed by signal 9" not in errors:
            raise Failure(f"the loss of {victim} is not told: {errors}")
        if f"Device {victim} is served again" not in errors:
            raise Failure(f"{victim} did not come back: {errors}")
        device = {one["id"]: one for one in trial.martlet.ask(running, "devices")["devices"]}[victim]
        _expect("restarts", device["restarts"], 1)
        if device["pid"] == pid:
            raise Failure(f"{victim} has the pid of the dead process")
        running.process.terminate()
        _expect("the exit code", running.wait_for_end(20), 128 + signal.SIGTERM)
    trial.nothing_left_of(running)
    if card.tap not in command("ip", "-br", "link", "show", "dev", card.tap):
        raise Failure("the tap is gone")
    if image.stat().st_size != 1 << 20:
        raise Failure("the image has changed its size")
    # All of it can be had again at once.
    command("flock", "--nonblock", image, "true")


for one in ("supervisor", "core", "blk0", "net0"):
    def killed(trial, victim=one):
        trial.only_martlet()
        _killed(trial, victim)
    killed.__name__ = f"killed_{one}"
    scenario(f"kill -9 of {one}: a device comes back, else all ends; nothing is left, tap and image are as they were", 120)(killed)


@scenario("an ordinary user in group kvm runs a machine with a disk and a tap of its own", 120)
def ordinary_user(trial):
    trial.only_martlet()
    user = 65534
    try:
        group = grp.getgrnam("kvm").gr_gid
    except KeyError:
        raise Skip("there is no group kvm")
    kvm = os.stat("/dev/kvm")
    if kvm.st_gid != group or kvm.st_mode & 0o060 != 0o060:
        raise Skip("/dev/kvm is not open to group kvm here")
    card = trial.tap(1)
    command("ip", "link", "del", card.tap)
    for words in (f"tuntap add {card.tap} mode tap vnet_hdr user {user}", f"addr add 10.77.1.1/24 dev {card.tap}", f"link set {card.tap} up"):
        command("ip", *words.split())
    image = trial.image("mine", 1 << 20)
    os.chown(image, user, user)
    os.chown(trial.place, user, user)
    job = """
dd if=/dev/urandom of=/data bs=64k count=8 2>/dev/null
dd if=/data of=/dev/$(disk mine) bs=64k conv=fsync 2>/dev/null
echo "MARTLET-SUM $(sum /data)"
c=$(card 52:54:00:77:00:01)
ip addr add 10.77.1.2/24 dev $c
ip link set $c up
succeeds ping ping -c 2 -w 20 10.77.1.1
echo MARTLET-LOOK
read -r line
pass looked
"""
    machine = trial.machine(f"{job}\n", disks=[Disk(image, serial="mine")], cards=[card])
    prefix = ["setpriv", f"--reuid={user}", f"--regid={user}", f"--groups={group}"]
    running = trial.start(machine, prefix=prefix)
    running.wait_for("MARTLET-LOOK", 90)
    processes = trial.martlet.processes(running)
    _expect("the processes", sorted(processes), ["blk0", "con0", "core", "net0", "serial"])
    for name, pid in processes.items():
        status = dict(line.split(":\t", 1) for line in open(f"/proc/{pid}/status") if ":\t" in line)
        _expect(f"the uid of {name}", status["Uid"].split(), [str(user)] * 4)
        _expect(f"the capabilities of {name}", int(status["CapPrm"], 16) | int(status["CapEff"], 16), 0)
    running.type("go on\n")
    result = trial.finish(running, 30, "ping looked")
    from . import sum_of
    expected = re.search(r"MARTLET-SUM (\w+)", result.text)[1]
    _expect("the image's content", sum_of(image.read_bytes()[:512 << 10]), expected)
    trial.nothing_left_of(running)
