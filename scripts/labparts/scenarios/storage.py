"""Storage under load: verified I/O over queue layouts, file systems, holes, failing storage, resizing."""

import os
import signal
import subprocess
import time
from pathlib import Path

from . import FILE_SYSTEM, TOOLS, Disk, Failure, Skip, command, scenario
from .mapper import loop, mapped

VERIFY = """
vd=/dev/$(disk work)
equal queues {queues} $(ls -d /sys/block/${{vd##*/}}/mq/* | wc -l)
bits=$(cat /sys/block/${{vd##*/}}/device/features)
equal layout {bits} $(echo $bits | cut -c35)$(echo $bits | cut -c30)$(echo $bits | cut -c29)
succeeds {name} tool fio --name=v --filename=$vd --rw=randrw --bsrange={least}-128k --ioengine=libaio --direct=1 --iodepth=32 --size=16m \\
  --verify=crc32c --verify_fatal=1 --verify_backlog=64 --fsync=500 --loops=1 --thread --eta=never
"""

# Name, queues, their size, keys of the disk, and which of packed ring, event indices and indirect tables the driver has then.
SPLIT = [("one queue of 256", 1, 256, ",packed=off", "011"), ("two of 16, no event indices", 2, 16, ",packed=off,event_idx=off", "001"),
         ("two of 1024, direct", 2, 1024, ",packed=off,direct=on", "011"),
         ("two of 128, no tables, no mapping, no looking", 2, 128, ",packed=off,indirect_desc=off,cache_map=off,poll=off", "010"),
         ("one of 64, neither, blocks of 4096", 1, 64, ",packed=off,event_idx=off,indirect_desc=off,block_size=4096", "000")]
PACKED = [("one queue of 256, threads", 1, 256, ",aio=threads", "111"), ("two of 16, no event indices", 2, 16, ",event_idx=off", "101"),
          ("two of 1024, direct", 2, 1024, ",direct=on", "111"), ("two of 128, no tables, no event indices", 2, 128, ",event_idx=off,indirect_desc=off", "100"),
          ("one of 64, no tables, blocks of 4096", 1, 64, ",indirect_desc=off,block_size=4096", "110")]


def verify(trial, layouts):
    note = ""
    for number, (name, queues, size, keys, bits) in enumerate(layouts):
        image = trial.image(f"work{number}", 24 << 20)
        if "direct" in keys.replace("indirect", ""):
            try:
                os.close(os.open(image, os.O_RDWR | os.O_DIRECT))
            except OSError:
                keys, note = keys.replace(",direct=on", ""), "without direct access, which this file system has not"
        disk = Disk(image, serial="work", keys=f",num_queues={queues},queue_size={size}{keys}")
        least = 4096 if "block_size" in keys else 512
        trial.run(TOOLS + VERIFY.format(queues=queues, name=f"fio{number}", bits=bits, least=least), f"queues layout fio{number}", 120,
                  disks=[disk, trial.tools()], cpus=2)
    return note


@scenario("fio writes and verifies over layouts of split rings, ways of access, and caches", 400)
def disk_verify(trial):
    return verify(trial, SPLIT)


@scenario("fio writes and verifies over layouts of packed rings, ways of access, and caches", 400)
def disk_verify_packed(trial):
    return verify(trial, PACKED)


HOLES = TOOLS + """
vd=/dev/$(disk holes)
succeeds discard tool blkdiscard -o 1048576 -l 4194304 $vd
succeeds zeroes tool blkdiscard -z -o 8388608 -l 1048576 $vd
sync
"""


