"""Initramfs archives in the `newc` format (kernel: Documentation/driver-api/early-userspace/buffer-format.rst)."""

import os
import stat


class Archive:
    """Collects entries and gives their bytes. Device nodes need no root; times are zero, so bytes are repeatable."""

    def __init__(self):
        self._parts = []
        self._inode = 0
        self._known = set()

    def _entry(self, name, mode, data=b"", device=(0, 0)):
        self._inode += 1
        encoded = name.encode() + b"\0"
        fields = (self._inode, mode, 0, 0, 1, 0, len(data), 0, 0, device[0], device[1], len(encoded), 0)
        header = b"070701" + b"".join(b"%08X" % field for field in fields)
        self._parts.append(_padded(header + encoded) + _padded(data))

    def directory(self, name, mode=0o755):
        """A directory with its parents; the second time it is already there."""
        name = name.strip("/")
        if not name or name in self._known:
            return
        self.directory(name.rpartition("/")[0])
        self._known.add(name)
        self._entry(name, stat.S_IFDIR | mode)

    def file(self, name, data, mode=0o644):
        """A regular file with its parent directories."""
        name = name.strip("/")
        self.directory(name.rpartition("/")[0])
        self._entry(name, stat.S_IFREG | mode, data if isinstance(data, bytes) else data.encode())

    def copy(self, source, name, mode=None):
        """A file of this machine, with its mode unless another is given."""
        with open(source, "rb") as handle:
            data = handle.read()
            permissions = stat.S_IMODE(os.fstat(handle.fileno()).st_mode)
        self.file(name, data, permissions if mode is None else mode)

    def link(self, name, target):
        """A symbolic link."""
        name = name.strip("/")
        self.directory(name.rpartition("/")[0])
        self._entry(name, stat.S_IFLNK | 0o777, target.encode())

    def character_device(self, name, major, minor, mode=0o600):
        """A device node, such as the console that the kernel opens for init."""
        name = name.strip("/")
        self.directory(name.rpartition("/")[0])
        self._entry(name, stat.S_IFCHR | mode, device=(major, minor))

    def bytes(self):
        """The archive, padded to 512 bytes; several may follow one another in one initramfs."""
        self._entry("TRAILER!!!", 0)
        joined = b"".join(self._parts)
        self._parts = [joined]
        return joined + bytes(-len(joined) % 512)


def _padded(data):
    return data + bytes(-len(data) % 4)
