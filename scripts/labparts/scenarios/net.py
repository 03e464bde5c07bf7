"""Network: TCP both ways with checksums, between the guest and this namespace."""

import socket
import threading

from . import Failure, pattern, scenario, sum_of

SIZE = 6 << 20


class Peer:
    """This side of the transfers: two listening sockets and, when the guest listens, one connection to it."""

    def __init__(self, address):
        self.address = address
        self.received = b""
        self.problem = None
        self.threads = []
        self._serve(7001, self._take)
        self._serve(7002, self._give)

    def _serve(self, port, function):
        listener = socket.create_server((self.address, port))
        listener.settimeout(120)

        def work():
            try:
                with listener, listener.accept()[0] as connection:
                    connection.settimeout(60)
                    function(connection)
            except OSError as error:
                self.problem = f"port {port}: {error}"

        thread = threading.Thread(target=work, daemon=True)
        thread.start()
        self.threads.append(thread)

    def _take(self, connection):
        while data := connection.recv(65536):
            self.received += data
        connection.sendall(sum_of(self.received).encode())

    def _give(self, connection):
        connection.sendall(pattern("host to guest", SIZE))

    def call(self, address, port):
        """Connects to the guest and sends."""
        with socket.create_connection((address, port), timeout=30) as connection:
            connection.sendall(pattern("call", SIZE))

    def done(self):
        for thread in self.threads:
            thread.join(10)
        if self.problem:
            raise Failure(self.problem)


JOB = f"""
mount -t tmpfs -o size=100m tmpfs /tmp
c=$(card 52:54:00:77:00:01)
equal card eth0 $c
ip addr add 10.77.1.2/24 dev $c
ip link set $c up
succeeds ping ping -c 3 -w 20 10.77.1.1
succeeds ping-large ping -c 2 -s 8000 -w 20 10.77.1.1
dd if=/dev/urandom of=/tmp/out bs=64k count={SIZE >> 16} 2>/dev/null
equal guest-to-host "$(sum /tmp/out)" "$(nc 10.77.1.1 7001 </tmp/out)"
nc 10.77.1.1 7002 </dev/null >/tmp/in
equal host-to-guest {sum_of(pattern("host to guest", SIZE))} "$(sum /tmp/in)"
nc -l -p 7003 >/tmp/called &
sleep 1
echo MARTLET-LISTENS
wait
equal host-calls-guest {sum_of(pattern("call", SIZE))} "$(sum /tmp/called)"
equal dropped 0 "$(cat /sys/class/net/$c/statistics/rx_errors)"
ip -s link show $c
"""
CHECKS = "card ping ping-large guest-to-host host-to-guest host-calls-guest dropped"


def transfer(trial, machine, on=None):
    """The whole round on a machine whose first card is at 10.77.1.2."""
    peer = Peer("10.77.1.1")
    running = trial.start(machine, on)
    running.wait_for("MARTLET-LISTENS", 120)
    peer.call("10.77.1.2", 7003)
    result = trial.finish(running, 60, CHECKS)
    peer.done()
    if len(peer.received) != SIZE:
        raise Failure(f"{len(peer.received)} bytes arrived instead of {SIZE}")
    return result


@scenario("TCP guest to host, host to guest, both kinds of connection, checksums; large pings", 180)
def net_tcp(trial):
    card = trial.tap(1)
    transfer(trial, trial.machine(JOB, cards=[card]))


@scenario("the same with two processors while a disk is busy", 180)
def net_and_disk(trial):
    from . import Disk
    card = trial.tap(1)
    image = trial.image("noise", 32 << 20)
    # Everything read must be what was written, turn after turn, while the network runs.
    job = """
(
  vd=/dev/$(disk noise)
  turn=0
  while [ ! -e /stop ]; do
    turn=$((turn + 1))
    dd if=/dev/urandom of=/block bs=64k count=16 2>/dev/null
    dd if=/block of=$vd bs=64k conv=fsync 2>/dev/null
    echo 3 >/proc/sys/vm/drop_caches
    dd if=$vd of=/again bs=64k count=16 2>/dev/null
    cmp -s /block /again || { touch /wrong; break; }
  done
  echo $turn >/turns
) &
noise=$!
""" + JOB.replace("\nwait\n", "\nwait $!\n") + """
touch /stop
wait $noise
between disk-turns 2 100000 "$(cat /turns)"
refused disk-wrong test -e /wrong
"""
    transfer(trial, trial.machine(job, cards=[card], cpus=2, disks=[Disk(image, serial="noise")]))
