"""Our back ends under QEMU, and a foreign back end under our core."""

import os
import random
import re
import socket
import struct
import subprocess
import time
from pathlib import Path

from .. import cache, vmm
from . import Card, Disk, Failure, Skip, command, pattern, scenario
from . import disk as disks
from . import kills, net

TESTPMD = "/usr/bin/dpdk-testpmd"


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


@scenario("QEMU's card under checked TCP: QEMU is killed and started anew, then martlet-net is killed again and again and QEMU connects again", 240)
def qemu_outlives_its_card(trial):
    card = trial.tap(1)
    socket = trial.place / "net.socket"

    def serve():
        socket.unlink(missing_ok=True)
        return trial.program([trial.options.bin / "martlet-net", f"--socket-path={socket}", f"--tap={card.tap}"], socket)

    back_end = serve()
    peer = kills.Peer("10.77.1.1")
    machine = trial.machine(kills.TRANSFERS, cards=[Card(mac=card.mac, socket=socket)], reconnects=True)

    def start():
        running = trial.start(machine, trial.qemu)
        running.wait_for("MARTLET-READY", 100)
        return running

    def wait_for_turns(running, count):
        goal, deadline = peer.turns + count, time.monotonic() + 60 * vmm.patience
        while peer.turns < goal:
            if back_end.poll() is not None or time.monotonic() > deadline:
                raise Failure(f"{peer.turns} transfers, and no more; the card's code is {back_end.poll()}; {running.tail()}")
            running.read_on(0.05)

    first = start()
    wait_for_turns(first, 1)
    first.process.kill()
    first.process.wait()
    running = start()
    for _ in range(5):
        wait_for_turns(running, 1)
        running.read_on(random.uniform(0, 0.5))
        back_end.kill()
        back_end.wait()
        back_end = serve()
    wait_for_turns(running, 1)
    peer.goes_on = False
    trial.finish(running, 60, "ping turns")
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


@scenario("martlet probe record between QEMU's guest and qemu-storage-daemon: the disk works, the log reads, the recording replays", 240)
def recorded_in_between(trial):
    image = trial.image("fill", 96 << 20)
    talk, log = trial.place / "talk", trial.place / "log"
    path = trial.place / "between.socket"
    probe = trial.options.bin / "martlet-probe"
    daemon = ["qemu-storage-daemon", "--blockdev", f"driver=file,node-name=file,filename={image}", "--export",
              "type=vhost-user-blk,id=export,node-name=file,writable=on,addr.type=unix,addr.path={socket}"]
    # --once ends the recorder, and the daemon that it started, with the guest.
    recorder = trial.program([probe, "record", "--once", "--type", "blk", "--listen", path, "--output", talk, "--log", log, "--", *daemon],
                             path)
    job = disks.FILL.replace("$(disk fill)", "vda")
    result = trial.run(job, "mkfs mount umount fsck", 200, on=trial.qemu, disks=[Disk(socket=path)])
    if recorder.wait(20) != 0:
        raise Failure(f"the recorder ended with {recorder.returncode}")
    disks.compare_files(image, result)
    said = log.read_text()
    # Memory is told as a table, or region by region where the back end has slots for it.
    for part in ("> SET_OWNER", "< GET_FEATURES answered: 0x", " FLUSH ", "> (SET_MEM_TABLE|ADD_MEM_REG)", r"\[memory", "> SET_VRING_KICK",
                 r"\[event\]", "> GET_VRING_BASE", "the front end hung up"):
        if not re.search(part, said):
            raise Failure(f"the log has no {part!r}; it ends with {said[-400:]}")
    replay(probe, talk, daemon, differences=[])
    # Another back end offers something else, and is told apart by nothing but what it offers.
    ours = [trial.options.bin / "martlet-block", "--socket-path={socket}", f"--blk-file={image}"]
    replay(probe, talk, ours, differences=["GET_FEATURES", "GET_PROTOCOL_FEATURES", "GET_QUEUE_NUM", "GET_MAX_MEM_SLOTS", "GET_CONFIG"])


def replay(probe, talk, back_end, differences):
    """The front end's half of a recording against a back end; the answers to no other requests may differ."""
    done = subprocess.run([probe, "replay", "--adapt", "--type", "blk", "--input", talk, "--", *back_end], capture_output=True, text=True)
    found = re.findall(r"^connection \d+, message \d+, (\w+)(.*)", done.stdout, re.MULTILINE)
    sent = re.search(r"^(\d+) messages sent", done.stdout, re.MULTILINE)
    if done.returncode != int(bool(found)) or bool(found) != bool(differences) or not sent or int(sent[1]) < 20:
        raise Failure(f"the replay to {back_end[0]} ended with {done.returncode}: {done.stdout[-800:]} {done.stderr[-400:]}")
    for request, what in found:
        if request not in differences or not what.endswith("the answers differ"):
            raise Failure(f"the replay to {back_end[0]}: {request}{what}")


