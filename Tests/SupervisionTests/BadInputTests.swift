import Foundation
import Glibc
import TestSupport
import Testing

/// Whatever is wrong with the input: one line that names it, the documented code, nothing left.
@Suite(.enabled(if: Installation.canRun, "These tests open /dev/kvm and need the built programs."))
struct BadInputTests {
  private func expect(
    _ installation: Installation, _ result: ProgramResult, _ code: Int32, _ line: String,
    _ location: SourceLocation = #_sourceLocation
  ) {
    #expect(result.errorLines == ["martlet: error: " + line], sourceLocation: location)
    #expect(result.code == code, sourceLocation: location)
    #expect(result.output == "", sourceLocation: location)
    installation.expectNothingLeft(location)
  }

  @Test func missingKernel() throws {
    let home = try Installation()
    expect(home, try home.run("--kernel", "none"), 3, "Cannot open kernel 'none': it does not exist; check the path")
  }

  @Test func emptyKernelAndDirectoryAndPipe() throws {
    let home = try Installation()
    _ = try home.shell(": > empty; mkdir dir; mkfifo pipe")
    expect(home, try home.run("--kernel", "empty"), 3, "Cannot use kernel 'empty': it is empty; name a complete file")
    expect(home, try home.run("--kernel", "dir"), 3, "Cannot use kernel 'dir': it is not a regular file; name one")
    expect(home, try home.run("--kernel", "pipe"), 3, "Cannot use kernel 'pipe': it is not a regular file; name one")
  }

  @Test func initramfsLargerThanMemory() throws {
    let home = try Installation()
    _ = try home.shell("truncate -s 64M initrd")
    expect(
      home, try home.run("--memory", "size=32M", "--initramfs", "initrd"), 3,
      "The initramfs 'initrd' has 67108864 bytes and does not fit into the guest's memory of 32M; raise --memory size=")
  }

  @Test(arguments: [
    (["--memory", "size=64T"], "Value '64T' does not fit --memory size; it wants a multiple of 4K from 4M to 8T"),
    (["--cpus", "boot=100000"], "Value '100000' does not fit --cpus boot; it wants a number from 1 to 254"),
    (["--dsik", "path=a"], "Unknown option --dsik; did you mean --disk?"),
    (["--cpus", "bot=2"], "Unknown key 'bot' in --cpus; did you mean 'boot'? It knows boot"),
    (
      ["--disk", "path=a,id=x", "path=b,id=x"],
      "Two devices have the id 'x' (--disk number 1 and --disk number 2); give one of them another id="
    ),
  ])
  func wrongCommandLine(_ arguments: [String], _ line: String) throws {
    let home = try Installation(programs: [])
    expect(home, try home.start(arguments).wait(), 2, line)
  }

  @Test func missingImage() throws {
    let home = try Installation()
    expect(
      home, try home.run("--disk", "path=none.img"), 3,
      "Cannot open image of disk blk0 'none.img': it does not exist; check the path")
  }

  @Test(.enabled(if: geteuid() == 0, "Becoming an ordinary user needs root."))
  func imageWithoutPermission() throws {
    let home = try Installation()
    // In a mount namespace of its own, where everybody may use /dev/kvm.
    func run(_ mode: String, _ disk: String) throws -> ProgramResult {
      try home.shell(
        """
        chmod \(mode) disk.img; exec unshare -m sh -c 'cp -a /dev/kvm kvm && chmod 666 kvm && mount --bind kvm /dev/kvm && rm -f kvm2 && \
        setpriv --reuid 65534 --regid 65534 --clear-groups ./martlet run --kernel kernel --console null --disk \(disk); code=$?; \
        umount /dev/kvm; rm -f kvm; exit $code'
        """)
    }
    for (mode, disk) in [("600", "path=disk.img"), ("644", "path=disk.img"), ("600", "path=disk.img,readonly=on")] {
      expect(
        home, try run(mode, disk), 3, "Cannot open image of disk blk0 'disk.img': permission denied; check its owner and mode")
    }
  }

  @Test func imageThatIsNoFile() throws {
    let home = try Installation()
    expect(
      home, try home.run("--disk", "path=/dev/zero"), 3,
      "Cannot use image of disk blk0 '/dev/zero': it is not a regular file or block device; name one")
  }

