import Foundation
import HostSystem
import TestSupport
import Testing
import VirtioSpec

/// Rate limits, changes of size, and sharing, as a driver sees them.
@Suite struct ServiceTests {
  private func seconds(_ body: () throws -> Void) rethrows -> Double {
    let begin = MonotonicTime.now
    try body()
    return Double(MonotonicTime.now.since(begin).nanoseconds) / 1e9
  }

  /// User and system time of a process in seconds.
  private func cpu(_ process: pid_t) -> Double {
    let text = (try? String(contentsOfFile: "/proc/\(process)/stat", encoding: .utf8)) ?? ""
    let words = text.split(separator: ")").last?.split(separator: " ") ?? []
    guard words.count > 12, let user = Double(words[11]), let system = Double(words[12]) else { return -1 }
    return (user + system) / Double(sysconf(Int32(_SC_CLK_TCK)))
  }

  @Test(arguments: ["io_uring", "threads"])
  func requestsPassAtTheRateAndWaitingCostsNothing(access: String) throws {
    let rig = try BlockRig(arguments: ["--aio=" + access, "--ops-size=20", "--ops-refill-time=100"])
    let before = cpu(rig.program.processID)
    let time = try seconds { () throws -> Void in for _ in 0..<220 { #expect(try rig.read(0, 1).status == 0) } }
    // Twenty at once, two hundred at two hundred a second.
    #expect((0.93...1.15).contains(time), "took \(time) s")
    #expect(cpu(rig.program.processID) - before < 0.3)
  }

  @Test func bytesPassAtTheRate() throws {
    let rig = try BlockRig(arguments: ["--bw-size=65536", "--bw-refill-time=100"])
    let time = try seconds { () throws -> Void in for _ in 0..<60 { #expect(try rig.read(0, 16).status == 0) } }
    // 64 KiB at once, 416 KiB at 640 KiB a second.
    #expect((0.60...0.80).contains(time), "took \(time) s")
  }

  @Test(arguments: ["io_uring", "threads"])
  func aDiskGrowsAndShrinksWhileItIsUsed(access: String) throws {
    let rig = try BlockRig(sectors: 2048, arguments: ["--aio=" + access])
    func capacity() throws -> UInt64 {
      try rig.front.configuration(8).enumerated().reduce(0) { $0 | UInt64($1.element) << (8 * $1.offset) }
    }
    func resize(_ sectors: Int) throws {
      truncate(rig.image, sectors * 512)
      rig.program.signal(SIGHUP)
      let end = MonotonicTime.now.advanced(by: .seconds(5))
      while try capacity() != UInt64(sectors), MonotonicTime.now < end { usleep(2000) }
      #expect(try capacity() == UInt64(sectors))
    }
    #expect(try rig.write(2047, pattern(512, 1)).status == 0)
    #expect(try rig.write(2048, pattern(512, 1)).status == 1)
    try resize(4096)
    #expect(try rig.write(4095, pattern(512, 2)).status == 0)
    #expect(try rig.read(2047, 1).data == pattern(512, 1))
    try resize(1024)
    #expect(try rig.read(2047, 1).status == 1)
    #expect(try rig.write(1024, pattern(512, 2)).status == 1)
    #expect(try rig.read(1023, 1).status == 0)
    #expect(rig.content.count == 1024 * 512)
  }

  /// Nobody says that the file was cut off: reads of what is gone fail, whichever way they were done before.
  @Test func aDiskThatIsCutOffUnawaresGivesErrors() throws {
    let rig = try BlockRig(sectors: 4096)
    #expect(try rig.write(0, pattern(65536, 3)).status == 0)
    for _ in 0..<3 { #expect(try rig.read(64, 8).data == Array(pattern(65536, 3)[32768..<36864])) }
    truncate(rig.image, 64 * 512 + 1000)
    #expect(try rig.read(64, 8).status == 1)
    truncate(rig.image, 4096)
    for _ in 0..<3 { #expect(try rig.read(64, 8).status == 1) }
    #expect(try rig.read(0, 8).data == Array(pattern(65536, 3)[..<4096]))
    #expect(rig.program.isRunning)
  }

  @Test func readersCanShareWhatAWriterHas() throws {
    let writer = try BlockRig(sectors: 64)
    let refused = try DeviceProcess("martlet-block", ["--blk-file=" + writer.image, "--read-only"])
    let end = MonotonicTime.now.advanced(by: .seconds(5))
    while refused.isRunning, MonotonicTime.now < end { usleep(5000) }
    #expect(refused.log.contains("in use"))
    let reader = try BlockRig(image: writer.image, arguments: ["--read-only", "--force-share"])
    #expect(try writer.write(3, pattern(512, 9)).status == 0)
    #expect(try reader.read(3, 1).data == pattern(512, 9))
    #expect(try reader.write(3, pattern(512, 8)).status == 1)
  }

  @Test func aDiskWithoutStorageServes() throws {
    let program = try DeviceProcess("martlet-block", ["--blk-null=1048576", "--num-queues=1"])
    let front = try TestFrontEnd(try program.connect(), wanting: { $0 })
    #expect(try front.configuration(8) == [0, 8, 0, 0, 0, 0, 0, 0])
  }
}