@scenario("discard makes holes on the host, write-zeroes reads as zeros, the rest stays", 90)
def disk_holes(trial):
    image = trial.image("holes", 16 << 20, random=True)
    before, blocks = image.read_bytes(), os.stat(image).st_blocks
    trial.run(HOLES, "discard zeroes", 80, disks=[Disk(image, serial="holes"), trial.tools()])
    after = image.read_bytes()
    expected = bytearray(before)
    expected[1 << 20:5 << 20] = bytes(4 << 20)
    expected[8 << 20:9 << 20] = bytes(1 << 20)
    if after != bytes(expected):
        raise Failure("the image does not contain what it should after discard and write-zeroes")
    freed = (blocks - os.stat(image).st_blocks) * 512
    if freed < 4 << 20:
        raise Failure(f"discarding 4 MiB gave {freed} bytes back to the host")


FULL = """
vd=/dev/$(disk full)
refused write dd if=/dev/urandom of=$vd bs=64k count=256 oflag=direct conv=notrunc
succeeds read dd if=$vd of=/dev/null bs=64k count=4 iflag=direct
"""


@scenario("a full host file system: the write fails, the disk goes on", 90)
def disk_full(trial):
    place = trial.place / "small"
    place.mkdir()
    command("mount", "-t", "tmpfs", "-o", "size=4m", "none", str(place))
    try:
        image = place / "full.img"
        with open(image, "wb") as file:
            file.truncate(64 << 20)
        trial.run(FULL, "write read", 80, disks=[Disk(image, serial="full")])
    finally:
        subprocess.run(["umount", "-l", str(place)])


BROKEN = """
vd=/dev/$(disk broken)
succeeds good dd if=$vd of=/dev/null bs=64k count=16 iflag=direct
refused read dd if=$vd of=/dev/null bs=4k skip=256 count=1 iflag=direct
refused write dd if=/dev/zero of=$vd bs=4k seek=256 count=1 oflag=direct conv=notrunc
succeeds again dd if=$vd of=/dev/null bs=64k count=16 iflag=direct
"""


@scenario("storage that fails (device mapper's error target): errors for what fails, and only for that", 90)
def disk_error(trial):
    with loop(trial.image("backing", 4 << 20, random=True)) as backing, \
         mapped(f"0 2048 linear {backing} 0\n2048 2048 error\n4096 4096 linear {backing} 4096\n") as (_, device):
        trial.run(BROKEN, "good read write again", 80, disks=[Disk(device, serial="broken", keys=",direct=on")])


VANISH = """
vd=/dev/$(disk gone)
succeeds write dd if=/dev/urandom of=$vd bs=64k count=16 oflag=direct conv=notrunc
succeeds read dd if=$vd of=/dev/null bs=64k count=16 iflag=direct
echo MARTLET-READY
n=0
while dd if=$vd of=/dev/null bs=4k count=1 iflag=direct 2>/dev/null && [ $n -lt 600 ]; do sleep 0.1; n=$((n + 1)); done
refused read-gone dd if=$vd of=/dev/null bs=64k count=1 iflag=direct
refused write-gone dd if=/dev/zero of=$vd bs=64k count=1 oflag=direct conv=notrunc
refused flush-gone dd if=/dev/zero of=$vd bs=64k count=1 conv=notrunc,fsync
"""


@scenario("a disk of the host that is taken away: errors for the guest, and nothing ends", 150)
def disk_vanishes(trial):
    trial.only_martlet()
    if subprocess.run(["modprobe", "-a", "sd_mod", "scsi_debug"], capture_output=True).returncode:
        raise Skip("this machine cannot make a disk of memory (scsi_debug)")
    driver = Path("/sys/bus/pseudo/drivers/scsi_debug")
    before = set(driver.glob("adapter*/host*/target*/*/block/*"))
    try:
        (driver / "add_host").write_text("1")
        deadline = time.monotonic() + 20
        while not (made := set(driver.glob("adapter*/host*/target*/*/block/*")) - before):
            if time.monotonic() > deadline:
                raise Failure("scsi_debug made no disk")
            time.sleep(0.05)
        disk = made.pop()
        pid = None

        def take_away(running):
            nonlocal pid
            running.wait_for("MARTLET-READY", 80)
            pid = trial.martlet.processes(running).get("blk0")
            (disk / "device/delete").write_text("1")
            running.wait_for("MARTLET-CHECK flush-gone", 60)
            if pid is None or trial.martlet.processes(running).get("blk0") != pid:
                raise Failure("the disk's process is not the one it was")

        trial.run(VANISH, "write read read-gone write-gone flush-gone", 140, disks=[Disk(f"/dev/{disk.name}", serial="gone", keys=",direct=on")],
                  meanwhile=take_away)
    finally:
        (driver / "add_host").write_text("-1")


