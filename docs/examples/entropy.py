#!/usr/bin/env python3
"""A vhost-user entropy device, written from protocol/vhost-user.md alone: no library of Martlet's, nothing but Python.

  entropy.py --socket-path PATH     listens, serves one front end after another
  entropy.py --fd NUMBER            serves the front end at the other end of this inherited socket
  entropy.py --print-capabilities   what this program can do as JSON

Try it:  martlet probe check --type rng -- docs/examples/entropy.py --socket-path {socket}
         martlet run ... --generic-vhost-user socket=PATH,device_type=rng,queue_sizes=[64]

It offers split rings without event indices and indirect tables, kicks are never turned off and every answer is called: Python
has no memory fences, and this needs none on x86, where stores stay in order and so do loads.
"""

import ctypes
import json
import mmap
import os
import selectors
import signal
import socket
import stat
import struct
import sys

GET_FEATURES, SET_FEATURES, SET_OWNER, RESET_OWNER, SET_MEM_TABLE = 1, 2, 3, 4, 5
SET_VRING_NUM, SET_VRING_ADDR, SET_VRING_BASE, GET_VRING_BASE = 8, 9, 10, 11
SET_VRING_KICK, SET_VRING_CALL, SET_VRING_ERR = 12, 13, 14
GET_PROTOCOL_FEATURES, SET_PROTOCOL_FEATURES, GET_QUEUE_NUM, SET_VRING_ENABLE = 15, 16, 17, 18
EVENTS = (SET_VRING_KICK, SET_VRING_CALL, SET_VRING_ERR)

PROTOCOL_FEATURES = 1 << 30
FEATURES = 1 << 32 | PROTOCOL_FEATURES  # VERSION_1
OWN_PROTOCOL_FEATURES = 1 << 0 | 1 << 3  # MQ, REPLY_ACK
QUEUES, LONGEST_RING, EINVAL, EOPNOTSUPP = 1, 1024, 22, 95


class Left(Exception):
    """The front end is gone, or broke the protocol so that nothing more can be understood."""


class Refused(Exception):
    """One request is wrong: answered with an errno value where that was asked for."""

    def __init__(self, why, number=EINVAL):
        super().__init__(why)
        self.number = number


class Memory:
    """The guest's memory as the last table has it."""

    def __init__(self, table, descriptors):
        self.regions = []
        for (guest, size, user, offset), descriptor in zip(table, descriptors):
            if size == 0 or max(guest, user, offset) + size > 1 << 64:
                raise Refused("a region without bytes, or one that wraps around")
            for other_guest, other_size, other_user, *_ in self.regions:
                if guest < other_guest + other_size and other_guest < guest + size:
                    raise Refused("regions overlap in the guest")
                if user < other_user + other_size and other_user < user + size:
                    raise Refused("regions overlap at the front end")
            # Whoever reads beyond the end of a file is killed.
            if os.fstat(descriptor).st_size < offset + size:
                raise Refused("the file of a region is shorter than the region")
            try:
                whole = mmap.mmap(descriptor, offset + size)
            except (OSError, ValueError, OverflowError) as error:
                raise Refused(f"a region cannot be mapped: {error}")
            self.regions.append((guest, size, user, offset, whole))

    def _find(self, address, count, by_user):
        for guest, size, user, offset, whole in self.regions:
            start = address - (user if by_user else guest)
            if 0 <= start and start + count <= size:
                return whole, offset + start
        return None

    def guest(self, address, count):
        """Where that guest memory lies here: a mapping and an offset, or None."""
        return self._find(address, count, False)

    def user(self, address, count):
        return self._find(address, count, True)


class Area:
    """One part of a ring. Each field is loaded and stored as a whole, never byte by byte."""

    def __init__(self, place, address, alignment):
        if place is None or address % alignment:
            raise Refused("a ring does not lie aligned in guest memory")
        self.whole, self.start = place

    def u16(self, offset):
        return ctypes.c_uint16.from_buffer(self.whole, self.start + offset)

    def u32(self, offset):
        return ctypes.c_uint32.from_buffer(self.whole, self.start + offset)

    def u64(self, offset):
        return ctypes.c_uint64.from_buffer(self.whole, self.start + offset)


