import Foundation
import Glibc
import HostSystem
import Sandbox
import Supervision
import TestSupport
import Testing

private let canJail =
  BuiltPrograms.exists("martlet-jail") && HostWalls.probe(identity: nil).namespaces.isSuperset(of: [.mount, .process])

/// `martlet jail` as people use it, with programs that every host has, and with a back end of QEMU's.
@Suite(.enabled(if: canJail, "Needs the programs and a host that can build a jail."))
struct JailTests {
  static let profiles =
    URL(fileURLWithPath: #filePath).deletingLastPathComponent().deletingLastPathComponent()
    .deletingLastPathComponent().path + "/protocol/jails/"
  static let examples = profiles.replacing("protocol/jails", with: "docs/examples")

  final class Place {
    let path = NSTemporaryDirectory() + "martlet-jail-\(UUID().uuidString)"
    init(isEverybodys: Bool = false) throws {
      try FileManager.default.createDirectory(atPath: path, withIntermediateDirectories: true)
      // A jail without root is in a user namespace of this user's; with root, under a uid that must be able to pass.
      chmod(path, 0o755)
      if isEverybodys { chown(path, 65531, 65531) }
    }
    deinit { try? FileManager.default.removeItem(atPath: path) }
    func write(_ name: String, _ text: String) throws { try text.write(toFile: path + "/" + name, atomically: true, encoding: .utf8) }
  }

  /// What makes somebody else of us: nothing, and as root an ordinary user.
  static let users: [[String]] = {
    let other = ["/usr/bin/setpriv", "--reuid=65531", "--regid=65531", "--clear-groups"]
    guard geteuid() == 0, let program = BuiltPrograms.exists("martlet-jail") ? BuiltPrograms.path("martlet-jail") : nil,
      let trial = try? RunningProgram(other[0], other.dropFirst() + ["/usr/bin/unshare", "-U", "test", "-x", program]),
      trial.wait().code == 0
    else { return [[]] }
    return [[], other]
  }()

  private func jail(_ place: Place, _ words: [String], seconds: Double = 20, below wrapper: [String] = []) throws -> ProgramResult {
    let all = wrapper + [BuiltPrograms.path("martlet"), "jail", "--profile", "p"] + words
    return try RunningProgram(all[0], Array(all.dropFirst()), directory: place.path).wait(seconds: seconds)
  }

  @Test(.enabled(if: geteuid() == 0, "Another user's link needs root."), arguments: ["place", "define", "profile", "learned"])
  func linksOfOtherUsersAreNotFollowed(what: String) throws {
    let place = try Place()
    try place.write("seen", "in the jail\n")
    try #require(jail(place, ["--learn", "--define", "file=\(place.path)/seen", "--", "/bin/cat", "\(place.path)/seen"]).code == 0)
    let profile = try String(contentsOfFile: place.path + "/p", encoding: .utf8)
    var link = place.path + "/link"
    var words = ["--define", "file=\(link)", "--", "/bin/cat", link]
    switch what {
    case "place":
      try place.write("p", profile + "\nfile \(link) ro\n")
      words[1] = "file=\(place.path)/seen"
    case "define": break
    default:
      words = (what == "learned" ? ["--learn"] : []) + ["--define", "file=\(place.path)/seen", "--", "/bin/cat", "\(place.path)/seen"]
      link = place.path + "/p"
      try place.write("precious", what == "learned" ? "" : profile)
      unlink(link)
    }
    try FileManager.default.createSymbolicLink(
      atPath: link, withDestinationPath: link.hasSuffix("/p") ? "precious" : "/etc/passwd")
    // Root's own is followed.
    let honest = try jail(place, words)
    #expect(honest.code == 0, "\(honest.errors)")
    if what == "learned" { try place.write("precious", "") }
    try #require(lchown(link, 65534, 65534) == 0)
    let result = try jail(place, words)
    #expect(result.code == 125 && result.output.isEmpty, "\(result.output)")
    #expect(
      result.errorLines.count == 1 && result.errors.contains("a symbolic link on the way belongs to another user"), "\(result.errors)")
    if what == "learned" { #expect(try String(contentsOfFile: place.path + "/precious", encoding: .utf8).isEmpty) }
  }

  @Test(arguments: users) func aLearnedProfileRunsTheProgramAndHidesEverythingElse(user: [String]) throws {
    let place = try Place(isEverybodys: !user.isEmpty)
    func jail(_ place: Place, _ words: [String]) throws -> ProgramResult { try self.jail(place, words, below: user) }
    try place.write("seen", "in the jail\n")
    try place.write("hidden", "outside\n")
    let seen = place.path + "/seen"
    let learned = try jail(place, ["--learn", "--define", "file=\(seen)", "--", "/bin/cat", seen])
    try #require(learned.code == 0, "\(learned.errors)")
    #expect(learned.output == "in the jail\n")
    let profile = try String(contentsOfFile: place.path + "/p", encoding: .utf8)
    #expect(profile.contains("file {file} ro") && profile.contains("libc.so.6 run"), "\(profile)")
    // It says nothing of what stands for {file}.
    let undefined = try jail(place, ["--", "/bin/cat", seen])
    #expect(undefined.code == 125 && undefined.errors.contains("add --define file=VALUE"), "\(undefined.errors)")
    let shown = try jail(place, ["--define", "file=\(seen)", "--", "/bin/cat", seen])
    #expect(shown.code == 0 && shown.output == "in the jail\n", "\(shown.errors)")
    // The other file's name is not there; cat says so and ends with 1, which passes through. Its message needs calls
    // that the first run did not.
    let more = try jail(place, ["--learn", "--define", "file=\(seen)", "--", "/bin/cat", place.path + "/nothing"])
    #expect(more.code == 1)
    let other = try jail(place, ["--define", "file=\(seen)", "--", "/bin/cat", place.path + "/hidden"])
    #expect(
      other.code == 1 && other.output.isEmpty && other.errors.contains("No such file")
        && other.errors.contains("martlet jail --learn finds out what it needs"), "\(other.errors)")
    // Learning again adds what is missing and nothing twice.
    let text = try String(contentsOfFile: place.path + "/p", encoding: .utf8)
    let lines = text.split(separator: "\n").map { $0.split(separator: "#")[0].trimmingCharacters(in: .whitespaces) }.filter {
      !$0.isEmpty && !$0.hasPrefix("Learned")
    }
    #expect(Set(lines).count == lines.count, "\(lines)")
  }

