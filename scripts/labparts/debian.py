"""Debian packages: installs what is missing, downloads and unpacks without installing."""

import os
import shutil
import subprocess

from .cache import LabError, say

# Kernel packages are never installed: only unpacked below .lab/.
_APT = ["-q", "-o", "APT::Sandbox::User=root", "-o", "DPkg::Lock::Timeout=120"]


def _run(command, **options):
    return subprocess.run(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                          text=True, **options)


def _installed(package):
    shown = _run(["dpkg-query", "-W", "-f", "${Status}", package])
    return shown.returncode == 0 and shown.stdout.endswith("ok installed")


def _environment():
    return dict(os.environ, DEBIAN_FRONTEND="noninteractive", LC_ALL="C.UTF-8")


def update():
    """Refreshes the package lists (needs root)."""
    say("refreshing the Debian package lists")
    done = _run(["apt-get", *_APT, "update"], env=_environment())
    if done.returncode != 0:
        raise LabError(f"apt-get update failed:\n{done.stdout.strip()}")


def require(packages):
    """Installs those of `packages` that are missing; an ordinary user is told what to install."""
    if shutil.which("dpkg-query") is None:
        raise LabError("This needs Debian (dpkg and apt-get); elsewhere install by hand and adapt labparts/debian.py")
    missing = [package for package in packages if not _installed(package)]
    if not missing:
        return
    if os.geteuid() != 0:
        raise LabError(f"Packages are missing; run as root: apt-get install --no-install-recommends {' '.join(missing)}")
    say(f"installing {' '.join(missing)}")
    command = ["apt-get", *_APT, "install", "-y", "--no-install-recommends", *missing]
    done = _run(command, env=_environment())
    if done.returncode != 0:
        update()
        done = _run(command, env=_environment())
    if done.returncode != 0:
        raise LabError(f"apt-get could not install {' '.join(missing)}:\n{done.stdout.strip()}")


def newest_dependency(package):
    """The first package that the meta-package `package` depends on: the kernel of today behind `linux-image-amd64`."""
    for attempt in range(2):
        shown = _run(["apt-cache", "depends", package], env=_environment())
        for line in shown.stdout.splitlines():
            kind, _, name = line.strip().partition(": ")
            if kind == "Depends":
                return name
        if attempt == 0 and os.geteuid() == 0:
            update()
    raise LabError(f"apt knows no package {package}; run apt-get update as root")


def unpack(package, directory):
    """Downloads `package` and unpacks it into `directory`, which must not exist yet."""
    os.makedirs(directory)
    command = ["apt-get", *_APT, "download", package]
    done = _run(command, cwd=directory, env=_environment())
    if done.returncode != 0 and os.geteuid() == 0:
        update()
        done = _run(command, cwd=directory, env=_environment())
    archives = [name for name in os.listdir(directory) if name.endswith(".deb")]
    if done.returncode != 0 or len(archives) != 1:
        raise LabError(f"apt-get could not download {package}:\n{done.stdout.strip()}")
    archive = os.path.join(directory, archives[0])
    done = _run(["dpkg", "-x", archive, directory])
    if done.returncode != 0:
        raise LabError(f"dpkg could not unpack {package}:\n{done.stdout.strip()}")
    os.unlink(archive)
