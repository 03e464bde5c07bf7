"""Our back ends under QEMU, and a foreign back end under our core."""

from . import Card, Disk, Failure, Skip, scenario
from . import disk as disks
from . import net


@scenario("QEMU as front end drives martlet-block: ext4 made, filled, checked, compared", 180)
def qemu_drives_block(trial):
    image = trial.image("fill", 96 << 20)
    socket = trial.place / "block.socket"
    back_end = trial.program([trial.options.bin / "martlet-block", f"--socket-path={socket}", f"--blk-file={image}"], socket)
    # QEMU's vhost-user-blk has no serial number for the guest to ask for unless the back end has one.
    job = disks.FILL.replace("$(disk fill)", "vda")
    result = trial.run(job, "mkfs mount umount fsck", 170, on=trial.qemu, disks=[Disk(socket=socket)])
    disks.compare_files(image, result)
    _ends_by_sigterm(back_end)


@scenario("QEMU as front end drives martlet-net: TCP both ways with checksums", 180)
def qemu_drives_net(trial):
    card = trial.tap(1)
    socket = trial.place / "net.socket"
    back_end = trial.program([trial.options.bin / "martlet-net", f"--socket-path={socket}", f"--tap={card.tap}"], socket)
    net.transfer(trial, trial.machine(net.JOB, cards=[Card(mac=card.mac, socket=socket)]), trial.qemu)
    _ends_by_sigterm(back_end)


def _ends_by_sigterm(back_end):
    if back_end.poll() not in (None, 0):
        raise Failure(f"the back end ended with {back_end.poll()}")
    back_end.terminate()
    code = back_end.wait(10)
    if code != 0:
        raise Failure(f"the back end answered SIGTERM with {code}")


@scenario("qemu-storage-daemon as back end: ext4 made, filled, checked, compared", 180)
def storage_daemon_serves(trial):
    image = trial.image("fill", 96 << 20)
    socket = trial.place / "storage.socket"
    trial.program(["qemu-storage-daemon", "--blockdev", f"driver=file,node-name=file,filename={image}",
                   "--export", f"type=vhost-user-blk,id=export,node-name=file,writable=on,addr.type=unix,addr.path={socket}"],
                  socket)
    job = disks.FILL.replace("$(disk fill)", "vda")
    result = trial.run(job, "mkfs mount umount fsck", 170, disks=[Disk(socket=socket)])
    disks.compare_files(image, result)