class Ring:
    """The one queue."""

    def __init__(self):
        self.kick = self.call = self.error = None
        self.forget()

    def forget(self):
        self.size, self.base, self.addresses = 0, 0, None
        self.is_started = self.is_enabled = False

    def close(self):
        for descriptor in (self.kick, self.call, self.error):
            if descriptor is not None:
                os.close(descriptor)
        self.kick = self.call = self.error = None

    def locate(self, memory):
        """Finds descriptor table, used and available ring in this memory; all or nothing."""
        if not self.size or not self.addresses or memory is None:
            raise Refused("a ring is started without size, address or memory")
        table, used, available = self.addresses
        areas = [Area(memory.user(table, 16 * self.size), table, 16), Area(memory.user(used, 6 + 8 * self.size), used, 4),
                 Area(memory.user(available, 6 + 2 * self.size), available, 2)]
        self.table, self.used, self.available = areas
        self.memory = memory

    def chain(self, head):
        """The writable buffers of a chain as (address, length); None when the driver broke the rules."""
        buffers, index = [], head
        for _ in range(self.size):
            if index >= self.size:
                return None
            # Copied out field by field, then judged: the guest may change them at any time.
            address, length = self.table.u64(16 * index).value, self.table.u32(16 * index + 8).value
            flags, after = self.table.u16(16 * index + 12).value, self.table.u16(16 * index + 14).value
            if flags & 4 or length == 0 or self.memory.guest(address, length) is None:
                return None
            if flags & 2:
                buffers.append((address, length))
            elif buffers:
                return None
            if not flags & 1:
                return buffers
            index = after
        return None

    def serve(self):
        """Answers everything that is available; false when the ring is broken."""
        if not (self.is_started and self.is_enabled):
            return True
        available = self.available.u16(2).value
        if (available - self.base) & 0xFFFF > self.size:
            return False
        used = self.used.u16(2).value
        answered = 0
        while self.base != available:
            head = self.available.u16(4 + 2 * (self.base % self.size)).value
            buffers = self.chain(head)
            if buffers is None:
                break
            written = self.fill(buffers)
            slot = 4 + 8 * (used % self.size)
            self.used.u32(slot).value = head
            self.used.u32(slot + 4).value = written
            used, self.base, answered = (used + 1) & 0xFFFF, (self.base + 1) & 0xFFFF, answered + 1
        if answered:
            # After the elements: with this store the driver sees them.
            self.used.u16(2).value = used
            self.notify()
        return self.base == available

    def fill(self, buffers):
        """The device: random bytes, at most 4096 of them, from the start of the buffers on."""
        written = 0
        for address, length in buffers:
            count = min(length, 4096 - written)
            whole, start = self.memory.guest(address, count)
            whole[start:start + count] = os.urandom(count)
            written += count
        return written

    def notify(self):
        if self.call is not None:
            os.eventfd_write(self.call, 1)


