"""What the scripts around the lab and the test guests share.

Python 3.9 or newer, standard library only. Nothing here is needed to build or to run Martlet itself.

  cache.py    where things made once are kept (.lab/ of the clone), one maker at a time
  debian.py   Debian packages: install the missing, unpack kernels without installing them
  cpio.py     initramfs archives, written byte by byte (no root, no mknod, the same bytes each time)
  kernel.py   kernel packages as files: bzImage, unpacked vmlinux, modules in dependency order
"""
