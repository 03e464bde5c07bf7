"""Boot paths, processors, memory, the kernel's log."""

from . import QUICK, Failure, scenario

IDENTITY = """
equal kernel 6.1 "$(uname -r | cut -d . -f 1,2)"
equal cpus {cpus} "$(nproc)"
equal cpus-apic {cpus} "$(grep -c '^apicid' /proc/cpuinfo)"
between memory-kib {low} {high} "$(awk '/^MemTotal/ {{ print $2 }}' /proc/meminfo)"
between clock-seconds {now} $(({now} + 300)) "$(date +%s)"
pass clocksource "$(cat /sys/devices/system/clocksource/clocksource0/current_clocksource)"
kernel_log
"""
CHECKS = "kernel cpus cpus-apic memory-kib clock-seconds"


def _identity(trial, cpus=1, mebibytes=256, seconds=60, more="", checks="", **parts):
    import time
    # The kernel keeps some memory for itself: its image, page descriptors and the initramfs archive.
    low = (mebibytes * 1024) * 94 // 100 - 60 * 1024
    job = IDENTITY.format(cpus=cpus, low=low, high=mebibytes * 1024, now=int(time.time()) - 5) + more
    result = trial.run(job, CHECKS + " " + checks, seconds, cpus=cpus, memory=f"{mebibytes}M", **parts)
    return result


@scenario("Debian's bzImage by the 64-bit boot protocol: kernel, processor, memory size, time of day", 90)
def boot_bzimage(trial):
    _identity(trial, kernel=trial.images.bzimage)


@scenario("the same kernel as ELF vmlinux by PVH", 90)
def boot_vmlinux(trial):
    _identity(trial, kernel=trial.images.vmlinux)


@scenario("4 processors run at once", 120)
def boot_four_cpus(trial):
    # Each busy process is bound to its processor and must get time on it.
    more = """
for cpu in 0 1 2 3; do
  taskset -c $cpu sh -c 'i=0; while [ $i -lt 2000 ]; do i=$((i + 1)); done' &
done
wait
for cpu in 0 1 2 3; do
  between cpu$cpu-jiffies 1 1000000 "$(awk -v name=cpu$cpu '$1 == name { print $2 + $4 }' /proc/stat)"
done
between interrupts-on-cpu3 1 100000000 "$(awk '/^ *LOC:/ { print $5 }' /proc/interrupts)"
"""
    _identity(trial, cpus=4, more=more, checks="cpu0-jiffies cpu3-jiffies interrupts-on-cpu3", seconds=110)


@scenario("128 MiB of memory", 90)
def memory_small(trial):
    _identity(trial, mebibytes=128)


@scenario("5 GiB of memory, below and above the 32-bit hole, both written and read back", 150)
def memory_above_hole(trial):
    # New pages come from the top: 64 MiB there. /proc/iomem shows where RAM is.
    more = """
between ram-above-4g 1 9 "$(grep -c '^1[0-9a-f]\\{8\\}-.*System RAM' /proc/iomem)"
equal ram-in-hole 0 "$(awk -F '[- ]' '/^[cdef][0-9a-f]{7}-.*System RAM/' /proc/iomem | wc -l)"
mount -t tmpfs -o size=200m tmpfs /tmp
dd if=/dev/urandom of=/tmp/a bs=1M count=32 2>/dev/null
cp /tmp/a /tmp/b
equal memory-keeps "$(sum /tmp/a)" "$(sum /tmp/b)"
"""
    _identity(trial, mebibytes=5120, more=more, checks="ram-above-4g ram-in-hole memory-keeps", seconds=140)


# What a stock kernel may say at level warning or worse without it being our fault. Each entry: a regular expression
# and its reason; only lines that the same kernel also prints under QEMU q35 may be added.
ALLOWED_KERNEL_LINES = [
    ("Speculative Return Stack Overflow", "the processor's model is affected and the host's microcode is old"),
    ("hrtimer: interrupt took", "the machine that emulates the host had something else to do meanwhile"),
]


# Every device is used before the log is read.
USE_ALL = """
equal cpus 4 "$(nproc)"
succeeds mkfs mkfs.ext4 -q /dev/$(disk a)
refused read-only dd if=/dev/zero of=/dev/$(disk b) bs=4096 count=1 conv=fsync
c=$(card 52:54:00:77:00:01)
ip addr add 10.77.1.2/24 dev $c
ip link set $c up
succeeds ping ping -c 2 -w 20 10.77.1.1
kernel_log
pass log-read "$(dmesg | wc -l) lines"
"""


@scenario("a stock kernel with default options, 4 processors and every device in use logs no warning", 180)
def kernel_log(trial):
    import re
    from . import Disk
    disks = [Disk(trial.image("a", 8 << 20), serial="a"), Disk(trial.image("b", 1 << 20), serial="b", readonly=True)]
    machine = trial.machine(USE_ALL, cmdline="console=ttyS0", cpus=4, memory="512M", disks=disks, cards=[trial.tap(1), trial.tap(2)])
    result = trial.finish(trial.start(machine), 170, "cpus mkfs read-only ping log-read")
    if not result.kernel_log and "Linux version" not in (trial.place / "serial").read_text(errors="replace"):
        raise Failure("no kernel log was read")
    bad = [line for line in result.kernel_log if not any(re.search(one, line) for one, _ in ALLOWED_KERNEL_LINES)]
    if bad:
        raise Failure(f"{len(bad)} lines in the kernel log: " + " / ".join(bad[:8]))
    serial = (trial.place / "serial").read_text(errors="replace")
    if "Linux version 6.1" not in serial:
        raise Failure("the serial line did not carry the kernel's messages")