NFS = TOOLS + """
for name in ring calls cached; do
  vd=/dev/$(disk $name)
  succeeds fio-$name tool fio --name=v --filename=$vd --rw=randrw --bsrange=512-128k --ioengine=libaio --direct=1 --iodepth=16 --size=6m \\
    --verify=crc32c --verify_fatal=1 --verify_backlog=32 --fsync=100 --thread --eta=never
done
echo MARTLET-READY
n=0
while dd if=$vd of=/dev/null bs=4k count=1 iflag=direct 2>/dev/null && [ $n -lt 600 ]; do sleep 0.1; n=$((n + 1)); done
for name in ring calls; do
  vd=/dev/$(disk $name)
  refused read-$name dd if=$vd of=/dev/null bs=64k count=1 iflag=direct
  refused write-$name dd if=/dev/zero of=$vd bs=64k count=1 oflag=direct conv=notrunc
done
"""


class NFS4:
    """A directory in memory, served by the kernel's NFS server of this network namespace and mounted from it."""

    def __init__(self, trial):
        self.behind, self.place, self.control = trial.place / "exported", trial.place / "nfs", trial.place / "nfsd"
        if subprocess.run(["modprobe", "-a", "nfsd", "nfsv4"], capture_output=True).returncode:
            raise Skip("this machine has no NFS")
        for place in (self.behind, self.place, self.control):
            place.mkdir()
        command("mount", "-t", "tmpfs", "-o", "size=64m", "none", str(self.behind))
        command("mount", "-t", "nfsd", "none", str(self.control))

    def put(self, file, text, must=True):
        """One line, in one call: a second one on the same descriptor is refused there."""
        try:
            number = os.open(file, os.O_WRONLY)
            try:
                os.write(number, text.encode() + b"\n")
            finally:
                os.close(number)
        except OSError as error:
            if must:
                raise Failure(f"{file} does not take {text!r}: {error.strerror}")

    def answer(self, cache, line):
        """What the server would ask mountd, answered before it asks."""
        self.put(f"/proc/net/rpc/{cache}/channel", line)

    def serve(self):
        for word in ("-2", "-3", "+4", "+4.2"):
            self.put(self.control / "versions", word, must=False)
        for file in ("nfsv4leasetime", "nfsv4gracetime"):
            self.put(self.control / file, "10", must=False)
        self.answer("auth.unix.ip", "nfsd 127.0.0.1 2147483647 *")
        # By number 0, for everybody, from any port; root stays root.
        self.answer("nfsd.fh", f"* 1 \\x00000000 2147483647 {self.behind}")
        self.answer("nfsd.export", f"* {self.behind} 2147483647 {0x2000 | 0x400 | 2} 65534 65534 0")
        self.put(self.control / "threads", "4")
        # Nobody from before is waited for.
        self.put(self.control / "v4_end_grace", "Y", must=False)
        command("mount", "-i", "-t", "nfs4", "-o", "addr=127.0.0.1,clientaddr=127.0.0.1,vers=4.2,soft,timeo=600", "127.0.0.1:/", str(self.place))

    def spoil(self):
        """Every handle is stale from now on."""
        self.put("/proc/net/rpc/nfsd.fh/flush", "1")
        self.answer("nfsd.fh", "* 1 \\x00000000 2147483647")

    def close(self):
        subprocess.run(["umount", "-f", "-l", str(self.place)], capture_output=True)
        self.put(self.control / "threads", "0", must=False)
        for place in (self.control, self.behind):
            subprocess.run(["umount", "-l", str(place)])


