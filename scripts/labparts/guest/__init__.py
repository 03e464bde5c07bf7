"""The test guest's images: kernel, initramfs and root disk, made from Debian packages without root."""

import hashlib
import os
import shutil
import subprocess
from pathlib import Path

from .. import cache, cpio, debian, kernel
from ..cache import LabError

PACKAGES = ["busybox-static", "e2fsprogs", "kmod", "lz4"]
# ext4 is built into Debian's cloud kernel. virtio_mmio serves QEMU's microvm, button and evdev the power button.
MODULES = ["virtio_pci", "virtio_mmio", "virtio_blk", "virtio_net", "virtio_console", "button", "evdev"]
PROGRAMS = ["/sbin/mke2fs", "/sbin/e2fsck"]
# On a disk of their own, for jobs that measure and break storage; started by `tool NAME` (scenarios/storage.py).
TOOL_PACKAGES = ["fio", "xfsprogs", "util-linux"]
TOOLS = ["/usr/bin/fio", "/sbin/mkfs.xfs", "/sbin/blkdiscard", "/sbin/fstrim"]
TOOL_MODULES = ["xfs"]
_HERE = Path(__file__).resolve().parent


class Images:
    """The files below .lab/guest/."""

    def __init__(self, directory):
        self.directory = directory
        self.bzimage = directory / "vmlinuz"
        self.vmlinux = directory / "vmlinux"
        self.initramfs = directory / "initramfs"
        self.root = directory / "root.img"

    def initramfs_with(self, job, files=None):
        """The initramfs with `job`, a shell script, behind it, and `files` by their absolute names."""
        archive = cpio.Archive()
        if job is not None:
            archive.file("job", job, 0o755)
        for name, data in (files or {}).items():
            archive.file(name, data, 0o755)
        return self.initramfs.read_bytes() + archive.bytes()

    def copy_root(self, destination):
        """A copy of the root disk that takes no more space than is used."""
        done = subprocess.run(["cp", "--sparse=always", str(self.root), str(destination)], capture_output=True, text=True)
        if done.returncode != 0:
            raise LabError(f"Cannot copy the root disk: {done.stderr.strip()}")


def images():
    """The images, built if they are missing or older than what describes them."""
    with cache.lock("packages"):
        debian.require(PACKAGES)
    cloud = kernel.from_package("linux-image-cloud-amd64")
    digest = hashlib.sha256(cloud.version.encode())
    for source in sorted(_HERE.rglob("*")) + [Path(cpio.__file__), Path("/bin/busybox"), *map(Path, PROGRAMS)]:
        if source.is_file():
            digest.update(source.read_bytes())
    directory = cache.ROOT / "guest"
    with cache.lock("guest"):
        stamp = directory / "built-from"
        if directory.exists() and not (stamp.exists() and stamp.read_text() == digest.hexdigest()):
            cache.remove(directory)
        cache.made(directory, lambda place: _build(place, cloud, digest.hexdigest()), "building the guest images")
    return Images(directory)


def _build(place, cloud, stamp):
    place.mkdir()
    os.link(cloud.image, place / "vmlinuz")
    os.link(cloud.vmlinux, place / "vmlinux")
    (place / "initramfs").write_bytes(_initramfs(cloud))
    _root_disk(place)
    (place / "built-from").write_text(stamp)


def tools():
    """An ext4 image with TOOLS in /bin, what they load in /lib, the loader as /ld.so, and kernel modules in /modules."""
    with cache.lock("packages"):
        debian.require(TOOL_PACKAGES)
    cloud = kernel.from_package("linux-image-cloud-amd64")
    digest = hashlib.sha256(cloud.version.encode())
    for source in [Path(__file__), *map(Path, TOOLS)]:
        digest.update(source.read_bytes())
    directory = cache.ROOT / "guest-tools"
    with cache.lock("guest-tools"):
        stamp = directory / "built-from"
        if directory.exists() and not (stamp.exists() and stamp.read_text() == digest.hexdigest()):
            cache.remove(directory)
        cache.made(directory, lambda place: _build_tools(place, cloud, digest.hexdigest()), "building the guest's tool disk")
    return directory / "tools.img"


