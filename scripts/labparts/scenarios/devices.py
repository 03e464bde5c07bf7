"""Entropy and file systems: a device of ours, and a daemon of QEMU's under our core."""

import os
import re
import signal
import time

from . import Failure, Share, pattern, scenario, sum_of

RNG = """
equal current virtio_rng.0 "$(cat /sys/class/misc/hw_random/rng_current)"
dd if=/dev/hwrng of=/one bs=1k count=4 iflag=fullblock 2>/dev/null
dd if=/dev/hwrng of=/two bs=1k count=4 iflag=fullblock 2>/dev/null
equal length 4096 "$(stat -c %s /one)"
refused same cmp /one /two
# Random bytes do not become smaller.
between packed 4000 8192 "$(gzip -c /two | wc -c)"
"""


@scenario("--rng: hwrng is ours and gives random bytes, also when its process is killed while it is read", 120)
def entropy(trial):
    files, load = trial.modules("virtio_rng")
    job = f"{load}{RNG}" + """
echo MARTLET-READING
dd if=/dev/hwrng of=/three bs=1k count=256 iflag=fullblock 2>/dev/null
equal after 262144 "$(stat -c %s /three)"
"""
    running = trial.start(trial.machine(job, files, rng=True))
    if trial.vmm is trial.martlet:
        running.wait_for("MARTLET-READING", 90)
        device = {one["id"]: one for one in trial.martlet.ask(running, "devices")["devices"]}["rng0"]
        if device["program"] != "martlet-template" or device["state"] != "active":
            raise Failure(f"ctl devices shows {device}")
        os.kill(device["pid"], signal.SIGKILL)
        running.wait_for_stderr("Device rng0 is served again", 20)
    trial.finish(running, 90, "current length same packed after")
    if trial.vmm is trial.martlet:
        trial.nothing_left_of(running)


@scenario("QEMU as front end drives martlet-template: random bytes in the guest", 120)
def qemu_drives_entropy(trial):
    path = trial.place / "rng.socket"
    back_end = trial.program([trial.options.bin / "martlet-template", f"--socket-path={path}"], path)
    files, load = trial.modules("virtio_rng")
    trial.run(load + RNG, "current length same packed", 110, on=trial.qemu, files=files, rng=path)
    back_end.terminate()
    if (code := back_end.wait(10)) != 0:
        raise Failure(f"the back end answered SIGTERM with {code}")


@scenario("QEMU's entropy: QEMU is killed again and again while the guest reads, and started anew on the same martlet-template", 180)
def qemu_dies_over_entropy(trial):
    # Not the other way round: QEMU 7.2 cannot connect its entropy device again (protocol/known-differences.md).
    path = trial.place / "rng.socket"
    back_end = trial.program([trial.options.bin / "martlet-template", f"--socket-path={path}"], path)
    files, load = trial.modules("virtio_rng")
    job = f"{load}{RNG}" + """
echo MARTLET-READING
dd if=/dev/hwrng of=/three bs=1k count=64 iflag=fullblock 2>/dev/null
equal after 65536 "$(stat -c %s /three)"
"""
    machine = trial.machine(job, files, rng=path)
    for _ in range(2):
        running = trial.start(machine, trial.qemu)
        running.wait_for("MARTLET-READING", 90)
        running.process.kill()
        running.process.wait()
    trial.finish(trial.start(machine, trial.qemu), 90, "current length same packed after")
    back_end.terminate()
    if (code := back_end.wait(10)) != 0:
        raise Failure(f"the back end answered SIGTERM with {code}")


FS = """
mkdir /share
succeeds mount mount -t virtiofs home /share
equal read "$(cat /share/sums)" "$(cd /share && sha256sum big small)"
dd if=/dev/urandom of=/local bs=64k count=32 2>/dev/null
cp /local /share/from-guest
mkdir -p /share/a/b
for n in $(seq 40); do echo "line $n" >/share/a/b/$n; done
mv /share/a/b/40 /share/a/forty
rm /share/a/b/39
ln -s b/1 /share/a/link
equal link "line 1" "$(cat /share/a/link)"
equal written "$(sum /local)" "$(sum /share/from-guest)"
echo "MARTLET-SUM $(sum /local)"
"""
VIRTIOFSD = "/usr/lib/qemu/virtiofsd"


def _serve(trial, directory, socket):
    socket.unlink(missing_ok=True)
    # A sandbox of its own needs what the lab's root has not; it is not what is looked at here.
    return trial.program([VIRTIOFSD, f"--socket-path={socket}", "-o", f"source={directory}", "-o", "sandbox=chroot"], socket)