def _virtio_user(prefix, options):
    """DPDK's front end, which swaps the addresses of each frame and sends it back."""
    return [TESTPMD, "--no-huge", "-m", "256", "--no-pci", "--no-telemetry", "--file-prefix", f"{prefix}{os.getpid()}", "--lcores", f"0@0,1@{max(os.sched_getaffinity(0))}",
            "--vdev", f"net_virtio_user0,{options},queues=1,queue_size=256", "--", "--forward-mode=macswap", "--port-topology=loop",
            "--stats-period", "3600", "--total-num-mbufs=8192"]


@scenario("DPDK's virtio-user as front end drives martlet-net: frames go there and come back whole", 60)
def virtio_user_drives_net(trial):
    trial.only_martlet()
    if not Path(TESTPMD).exists():
        raise Skip("dpdk-testpmd is not there (Debian's dpdk-dev)")
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    path = trial.place / "net.socket"
    os.set_inheritable(theirs.fileno(), True)
    words = [trial.options.bin / "martlet-net", f"--socket-path={path}", f"--packet-fd={theirs.fileno()}"]
    card = trial.program(words, path, pass_fds=[theirs.fileno()])
    for turn in range(4):
        # The second time after the front end was killed, the third after both were: this front end does not connect again.
        if turn == 2:
            card.kill()
            card.wait()
            path.unlink()
            card = trial.program(words, path, pass_fds=[theirs.fileno()])
        front = trial.program(_virtio_user("user", f"path={path}"))
        _frames_come_back(ours, front)
        front.kill()
        front.wait()
    _ends_by_sigterm(card)


@scenario("DPDK's virtio-user waits for its card, which is killed under it and comes back: frames go there and come back whole", 60)
def virtio_user_outlives_its_card(trial):
    trial.only_martlet()
    if not Path(TESTPMD).exists():
        raise Skip("dpdk-testpmd is not there (Debian's dpdk-dev)")
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    path = trial.place / "user.socket"
    # Here the front end listens. It knows nothing of signals: what it writes to a dead card would end it.
    front = trial.program(["env", "--ignore-signal=PIPE", *_virtio_user("waits", f"path={path},server=1")], path)
    for turn in range(4):
        with socket.socket(socket.AF_UNIX) as line:
            line.connect(str(path))
            descriptors = [line.fileno(), theirs.fileno()]
            card = trial.program([trial.options.bin / "martlet-net", f"--fd={descriptors[0]}", f"--packet-fd={descriptors[1]}"],
                                 pass_fds=descriptors)
        _frames_come_back(ours, front)
        card.kill()
        card.wait()
        # What was on its way to the card that is no more belongs to nobody.
        ours.settimeout(0)
        try:
            while ours.recv(65536):
                pass
        except BlockingIOError:
            pass
    front.kill()
    front.wait()


def _frames_come_back(line, front):
    """Sends frames with a virtio header each, and expects every one with its addresses swapped."""
    line.settimeout(0.5)
    there, here = bytes.fromhex("525400123456"), bytes.fromhex("020000000001")
    deadline = time.monotonic() + 20 * vmm.patience
    number = 0
    while number < 500:
        size = 46 + number * 37 % 1400
        body = struct.pack(">HQ", 0x88B5, number) + pattern(f"frame {number}", size)
        line.send(bytes(12) + there + here + body)
        expected = here + there + body
        while True:
            try:
                got = line.recv(65536)[12:]
            except TimeoutError:
                got = None
            if got == expected:
                number += 1
                break
            if front.poll() is not None or time.monotonic() > deadline:
                raise Failure(f"frame {number} did not come back; the front end's code is {front.poll()}")
            if got is None:
                # Before the front end is up frames are dropped, as a network does.
                if number:
                    raise Failure(f"frame {number} of {size} bytes was lost")
                line.send(bytes(12) + there + here + body)


@scenario("qemu-storage-daemon started in a jail by Martlet: ext4 made, filled, checked, compared", 240)
def jailed_storage_daemon_serves(trial):
    trial.only_martlet()
    # On a file system with id-mapped mounts, which neither the lab's overlay nor its tmpfs has: so the image stays its owner's alone.
    store = trial.image("store", 160 << 20)
    command("mkfs.ext4", "-q", "-F", store)
    place = trial.place / "disks"
    place.mkdir()
    command("mount", "-o", "loop", store, place)
    try:
        image = place / "fill.img"
        image.touch()
        os.truncate(image, 96 << 20)
        image.chmod(0o600)
        jailed = Disk(path=image, jail=cache.CLONE / "protocol/jails/qemu-storage-daemon.jail",
                      program="qemu-storage-daemon --blockdev driver=file,node-name=f,filename={path} "
                              "--export type=vhost-user-blk,id=e,node-name=f,writable=on,addr.type=fd,addr.str={listen}")
        job = disks.FILL.replace("$(disk fill)", "vda")
        result = trial.run(job, "mkfs mount umount fsck", 230, disks=[jailed])
        disks.compare_files(image, result)
        trial.nothing_left()
    finally:
        subprocess.run(["umount", "-l", str(place)])