  @Test func codesSignalsAndTheJailsEndPassThrough() throws {
    let place = try Place()
    let plain = try jail(place, ["--learn", "--", "/bin/bash", "--norc", "-c", "exit 7"])
    #expect(plain.code == 7)
    #expect(try jail(place, ["--learn", "--", "/bin/bash", "--norc", "-c", "read x"]).code == 1)
    #expect(try jail(place, ["--", "/bin/bash", "--norc", "-c", "exit 7"]).code == 7)
    // A program that waits for input, and has no handler: as pid 1 the kernel would spare it.
    for (signal, code): (Int32, Int32) in [(SIGTERM, 143), (SIGINT, 130), (SIGHUP, 129)] {
      let pipe = Pipe()
      let running = try RunningProgram(
        BuiltPrograms.path("martlet-jail"), ["--profile", "p", "--", "/bin/bash", "--norc", "-c", "read x"], directory: place.path,
        input: pipe.fileHandleForReading)
      let child = try #require(Self.child(of: running.pid))
      running.signal(signal)
      let result = running.wait()
      #expect(result.code == code, "\(result)")
      #expect(!Self.exists(child))
    }
    // The jail killed: the program goes with it.
    let pipe = Pipe()
    let running = try RunningProgram(
      BuiltPrograms.path("martlet-jail"), ["--profile", "p", "--", "/bin/bash", "--norc", "-c", "read x"], directory: place.path,
      input: pipe.fileHandleForReading)
    let child = try #require(Self.child(of: running.pid))
    running.signal(SIGKILL)
    _ = running.wait()
    let end = Date().addingTimeInterval(60)
    while Self.exists(child), Date() < end { usleep(2000) }
    #expect(!Self.exists(child))
  }

