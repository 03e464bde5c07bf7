"""Kernel packages as files: the bzImage, the ELF vmlinux inside it, and modules in the order they must be loaded."""

import lzma
import os
import struct
import subprocess
from pathlib import Path

from . import cache, debian
from .cache import LabError


class Kernel:
    """One unpacked kernel package below .lab/kernels/."""

    def __init__(self, directory):
        self.directory = Path(directory)
        (self.modules,) = (self.directory / "lib/modules").iterdir()
        self.version = self.modules.name
        self.image = self.directory / "boot" / f"vmlinuz-{self.version}"
        self.vmlinux = self.directory / "boot" / f"vmlinux-{self.version}"
        self._dependencies = {}
        for line in (self.modules / "modules.dep").read_text().splitlines():
            path, _, needed = line.partition(":")
            self._dependencies[_module_name(path)] = (path, [_module_name(one) for one in needed.split()])
        self._built_in = {_module_name(line) for line in (self.modules / "modules.builtin").read_text().splitlines()}

    def load_order(self, names):
        """Paths of the module files to load, what is needed first. Built-in ones are left out."""
        order = []

        def add(name):
            name = name.replace("-", "_")
            if name in self._built_in:
                return
            if name not in self._dependencies:
                raise LabError(f"Kernel {self.version} has no module {name}")
            path, needed = self._dependencies[name]
            for one in reversed(needed):
                add(one)
            if path not in order:
                order.append(path)

        for name in names:
            add(name)
        return [self.modules / path for path in order]


def from_package(meta_package):
    """The kernel behind a Debian meta-package such as `linux-image-amd64`, unpacked below .lab/ if it is not yet."""
    root = cache.ROOT / "kernels" / meta_package
    with cache.lock("kernels"):
        cache.made(root, lambda directory: _unpack(meta_package, directory), f"fetching {meta_package}")
    return Kernel(root)


def _unpack(meta_package, directory):
    debian.unpack(debian.newest_dependency(meta_package), directory)
    (modules,) = (directory / "lib/modules").iterdir()
    version = modules.name
    done = subprocess.run(["/sbin/depmod", "-b", str(directory), version], capture_output=True, text=True)
    if done.returncode != 0:
        raise LabError(f"depmod failed on {meta_package}: {done.stderr.strip()}")
    vmlinux = unpacked_vmlinux((directory / "boot" / f"vmlinuz-{version}").read_bytes())
    (directory / "boot" / f"vmlinux-{version}").write_bytes(vmlinux)
    for module in os.listdir(directory):
        if module not in ("boot", "lib"):
            cache.remove(directory / module)


def unpacked_vmlinux(image):
    """The ELF file inside a bzImage (Documentation/arch/x86/boot.rst: payload_offset, payload_length)."""
    if len(image) < 0x250 or image[0x202:0x206] != b"HdrS":
        raise LabError("The kernel file is not a bzImage")
    setup_sectors = image[0x1F1] or 4
    offset, length = struct.unpack_from("<II", image, 0x248)
    start = (setup_sectors + 1) * 512 + offset
    payload = image[start:start + length]
    # The last four bytes of the payload are the unpacked size, put there by the kernel's build.
    body, (size,) = payload[:-4], struct.unpack("<I", payload[-4:])
    if body.startswith(b"\x02\x21\x4c\x18"):
        unpacked = subprocess.run(["lz4", "-d", "-c"], input=body, stdout=subprocess.PIPE, check=True).stdout
    elif body.startswith(b"\xfd7zXZ\0"):
        unpacked = lzma.decompress(body, lzma.FORMAT_XZ)
    else:
        raise LabError(f"The kernel's payload begins with {body[:6].hex()}, which is neither LZ4 nor XZ")
    if len(unpacked) != size or unpacked[:4] != b"\x7fELF":
        raise LabError(f"The kernel unpacked to {len(unpacked)} bytes, expected an ELF file of {size}")
    return unpacked


def _module_name(path):
    return os.path.basename(path).partition(".ko")[0].replace("-", "_")
