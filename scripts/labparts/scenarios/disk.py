"""Disks: file systems, contents both ways, serial numbers, read-only, many at once."""

import subprocess

from . import Disk, Failure, command, pattern, scenario, sum_of

FILL = """
vd=/dev/$(disk fill)
succeeds mkfs mkfs.ext4 -q $vd
mkdir -p /mnt
succeeds mount mount -t ext4 $vd /mnt
mkdir /mnt/deep
i=0
while [ $i -lt 40 ]; do
  dd if=/dev/urandom of=/mnt/deep/file$i bs=1k count=$((i * 13 + 1)) 2>/dev/null
  i=$((i + 1))
done
dd if=/dev/urandom of=/mnt/large bs=64k count=160 2>/dev/null
sync
echo 3 >/proc/sys/vm/drop_caches
cd /mnt
sha256sum large deep/* | sed 's/^/MARTLET-SUM /'
cd /
succeeds umount umount /mnt
succeeds fsck fsck.ext4 -fn $vd
"""


def compare_files(image, result):
    """Checks the image with fsck and every file in it against the sums that the guest printed."""
    command("/sbin/e2fsck", "-fn", image)
    sums = [line.split()[1:] for line in result.text.splitlines() if line.startswith("MARTLET-SUM ")]
    if len(sums) != 41:
        raise Failure(f"the guest printed {len(sums)} sums instead of 41")
    for expected, name in sums:
        data = subprocess.run(["/sbin/debugfs", "-R", f"cat /{name}", str(image)], capture_output=True).stdout
        if sum_of(data) != expected:
            raise Failure(f"file {name} has the sum {sum_of(data)} on the host, {expected} in the guest")


@scenario("ext4 made, filled, unmounted, checked; every file compared on the host", 150)
def disk_ext4(trial):
    image = trial.image("fill", 96 << 20)
    result = trial.run(FILL, "mkfs mount umount fsck", 140, disks=[Disk(image, serial="fill")])
    compare_files(image, result)


@scenario("a host's bytes read by the guest, the guest's by the host; size, serial number, odd requests", 90)
def disk_contents(trial):
    size = (12 << 20) + 512 * 7
    source, target = trial.image("source", size, random=True), trial.image("target", 16 << 20)
    before = sum_of(source.read_bytes())
    job = f"""
source=/dev/$(disk source)
target=/dev/$(disk target)
equal size {size // 512} "$(cat /sys/block/${{source##*/}}/size)"
equal read {before} "$(sum $source)"
dd if=$source of=$target bs=1M 2>/dev/null
dd if=$source of=$target bs=512 skip=3 seek=27001 count=5 conv=notrunc 2>/dev/null
sync
equal read-again {before} "$(sum $source)"
"""
    trial.run(job, "size read read-again", 80, disks=[Disk(source, serial="source"), Disk(target, serial="target")])
    expected = bytearray(source.read_bytes())
    expected += bytes((16 << 20) - len(expected))
    expected[27001 * 512:27006 * 512] = expected[3 * 512:8 * 512]
    if sum_of(source.read_bytes()) != before:
        raise Failure("the source changed")
    if target.read_bytes() != expected:
        raise Failure("the target does not contain what the guest wrote")


@scenario("a read-only disk refuses writes and stays as it was", 90)
def disk_readonly(trial):
    image = trial.image("fixed", 4 << 20, random=True)
    before = sum_of(image.read_bytes())
    job = f"""
vd=$(disk fixed)
equal ro 1 "$(cat /sys/block/$vd/ro)"
refused write dd if=/dev/zero of=/dev/$vd bs=4096 count=1 conv=fsync
equal read {before} "$(sum /dev/$vd)"
"""
    trial.run(job, "ro write read", 80, disks=[Disk(image, serial="fixed", readonly=True)])
    if sum_of(image.read_bytes()) != before:
        raise Failure("the image changed")


@scenario("8 disks and 4 cards at once, each the right one", 180)
def many_devices(trial):
    size = 1 << 20
    disks = [Disk(trial.image(f"many{n}", size, random=True), serial=f"serial{n}") for n in range(8)]
    cards = [trial.tap(n) for n in range(1, 5)]
    job = "equal disks 8 $(ls -d /sys/block/vd* | wc -l)\nequal cards 4 $(ls -d /sys/class/net/eth* | wc -l)\n"
    for n in range(8):
        job += f"equal disk{n} {sum_of(pattern(f'many{n}', size))} $(sum /dev/$(disk serial{n}))\n"
        job += f"echo 'written {n}' | dd of=/dev/$(disk serial{n}) conv=notrunc,fsync 2>/dev/null\n"
    for n in range(1, 5):
        job += f"c=$(card 52:54:00:77:00:{n:02x})\nip addr add 10.77.{n}.2/24 dev $c\nip link set $c up\n"
    for n in range(1, 5):
        job += f"succeeds ping{n} ping -c 2 -w 20 10.77.{n}.1\n"
    checks = "disks cards " + " ".join(f"disk{n}" for n in range(8)) + " ping1 ping2 ping3 ping4"
    trial.run(job, checks, 170, disks=disks, cards=cards, cpus=2)
    for n, disk in enumerate(disks):
        text = f"written {n}\n".encode()
        if disk.path.read_bytes() != text + pattern(f"many{n}", size)[len(text):]:
            raise Failure(f"disk {n} does not contain what the guest wrote to it")