  /// The program of a jail, once it runs.
  private static func child(of pid: Int32) -> Int32? {
    let end = Date().addingTimeInterval(60)
    while Date() < end {
      let text = FileManager.default.contents(atPath: "/proc/\(pid)/task/\(pid)/children").map { String(decoding: $0, as: UTF8.self) } ?? ""
      if let child = text.split(separator: " ").compactMap({ Int32($0) }).first,
        let status = FileManager.default.contents(atPath: "/proc/\(child)/status"),
        String(decoding: status, as: UTF8.self).contains("Name:\tbash")
      {
        usleep(100_000)
        return child
      }
      usleep(2000)
    }
    return nil
  }

  private static func exists(_ pid: Int32) -> Bool {
    guard let status = FileManager.default.contents(atPath: "/proc/\(pid)/status") else { return false }
    return !String(decoding: status, as: UTF8.self).contains("State:\tZ")
  }

  @Test func whatCannotWorkIsRefusedBeforeAnythingIsStarted() throws {
    let place = try Place()
    func expect(_ profile: String?, _ words: [String], _ code: Int32, _ message: String) throws {
      if let profile { try place.write("p", profile) } else { try? FileManager.default.removeItem(atPath: place.path + "/p") }
      let result = try jail(place, words)
      #expect(result.code == code && result.errors.contains(message), "\(result)")
      #expect(result.errorLines.count == 1, "\(result.errors)")
    }
    let call = "call read # x\n"
    try expect(nil, ["--", "/bin/true"], 125, "Cannot read the profile 'p'")
    try expect(call, ["--", "/no/such/program"], 127, "There is no program '/no/such/program'")
    try expect(call, [], 125, "No program is named")
    for (limits, words) in [
      ("cpu-limit=0%", "from 1%"), ("memory-limit=1M", "from 16M"), ("cpu-limt=5%", "did you mean 'cpu-limit'"),
      ("pids-limit", "pids-limit"),
    ] { try expect(call, ["--limits", limits, "--", "/bin/true"], 125, words) }
    try expect(call, ["--limits"], 125, "--limits cpu-limit=50%,memory-limit=1G")
    try expect(call, ["--limits=pids-limit=9", "--limits=pids-limit=9", "--", "/bin/true"], 125, "given twice")
    let seen = "directory /usr run\ndirectory /lib run\ndirectory /lib64 run\n\(call)"
    try expect(seen, ["--limits", "pids-limit=9", "--cgroup", "/none", "--", "/bin/true"], 125, "The limits cannot be kept")
    try expect(call, ["--prfile", "x", "--", "/bin/true"], 125, "did you mean --profile?")
    try expect("", ["--", "/bin/true"], 125, "ld-linux-x86-64.so.2")
    try expect("file /lib64/ld-linux-x86-64.so.2 run\n\(call)", ["--", "/bin/true"], 125, "The jail hides 'libc.so.6'")
    try expect(
      "file /lib64/ld-linux-x86-64.so.2 run\n\(call)", ["--", "/bin/true"], 125,
      "add the line 'file /lib/x86_64-linux-gnu/libc.so.6 run' to 'p'")
    try expect("file /no/such/file ro\n\(call)", ["--", "/bin/true"], 125, "wants '/no/such/file' to be seen")
    try expect("file /etc ro\n\(call)", ["--", "/bin/true"], 125, "write 'directory'")
    try expect("directory / ro\n\(call)", ["--", "/bin/true"], 125, "not the whole root")
    try expect("program /bin/false\n\(call)", ["--", "/bin/true"], 125, "It is made for /bin/false")
    try expect("directory /usr run\ndirectory /lib run\ndirectory /lib64 run\n", ["--", "/bin/true"], 125, "allows no system call")
    try expect(
      "descriptor 9\ndirectory /usr run\ndirectory /lib run\ndirectory /lib64 run\n\(call)", ["--", "/bin/true"], 125,
      "descriptor 9, which is not open")
    try place.write("script", "#!/bin/sh\n")
    chmod(place.path + "/script", 0o755)
    try expect(call, ["--", place.path + "/script"], 126, "it is a script")
  }