@scenario("images on NFS, by ring and by calls: verified, locked, and errors once their handles are stale", 240)
def disk_nfs(trial):
    trial.only_martlet()
    server = NFS4(trial)
    try:
        server.serve()
        images = {}
        for name in ("ring", "calls", "cached"):
            images[name] = server.place / f"{name}.img"
            with open(images[name], "wb") as file:
                file.truncate(8 << 20)
        second = None

        def meanwhile(running):
            nonlocal second
            running.wait_for("MARTLET-READY", 200)
            second = subprocess.run([trial.options.bin / "martlet-block", f"--blk-file={images['ring']}", f"--socket-path={trial.place}/second"],
                                    capture_output=True, text=True, timeout=60)
            server.spoil()

        trial.run(NFS, "fio-ring fio-calls fio-cached read-ring write-ring read-calls write-calls", 230, cpus=2, meanwhile=meanwhile, disks=[
            Disk(images["ring"], serial="ring", keys=",aio=io_uring,direct=on"), Disk(images["calls"], serial="calls", keys=",aio=threads,direct=on"),
            Disk(images["cached"], serial="cached"), trial.tools()])
        if second is None or second.returncode != 1 or "is in use by" not in second.stderr:
            raise Failure(f"a second user was not refused: {second}")
        log = (trial.place / "stderr").read_text(errors="replace")
        if "ESTALE" not in log.upper():
            raise Failure(f"no handle was stale: {log[-500:]}")
    finally:
        server.close()


RESIZE = """
vd=$(disk grow)
dd if=/dev/urandom of=/tmp/data bs=64k count=16 2>/dev/null
echo MARTLET-READY
(while [ ! -e /tmp/stop ]; do dd if=/dev/$vd of=/dev/null bs=64k count=32 iflag=direct 2>/dev/null || echo bad >/tmp/bad; done) &
(while [ ! -e /tmp/stop ]; do dd if=/tmp/data of=/dev/$vd bs=64k seek=64 oflag=direct conv=notrunc 2>/dev/null || echo bad >/tmp/bad; done) &
n=0
while [ "$(cat /sys/block/$vd/size)" != 65536 ] && [ $n -lt 600 ]; do sleep 0.1; n=$((n + 1)); done
equal grown 65536 "$(cat /sys/block/$vd/size)"
succeeds end dd if=/dev/zero of=/dev/$vd bs=512 seek=65535 count=1 oflag=direct conv=notrunc
echo MARTLET-GROWN
n=0
while [ "$(cat /sys/block/$vd/size)" != 16384 ] && [ $n -lt 600 ]; do sleep 0.1; n=$((n + 1)); done
equal shrunk 16384 "$(cat /sys/block/$vd/size)"
touch /tmp/stop
wait
equal load none "$(cat /tmp/bad 2>/dev/null || echo none)"
equal written "$(md5sum </tmp/data)" "$(dd if=/dev/$vd bs=64k skip=64 count=16 iflag=direct 2>/dev/null | md5sum)"
"""


@scenario("a disk grows and shrinks while the guest reads and writes it", 150)
def disk_resize(trial):
    if trial.vmm.name != "martlet":
        raise Skip("needs martlet ctl")
    image = trial.image("grow", 16 << 20)

    def orders(running):
        running.wait_for("MARTLET-READY", 60)
        trial.vmm.control(running, "resize-disk blk0 32M")
        running.wait_for("MARTLET-GROWN", 80)
        trial.vmm.control(running, "resize-disk blk0 8M")
        stats = trial.vmm.ask(running, "stats blk0")
        if not sum(queue["requests"] for queue in stats["devices"][0]["queues"]):
            raise Failure(f"nothing was counted: {stats}")

    trial.run(RESIZE, "grown end shrunk load written", 140, disks=[Disk(image, serial="grow")], meanwhile=orders)
    if image.stat().st_size != 8 << 20:
        raise Failure(f"the image has {image.stat().st_size} bytes")


