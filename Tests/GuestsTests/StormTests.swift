// Many VMs at once, every third of them on a host that refuses one step of the start.

import CLinux
import Foundation
import Glibc
import HostSystem
import TestSupport
import Testing

@Suite(
  "Many VMs at once, some of which cannot start", .serialized,
  .enabled(if: MicroVM.canRun && BuiltPrograms.exists("martlet-hostile") && geteuid() == 0, "Needs root, /dev/kvm and the built programs."))
struct StormTests {
  /// Calls without which a start cannot succeed, one for each of its steps at least: the kernel is made to lack them, in all
  /// processes of the VM, by a filter in front of it.
  private static let steps = [
    "clone3", "setsid", "dup3", "close_range", "mount", "pivot_root", "umount2", "sethostname", "prlimit64", "setgroups", "setresgid",
    "setresuid", "capset", "execveat", "landlock_restrict_self", "openat", "fstat", "socketpair", "pipe2", "eventfd2", "epoll_create1",
    "epoll_ctl", "signalfd4", "timerfd_create", "memfd_create", "ioctl", "pread64", "rt_sigaction", "listen", "recvmsg", "sendmsg",
    "unshare",
  ]

  /// 30 on a machine of CI's; 100 in full.
  @Test func nothingIsLeftOfThoseThatFailAndTheOthersRun() throws {
    let count = MicroGuest.isFull ? 100 : 30
    let groups = controlGroups()
    var running: [(vm: MicroVM, program: RunningProgram, missing: String?)] = []
    for number in 0..<count {
      let vm = try MicroVM()
      var wrapper: [String] = []
      var missing: String?
      if number % 3 == 2 {
        // A different step each time; in the short form every third of them.
        missing = Self.steps[number / 3 * (MicroGuest.isFull ? 1 : 3) % Self.steps.count]
        wrapper = [BuiltPrograms.path("martlet-hostile"), "--what=without", "--calls=\(missing ?? "")", "--"]
      }
      let options =
        try vm.disk(mebibytes: 1) + [
          "--memory", "size=64M", "--console", "socket=con", "--serial", "file=serial", "--deadline", "ready=60000,reply=60000",
        ]
      // The guest runs before its devices are ready: one whose VM is to fail must not be done before.
      running.append((vm, try vm.start(missing == nil ? "test=boot" : "test=boot,idle ms=60000", options, below: wrapper), missing))
    }
    for (vm, program, missing) in running {
      let result = program.wait(seconds: 120)
      if let missing {
        #expect(
          result.code > 0 && result.signal == nil, "without \(missing): code \(result.code), signal \(String(describing: result.signal))")
        #expect((1...4).contains(result.errorLines.count), "without \(missing): \(result.errors)")
      } else {
        #expect(result.code == 0 && result.errors.isEmpty, "\(result.errors)")
        let serial = (try? String(contentsOfFile: vm.path("serial"), encoding: .utf8)) ?? ""
        #expect(serial.contains("MICRO done ok"), "\(serial)")
      }
      vm.expectNothingLeft()
      let sockets = (try? String(contentsOfFile: "/proc/net/unix", encoding: .utf8)) ?? ""
      #expect(!sockets.contains(vm.directory), "a socket of \(vm.name) is left, without \(missing ?? "nothing")")
      // The image's lock can be had at once.
      let image = try OwnedFD.open(vm.path("disk.img"), O_RDWR)
      #expect(clinux_ofd_lock(image.rawValue, CInt(F_WRLCK)) == 0, "without \(missing ?? "nothing")")
    }
    #expect(controlGroups() == groups)
    // No process under any name: guest memory is gone with the last that maps it.
    let names = Set(running.map(\.vm.name))
    for line in MicroGuest.commandLines().values { #expect(!names.contains { line.contains($0) }, "\(line)") }
  }

  /// Names of control groups that VMs of ours might have made.
  private func controlGroups() -> Set<String> {
    guard let all = FileManager.default.enumerator(atPath: "/sys/fs/cgroup") else { return [] }
    return Set(all.compactMap { $0 as? String }.filter { $0.hasSuffix("/cgroup.procs") && $0.contains("micro") })
  }
}