  @Test func aCallOutsideTheProfileEndsTheProgramWithItsName() throws {
    let place = try Place()
    // Not enough for any dynamic program: the loader's first call is fatal.
    try place.write("p", "directory /usr run\ndirectory /lib run\ndirectory /lib64 run\ncall read # x\n")
    let result = try jail(place, ["--", "/bin/true"])
    #expect(result.code == 159 && result.errors.contains("audit: sandbox violation: /"), "\(result)")
    if geteuid() == 0, access("/dev/kmsg", R_OK) == 0 {
      #expect(result.errors.contains("for calling brk (12)") || result.errors.contains("cannot be read"))
    }
  }

  /// A stand-in for QEMU's storage daemon that has been taken over: its jail, and what is needed to tell.
  @Test(.enabled(if: BuiltPrograms.exists("martlet-hostile"), "The stand-in is not built."))
  func aHostileProgramInTheJailOfTheStorageDaemonReachesNothing() throws {
    let place = try Place()
    try Data(count: 4096).write(to: URL(fileURLWithPath: place.path + "/image"))
    var text = try String(contentsOfFile: Self.profiles + "qemu-storage-daemon.jail", encoding: .utf8)
    text = text.split(separator: "\n").filter { !$0.hasPrefix("program ") && !$0.hasPrefix("file /lib") && !$0.hasPrefix("file /etc") }
      .joined(separator: "\n")
    text +=
      "\ncall wait4 # tells\ncall alarm # tells\ncall prctl arg0 in 4, 23, 27, 38, 39, 47 # not dumpable; libcap-ng asks at its start\ncall gettid # tells\ncall ioctl arg1 == 0x5401 # Swift\n"
    text += "environment SWIFT_BACKTRACE=enable=no,swift-backtrace=/\n"
    let own = geteuid() == 0 ? ChildIdentity(uid: 1_900_000_200, gid: 1_900_000_200) : nil
    let profile = try JailProfile(text, file: "p")
    let null = try OwnedFD.open("/dev/null", O_RDWR)
    let memory = try SharedMemory.sealed(name: "hostile", byteCount: 1 << 16)
    let pair = try UnixSocket.pair(.stream)
    var ends: [CInt] = [-1, -1]
    try #require(pipe(&ends) == 0)
    let reading = try OwnedFD.inherited(ends[0])
    let child: StartedChild
    do {
      let writing = try OwnedFD.inherited(ends[1])
      var plan = try JailPlan(
        profile, words: [BuiltPrograms.path("martlet-hostile"), "--what=attacks", "--files=off", "--victim=\(getpid())"],
        defines: ["path": place.path + "/image", "sockets": place.path], descriptors: [3: memory.rawValue, 4: pair.second.rawValue],
        standard: (null.rawValue, writing.rawValue, 2), identity: own, host: HostWalls.probe(identity: own), searchPath: nil)
      plan.launch.parentDeathSignal = 0
      child = try plan.start()
    }
    let lines = String(decoding: try reading.readToEnd(limit: 1 << 20), as: UTF8.self).split(separator: "\n")
    check(child.process.waitForEnd() == .exited(code: 0), "the stand-in did not come to its end")
    try #require(lines.last == "end")
    #expect(lines.count > 70)
    // What the daemon needs for itself, and harms nobody: an address for its own socket, holes in memory it may write, the flags
    // of its own sockets, the root directory that shows nothing.
    let harmless = ["become_dumpable", "bind_socket", "punch_memory", "make_blocking", "open_root"]
    for line in lines.dropLast() {
      let words = line.split(separator: " ")
      let refused = words[1] == "killed" ? words[2] == "31" : words[2].hasPrefix("-")
      #expect(refused || harmless.contains(String(words[0])), "\(line)")
    }
    checkEqual((SharedMemory.seals(of: memory) ?? 0) & 0xF, SharedMemory.sizeSeals)
    func outcome(_ attack: String) -> String? { lines.first { $0.hasPrefix(attack + " ") }.map { String($0.dropFirst(attack.count + 1)) } }
    #expect(outcome("open_file") == "got \(-ENOENT)")
    for attack in ["exec_shell", "exec_descriptor", "trace_victim", "connect_loopback", "map_executable", "signal_victim"] {
      #expect(outcome(attack) == "killed 31", "\(attack)")
    }
  }