LOAD = "vd=/dev/$(disk fs)" + FILE_SYSTEM + """
# What fsstress does, in a shell: files and directories made, written at odd places, cut, linked, renamed, removed, synced, by several at once.
work() {{
  d=/mnt/$1
  mkdir -p $d
  seed=$2 i=0
  while [ $i -lt 150 ]; do
    seed=$(((seed * 1103515245 + 12345) & 0x7fffffff))
    f=$d/f$((seed / 16 % 24)) g=$d/g$((seed / 512 % 24))
    case $((seed / 65536 % 11)) in
      0 | 1 | 2) dd if=/dev/urandom of=$f bs=$((seed % 7000 + 1)) count=$((i % 40 + 1)) 2>/dev/null ;;
      3) dd if=/dev/urandom of=$f bs=777 seek=$((seed % 400)) count=9 conv=notrunc 2>/dev/null ;;
      4) mv -f $f $g 2>/dev/null ;;
      5) ln -f $f $g.link 2>/dev/null ;;
      6) ln -sf $f $g.symbolic ;;
      7) rm -f $g $f.link ;;
      8) mkdir -p $d/dir$((seed % 9))/deep && cp $f $d/dir$((seed % 9))/deep/ 2>/dev/null ;;
      9) rm -rf $d/dir$((seed % 9)); truncate -s $((seed % 90000)) $f 2>/dev/null || dd if=/dev/null of=$f bs=1 seek=$((seed % 90000)) 2>/dev/null ;;
      10) [ $((i % 3)) = 0 ] && sync ;;
    esac
    i=$((i + 1))
  done
}}
work a 1 & work b 22 & work c 333 &
wait
succeeds trim tool fstrim /mnt
sync
echo 3 >/proc/sys/vm/drop_caches
succeeds reread sh -c 'find /mnt -type f -exec cat {{}} + >/dev/null'
succeeds umount umount /mnt
"""


@scenario("ext4 and xfs under a mixed load with trim; checked on the host", 240)
def disk_filesystems(trial):
    for kind, mkfs, check, size in [("ext4", "mkfs.ext4 -q", ["/sbin/e2fsck", "-fn"], 96),
                                    ("xfs", "tool mkfs.xfs -q", ["/sbin/xfs_repair", "-n"], 320)]:
        image = trial.image(f"fs-{kind}", size << 20)
        trial.run(TOOLS + LOAD.format(mkfs=mkfs, kind=kind), "mkfs mount trim reread umount", 110, disks=[Disk(image, serial="fs"), trial.tools()],
                  cpus=2)
        command(*check, str(image))


KILLED = """
vd=/dev/$(disk work)
echo MARTLET-READY
succeeds fio tool fio --name=v --filename=$vd --rw=randrw --bsrange=512-64k --ioengine=libaio --direct=1 --iodepth=16 --size=12m --time_based --runtime=25 \\
  --verify=crc32c --verify_fatal=1 --verify_backlog=32 --fsync=200 --thread --eta=never
sleep 3 # So that the last kill is over before the machine is off.
"""


@scenario("the disk's process is killed every second while fio verifies what it reads", 240)
def disk_killed(trial):
    trial.only_martlet()
    image = trial.image("work", 16 << 20)
    kills = 0

    def kill_it(running):
        nonlocal kills
        running.wait_for("MARTLET-READY", 100)
        while b"MARTLET-CHECK fio" not in running.output and running.process.poll() is None:
            kills += trial.martlet.kill(running, "blk0")
            running.read_on(1)

    trial.run(TOOLS + KILLED, "fio", 230, disks=[Disk(image, serial="work", keys=",restart-limit=1000"), trial.tools()], cpus=2, meanwhile=kill_it)
    if kills < 10:
        raise Failure(f"only {kills} kills fell into the load")
    return f"{kills} kills"
