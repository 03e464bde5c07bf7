// Statistics and size of a disk, asked of a running VM.

import Foundation
import TestSupport
import Testing

@Suite("Disks of a running VM", .serialized, .enabled(if: WholeVM.canRun, "These tests need /dev/kvm and the built programs."))
struct DiskServiceTests {
  private func queues(_ home: WholeVM, _ request: String) throws -> [[String: Any]] {
    let answer = try JSONSerialization.jsonObject(with: Data(try home.ctl(request).output.utf8)) as? [String: Any]
    let devices = answer?["devices"] as? [[String: Any]] ?? []
    return devices.flatMap { $0["queues"] as? [[String: Any]] ?? [] }
  }

  private func sum(_ queues: [[String: Any]], _ name: String) -> Int { queues.reduce(0) { $0 + ($1[name] as? Int ?? 0) } }

  @Test("What a guest has done is counted, and goes on after the process was killed")
  func statistics() throws {
    let home = try WholeVM()
    let vm = try home.start([
      "--cmdline", "test=blk op=read depth=8 n=5000 span=2 end=hang", "--disk", "path=disk.img,num_queues=2", "--control", "ctl",
      "--serial", "file=serial.log",
    ])
    try home.waitUntilRunning()
    var found: [[String: Any]] = []
    func readCount() -> Int { (found.first?["latency_reads"] as? [String: Any])?["count"] as? Int ?? 0 }
    try waitWhile {
      found = try queues(home, "stats blk0")
      return sum(found, "bytes_written") < 5000 * 4096 || readCount() < 5000 || sum(found, "errors") < 3
    }
    #expect(found.count == 2)
    #expect(sum(found, "requests") >= 5000, "\(found)")
    #expect(sum(found, "bytes_written") >= 5000 * 4096)
    #expect(sum(found, "errors") == 3, "the guest asks for what is beyond the end, for what is absurd, and for what nobody knows")
    #expect(sum(found, "batches") > 0 && sum(found, "kicks") > 0)
    let latency = found[0]["latency_reads"] as? [String: Any]
    #expect(readCount() >= 5000)
    #expect((latency?["p50_ns"] as? Int ?? 0) > 0)
    let before = sum(found, "requests")
    kill(try #require(home.processes["blk0"]), SIGKILL)
    waitWhile { !vm.errorText.contains("served again") }
    #expect(try sum(queues(home, "stats"), "requests") >= before)
    #expect(try home.ctl("stats nothing").code == 1)
    vm.signal(SIGTERM)
    _ = vm.wait()
    home.expectNothingLeft()
  }

  /// Zeros in every page of a VM's statistics where it says of what file a flush has failed.
  private func forgetFailures(_ supervisor: Int32) throws {
    var pageCount = 0
    let directory = "/proc/\(supervisor)/fd"
    for number in try FileManager.default.contentsOfDirectory(atPath: directory) {
      let path = directory + "/" + number
      guard let name = try? FileManager.default.destinationOfSymbolicLink(atPath: path), name.hasPrefix("/memfd:statistics") else {
        continue
      }
      let file = try FileHandle(forUpdating: URL(fileURLWithPath: path))
      for start in stride(from: 0, to: try file.seekToEnd(), by: 4096) {
        try file.seek(toOffset: start + 14 * 8)
        try file.write(contentsOf: Data(count: 16))
        pageCount += 1
      }
    }
    #expect(pageCount > 0)
  }

  /// How the next process comes to serve.
  enum Successor { case kill, replace, forget }

  /// The kernel tells of lost writes once per open file, and it has told a process that is no more. The next one hears of it by what the
  /// dead one has noted, and by an open file from before it. (`forget` takes the note away, as if it had died before it could write it.)
  @Test(
    "Data that was lost is no more stable for the next process than it was for the one before",
    .enabled(if: LoopDisk.canRun, "Needs root."),
    arguments: [
      ("", [Successor.kill]), (",spare=on", [.kill]), ("", [.forget, .kill]), ("", [.kill, .kill]), ("", [.replace]),
      ("", [.replace, .kill]),
    ])
  func lostBeforeADeath(keys: String, steps: [Successor]) throws {
    let full = try FullStorage()
    let home = try WholeVM()
    let vm = try home.start([
      "--cmdline", "test=blk op=read span=8 n=500000 flush=1", "--disk", "path=\(full.loop.device)\(keys)", "--control", "ctl",
      "--serial", "file=serial.log",
    ])
    func reports() -> [MicroReport] {
      let text = (try? String(contentsOfFile: home.directory + "/serial.log", encoding: .utf8)) ?? ""
      return text.split(separator: "\n").compactMap { MicroReport(line: $0) }
    }
    waitWhile { !reports().contains { $0.name == "blk.verify" } && vm.isRunning }
    #expect(reports().first { $0.name == "blk.flushed" }?.passed == false, "8 MiB were written and there is room for less than 2")
    var deaths = 0
    for step in steps {
      switch step {
      case .kill:
        kill(try #require(home.processes["blk0"]), SIGKILL)
        deaths += 1
        waitWhile { vm.errorText.split(separator: "served again").count <= deaths && vm.isRunning }
      case .replace: #expect(try home.ctl("replace blk0").code == 0)
      case .forget: try forgetFailures(vm.pid)
      }
    }
    #expect(!reports().contains { $0.name == "blk.flushed-again" }, "the guest still reads")
    waitWhile { !reports().contains { $0.name == "blk.flushed-again" } && vm.isRunning }
    #expect(reports().first { $0.name == "blk.flushed-again" }?.passed == false, "\(reports())")
    if vm.isRunning { vm.signal(SIGTERM) }
    _ = vm.wait()
    home.expectNothingLeft()
  }

  @Test("Another file in the image's place is never touched: the guest keeps the old one, and no successor takes the new one")
  func replacedFile() throws {
    let home = try WholeVM()
    let path = home.directory + "/disk.img"
    let vm = try home.start([
      "--cmdline", "test=blk op=write depth=8 n=100000000 span=2", "--disk", "path=disk.img,restart-limit=3", "--control", "ctl",
      "--serial", "file=serial.log",
    ])
    try home.waitUntilRunning()
    func done() throws -> Int { sum(try queues(home, "stats blk0"), "requests") }
    func wait(_ what: String, _ condition: () throws -> Bool) throws {
      let end = Date().addingTimeInterval(60)
      while try !condition() {
        guard Date() < end, vm.isRunning else { throw TestFailure("\(what): not seen; \(vm.errorText.suffix(1500))") }
        usleep(5000)
      }
    }
    try wait("a disk at work") { try done() > 1000 }
    let other = Data((0..<(2 << 20)).map { UInt8(truncatingIfNeeded: $0 &* 7) })
    try other.write(to: URL(fileURLWithPath: home.directory + "/other.img"))
    #expect(rename(home.directory + "/other.img", path) == 0)
    let before = try done()
    try wait("work on the old file") { try done() > before + 1000 }
    let refused = try home.ctl("resize-disk blk0 4M")
    #expect(refused.code == 1)
    #expect((refused.output + refused.errors).contains("it is not the file it was when the VM started"), "\(refused)")
    kill(try #require(home.processes["blk0"]), SIGKILL)
    try wait("a disk that is given up") { vm.errorText.contains("the device blk0 needs a reset") }
    #expect(vm.errorText.contains("'disk.img': it is not the file it was when the VM started"), "\(vm.errorText)")
    #expect(try Data(contentsOf: URL(fileURLWithPath: path)) == other)
    #expect(vm.isRunning)
    vm.signal(SIGTERM)
    _ = vm.wait()
    home.expectNothingLeft()
  }

  @Test("A guest whose disk comes to look like a qcow2 image keeps it, also when the process dies; another VM is told")
  func foreignFormat() throws {
    let home = try WholeVM()
    let arguments = ["--cmdline", "test=boot end=hang", "--disk", "path=disk.img", "--control", "ctl", "--serial", "file=serial.log"]
    let vm = try home.start(arguments)
    try home.waitUntilRunning()
    let image = try FileHandle(forWritingTo: URL(fileURLWithPath: home.directory + "/disk.img"))
    try image.write(contentsOf: Data([0x51, 0x46, 0x49, 0xFB, 0, 0, 0, 3]))
    kill(try #require(home.processes["blk0"]), SIGKILL)
    waitWhile { vm.isRunning && !vm.errorText.contains("served again") }
    #expect(try home.ctl("replace blk0").code == 0)
    vm.signal(SIGTERM)
    _ = vm.wait()
    let next = try home.start(arguments).wait()
    #expect(next.code == 3 && next.errors.contains("is in the format qcow2, and only raw images are served"), "\(next)")
    home.expectNothingLeft()
  }

  @Test("A guest that is reset while its disk's rate limit holds it back is served afterwards")
  func resetWhileThrottled() throws {
    let home = try WholeVM()
    let vm = try home.start([
      "--cmdline", "test=blk op=read n=100000 depth=8 span=1", "--disk",
      "path=disk.img,num_queues=1,ops_size=200,ops_refill_time=1000", "--control", "ctl", "--serial", "file=serial.log",
    ])
    try home.waitUntilRunning()
    func done() throws -> Int { sum(try queues(home, "stats blk0"), "requests") }
    try waitWhile { try vm.isRunning && done() < 300 }
    #expect(try home.ctl("reboot").code == 0)
    let before = try done()
    let end = Date().addingTimeInterval(20)
    while try done() < before + 300, Date() < end, vm.isRunning { usleep(50_000) }
    #expect(try done() >= before + 300)
    vm.signal(SIGTERM)
    _ = vm.wait()
    home.expectNothingLeft()
  }

  @Test("A disk is made longer and shorter; what is no size or no disk is refused")
  func resize() throws {
    let home = try WholeVM()
    let vm = try home.start([
      "--cmdline", "test=boot end=hang", "--disk", "path=disk.img", "--control", "ctl", "--serial", "file=serial.log",
    ])
    try home.waitUntilRunning()
    func size() throws -> Int { try FileManager.default.attributesOfItem(atPath: home.directory + "/disk.img")[.size] as? Int ?? -1 }
    #expect(try home.ctl("resize-disk blk0 8M").code == 0)
    #expect(try size() == 8 << 20)
    #expect(try home.ctl("resize-disk blk0 1M").code == 0)
    #expect(try size() == 1 << 20)
    #expect(try home.ctl("resize-disk blk0").code == 0)
    for wrong in ["resize-disk blk0 1000", "resize-disk blk0 0", "resize-disk blk9 1M", "resize-disk con0"] {
      #expect(try home.ctl(wrong).code == 1, "\(wrong)")
    }
    #expect(try home.ctl("resize-disk").code == 2)
    #expect(try size() == 1 << 20)
    #expect(vm.isRunning)
    vm.signal(SIGTERM)
    _ = vm.wait()
    home.expectNothingLeft()
  }
}