  /// What the probe says of a back end that was just started: its socket's file is there a moment before anybody listens.
  static func probe(_ words: [String], of backEnd: RunningProgram?, until end: Date, seconds: Double, directory: String? = nil) throws
    -> ProgramResult
  {
    while true {
      let result = try RunningProgram(BuiltPrograms.path("martlet-probe"), words, directory: directory).wait(seconds: seconds)
      guard let backEnd, result.errors.contains("No back end can be reached"), backEnd.isRunning, Date() < end else { return result }
      usleep(20_000)
    }
  }

  @Test(
    .enabled(if: access("/usr/bin/qemu-storage-daemon", X_OK) == 0 && BuiltPrograms.exists("martlet-probe"), "Needs qemu-storage-daemon."),
    arguments: users)
  func theStorageDaemonServesADiskFromItsJail(user: [String]) throws {
    let place = try Place(isEverybodys: !user.isEmpty)
    let image = place.path + "/image"
    try Data(count: 8 << 20).write(to: URL(fileURLWithPath: image))
    // As people have it: nobody else's to read.
    chmod(image, 0o600)
    if !user.isEmpty { chown(image, 65531, 65531) }
    let socket = place.path + "/q.sock"
    let words = user + [BuiltPrograms.path("martlet")]
    let daemon = try RunningProgram(
      words[0],
      words.dropFirst() + [
        "jail", "--profile", Self.profiles + "qemu-storage-daemon.jail", "--define", "path=\(image)", "--define", "sockets=\(place.path)",
        "--",
        "qemu-storage-daemon", "--blockdev", "driver=file,node-name=f,filename=\(image)", "--export",
        "type=vhost-user-blk,id=e,node-name=f,writable=on,addr.type=unix,addr.path=\(socket)",
      ])
    defer {
      daemon.signal(SIGTERM)
      #expect(daemon.wait().code == 0)
    }
    let end = Date().addingTimeInterval(60)
    while access(socket, F_OK) != 0, daemon.isRunning, Date() < end { usleep(5000) }
    let check = try Self.probe(
      ["check", "--socket", socket, "--writes", "--only", "blk.write,blk.discard,blk.flush,blk.survives,blk.read"], of: daemon, until: end,
      seconds: 40)
    #expect(check.code == 0 && check.output.contains(" 0 failed"), "\(check.output)\(check.errors)\(daemon.errorText)")
    let bench = try RunningProgram(
      BuiltPrograms.path("martlet-probe"), ["bench", "--socket", socket, "--rw", "randrw", "--runtime", "0.3", "--no-syscalls"]
    ).wait(seconds: 30)
    #expect(bench.code == 0 && bench.output.contains("IOPS"), "\(bench.output)\(bench.errors)\(daemon.errorText)")
  }
}
