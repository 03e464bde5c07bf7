import Foundation
import Glibc
import TestSupport
import Testing

/// The process that starts others is root's and trusts nobody: whoever has taken over the supervisor has its order line, and no more than
/// that. A stand-in takes the line out of a running supervisor and forges orders.
@Suite(.serialized) struct SpawnerTests {
  /// Prints for each order its name, how it was answered, the number of descriptors that came, and the sentence.
  private static let attacker = """
    import array, ctypes, os, re, socket, subprocess, sys
    supervisor, spawner, core, disk, stranger = (int(word) for word in sys.argv[1:6])
    libc = ctypes.CDLL(None, use_errno=True)

    def steal(number):
        handle = os.pidfd_open(supervisor)
        fd = libc.syscall(438, handle, number, 0)  # pidfd_getfd
        os.close(handle)
        assert fd >= 0, os.strerror(ctypes.get_errno())
        return fd

    def sockets(pid):
        found = {}
        for number in os.listdir(f"/proc/{pid}/fd"):
            match = re.fullmatch(r"socket:\\[(\\d+)\\]", os.readlink(f"/proc/{pid}/fd/{number}"))
            if match: found[match[1]] = int(number)
        return found

    peers = {}
    for line in subprocess.run(["ss", "-xaH"], capture_output=True, text=True).stdout.splitlines():
        words = line.split()
        peers[words[5]] = words[7]
    theirs, ours = sockets(spawner), sockets(supervisor)
    [number] = [ours[inode] for inode in ours if peers.get(inode) in theirs]
    line = socket.socket(fileno=steal(number))

    def ask(name, order, text, descriptors=()):
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))] if descriptors else []
        line.sendmsg([bytes([order]) + text.encode()], rights)
        line.settimeout(20)
        answer, extra, _, _ = line.recvmsg(4096, socket.CMSG_LEN(4 * 32))
        received = array.array("i")
        for _, _, data in extra: received.frombytes(data)
        for fd in received: os.close(fd)
        print(name, ["done", "not yet", "failed"][answer[0]], len(received), answer[5:].decode(), sep="|", flush=True)

    START, IMAGE, CONNECT, START_JAILED, RESIZE, ORDER, FORGET, RECORDING, USAGE = 1, 2, 3, 5, 6, 7, 8, 9, 12
    def client(text="add rng src=/dev/urandom\\n"):
        here, there = socket.socketpair()
        here.sendall(text.encode())
        return here, there

    first = int(re.search(r"Uid:\\s(\\d+)", open(f"/proc/{core}/status").read())[1])
    taken = int(re.search(r"Uid:\\s(\\d+)", open(f"/proc/{disk}/status").read())[1])
    here, there = client()
    for name, text in [
        ("id: none", ""), ("id: a blank", " "), ("id: root's", "0"), ("id: below the VM's", str(first - 1)), ("id: the core's", str(first)),
        ("id: a device's", str(taken)), ("id: the last", str(first + 59)), ("id: behind the VM's", str(first + 60)),
        ("id: somebody's", "65534"), ("id: beyond numbers", str(1 << 32)), ("id: negative", "-1"), ("id: a word", "root"),
    ]: ask(name, ORDER, text, [there.fileno()])
    free = str(first + 40)
    ask("client: none", ORDER, free)
    for number in ours.values():
        copy = socket.socket(fileno=steal(number))
        if copy.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN): continue
        pid = int.from_bytes(copy.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)[:4], "little")
        if pid == supervisor: break
    else: raise SystemExit("no connection that the supervisor has made")
    ask("client: the supervisor", ORDER, free, [copy.fileno()])
    os.seteuid(65534)
    near, far = client()
    os.seteuid(0)
    ask("client: another user", ORDER, free, [far.fileno()])
    entrance = socket.socket(socket.AF_UNIX)
    entrance.bind("\\0martlet-test-%d" % os.getpid())
    entrance.listen()
    child = os.fork()
    if child == 0:
        connection = socket.socket(socket.AF_UNIX)
        connection.connect(entrance.getsockname())
        connection.sendall(b"add rng src=/dev/urandom\\n")
        connection.recv(1)
        os._exit(0)
    gone, _ = entrance.accept()
    os.kill(child, 9)
    os.waitpid(child, 0)
    ask("client: gone", ORDER, free, [gone.fileno()])
    for name, pid in [("itself", spawner), ("the supervisor", supervisor), ("a stranger", stranger), ("the first", 1), ("nobody", 0), ("all", -1)]:
        ask("usage: " + name, USAGE, f"core {pid}")
    for name in ["", "/bin/sh", "../blk0", "supervisor", "spawner", "blk0 ", "blk0/candidate"]:
        ask(f"start: {name}", START, name)
        ask(f"start jailed: {name}", START_JAILED, name)
    for name in ["", "/etc/shadow", "../../etc/shadow"]:
        ask(f"image: {name}", IMAGE, name)
        ask(f"connect: {name}", CONNECT, name)
        ask(f"resize: {name}", RESIZE, f"{name} 0")
        ask(f"recording: {name}", RECORDING, f"{name} 0")
    for order in [0, 18, 255]: ask(f"order {order}", order, "blk0")
    # What is honest is answered.
    ask("honest usage", USAGE, f"core {core}")
    ask("honest order", ORDER, free, [there.fileno()])
    ask("honest forgetting", FORGET, "rng0")
    """