def _share(trial):
    directory = trial.place / "home"
    directory.mkdir()
    for name, size in (("big", 3 << 20), ("small", 77)):
        (directory / name).write_bytes(pattern(name, size))
    (directory / "sums").write_text("".join(f"{sum_of((directory / name).read_bytes())}  {name}\n" for name in ("big", "small")))
    return directory


def _compare(directory, text):
    expected = re.search(r"MARTLET-SUM (\w+)", text)[1]
    found = sum_of((directory / "from-guest").read_bytes())
    if found != expected:
        raise Failure(f"the guest wrote a file with the sum {expected}, here it has {found}")
    lines = {path.name: path.read_text() for path in (directory / "a/b").iterdir()}
    if lines != {str(n): f"line {n}\n" for n in range(1, 39)} or (directory / "a/forty").read_text() != "line 40\n":
        raise Failure(f"the small files are {sorted(lines)}")


@scenario("--fs with QEMU's virtiofsd: mounted, read, written, renamed, compared on the host", 120)
def file_system(trial):
    directory, socket = _share(trial), trial.place / "fs.socket"
    _serve(trial, directory, socket)
    files, load = trial.modules("virtiofs")
    result = trial.run(load + FS + "succeeds umount umount /share\n", "mount read link written umount", 110, files=files,
                       shares=[Share("home", socket)])
    _compare(directory, result.text)


@scenario("--fs: virtiofsd is killed under writes and started again: they end with an error, a new mount goes on", 120)
def file_system_restart(trial):
    trial.only_martlet()
    directory, socket = _share(trial), trial.place / "fs.socket"
    daemon = _serve(trial, directory, socket)
    files, load = trial.modules("virtiofs")
    job = load + """
mkdir /share
dd if=/dev/urandom of=/local bs=64k count=4 2>/dev/null
succeeds mount mount -t virtiofs home /share
equal before "$(cat /share/sums)" "$(cd /share && sha256sum big small)"
(
  n=0
  while cat /local >/share/busy; do
    n=$((n + 1))
    [ $n = 3 ] && echo MARTLET-KILL
  done
  echo "MARTLET-STOPPED $n"
) 2>/dev/null &
wait
refused stale cat /share/small
succeeds umount umount /share
succeeds again mount -t virtiofs home /share
equal after "$(cat /share/sums)" "$(cd /share && sha256sum big small)"
"""
    running = trial.start(trial.machine(job, files, shares=[Share("home", socket)]))
    running.wait_for("MARTLET-KILL", 90)
    daemon.kill()
    daemon.wait()
    running.wait_for_stderr("Back end of fs0 at .* is gone", 20)
    _serve(trial, directory, socket)
    running.wait_for_stderr("Device fs0 is served again", 20)
    trial.finish(running, 60, "mount before stale umount again after")


@scenario("--fs: paused and resumed under reads and writes by four at a time: nothing is answered twice, nothing is lost", 200,
          by_hand=True)
def file_system_paused(trial):
    trial.only_martlet()
    directory, socket = _share(trial), trial.place / "fs.socket"
    _serve(trial, directory, socket)
    files, load = trial.modules("virtiofs")
    job = load + """
mkdir /share
dd if=/dev/urandom of=/local bs=64k count=4 2>/dev/null
succeeds mount mount -t virtiofs home /share
echo MARTLET-BUSY
for n in 1 2 3 4; do
  (
    while [ ! -e /share/enough ]; do
      cp /local /share/busy$n && cmp -s /local /share/busy$n || echo MARTLET-WRONG
      stat /share/* >/dev/null
    done
  ) &
done
wait
equal after "$(cat /share/sums)" "$(cd /share && sha256sum big small)"
for n in 1 2 3 4; do cmp /local /share/busy$n || echo MARTLET-WRONG; done
# What the driver says of an answer that it did not ask for.
equal heads 0 "$(dmesg | grep -c 'is not a head')"
succeeds umount umount /share
"""
    running = trial.start(trial.machine(job, files, shares=[Share("home", socket)]))
    running.wait_for("MARTLET-BUSY", 90)
    for _ in range(30):
        time.sleep(0.1)
        trial.martlet.control(running, "pause")
        trial.martlet.control(running, "resume")
    (directory / "enough").write_text("")
    result = trial.finish(running, 90, "mount after heads umount")
    if "MARTLET-WRONG" in result.text:
        raise Failure("what the guest wrote is not what it read")
