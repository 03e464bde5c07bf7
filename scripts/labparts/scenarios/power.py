"""Reset, power-off and the power button."""

import re

from . import QUICK, Disk, Failure, scenario
from .console import boot_root_disk

# The disk's first sector counts the starts. After the last one the guest powers off.
COUNTING = """
n=$(dd if=/dev/vda bs=512 count=1 2>/dev/null | head -n 1 | tr -d '\\000')
n=$((n + 1))
echo $n >/sector
dd if=/sector of=/dev/vda bs=512 conv=notrunc,sync,fsync 2>/dev/null
echo "MARTLET-BOOT $n"
if [ $n -le {reboots} ]; then
  sync
  {how}
  sleep 100
  exit 9
fi
pass last
"""


def _reboots(trial, reboots, how, seconds, cmdline=QUICK, **parts):
    image = trial.image("count", 1 << 20)
    job = COUNTING.format(reboots=reboots, how=how)
    result = trial.run(job, "last", seconds, cmdline=cmdline, disks=[Disk(image)], **parts)
    boots = [int(number) for number in re.findall(r"MARTLET-BOOT (\d+)", result.text)]
    if boots != list(range(1, reboots + 2)):
        raise Failure(f"the guest started as {boots}, expected 1 to {reboots + 1}")
    if int(image.read_bytes()[:512].split(b"\n")[0]) != reboots + 1:
        raise Failure("the count on the disk is not the guest's")


@scenario("the guest reboots ten times in place and powers off", 240)
def reboot_ten_times(trial):
    _reboots(trial, 10, "reboot -f", 230, cpus=2, cards=[trial.tap(1)])


def _reboot_way(letter, meaning):
    def way(trial):
        _reboots(trial, 1, "reboot -f", 80, f"{QUICK} reboot={letter}")
    way.__name__ = f"reboot_by_{meaning}"
    scenario(f"the guest reboots with reboot={letter}", 90)(way)


for one in (("t", "triple_fault"), ("k", "keyboard"), ("a", "acpi"), ("p", "pci")):
    _reboot_way(*one)


@scenario("a panic with panic=1 reboots the guest", 90)
def reboot_by_panic(trial):
    _reboots(trial, 1, "echo c >/proc/sysrq-trigger", 80, f"{QUICK} panic=1")


@scenario("with --no-reboot a reset ends the machine", 90)
def no_reboot(trial):
    machine = trial.machine("echo MARTLET-BOOT\nreboot -f\nsleep 100", no_reboot=True)
    running = trial.start(machine)
    code = running.wait_for_end(80)
    if running.output.count(b"MARTLET-BOOT") != 1:
        raise Failure(f"the guest started {running.output.count(b'MARTLET-BOOT')} times; {running.tail()}")
    return f"exit code {code}"


@scenario("the power button makes a guest with acpid shut down in order", 150)
def power_button(trial):
    running = boot_root_disk(trial)
    trial.vmm.power_button(running)
    code = running.wait_for_end(60)
    if code != 0:
        raise Failure(f"the machine ended with {code}; {running.tail()}")
    # The guest's init says so on the kernel's console.
    if b"The system is going down" not in running.output + (trial.place / "serial").read_bytes():
        raise Failure(f"the guest did not shut down by itself; {running.tail()}")