  @Test func imageOfAnotherFormat() throws {
    let home = try Installation()
    let image = Data([0x51, 0x46, 0x49, 0xFB, 0, 0, 0, 3] + [UInt8](repeating: 0, count: 65528))
    try image.write(to: URL(fileURLWithPath: home.directory + "/a.qcow2"))
    expect(
      home, try home.run("--disk", "path=a.qcow2"), 3,
      "Image 'a.qcow2' of disk blk0 is in the format qcow2, and only raw images are served; convert it (qemu-img convert -O raw), or add "
        + "format=raw to the disk's keys if its bytes are the disk")
    expect(
      home, try home.run("--disk", "path=a.qcow2,format=qcow2"), 2, "Value 'qcow2' does not fit --disk format; it wants raw")
    _ = try home.start(["--disk", "path=a.qcow2,format=raw", "--control", "ctl"])
    try home.waitUntilRunning()
  }

  @Test func imageInUseNamesTheHolder() throws {
    let home = try Installation()
    let first = try home.start(["--disk", "path=disk.img", "--control", "ctl"])
    try home.waitUntilRunning()
    // The VM's part of the lock is the supervisor's. The first VM goes on.
    let owner = home.processes.first { $0.title == "vm/vm/supervisor" }?.pid ?? 0
    let second = try home.run("--disk", "path=./disk.img,id=root", "--name", "second")
    #expect(
      second.errorLines == [
        "martlet: error: Image './disk.img' of disk root is in use by process \(owner) (supervisor); end that use or name another image"
      ])
    #expect(second.code == 3)
    let reader = try home.run("--disk", "path=disk.img,readonly=on", "--name", "third")
    #expect(reader.code == 3)
    #expect(first.isRunning)
    first.signal(SIGTERM)
    #expect(first.wait().code == 143)
    home.expectNothingLeft()
    // Free again.
    #expect(try home.run("--disk", "path=disk.img", "--name", "guest-off").code == 0)
  }

  @Test func oneImageByTwoNamesIsNoticed() throws {
    let home = try Installation()
    _ = try home.shell("ln disk.img same.img")
    expect(
      home, try home.run("--disk", "path=disk.img", "path=same.img"), 3,
      "Image 'same.img' of disk blk1 is in use by another disk of this VM; end that use or name another image")
  }

  @Test func readersShareAnImage() throws {
    let home = try Installation()
    let result = try home.run(
      "--disk", "path=disk.img,readonly=on", "path=./disk.img,readonly=on", "--name", "guest-off")
    #expect(result.code == 0)
  }

  @Test func tapMissing() throws {
    let home = try Installation()
    expect(
      home, try home.run("--net", "tap=notap0"), 3,
      "There is no interface 'notap0' for net0; make it: ip tuntap add dev notap0 mode tap, ip link set notap0 up")
  }

  @Test(.enabled(if: geteuid() == 0 && access("/dev/net/tun", R_OK | W_OK) == 0, "Making a tap needs root and /dev/net/tun."))
  func tapThatIsNoneAndTapBusy() throws {
    let home = try Installation()
    let prefix = "./martlet run --kernel kernel --console null"
    let result = try home.shell("unshare -n sh -c 'exec \(prefix) --net tap=lo'")
    expect(home, result, 3, "Interface 'lo' of net0 is not a tap; name a tap (ip tuntap show lists them)")
    let busy = try home.shell(
      """
      unshare -n sh -c 'ip tuntap add dev t0 mode tap
      \(prefix) --net tap=t0 --control ctl --name first & first=$!
      until ./martlet ctl --control ctl info --json 2>/dev/null | grep -q running; do sleep 0.02; done
      \(prefix) --net tap=t0 --name second; code=$?
      kill $first; wait $first
      ip -o link show t0 >/dev/null || echo the tap is gone >&2
      exit $code'
      """)
    expect(
      home, busy, 3,
      "Tap 't0' of net0 is busy: another process is attached to it; end that process or name another tap")
  }

  @Test(.enabled(if: geteuid() == 0, "Hiding /dev/kvm needs root."))
  func noKVM() throws {
    let home = try Installation()
    let script = """
      unshare -m sh -c 'mount -t tmpfs none /mnt && mknod -m 666 /mnt/null c 1 3 && mount --move /mnt /dev 2>/dev/null \
      || mount --bind /mnt /dev; exec ./martlet run --kernel kernel --console null'
      """
    expect(
      home, try home.shell(script), 4,
      "There is no /dev/kvm; load the module (modprobe kvm_intel or kvm_amd) or see martlet doctor")
  }

  @Test(.enabled(if: geteuid() == 0, "Becoming an ordinary user needs root."))
  func noPermissionForKVM() throws {
    let home = try Installation()
    // In a mount namespace of its own, so that the host's device keeps its mode.
    let script = """
      unshare -m sh -c 'cp -a /dev/kvm kvm && chmod 600 kvm && mount --bind kvm /dev/kvm && rm -f kvm2 && \
      exec setpriv --reuid 65534 --regid 65534 --clear-groups ./martlet run --kernel kernel --console null'; code=$?; rm -f kvm; exit $code
      """
    expect(
      home, try home.shell(script), 4,
      "No permission to open /dev/kvm; join the group that owns it (usually: usermod -aG kvm USER, then log in again)")
  }

  @Test func backEndSocketThatIsMissingOrRefuses() throws {
    let home = try Installation()
    expect(
      home, try home.run("--disk", "vhost_user=on,socket=none.sock"), 3,
      "Cannot connect to the back end of blk0 at 'none.sock': it does not exist; check the path")
    let path = home.directory + "/dead.sock"
    let made = try home.shell("python3 -c 'import socket; socket.socket(socket.AF_UNIX).bind(\"dead.sock\")'")
    try #require(made.code == 0)
    let result = try home.run("--net", "vhost_user=on,socket=dead.sock")
    unlink(path)
    expect(
      home, result, 3, "Back end of net0 refuses at 'dead.sock': nobody listens there; start the back end first")
  }

  @Test func backEndSocketThatNeverAccepts() throws {
    let home = try Installation()
    let listener = try RunningProgram(
      "/usr/bin/env",
      [
        "python3", "-c",
        """
        import socket, time
        s = socket.socket(socket.AF_UNIX); s.bind("full.sock"); s.listen(0)
        c = [socket.socket(socket.AF_UNIX) for _ in range(4)]
        for x in c: x.setblocking(False)
        for x in c: x.connect_ex("full.sock")
        print("full", flush=True)
        time.sleep(30)
        """,
      ], directory: home.directory)
    home.waitUntil("a full backlog") { listener.outputText.contains("full") }
    let result = try home.run("--disk", "vhost_user=on,socket=full.sock", "--deadline", "connect=200")
    listener.signal(SIGKILL)
    _ = listener.wait()
    unlink(home.directory + "/full.sock")
    expect(
      home, result, 3, "Back end of blk0 does not accept at 'full.sock' in time; is it serving another VM?")
  }

  @Test(.enabled(if: geteuid() == 0, "Another user's link needs root."))
  func linksOfOtherUsersAreNotFollowed() throws {
    let home = try Installation()
    let victim = home.directory + "/victim"
    try "precious".write(toFile: victim, atomically: false, encoding: .utf8)
    try FileManager.default.createDirectory(atPath: home.directory + "/real", withIntermediateDirectories: false)
    let links = ["k": "kernel", "d": "disk.img", "f": "victim", "new": "none", "dir": "real", "rng": "/dev/urandom"]
    for (link, target) in links {
      try FileManager.default.createSymbolicLink(atPath: home.directory + "/" + link, withDestinationPath: target)
      try #require(lchown(home.directory + "/" + link, 65534, 65534) == 0)
    }
    let why = "a symbolic link on the way belongs to another user, who could make it lead anywhere; name the path without it"
    for (arguments, what) in [
      (["--kernel", "k"], "kernel 'k'"), (["--initramfs", "k"], "initramfs 'k'"), (["--disk", "path=d"], "image of disk blk0 'd'"),
      (["--disk", "path=d,readonly=on"], "image of disk blk0 'd'"), (["--console", "file=f"], "file of --console 'f'"),
      (["--serial", "file=f"], "file of --serial 'f'"), (["--serial", "file=new"], "file of --serial 'new'"),
      (["--serial", "file=dir/log"], "file of --serial 'dir/log'"), (["--rng", "src=rng"], "source of --rng 'rng'"),
      (["--flight-recorder", "dir"], "directory of --flight-recorder 'dir'"),
    ] { expect(home, try home.start(arguments).wait(), 3, "Cannot open \(what): \(why)") }
    #expect(try String(contentsOfFile: victim, encoding: .utf8) == "precious")
    #expect(access(home.directory + "/none", F_OK) != 0)
    #expect(try FileManager.default.contentsOfDirectory(atPath: home.directory + "/real").isEmpty)
  }

  @Test func aFileIsNoSourceOfRandomBytes() throws {
    let home = try Installation()
    expect(
      home, try home.run("--rng", "src=disk.img"), 3,
      "Cannot use source of --rng 'disk.img': it is not a character device such as /dev/urandom; name one")
    expect(
      home, try home.run("--rng", "src=none"), 3, "Cannot open source of --rng 'none': it does not exist; check the path")
  }

  @Test func missingProgram() throws {
    let home = try Installation(programs: ["martlet-core", "martlet-console"])
    expect(
      home, try home.run("--disk", "path=disk.img"), 4,
      "Program martlet-block cannot be opened in \(home.directory): no such file or directory (ENOENT); "
        + "install all of Martlet's programs together")
  }

  @Test func controlSocketInUse() throws {
    let home = try Installation()
    let first = try home.start(["--control", "ctl"])
    try home.waitUntilRunning()
    let second = try home.run("--control", "ctl", "--name", "second")
    #expect(
      second.errorLines == ["martlet: error: Socket 'ctl' of --control is in use by another process; name another path"])
    #expect(second.code == 3)
    #expect(try home.ctl("info").code == 0)
    first.signal(SIGINT)
    #expect(first.wait().code == 130)
    home.expectNothingLeft()
  }

  // MARK: What the core and the devices report

  @Test(arguments: [
    ("core-input", 3, "'kernel': Kernel file is cut short; copy the file again"),
    ("core-late", 3, "'kernel': Kernel has no PVH entry"),
    ("core-host", 4, "KVM lacks KVM_CAP_IRQFD"),
    ("core-device", 5, "Device blk0: The peer did not answer GET_FEATURES within 5000 ms"),
    ("core-early", 6, "The core process exited with code 3; the VM has ended"),
    ("core-die", 6, "The core process was killed by signal 11; the VM has ended"),
    ("core-garbage", 1, "A control message ends in the middle of a field; are all programs of one version?"),
    ("dev-quiet", 5, "martlet-block of blk0 exited with code 0 before it was ready"),
    ("dev-crash", 5, "martlet-block of blk0 exited with code 3 before it was ready"),
    ("guest-crash", 7, "The guest crashed and cannot run any more; its console may say why"),
  ])
  func failuresAreToldInOneLine(_ name: String, _ code: Int32, _ line: String) throws {
    let home = try Installation()
    expect(home, try home.run("--disk", "path=disk.img", "--control", "ctl", "--name", name), code, line)
  }

  @Test func failuresOfExternalBackEndsNameTheirSocket() throws {
    let home = try Installation()
    let listener = try RunningProgram(
      "/usr/bin/env",
      [
        "python3", "-c",
        "import socket; s = socket.socket(socket.AF_UNIX); s.bind('be.sock'); s.listen(1); print('up', flush=True); c = s.accept(); "
          + "import time; time.sleep(30)",
      ], directory: home.directory)
    home.waitUntil("a listener") { listener.outputText.contains("up") }
    let result = try home.run("--disk", "vhost_user=on,socket=be.sock", "--name", "core-device")
    listener.signal(SIGKILL)
    _ = listener.wait()
    unlink(home.directory + "/be.sock")
    expect(
      home, result, 5,
      "Back end of blk0 at 'be.sock': The peer did not answer GET_FEATURES within 5000 ms; is it a vhost-user back end of type block?")
  }

  @Test func deviceThatCannotStartSpeaksForItself() throws {
    let home = try Installation()
    let result = try home.run("--disk", "path=disk.img", "--name", "dev-refuse")
    #expect(result.errorLines == ["vm/dev-refuse/blk0: error: Cannot serve"])
    #expect(result.code == 5)
    home.expectNothingLeft()
  }

  @Test(arguments: [
    ("dev-never", "martlet-block of blk0"), ("dev-early-eof", "martlet-block of blk0"), ("core-hang", "martlet-core of core"),
  ])
  func silenceEndsAtTheDeadline(_ name: String, _ who: String) throws {
    let home = try Installation()
    let start = Date()
    expect(
      home, try home.run("--disk", "path=disk.img", "--name", name, "--deadline", "ready=300"), 5,
      "\(who) was not ready within 300 ms; look at its messages or raise --deadline ready=")
    #expect(Date().timeIntervalSince(start) < 3)
  }
}