  static let canRun =
    RunningMachineTests.canRun && geteuid() == 0 && Hostile.host.lacks.isEmpty && access("/usr/bin/python3", X_OK) == 0
    && ["/usr/bin/ss", "/bin/ss", "/usr/sbin/ss", "/sbin/ss"].contains { (path: String) in access(path, X_OK) == 0 }

  @Test(.enabled(if: canRun, "Needs KVM, root, the programs, the full walls, python3 and ss."), arguments: [false, true])
  func forgedOrdersAreRefusedAndNothingComesOfThem(hasKeeper: Bool) throws {
    let directory = "/tmp/martlet-orders-\(getpid())-\(hasKeeper)"
    let name = "orders-\(getpid())-\(hasKeeper)"
    defer { try? FileManager.default.removeItem(atPath: directory) }
    try RunningMachineTests.prepare(directory)
    let vm = try RunningProgram(
      BuiltPrograms.path("martlet"),
      RunningMachineTests.command(directory, "test=idle ms=60000", name: name) + ["--cgroup", "off", "--hardened"]
        + (hasKeeper ? ["--on-supervisor-death", "continue"] : []), directory: directory)
    defer {
      vm.signal(SIGTERM)
      _ = vm.wait()
    }
    let stranger = try RunningProgram("/usr/bin/env", ["sleep", "100"])
    defer {
      stranger.signal(SIGKILL)
      _ = stranger.wait()
    }
    let view = RunningMachineTests()
    waitWhile { vm.isRunning && view.processes(of: name)["spawner"] == nil }
    func answers() throws -> Bool {
      try RunningProgram(BuiltPrograms.path("martlet"), ["ctl", "--control", "ctl", "info"], directory: directory).wait().output
        .contains("running for")
    }
    try waitWhile { try vm.isRunning && !answers() }
    let before = view.processes(of: name)
    let parent = try #require(before[hasKeeper ? "keeper" : "supervisor"])
    func children() -> Set<Substring> {
      let list = FileManager.default.contents(atPath: "/proc/\(parent)/task/\(parent)/children") ?? Data()
      return Set(String(decoding: list, as: UTF8.self).split(separator: " "))
    }
    let childrenBefore = children()
    try #require(childrenBefore.count >= before.count - 1)
    let words = try ["supervisor", "spawner", "core", "blk0"].map { String(try #require(before[$0])) }
    let result = try RunningProgram(
      "/usr/bin/env", ["python3", "-c", Self.attacker] + words + [String(stranger.pid)], directory: directory
    ).wait(seconds: 60)
    try #require(result.code == 0, "\(result.errors)")
    var count = 0
    for line in result.output.split(separator: "\n") {
      let parts = line.split(separator: "|", omittingEmptySubsequences: false)
      try #require(parts.count == 4, "\(line)")
      // Beside a keeper the supervisor is one of those that the spawner knows the use of.
      let isHonest = parts[0].hasPrefix("honest") || (hasKeeper && parts[0] == "usage: the supervisor")
      #expect(parts[1] == (isHonest ? "done" : "failed"), "\(line)")
      // An order is answered with the file that it names, and memory.
      #expect(parts[2] == (parts[0] == "honest order" ? "2" : "0"), "\(line)")
      if parts[0].hasPrefix("client: ") { #expect(parts[3].contains("root") || parts[0].hasSuffix("none"), "\(line)") }
      if parts[0].hasPrefix("id: ") { #expect(parts[3].contains("id"), "\(line)") }
      count += 1
    }
    #expect(count == 54)
    #expect(view.processes(of: name) == before)
    #expect(children() == childrenBefore)
    #expect(stranger.isRunning && vm.isRunning)
    #expect(try answers())
  }
}
