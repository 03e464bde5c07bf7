import ControlProtocol
import Supervision
import Testing

/// What is read and written without a kernel; the kernel's part is scripts/guest-tests control-groups.
@Suite struct ControlGroupTests {
  private let mounts = """
    22 1 0:20 / / rw - ext4 /dev/a rw
    30 22 0:26 / /sys/fs/cgroup\\040two rw,nosuid shared:4 - cgroup2 cgroup2 rw
    """

  @Test func ourGroupIsFoundBelowItsMount() throws {
    let hierarchy = try #require(ControlGroupHierarchy(mounts: mounts, groups: "3:cpu:/x\n0::/user.slice/a\n"))
    #expect(hierarchy.mountPoint == "/sys/fs/cgroup two")
    #expect(hierarchy.own == "/sys/fs/cgroup two/user.slice/a")
    #expect(ControlGroupHierarchy(mounts: mounts, groups: "0::/\n")?.own == "/sys/fs/cgroup two")
  }

  @Test func inAContainerThePathsAreThoseOfItsPart() throws {
    let part = mounts.replacing(" / /sys", with: " /docker/1 /sys")
    #expect(ControlGroupHierarchy(mounts: part, groups: "0::/docker/1/b\n")?.own == "/sys/fs/cgroup two/b")
    #expect(ControlGroupHierarchy(mounts: part, groups: "0::/docker/1\n")?.own == "/sys/fs/cgroup two")
    // Outside of what is mounted.
    #expect(ControlGroupHierarchy(mounts: part, groups: "0::/docker/12\n")?.own == nil)
    #expect(ControlGroupHierarchy(mounts: mounts, groups: "0::/../x\n")?.own == nil)
  }

  @Test func versionOneIsNone() {
    #expect(ControlGroupHierarchy(mounts: "30 22 0:26 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu\n", groups: "1:cpu:/\n") == nil)
  }

  @Test func eachLimitIsOneTextOfTheKernels() throws {
    let vm = try VMConfiguration(arguments: [
      "--kernel", "k", "--disk",
      "path=a,cpu-limit=150%,cpu-weight=7,memory-limit=1G,pids-limit=40,io-weight=9,io-read-limit=1M,io-write-limit=2M",
    ])
    let storage = StorageDevice(major: 8, minor: 16)
    let texts = ControlGroups.settings(vm.limits(of: "blk0"), storage).map { "\($0.file) \($0.text)" }
    #expect(
      texts == [
        "cpu.max 150000 100000", "cpu.weight 7", "memory.max 1073741824", "memory.swap.max 0", "memory.oom.group 1", "pids.max 40",
        "io.weight default 9", "io.max 8:16 rbps=1048576", "io.max 8:16 wbps=2097152",
      ])
    #expect(ControlGroups.settings(ResourceLimits(), storage).isEmpty)
  }

  @Test func usageTravelsAsText() {
    let usage = ProcessUsage("cpu_ns=12 memory_rss=4096 nonsense=1 threads=x io_read=")
    #expect(usage[.processorTime] == 12 && usage[.resident] == 4096)
    #expect(usage[.threads] == nil && usage[.read] == nil)
  }
}
