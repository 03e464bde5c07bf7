import CLinux
import Glibc
import HostSystem

/// What else the host offers. Nothing here stops a guest.
enum HostExamination {
  /// A small file of /proc or /sys without its line end; nil when it is not there.
  private static func read(_ path: String) -> String? {
    guard let fd = try? OwnedFD.open(path, O_RDONLY), let bytes = try? fd.readToEnd(limit: 4096) else { return nil }
    return String(decoding: bytes.prefix { $0 != 10 }, as: UTF8.self)
  }

  private static func number(_ path: String) -> UInt64? { read(path).flatMap { UInt64($0) } }

  static func identities() -> Finding {
    guard geteuid() == 0 else {
      return Finding(
        "identities", .limited, "run by an ordinary user, all processes of a VM share its uid",
        remedy: "run as root to give each process a uid of its own")
    }
    return Finding("identities", .good, "run by root, each process of a VM gets a uid of its own")
  }

  static func landlock() -> Finding {
    let level = clinux_landlock_abi()
    switch level {
    case 6...: return Finding("landlock", .good, "level \(level)")
    case 1...:
      return Finding(
        "landlock", .limited, "level \(level); level 6 also separates sockets and signals", remedy: "Linux 6.12 or later")
    default:
      return Finding(
        "landlock", .limited, "not available", remedy: "boot with landlock in the lsm= list, on Linux 5.13 or later")
    }
  }

  static func asynchronousIO() -> Finding {
    do throws(SystemError) {
      _ = try IORing(IORing.Configuration(capacity: 8))
      return Finding("io_uring", .good, "available")
    } catch {
      let setting = read("/proc/sys/kernel/io_uring_disabled") ?? "0"
      return Finding(
        "io_uring", .limited, "not available (\(error.errno.name)); disks use slower system calls",
        remedy: setting == "0" ? "Linux 5.10 or later" : "sysctl kernel.io_uring_disabled=0 (it is \(setting))")
    }
  }

  static func userNamespaces() -> Finding {
    if number("/proc/sys/user/max_user_namespaces") == 0 {
      return Finding(
        "user namespaces", .limited, "switched off", remedy: "sysctl user.max_user_namespaces=10000")
    }
    if number("/proc/sys/kernel/unprivileged_userns_clone") == 0 {
      return Finding(
        "user namespaces", .limited, "for root only", remedy: "sysctl kernel.unprivileged_userns_clone=1")
    }
    if number("/proc/sys/kernel/apparmor_restrict_unprivileged_userns") == 1 {
      return Finding(
        "user namespaces", .limited, "restricted by AppArmor for ordinary users",
        remedy: "an AppArmor profile for martlet-supervisor with 'userns,'")
    }
    guard read("/proc/self/uid_map") != nil else {
      return Finding("user namespaces", .limited, "not in this kernel", remedy: "a kernel with CONFIG_USER_NS")
    }
    return Finding("user namespaces", .good, "available")
  }

  /// Version 2, for the limits of devices.
  static func controlGroups() -> Finding {
    let remedy = "boot with systemd.unified_cgroup_hierarchy=1; limits of devices (cpu-limit= and others) need them"
    var point: String?
    for line in (read("/proc/self/mountinfo") ?? "").split(separator: "\n") where line.contains(" - cgroup2 ") {
      point = line.split(separator: " ").dropFirst(4).first.map(String.init)
    }
    guard let point, let offered = read(point + "/cgroup.controllers") else {
      return Finding("control groups", .limited, "version 2 is not mounted", remedy: remedy)
    }
    let missing = ["cpu", "memory", "io", "pids"].filter { name in !offered.split { $0 == " " || $0 == "\n" }.contains(Substring(name)) }
    guard missing.isEmpty else {
      return Finding("control groups", .limited, "version 2 lacks the controllers \(missing.joined(separator: ", "))", remedy: remedy)
    }
    return Finding("control groups", .good, "version 2 with cpu, memory, io, pids at \(point)")
  }

  static func hugePages() -> Finding {
    let folder = "/sys/kernel/mm/hugepages/hugepages-2048kB/"
    let free = number(folder + "free_hugepages")
    let all = number(folder + "nr_hugepages")
    let transparent = read("/sys/kernel/mm/transparent_hugepage/shmem_enabled").map { text in
      text.split(separator: " ").first { $0.hasPrefix("[") }.map { String($0.dropFirst().dropLast()) } ?? text
    }
    let rest = "transparent for shared memory: \(transparent ?? "not available")"
    guard let free, let all, all > 0 else {
      return Finding(
        "huge pages", .limited, "none reserved; \(rest)",
        remedy: "sysctl vm.nr_hugepages=N reserves N pages of 2 MiB; only large guests gain")
    }
    return Finding("huge pages", .good, "\(free) of \(all) pages of 2 MiB free; \(rest)")
  }

  static func tun() -> Finding {
    do throws(SystemError) {
      _ = try OwnedFD.open("/dev/net/tun", O_RDWR)
      return Finding("tun", .good, "/dev/net/tun can be opened")
    } catch {
      return Finding(
        "tun", .limited, "/dev/net/tun cannot be opened: \(error.errno.explanation); no network cards",
        remedy: error.errno == .noEntry ? "modprobe tun" : "chmod 666 /dev/net/tun")
    }
  }
}