class Session:
    """One front end, from its first message to its end."""

    def __init__(self, connection):
        self.socket = connection
        self.loop = selectors.DefaultSelector()
        self.loop.register(connection, selectors.EVENT_READ, "socket")
        self.ring = Ring()
        self.memory = None
        self.features = self.protocol_features = 0

    def run(self):
        try:
            while True:
                for key, _ in self.loop.select():
                    if key.data == "socket":
                        self.receive()
                    elif key.fd == self.ring.kick:
                        os.eventfd_read(self.ring.kick)
                        self.serve()
        except (Left, OSError) as end:
            print(f"entropy.py: the front end is gone: {end}", file=sys.stderr)
        finally:
            self.loop.close()
            self.ring.close()
            self.socket.close()

    def serve(self):
        if not self.ring.serve():
            # The front end will tell the guest that the device needs a reset.
            self.ring.is_enabled = False
            if self.ring.error is not None:
                os.eventfd_write(self.ring.error, 1)

    # Messages: a header of request, flags and size, then the payload; descriptors come with the first byte.

    def receive(self):
        header, packed, flags, _ = self.socket.recvmsg(12, socket.CMSG_SPACE(4 * 32))
        descriptors = [number for _, _, data in packed for number, in struct.iter_unpack("i", data[:len(data) // 4 * 4])]
        try:
            self.socket.settimeout(1)
            header += self.exactly(12 - len(header), bool(header))
            request, marks, size = struct.unpack("=III", header)
            if flags & socket.MSG_CTRUNC or marks & ~0x8 != 1 or size > 4096:
                raise Left(f"header {header.hex()}")
            payload = self.exactly(size, True)
            needs_reply = bool(marks & 0x8)
            try:
                reply = self.handle(request, payload, descriptors)
            except Refused as refusal:
                print(f"entropy.py: request {request} is refused: {refusal}", file=sys.stderr)
                if not (needs_reply and self.protocol_features & 1 << 3):
                    raise Left("a request that cannot be refused otherwise")
                reply = struct.pack("=Q", refusal.number)
            else:
                acknowledges = needs_reply and (self.protocol_features & 1 << 3 or request == SET_PROTOCOL_FEATURES)
                if reply is None and acknowledges:
                    reply = struct.pack("=Q", 0)
            if reply is not None:
                self.socket.sendall(struct.pack("=III", request, 0x5, len(reply)) + reply)
        finally:
            # What was kept has been taken out of the list.
            for descriptor in descriptors:
                os.close(descriptor)

    def exactly(self, count, is_begun):
        data = b""
        while len(data) < count:
            piece = self.socket.recv(count - len(data))
            if not piece:
                raise Left("in the middle of a message" if is_begun or data else "it closed the connection")
            data += piece
        return data

    def handle(self, request, payload, descriptors):
        """Does a request; its reply, or None when it has none of its own."""
        sizes = {GET_FEATURES: 0, SET_FEATURES: 8, SET_OWNER: 0, RESET_OWNER: 0, SET_VRING_NUM: 8, SET_VRING_ADDR: 40, SET_VRING_BASE: 8,
                 GET_VRING_BASE: 8, SET_VRING_KICK: 8, SET_VRING_CALL: 8, SET_VRING_ERR: 8, GET_PROTOCOL_FEATURES: 0,
                 SET_PROTOCOL_FEATURES: 8, GET_QUEUE_NUM: 0, SET_VRING_ENABLE: 8}
        if request == SET_MEM_TABLE:
            return self.set_memory(payload, descriptors)
        if request not in sizes or len(payload) != sizes[request] or (descriptors and request not in EVENTS):
            raise Left(f"request {request} with {len(payload)} bytes and {len(descriptors)} descriptors")
        number = struct.unpack("=Q", payload)[0] if len(payload) == 8 else 0
        if request == GET_FEATURES:
            return struct.pack("=Q", FEATURES)
        if request == GET_PROTOCOL_FEATURES:
            return struct.pack("=Q", OWN_PROTOCOL_FEATURES)
        if request == GET_QUEUE_NUM:
            if not self.protocol_features & 1:
                raise Left("GET_QUEUE_NUM without MQ")
            return struct.pack("=Q", QUEUES)
        if request == SET_FEATURES:
            if number & ~FEATURES or (self.ring.is_started and number != self.features):
                raise Refused("features that are not offered, or that change under a running ring")
            self.features = number
        elif request == SET_PROTOCOL_FEATURES:
            if number & ~OWN_PROTOCOL_FEATURES:
                raise Refused("protocol features that are not offered")
            self.protocol_features = number
        elif request == RESET_OWNER:
            self.ring.is_enabled = False
        elif request in EVENTS:
            self.set_event(request, number, descriptors)
        elif request != SET_OWNER:
            return self.set_ring(request, payload)
        return None

    def set_memory(self, payload, descriptors):
        if len(payload) < 8:
            raise Left("SET_MEM_TABLE without its count")
        count, padding = struct.unpack_from("=II", payload)
        if count > 32 or len(payload) != 8 + 32 * count or len(descriptors) != count:
            raise Left(f"SET_MEM_TABLE of {count} regions with {len(payload)} bytes and {len(descriptors)} descriptors")
        if count == 0 or padding:
            raise Refused("an empty table, or padding that is not zero")
        memory = Memory([struct.unpack_from("=QQQQ", payload, 8 + 32 * index) for index in range(count)], descriptors)
        if self.ring.is_started:
            self.ring.locate(memory)
        self.memory = memory

    def set_ring(self, request, payload):
        ring = self.ring
        index, number = struct.unpack_from("=II", payload)
        if index >= QUEUES:
            raise Refused(f"there is no ring {index}")
        if request == GET_VRING_BASE:
            if ring.is_started:
                self.loop.unregister(ring.kick)
                os.close(ring.kick)
                ring.kick, ring.is_started = None, False
            return struct.pack("=II", index, ring.base)
        if request == SET_VRING_ENABLE:
            if number > 1:
                raise Refused("a ring is enabled by 1 and disabled by 0")
            ring.is_enabled = bool(number)
            self.serve()
            return None
        if ring.is_started:
            raise Refused("a running ring keeps size, base and addresses")
        if request == SET_VRING_NUM:
            if not 0 < number <= LONGEST_RING or number & (number - 1):
                raise Refused(f"a ring of {number} entries")
            ring.size = number
        elif request == SET_VRING_BASE:
            if number > 0xFFFF:
                raise Refused(f"base {number}")
            ring.base = number
        else:
            _, flags, table, used, available, _ = struct.unpack("=IIQQQQ", payload)
            if flags:
                raise Refused("dirty logging is not offered", EOPNOTSUPP)
            ring.addresses = (table, used, available)
        return None

    def set_event(self, request, number, descriptors):
        ring = self.ring
        has_descriptor = not number & 0x100
        if number >> 9 or len(descriptors) != has_descriptor:
            raise Left(f"an event {number:#x} with {len(descriptors)} descriptors")
        if number & 0xFF >= QUEUES:
            raise Refused(f"there is no ring {number & 0xFF}")
        if request == SET_VRING_KICK:
            if not has_descriptor:
                raise Refused("rings are not polled", EOPNOTSUPP)
            if not self.features & 1 << 32:
                raise Refused("VERSION_1 was not acknowledged")
            if not ring.is_started:
                ring.locate(self.memory)
            if not stat.S_IFMT(os.fstat(descriptors[0]).st_mode) == 0:
                raise Refused("a kick that is no eventfd")
            os.set_blocking(descriptors[0], False)
            self.loop.register(descriptors[0], selectors.EVENT_READ, "kick")
            if ring.kick is not None:
                self.loop.unregister(ring.kick)
                os.close(ring.kick)
            ring.kick = descriptors.pop()
            if not ring.is_started:
                ring.is_started = True
                # Without bit 30 nobody will enable it.
                ring.is_enabled = ring.is_enabled or not self.features & PROTOCOL_FEATURES
            self.serve()
            return
        name = "call" if request == SET_VRING_CALL else "error"
        if getattr(ring, name) is not None:
            os.close(getattr(ring, name))
        setattr(ring, name, descriptors.pop() if has_descriptor else None)
        if name == "call":
            # Covers a call that was lost between the old descriptor and the new one.
            ring.notify()


def main(words):
    if "--print-capabilities" in words:
        print(json.dumps({"type": "rng"}))
        return 0
    rest = [part for word in words for part in word.split("=", 1)]
    options = dict(zip(rest[::2], rest[1::2]))
    if len(rest) % 2 or len(options) != 1 or not options.keys() <= {"--socket-path", "--fd"}:
        print(__doc__, file=sys.stderr)
        return 2
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(0))
    # Whoever started this may have had it blocked.
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
    if "--fd" in options:
        Session(socket.socket(fileno=int(options["--fd"]))).run()
        return 0
    path = options["--socket-path"]
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        try:
            listener.listen()
            while True:
                Session(listener.accept()[0]).run()
        finally:
            os.unlink(path)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
