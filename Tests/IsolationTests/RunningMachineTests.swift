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
  static func command(_ directory: String, _ commandLine: String) -> [String] {
    [
      "run", "--name", "walls", "--kernel", directory + "/micro/micro.elf", "--cmdline", commandLine, "--cpus", "boot=2",
      "--memory", "size=64M", "--disk", "path=disk.img", "--console", "null", "--serial", "file=log", "--control", "ctl",
    ]
  }

  /// A VM whose guest does nothing for a while.
  private func start(_ directory: String, _ options: [String]) throws -> RunningProgram {
    try Self.prepare(directory)
    return try RunningProgram(
      BuiltPrograms.path("martlet"), Self.command(directory, "test=idle ms=60000") + options, directory: directory)
  }

  private func processes() -> [String: Int32] {
    var result: [String: Int32] = [:]
    for name in (try? FileManager.default.contentsOfDirectory(atPath: "/proc")) ?? [] {
      guard let pid = Int32(name), let line = FileManager.default.contents(atPath: "/proc/\(pid)/cmdline") else { continue }
      let title = String(decoding: line.prefix { $0 != 0 }, as: UTF8.self)
      if title.hasPrefix("vm/walls/") { result[String(title.dropFirst(9))] = pid }
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

  @Test(.enabled(if: canRun && geteuid() == 0 && Hostile.host.lacks.isEmpty, "Needs KVM, root, the programs and the full walls."))
  func everyProcessAndThreadIsAsDeclared() throws {
    let directory = "/tmp/martlet-walls-\(getpid())"
    defer { try? FileManager.default.removeItem(atPath: directory) }
    let vm = try start(directory, ["--hardened"])
    defer {
      vm.signal(SIGTERM)
      _ = vm.wait()
    }
    let end = Date().addingTimeInterval(15)
    while Date() < end, vm.isRunning {
      let info = try RunningProgram(BuiltPrograms.path("martlet"), ["ctl", "--control", "ctl", "info"], directory: directory).wait()
      if info.output.contains("running for") { break }
      usleep(20_000)
    }
    let processes = processes()
    try #require(Set(processes.keys) == ["supervisor", "guardian", "core", "blk0", "con0", "serial"], "\(vm.errorText)")
    let own = namespaces(getpid())
    var uids: Set<String> = []
    var seen: [String: Set<String>] = [:]
    for name in ["core", "blk0", "con0", "serial"] {
      let pid = try #require(processes[name])
      let tasks = try FileManager.default.contentsOfDirectory(atPath: "/proc/\(pid)/task")
      // Every thread, because filters and Landlock belong to threads.
      for task in tasks {
        let fields = status("/proc/\(pid)/task/\(task)/status")
        let who = "\(name), thread \(fields["Name"] ?? task)"
        for set in ["CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"] { #expect(fields[set] == "0000000000000000", "\(set) of \(who)") }
        #expect(fields["Groups"] == "", "\(who)")
        #expect(fields["NoNewPrivs"] == "1", "\(who)")
        #expect(fields["Seccomp"] == "2", "\(who)")
        #expect(fields["Seccomp_filters"] == "1", "\(who)")
        uids.insert(fields["Uid"] ?? "")
        #expect(fields["NSpid"]?.split(separator: " ").count == 2, "\(who)")
      }
      #expect(status("/proc/\(pid)/status")["NSpid"]?.hasSuffix(" 1") == true)
      for (kind, link) in namespaces(pid) {
        if kind == "user" {
          #expect(link == own[kind])
        } else {
          #expect(link != own[kind], "\(kind) of \(name)")
          #expect(seen[kind, default: []].insert(link).inserted, "\(kind) of \(name) is shared")
        }
      }
      // Not dumpable: the files of its directory belong to root, whatever its uid.
      var facts = stat()
      #expect(stat("/proc/\(pid)/environ", &facts) == 0 && facts.st_uid == 0, "\(name)")
      #expect(try FileManager.default.contentsOfDirectory(atPath: "/proc/\(pid)/root/").isEmpty, "\(name)")
      let mounts = String(decoding: FileManager.default.contents(atPath: "/proc/\(pid)/mounts") ?? Data(), as: UTF8.self)
      #expect(mounts.split(separator: "\n").count == 1 && mounts.contains(" / tmpfs ro,nosuid,nodev,noexec"), "\(name): \(mounts)")
      let limits = String(decoding: FileManager.default.contents(atPath: "/proc/\(pid)/limits") ?? Data(), as: UTF8.self)
      #expect(limits.contains(#/Max core file size +0 +0 /#) && limits.contains(#/Max msgqueue size +0 +0 /#), "\(name)")
    }
    #expect(uids.count == 4 && !uids.contains { $0.hasPrefix("0 ") })

    // Descriptors. /dev/kvm is closed, guest memory is open in the core alone.
    let core = files(try #require(processes["core"]))
    #expect(
      Set(core.keys) == [
        "null", "pipe", "socket", "[eventpoll]", "[timerfd]", "[eventfd]", "micro.elf", "memfd:martlet-guest (deleted)", "kvm-vm",
        "kvm-vcpu:0", "kvm-vcpu:1",
      ])
    #expect(
      files(try #require(processes["blk0"]))
        == [
          "null": 2, "pipe": 1, "socket": 2, "disk.img": 1, "[signalfd]": 1, "[eventpoll]": 1, "[eventfd]": 6, "[io_uring]": 1,
        ])
    #expect(
      Set(files(try #require(processes["con0"])).keys) == ["null", "pipe", "socket", "[signalfd]", "[eventpoll]", "[timerfd]", "[eventfd]"])
    #expect(
      Set(files(try #require(processes["serial"])).keys).isSubset(of: [
        "null", "pipe", "socket", "[signalfd]", "[eventpoll]", "log", "[timerfd]", "[eventfd]",
      ]))
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
