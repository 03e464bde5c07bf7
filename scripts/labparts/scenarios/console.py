"""The console: a person logs in."""

from . import QUICK, Disk, Failure, scenario


def boot_root_disk(trial, cmdline="", **parts):
    """A machine with the root disk, at its login prompt."""
    root = trial.place / "root.img"
    trial.images.copy_root(root)
    machine = trial.machine(initramfs=trial.images.initramfs, disks=[Disk(root, serial="root")],
                            cmdline=f"{QUICK} martlet.root=/dev/vda {cmdline}", **parts)
    running = trial.start(machine)
    running.wait_for("guest login: ", 90)
    return running


def log_in(running):
    """From the login prompt to the shell."""
    start = running.type("root\r")
    running.wait_for(r"guest:\S*# ", 30, start)


def answer(running, line):
    """Types a command line into the shell; its output."""
    start = running.type(f"{line}\r")
    match = running.wait_for(r"(?s)\r\n(.*?)guest:\S*# ", 30, start)
    return match[1].decode(errors="replace").replace("\r", "").strip()


@scenario("a person logs in on the console of a guest with a root disk, works there, powers off", 150)
def console_login(trial):
    running = boot_root_disk(trial)
    log_in(running)
    for line, expected in (("tty", "/dev/hvc0"), ("id -u", "0"), ("echo $((6 * 7))", "42"),
                           ("cat /proc/1/comm", "init"), ("touch /root/was-here && echo done", "done")):
        found = answer(running, line)
        if found != expected:
            raise Failure(f"'{line}' printed '{found}' instead of '{expected}'")
    # Ctrl-C ends a command: the byte reaches the guest and is not eaten by a terminal on the way.
    start = running.type("sleep 1000; echo sl''ept\r")
    running.wait_for("sleep 1000", 20, start)
    import time
    time.sleep(2)
    start = running.type("\x03")
    running.wait_for(r"guest:\S*# ", 20, start)
    # A long output arrives whole.
    found = answer(running, "seq 1 3000")
    if found.split() != [str(number) for number in range(1, 3001)]:
        raise Failure(f"'seq 1 3000' printed {len(found.split())} words")
    size = answer(running, "stty size")
    running.type("poweroff\r")
    code = running.wait_for_end(60)
    if code != 0:
        raise Failure(f"the machine ended with {code}; {running.tail()}")
    expected = f"{running.rows} {running.columns}"
    if size != expected and trial.vmm.name == "martlet":
        raise Failure(f"the terminal is {size} in the guest, {expected} outside")
    return f"terminal size {size}"
