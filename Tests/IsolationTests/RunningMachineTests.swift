import Foundation
import Glibc
import Sandbox
import Supervision
import TestSupport
import Testing

/// A running VM's processes and threads, as the kernel shows them, against what is declared: nothing more, nothing less.
@Suite(.serialized) struct RunningMachineTests {
  static let canRun =
    access("/dev/kvm", R_OK | W_OK) == 0
    && ["martlet", "martlet-supervisor", "martlet-core", "martlet-block", "martlet-console"].allSatisfy(BuiltPrograms.exists)

  /// A micro guest and a disk in a new directory.
  static func prepare(_ directory: String) throws {
    let root = URL(fileURLWithPath: #filePath).deletingLastPathComponent().deletingLastPathComponent().deletingLastPathComponent()
    let build = try RunningProgram(root.path + "/scripts/micro-guests", [directory + "/micro"]).wait(seconds: 60)
    try #require(build.code == 0, "\(build.errors)")
    try Data(count: 1 << 20).write(to: URL(fileURLWithPath: directory + "/disk.img"))
  }

  /// `run` with a disk and two consoles, the serial port in `log`.
  static func command(_ directory: String, _ commandLine: String, name: String = "walls") -> [String] {
    [
      "run", "--name", name, "--kernel", directory + "/micro/micro.elf", "--cmdline", commandLine, "--cpus", "boot=2",
      "--memory", "size=64M", "--disk", "path=disk.img,num_queues=1", "--console", "null", "--serial", "file=log", "--control", "ctl",
    ]
  }

  /// A VM whose guest does nothing for a while.
  private func start(_ directory: String, _ options: [String]) throws -> RunningProgram {
    try Self.prepare(directory)
    return try RunningProgram(
      BuiltPrograms.path("martlet"), Self.command(directory, "test=idle ms=60000") + options, directory: directory)
  }

  func processes(of vm: String) -> [String: Int32] {
    var result: [String: Int32] = [:]
    for name in (try? FileManager.default.contentsOfDirectory(atPath: "/proc")) ?? [] {
      guard let pid = Int32(name), let line = FileManager.default.contents(atPath: "/proc/\(pid)/cmdline") else { continue }
      let title = String(decoding: line.prefix { $0 != 0 }, as: UTF8.self)
      if title.hasPrefix("vm/\(vm)/") { result[String(title.dropFirst(vm.count + 4))] = pid }
    }
    return result
  }

  private func status(_ path: String) -> [String: String] {
    var fields: [String: String] = [:]
    for line in String(decoding: FileManager.default.contents(atPath: path) ?? Data(), as: UTF8.self).split(separator: "\n") {
      let parts = line.split(separator: ":", maxSplits: 1)
      fields[String(parts[0])] = parts.count > 1 ? parts[1].split(whereSeparator: \.isWhitespace).joined(separator: " ") : ""
    }
    return fields
  }

  /// What the descriptors of a process lead to, each with how many.
  private func files(_ pid: Int32) -> [String: Int] {
    var counts: [String: Int] = [:]
    for number in (try? FileManager.default.contentsOfDirectory(atPath: "/proc/\(pid)/fd")) ?? [] {
      guard let link = try? FileManager.default.destinationOfSymbolicLink(atPath: "/proc/\(pid)/fd/\(number)") else { continue }
      let kind = link.replacing(#/:\[\d+\]$/#, with: "").replacing(#/^.*\//#, with: "").replacing("anon_inode:", with: "")
      counts[kind, default: 0] += 1
    }
    return counts
  }

  private func namespaces(_ pid: Int32) -> [String: String] {
    var links: [String: String] = [:]
    for (name, _) in Namespaces.named {
      links[name] = try? FileManager.default.destinationOfSymbolicLink(atPath: "/proc/\(pid)/ns/\(name)")
    }
    return links
  }

  /// What one process of the running VM is to have.
  private struct Declared {
    var capabilities = "0000000000000000"
    var filters = 1
    /// Kinds of namespaces that are not its own.
    var shared: Set<String> = ["user"]
    var hasOwnRoot = true
    var limits: [String: UInt64] = [:]
    /// What its descriptors lead to, each with how many.
    var files: [String: Int]
    /// What is mapped besides its own program, its heap and its stack.
    var maps: Set<String> = []
  }

  /// A VM with a disk, a card, a source of random bytes, two consoles and two processors.
  private static let declared: [String: Declared] = [
    "core": Declared(
      limits: ["core file size": 0, "msgqueue size": 0, "realtime priority": 0, "open files": 16384, "processes": 18],
      files: [
        "null": 2, "pipe": 1, "socket": 8, "[eventpoll]": 1, "[timerfd]": 1, "[eventfd]": 17, "micro.elf": 1,
        "memfd:martlet-guest (deleted)": 2, "kvm-vm": 1, "kvm-vcpu:0": 1, "kvm-vcpu:1": 1,
      ], maps: ["memfd:martlet-guest (deleted)", "anon_inode:kvm-vcpu:0", "anon_inode:kvm-vcpu:1"]),
    "blk0": Declared(
      limits: ["core file size": 0, "msgqueue size": 0, "realtime priority": 0, "open files": 1024, "processes": 49],
      files: [
        "null": 2, "pipe": 1, "socket": 2, "disk.img": 1, "[signalfd]": 1, "[eventpoll]": 1, "[eventfd]": 7, "[io_uring]": 1,
        "memfd:inflight (deleted)": 1,
      ], maps: ["anon_inode:[io_uring]", "memfd:inflight (deleted)", "memfd:statistics (deleted)"]),
    "net0": Declared(
      limits: ["core file size": 0, "msgqueue size": 0, "realtime priority": 0, "open files": 1024, "processes": 82],
      files: [
        "null": 2, "pipe": 1, "socket": 1, "tun": 1, "[signalfd]": 1, "[eventpoll]": 1, "[eventfd]": 7, "memfd:inflight (deleted)": 1,
      ], maps: ["memfd:inflight (deleted)", "memfd:statistics (deleted)"]),
    "rng0": Declared(
      limits: ["core file size": 0, "msgqueue size": 0, "realtime priority": 0, "open files": 1024, "processes": 49],
      files: [
        "null": 2, "pipe": 1, "socket": 1, "urandom": 1, "[signalfd]": 1, "[eventpoll]": 1, "[eventfd]": 3,
        "memfd:inflight (deleted)": 1,
      ], maps: ["memfd:inflight (deleted)", "memfd:statistics (deleted)"]),
    "con0": Declared(
      limits: ["core file size": 0, "msgqueue size": 0, "realtime priority": 0, "open files": 1024, "processes": 82],
      files: [
        "null": 2, "pipe": 1, "socket": 2, "[signalfd]": 1, "[eventpoll]": 1, "[timerfd]": 1, "[eventfd]": 7,
        "memfd:inflight (deleted)": 1,
      ], maps: ["memfd:inflight (deleted)", "memfd:statistics (deleted)"]),
    "serial": Declared(
      limits: ["core file size": 0, "msgqueue size": 0, "realtime priority": 0, "open files": 1024, "processes": 49],
      files: ["null": 2, "pipe": 1, "socket": 1, "log": 1, "[signalfd]": 1, "[eventpoll]": 1, "[timerfd]": 1]),
    // In the pid namespace it was started in; it ends the others (CAP_KILL).
    "supervisor": Declared(
      capabilities: "0000000000000020", shared: ["user", "pid"],
      limits: ["core file size": 0, "msgqueue size": 0, "realtime priority": 0, "open files": 256, "processes": 1],
      files: [:], maps: ["memfd:statistics (deleted)"]),
    // Unlinks files of the host (CAP_DAC_OVERRIDE, CAP_FOWNER).
    "guardian": Declared(
      capabilities: "000000000000000a", shared: ["user", "pid", "mnt", "net", "ipc", "uts", "cgroup"], hasOwnRoot: false,
      files: ["pipe": 1]),
  ]

  @Test(
    .enabled(
      if: canRun && BuiltPrograms.exists("martlet-net") && geteuid() == 0 && Hostile.host.lacks.isEmpty,
      "Needs KVM, root, the programs and the full walls."),
    arguments: [false, true])
  func everyProcessAndThreadIsAsDeclared(afterTakeover: Bool) throws {
    let directory = "/tmp/martlet-walls-\(getpid())-\(afterTakeover)"
    // Other tests run VMs at the same time.
    let name = "audit-\(getpid())-\(afterTakeover)"
    defer { try? FileManager.default.removeItem(atPath: directory) }
    try Self.prepare(directory)
    // In a network namespace with a tap of its own.
    let script = "ip tuntap add audit0 mode tap && ip link set audit0 up && exec \"$@\""
    let vm = try RunningProgram(
      "/usr/bin/unshare",
      ["--net", "/bin/sh", "-c", script, "sh", BuiltPrograms.path("martlet")]
        + Self.command(directory, "test=idle ms=60000", name: name)
        + ["--net", "tap=audit0", "--rng", "on", "--cgroup", "off", "--hardened"]
        + (afterTakeover ? ["--on-supervisor-death", "continue"] : []), directory: directory)
    defer {
      vm.signal(SIGTERM)
      _ = vm.wait()
    }
    let end = Date().addingTimeInterval(60)
    while Date() < end, vm.isRunning {
      let info = try RunningProgram(BuiltPrograms.path("martlet"), ["ctl", "--control", "ctl", "info"], directory: directory).wait()
      if info.output.contains("running for") { break }
      usleep(20_000)
    }
    if afterTakeover {
      waitWhile { vm.isRunning && self.processes(of: name)["spawner"] == nil }
      _ = try RunningProgram(BuiltPrograms.path("martlet"), ["ctl", "--control", "ctl", "devices"], directory: directory).wait()
      kill(try #require(self.processes(of: name)["supervisor"]), SIGKILL)
      waitWhile { vm.isRunning && !vm.errorText.contains("has taken over") }
    }
    let processes = processes(of: name)
    let outside: Set = afterTakeover ? ["spawner", "keeper"] : ["spawner"]
    try #require(Set(processes.keys) == Set(Self.declared.keys).union(outside), "\(vm.errorText)")
    // Of the keeper's: states, and ends of processes.
    let shared: Set = afterTakeover ? ["dev/zero (deleted)"] : []
    let own = namespaces(getpid())
    var uids: Set<String> = []
    var seen: [String: Set<String>] = [:]
    for (name, declared) in Self.declared {
      let pid = try #require(processes[name])
      // Every thread, because ids, capabilities, filters and Landlock belong to threads.
      for task in try FileManager.default.contentsOfDirectory(atPath: "/proc/\(pid)/task") {
        let fields = status("/proc/\(pid)/task/\(task)/status")
        let who = "\(name), thread \(fields["Name"] ?? task)"
        #expect(fields["CapBnd"] == "0000000000000000", "CapBnd of \(who)")
        // Exec takes the supervisor's along only in these.
        let kept = name == "supervisor" ? declared.capabilities : "0000000000000000"
        for set in ["CapInh", "CapAmb"] { #expect(fields[set] == kept, "\(set) of \(who)") }
        for set in ["CapPrm", "CapEff"] { #expect(fields[set] == declared.capabilities, "\(set) of \(who)") }
        #expect(fields["Groups"] == "" || name == "guardian", "\(who)")
        #expect(fields["NoNewPrivs"] == "1", "\(who)")
        #expect(fields["Seccomp"] == "2", "\(who)")
        #expect(fields["Seccomp_filters"] == "\(declared.filters)", "\(who)")
        let ids = Set((fields["Uid"] ?? "").split(separator: " ") + (fields["Gid"] ?? "").split(separator: " "))
        #expect(ids.count == 1, "\(who): one id for all eight: \(ids)")
        #expect(fields["NSpid"]?.split(separator: " ").count == (declared.shared.contains("pid") ? 1 : 2), "\(who)")
      }
      if name != "guardian" { #expect(uids.insert(status("/proc/\(pid)/status")["Uid"] ?? "").inserted, "\(name) shares its uid") }
      if !declared.shared.contains("pid") { #expect(status("/proc/\(pid)/status")["NSpid"]?.hasSuffix(" 1") == true) }
      for (kind, link) in namespaces(pid) {
        if declared.shared.contains(kind) {
          // The test's own, but for the network of the VM's starter.
          if kind != "net" { #expect(link == own[kind], "\(kind) of \(name)") }
        } else {
          #expect(link != own[kind], "\(kind) of \(name)")
          #expect(seen[kind, default: []].insert(link).inserted, "\(kind) of \(name) is shared")
        }
      }
      // Not dumpable: the files of its directory belong to root, whatever its uid.
      var facts = stat()
      #expect(stat("/proc/\(pid)/environ", &facts) == 0 && facts.st_uid == 0, "\(name)")
      if declared.hasOwnRoot {
        #expect(try FileManager.default.contentsOfDirectory(atPath: "/proc/\(pid)/root/").isEmpty, "\(name)")
        #expect(try FileManager.default.destinationOfSymbolicLink(atPath: "/proc/\(pid)/cwd") == "/", "\(name)")
        let mounts = String(decoding: FileManager.default.contents(atPath: "/proc/\(pid)/mounts") ?? Data(), as: UTF8.self)
        #expect(mounts.split(separator: "\n").count == 1 && mounts.contains(" / tmpfs ro,nosuid,nodev,noexec"), "\(name): \(mounts)")
      }
      let limits = String(decoding: FileManager.default.contents(atPath: "/proc/\(pid)/limits") ?? Data(), as: UTF8.self)
      for (limit, value) in declared.limits {
        let line = try #require(limits.split(separator: "\n").first { $0.hasPrefix("Max \(limit) ") })
        #expect(line.contains(try Regex(" \(value) +\(value) ")), "\(name): \(line)")
      }
      checkMaps(name, pid, declared.maps.union(["supervisor", "guardian"].contains(name) ? shared : []))
      if name != "supervisor" { #expect(files(pid) == declared.files, "\(name)") }
    }
    // Each was executed anew, so no address of one says anything about another's.
    let bases = Self.declared.keys.filter { $0 != "guardian" }.compactMap { name in
      processes[name].flatMap { FileManager.default.contents(atPath: "/proc/\($0)/maps") }.map {
        String(decoding: $0.prefix(12), as: UTF8.self)
      }
    }
    #expect(Set(bases).count == Self.declared.count - 1, "\(bases)")
    #expect(!uids.contains { $0.hasPrefix("0 ") || $0.contains(" 0 ") })

    // The supervisor: its standard descriptors, its loop, and one pidfd for each process of the VM.
    let supervisor = files(try #require(processes["supervisor"]))
    let pidfds = supervisor.filter { $0.key.contains("pidfd") }.values.reduce(0, +)
    #expect(pidfds == Self.declared.count, "all but itself, and the spawner: \(supervisor)")
    #expect(
      supervisor.filter { !$0.key.contains("pidfd") }
        == [
          "null": 1, "pipe": 3, "[eventpoll]": 1, "[signalfd]": 1, "kmsg": 1, "socket": 4, "tun": 1, "urandom": 1,
          "memfd:statistics (deleted)": 4,
          // The VM's part of the lock on its image; the process's, to be given up with the process; and the next process's.
          "disk.img": 3,
        ],
      "\(supervisor)")

    // The spawner: walls would be its children's. It has what a launch needs, and its order line.
    let spawner = try #require(processes["spawner"])
    try checkOutside("spawner", spawner, capabilities: "00000000002c11ca", own)
    // What it forks gets what the starter has.
    if let keeper = processes["keeper"] {
      try checkOutside("keeper", keeper, capabilities: status("/proc/self/status")["CapEff"] ?? "", own)
    }
    #expect(files(spawner) == ["null": 1, "pipe": 1, "socket": 1, "release": 1], "\(files(spawner))")
    checkMaps("spawner", spawner, shared.union(["memfd:statistics (deleted)"]))
    var facts = stat()
    #expect(stat("/proc/\(spawner)/environ", &facts) == 0 && facts.st_uid == 0)
  }

  /// One that works for the VM outside the walls: root, with these capabilities in the three sets that count, one thread.
  private func checkOutside(_ name: String, _ pid: Int32, capabilities: String, _ own: [String: String]) throws {
    #expect(try FileManager.default.contentsOfDirectory(atPath: "/proc/\(pid)/task").count == 1, "\(name)")
    let fields = status("/proc/\(pid)/status")
    for set in ["CapPrm", "CapEff", "CapBnd"] { #expect(fields[set] == capabilities, "\(set) of \(name)") }
    for set in ["CapInh", "CapAmb"] { #expect(fields[set] == "0000000000000000", "\(set) of \(name)") }
    for ids in ["Uid", "Gid"] { #expect(fields[ids] == "0 0 0 0", "\(ids) of \(name)") }
    #expect(fields["NoNewPrivs"] == "1" && fields["Seccomp"] == "0", "\(name)")
    for (kind, link) in namespaces(pid) where kind != "net" { #expect(link == own[kind], "\(kind) of \(name)") }
    var facts = stat()
    #expect(stat("/proc/\(pid)/environ", &facts) == 0 && facts.st_uid == 0, "\(name)")
  }

  /// Kinds of processes that the VM above has none of: of threads that block, spares, programs in jails; as root and as an ordinary user.
  @Test(
    .enabled(
      if: canRun && geteuid() == 0 && Hostile.host.lacks.isEmpty && access("/usr/bin/qemu-storage-daemon", X_OK) == 0,
      "Needs KVM, root, the programs, the full walls and qemu-storage-daemon."), arguments: [true, false])
  func sparesThreadsAndJailedProgramsAreWalledInAndSoIsAllOfAnOrdinaryUser(asRoot: Bool) throws {
    let directory = "/tmp/martlet-kinds-\(getpid())-\(asRoot)"
    let name = "kinds-\(getpid())-\(asRoot)"
    defer { try? FileManager.default.removeItem(atPath: directory) }
    try Self.prepare(directory)
    try Data(count: 1 << 20).write(to: URL(fileURLWithPath: directory + "/jailed.img"))
    let user: UInt32 = 65533
    var words = [BuiltPrograms.path("martlet")]
    if !asRoot {
      for file in ["", "/disk.img", "/jailed.img"] { try #require(chown(directory + file, user, user) == 0) }
      // The device with a mode of its own, for this VM only.
      let script = """
        cp -a /dev/kvm kvm && chown 0:65500 kvm && chmod 660 kvm && mount --bind kvm /dev/kvm && \
        exec setpriv --reuid \(user) --regid \(user) --groups 65500 "$@"
        """
      words = ["/usr/bin/unshare", "-m", "/bin/sh", "-c", script, "sh"] + words
    }
    let profile =
      URL(fileURLWithPath: #filePath).deletingLastPathComponent().deletingLastPathComponent().deletingLastPathComponent().path
      + "/protocol/jails/qemu-storage-daemon.jail"
    try FileManager.default.copyItem(atPath: profile, toPath: directory + "/p")
    let program =
      "qemu-storage-daemon --blockdev driver=file,node-name=f,filename={path} --export "
      + "type=vhost-user-blk,id=e,node-name=f,writable=on,addr.type=fd,addr.str={listen}"
    words += Self.command(directory, "test=idle ms=60000", name: name).map { $0.replacing("num_queues=1", with: "aio=threads,spare=on") }
    words += [
      "--disk", "vhost_user=on,path=\(directory)/jailed.img,jail=\(directory)/p,program=\"\(program)\"", "--cgroup", "off", "--hardened",
    ]
    let vm = try RunningProgram(words[0], Array(words.dropFirst()), directory: directory)
    defer {
      vm.signal(SIGTERM)
      _ = vm.wait()
    }
    waitWhile { vm.isRunning && processes(of: name)["blk0 (spare)"] == nil }
    usleep(200_000)
    var found = processes(of: name)
    let supervisor = try #require(found["supervisor"], "\(vm.errorText)")
    let children = FileManager.default.contents(atPath: "/proc/\(supervisor)/task/\(supervisor)/children") ?? Data()
    for child in String(decoding: children, as: UTF8.self).split(separator: " ").compactMap({ Int32($0) }) {
      if (try? FileManager.default.destinationOfSymbolicLink(atPath: "/proc/\(child)/exe"))?.hasSuffix("qemu-storage-daemon") == true {
        found["jailed"] = child
      }
    }
    for outside in ["spawner", "guardian"] {
      // An ordinary user's have no more to give up.
      let pid = try #require(found[outside])
      found[outside] = nil
      if !asRoot { #expect(status("/proc/\(pid)/status")["CapEff"] == "0000000000000000", "\(outside)") }
    }
    #expect(Set(found.keys) == ["supervisor", "core", "blk0", "blk0 (spare)", "con0", "serial", "jailed"])
    let own = namespaces(getpid())
    for (name, pid) in found {
      let isSupervisor = name == "supervisor"
      let tasks = try FileManager.default.contentsOfDirectory(atPath: "/proc/\(pid)/task")
      // Those that block for requests.
      if name.hasPrefix("blk0") { #expect(tasks.count > 2, "\(name): \(tasks.count)") }
      for task in tasks {
        let fields = status("/proc/\(pid)/task/\(task)/status")
        let who = "\(name), thread \(fields["Name"] ?? task)"
        let kept = asRoot && isSupervisor ? "0000000000000020" : "0000000000000000"
        #expect(fields["CapBnd"] == "0000000000000000", "\(who)")
        for set in ["CapPrm", "CapEff", "CapInh", "CapAmb"] { #expect(fields[set] == kept, "\(set) of \(who)") }
        #expect(fields["NoNewPrivs"] == "1" && fields["Seccomp"] == "2", "\(who)")
        let ids = Set((fields["Uid"] ?? "").split(separator: " ") + (fields["Gid"] ?? "").split(separator: " "))
        #expect(ids.count == 1 && (asRoot ? !["0", "\(user)"].contains(ids.first) : ids.first == "\(user)"), "\(who): \(ids)")
        // Groups that a user has cannot be given up by a user; there they are nobody's.
        if asRoot { #expect(fields["Groups"] == "", "\(who)") }
      }
      for (kind, link) in namespaces(pid) {
        if kind == "user" && asRoot || kind == "pid" && isSupervisor { continue }
        #expect(link != own[kind], "\(kind) of \(name)")
      }
      let root = Set(try FileManager.default.contentsOfDirectory(atPath: "/proc/\(pid)/root/"))
      #expect(name == "jailed" ? root.isDisjoint(with: ["root", "sys", "boot", "srv"]) : root.isEmpty, "\(name): \(root)")
      var facts = stat()
      // Somebody else's program is behind its own walls as its author made it.
      if name != "jailed" { #expect(stat("/proc/\(pid)/environ", &facts) == 0 && facts.st_uid == 0, "\(name)") }
    }
  }

  /// No page is writable and executable; nothing is mapped but the program itself, anonymous memory and `allowed`.
  private func checkMaps(_ name: String, _ pid: Int32, _ allowed: Set<String>) {
    let program = try? FileManager.default.destinationOfSymbolicLink(atPath: "/proc/\(pid)/exe")
    let maps = String(decoding: FileManager.default.contents(atPath: "/proc/\(pid)/maps") ?? Data(), as: UTF8.self)
    #expect(maps.contains("[stack]"), "the maps of \(name) can be read")
    var found: Set<String> = []
    for line in maps.split(separator: "\n") {
      let words = line.split(separator: " ", maxSplits: 5)
      #expect(!(words[1].contains("w") && words[1].contains("x")), "\(name): \(line)")
      guard words.count == 6 else { continue }
      let what = words[5].drop { $0 == " " }
      if what == program ?? "" || what.hasPrefix("[") { continue }
      // A memory file and an anonymous inode are shown with a slash before their names.
      found.insert(String(what.drop { $0 == "/" }))
      #expect(!words[1].contains("x"), "\(name): \(line)")
    }
    #expect(found == allowed, "\(name)")
  }

  @Test(.enabled(if: canRun, "Needs KVM and the programs."))
  func offSaysLoudlyThatItIsOff() throws {
    let directory = "/tmp/martlet-walls-off-\(getpid())"
    defer { try? FileManager.default.removeItem(atPath: directory) }
    let vm = try start(directory, ["--sandbox", "off"])
    usleep(500_000)
    vm.signal(SIGTERM)
    let result = vm.wait()
    #expect(result.errors.contains("The sandbox is OFF"))
  }

  @Test(.enabled(if: BuiltPrograms.exists("martlet-supervisor"), "Needs the programs."))
  func hardenedAndOffExcludeEachOther() throws {
    let result = try RunningProgram(
      BuiltPrograms.path("martlet"), ["run", "--kernel", "k", "--hardened", "--sandbox", "off"]
    ).wait()
    #expect(result.code == 2)
    #expect(result.errors.contains("--hardened") && result.errors.contains("--sandbox off"))
  }
}