def _build_tools(place, cloud, stamp):
    tree = place / "tree"
    for name in ("bin", "lib", "modules"):
        (tree / name).mkdir(parents=True)
    for program in TOOLS:
        shutil.copy(os.path.realpath(program), tree / "bin" / os.path.basename(program))
    for name, source in _programs(TOOLS).items():
        if name.startswith("/bin/"):
            continue
        loader = "/ld-linux" in name
        shutil.copy(source, tree / ("ld.so" if loader else f"lib/{os.path.basename(name)}"))
    modules = cloud.load_order(TOOL_MODULES)
    for module in modules:
        shutil.copy(module, tree / "modules" / module.name)
    (tree / "modules/order").write_text("".join(f"{module.name}\n" for module in modules))
    size = sum(one.stat().st_size for one in tree.rglob("*") if one.is_file())
    done = subprocess.run(["/sbin/mke2fs", "-q", "-t", "ext4", "-O", "^has_journal", "-E", "root_owner=0:0", "-d", str(tree),
                           str(place / "tools.img"), f"{size // 900000 + 16}M"], capture_output=True, text=True)
    if done.returncode != 0:
        raise LabError(f"mke2fs could not make the tool disk: {done.stderr.strip()}")
    cache.remove(tree)
    (place / "built-from").write_text(stamp)


def _programs(programs=PROGRAMS):
    """Every file that programs need, by ldd: name in the guest -> file here."""
    files = {}
    for program in programs:
        files["/bin/" + os.path.basename(program)] = program
        shown = subprocess.run(["ldd", program], capture_output=True, text=True, check=True).stdout
        for line in shown.splitlines():
            for word in line.split():
                if word.startswith("/"):
                    files[word] = os.path.realpath(word)
    return files


def _initramfs(cloud):
    archive = cpio.Archive()
    for directory in ("dev", "proc", "sys", "new", "modules"):
        archive.directory(directory)
    archive.character_device("dev/console", 5, 1)
    archive.copy("/bin/busybox", "bin/busybox", 0o755)
    for name, source in _programs().items():
        archive.copy(source, name, 0o755)
    archive.link("bin/mkfs.ext4", "mke2fs")
    archive.link("bin/fsck.ext4", "e2fsck")
    modules = cloud.load_order(MODULES)
    for module in modules:
        archive.copy(module, f"modules/{module.name}")
    archive.file("modules/order", "".join(f"{module.name}\n" for module in modules))
    archive.copy(_HERE / "checks.sh", "checks.sh", 0o644)
    archive.copy(_HERE / "init", "init", 0o755)
    return archive.bytes()


def _root_disk(place):
    tree = place / "root"
    for directory in ("bin", "sbin", "dev", "proc", "sys", "etc", "root", "run", "tmp", "mnt", "lib64", "var/log"):
        (tree / directory).mkdir(parents=True, exist_ok=True)
    shutil.copy("/bin/busybox", tree / "bin/busybox")
    applets = subprocess.run(["/bin/busybox", "--list-full"], capture_output=True, text=True, check=True).stdout
    for applet in applets.split():
        name = applet.rpartition("/")[2]
        if name not in ("busybox", "mke2fs") and not (tree / "bin" / name).exists():
            (tree / "bin" / name).symlink_to("busybox")
    (tree / "sbin/init").symlink_to("../bin/busybox")
    for name, source in _programs().items():
        target = tree / name.lstrip("/")
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(source, target)
        target.chmod(0o755)
    (tree / "bin/mkfs.ext4").symlink_to("mke2fs")
    (tree / "bin/fsck.ext4").symlink_to("e2fsck")
    for source in (_HERE / "root-etc").iterdir():
        shutil.copy(source, tree / "etc" / source.name)
    for script in ("start", "console", "shell"):
        (tree / "etc" / script).chmod(0o755)
    # Where busybox's acpid looks for what the power button does.
    button = tree / "etc/acpi/PWRF/00000080"
    button.parent.mkdir(parents=True)
    button.write_text("#!/bin/sh\nexec /bin/poweroff\n")
    button.chmod(0o755)
    (tree / "tmp").chmod(0o1777)
    # As another user than root: in a user namespace, so that the files belong to root in the image.
    prefix = [] if os.geteuid() == 0 else ["unshare", "-r"]
    done = subprocess.run([*prefix, "/sbin/mke2fs", "-q", "-t", "ext4", "-L", "martlet-root", "-E", "root_owner=0:0",
                           "-d", str(tree), str(place / "root.img"), "256M"], capture_output=True, text=True)
    if done.returncode != 0:
        raise LabError(f"mke2fs could not make the root disk: {done.stderr.strip()}")
    cache.remove(tree)
