"""Devices that come and go under a stock kernel."""

import os
import signal
import time

from . import Failure, scenario

# What the guest does as it is told on its console, a word a line.
JOB = """
mkdir -p /mnt
appears() { n=0; while [ -z "$($1 $2)" ] && [ $n -lt 600 ]; do n=$((n + 1)); sleep 0.1; done; $1 $2; }
vanishes() {
  n=0
  while [ -n "$($1 $2)" ] && [ $n -lt 600 ]; do n=$((n + 1)); sleep 0.1; done
  equal "gone-$3" "" "$($1 $2)"
}
# Without asking the disk anything: one that is taken by force answers no more, and the asker would wait for ever.
leaves() {
  n=0
  while [ -e /sys/block/$1 ] && [ $n -lt 600 ]; do n=$((n + 1)); sleep 0.1; done
  equal "gone-$2" "" "$(ls -d /sys/block/$1)"
}
exec 2>/dev/null
echo MARTLET-READY
d=$(appears disk late)
succeeds mkfs mkfs.ext4 -q /dev/$d
succeeds mount mount -t ext4 /dev/$d /mnt
dd if=/dev/urandom of=/mnt/file bs=64k count=64
before=$(sum /mnt/file)
succeeds umount umount /mnt
echo MARTLET-WRITTEN
vanishes disk late 1
echo MARTLET-GONE-1
d=$(appears disk late)
succeeds mount-again mount -t ext4 -o ro /dev/$d /mnt
equal bytes $before $(sum /mnt/file)
succeeds umount-again umount /mnt
echo MARTLET-READ
vanishes disk late 2
echo MARTLET-GONE-2
c=$(appears card 52:54:00:77:00:01)
ip addr add 10.77.1.2/24 dev $c
ip link set $c up
succeeds ping ping -c 3 -w 20 10.77.1.1
echo MARTLET-PINGED
vanishes card 52:54:00:77:00:01 3
echo MARTLET-GONE-3
d=$(appears disk late)
succeeds mount-third mount -t ext4 -o ro /dev/$d /mnt
equal bytes-third $before $(sum /mnt/file)
umount /mnt
echo MARTLET-FORCE
leaves $d 4
echo MARTLET-GONE-4
dmesg | grep -i -E 'acpiphp|pci 0000:00' | tail -n 20
echo MARTLET-DONE
"""


@scenario("hot plug: a disk written, removed, added again; one whose back end died; a network card pinged; one taken by force", 240)
def hotplug(trial):
    trial.only_martlet()
    ctl = trial.martlet
    image = trial.image("late", 64 << 20)
    card = trial.tap(1)
    running = trial.start(trial.machine(JOB))
    running.wait_for("MARTLET-READY", 80)

    def add_disk(keys=""):
        ctl.control(running, f"add disk path={image},serial=late,id=late{keys}")

    def remove(name, word, force=""):
        ctl.control(running, f"remove {name} --timeout 60000{force}", patience=90)
        running.wait_for(word, 60)
        devices = [one["id"] for one in ctl.ask(running, "devices")["devices"]]
        if name in devices or name in ctl.processes(running):
            raise Failure(f"{name} is left: {devices}")

    add_disk()
    running.wait_for("MARTLET-WRITTEN", 80)
    remove("late", "MARTLET-GONE-1")
    add_disk(",on-death=hold")
    running.wait_for("MARTLET-READ\\s", 80)
    # Its process is dead when the guest is asked to let go, and the guest, which looks at the disk's serial number over and over, has
    # asked it something: a driver waits for that.
    os.kill(ctl.processes(running)["late"], signal.SIGKILL)
    deadline = time.monotonic() + 20
    while next(one for one in ctl.ask(running, "devices")["devices"] if one["id"] == "late")["state"] == "active":
        if time.monotonic() > deadline:
            raise Failure("the death of the disk's process goes unnoticed")
        time.sleep(0.05)
    remove("late", "MARTLET-GONE-2")
    ctl.control(running, f"add net tap={card.tap},mac={card.mac},id=card")
    running.wait_for("MARTLET-PINGED", 80)
    remove("card", "MARTLET-GONE-3")
    add_disk()
    running.wait_for("MARTLET-FORCE", 80)
    remove("late", "MARTLET-GONE-4", " --force")
    trial.finish(running, 80, "mkfs mount umount gone-1 mount-again bytes gone-2 ping gone-3 mount-third bytes-third gone-4")
    trial.nothing_left()
