// Disks served by somebody else's program, which the supervisor starts in a jail.

import Foundation
import TestSupport
import Testing

@Suite(
  "Micro guests under martlet run: back ends in jails",
  .enabled(if: MicroVM.canRun && access("/usr/bin/qemu-storage-daemon", X_OK) == 0, "Needs /dev/kvm, the programs and qemu-storage-daemon.")
)
struct MicroJailTests {
  static let profile =
    URL(fileURLWithPath: #filePath).deletingLastPathComponent().deletingLastPathComponent()
    .deletingLastPathComponent().path + "/protocol/jails/qemu-storage-daemon.jail"

  private func disk(_ vm: MicroVM, _ socket: String, _ more: String = "") throws -> [String] {
    _ = try vm.disk()
    return [
      "--disk",
      "vhost_user=on,path=disk.img,jail=\(Self.profile)\(more),program=\"qemu-storage-daemon --blockdev driver=file,node-name=f,filename={path} "
        + "--export type=vhost-user-blk,id=e,node-name=f,writable=on,\(socket)\"",
    ]
  }

  @Test(arguments: ["addr.type=fd,addr.str={listen}", "addr.type=unix,addr.path={socket}"])
  func theStorageDaemonServesAGuestFromItsJail(socket: String) throws {
    let vm = try MicroVM()
    let before = try FileManager.default.contentsOfDirectory(atPath: "/tmp").filter { $0.hasPrefix("martlet-") && $0.count == 14 }
    // With interrupts: this daemon gives up a driver that polls, in a jail or not.
    let run = try vm.run("test=blk span=2 n=300 depth=8 wait=halt", disk(vm, socket))
    #expect(run.passed && run.exitStatus == 0, run.summary)
    #expect(run.report("blk.verify") != nil, run.summary)
    // The directory in which the socket was made is gone.
    #expect(try FileManager.default.contentsOfDirectory(atPath: "/tmp").filter { $0.hasPrefix("martlet-") && $0.count == 14 } == before)
  }

  @Test(.enabled(if: access("/usr/bin/dpdk-testpmd", X_OK) == 0 && geteuid() == 0, "Needs root and dpdk-testpmd (Debian's dpdk-dev)."))
  func dpdkEchoesFramesFromItsJail() throws {
    let vm = try MicroVM()
    let profile = Self.profile.replacing("qemu-storage-daemon", with: "dpdk-testpmd")
    // One processor for its words, one that spins.
    let words =
      "dpdk-testpmd --no-huge -m 256 --no-pci --no-telemetry --no-shconf --lcores 0@0,1@1 --vdev net_vhost0,iface={socket},queues=1 -- "
      + "--no-mlockall --total-num-mbufs=8192 --forward-mode=macswap --port-topology=loop --stats-period 3600"
    let run = try vm.run(
      "test=net n=500 size=512 window=8",
      [
        "--deadline", "ready=30000", "--net", "vhost_user=on,jail=\(profile),mac=52:54:00:12:34:56,program=\"\(words)\"",
      ])
    #expect(run.passed && run.exitStatus == 0, run.summary)
    #expect(run.report("net.echo") != nil, run.summary)
    #expect(!run.errors.contains("violation"), run.summary)
  }

  @Test func itIsShownWatchedAndStartedAgainAsOurs() throws {
    let vm = try MicroVM()
    let running = try vm.start("test=idle ms=60000", disk(vm, "addr.type=fd,addr.str={listen}"))
    defer {
      running.signal(SIGTERM)
      #expect(running.wait().code == 143)
      vm.expectNothingLeft()
    }
    try vm.wait(for: "start ok", of: running)
    func device() throws -> [String: Any] {
      let object = try JSONSerialization.jsonObject(with: Data(vm.ctl("devices").output.utf8)) as? [String: Any]
      return try #require((object?["devices"] as? [[String: Any]])?.first)
    }
    let first = try device()
    #expect(first["program"] as? String == "qemu-storage-daemon" && first["process"] as? String == "running", "\(first)")
    let pid = try #require(first["pid"] as? Int)
    #expect((first["cpu_ns"] as? Int ?? 0) > 1_000_000, "\(first)")
    let status = try String(contentsOfFile: "/proc/\(pid)/status", encoding: .utf8)
    #expect(status.contains("Seccomp:\t2") && status.contains("CapEff:\t0000000000000000") && status.contains("NoNewPrivs:\t1"))
    #expect(!status.contains("Uid:\t0\t"))
    #expect(try FileManager.default.contentsOfDirectory(atPath: "/proc/\(pid)/root/etc") == ["ld.so.cache"])
    kill(Int32(pid), SIGKILL)
    let end = Date().addingTimeInterval(60)
    var now = try device()
    while now["pid"] as? Int == pid || now["process"] as? String != "running", Date() < end {
      usleep(20_000)
      now = try device()
    }
    #expect(now["pid"] as? Int != pid && now["process"] as? String == "running", "\(now) \(running.errorText)")
  }

  @Test func whatItsJailLacksEndsTheStartInOneLine() throws {
    let vm = try MicroVM()
    let good = try String(contentsOfFile: Self.profile, encoding: .utf8)
    func expect(_ profile: String, _ code: Int32, _ message: String) throws {
      try profile.write(toFile: vm.path("p"), atomically: true, encoding: .utf8)
      var words = try disk(vm, "addr.type=fd,addr.str={listen}")
      words[1] = words[1].replacingOccurrences(of: Self.profile, with: "p")
      let result = try vm.start("test=exits", words).wait(seconds: 30)
      #expect(result.code == code && result.errors.contains(message), "\(result)")
      vm.expectNothingLeft()
    }
    try expect(good + "\nfrobnicate yes\n", 3, "Back end of blk0: Profile 'p', line")
    try expect(good.replacingOccurrences(of: "file /lib/x86_64-linux-gnu/libz.so.1 run\n", with: ""), 3, "The jail hides 'libz.so.1'")
    try expect(
      good.replacingOccurrences(of: "/usr/bin/qemu-storage-daemon", with: "/usr/bin/qemu-img"), 3, "It is made for /usr/bin/qemu-img")
    // It starts, makes one call too many, and the line says which.
    try expect(good.replacingOccurrences(of: "call signalfd4", with: "call signalfd"), 5, "qemu-storage-daemon of blk0")
  }
}
