import Foundation
import HostSystem
import TestSupport
import Testing
import VMMemory
import VirtioQueue
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

  @Test(arguments: ["io_uring", "threads"])
  func theBurstComesOnceAndBeforeTheRate(access: String) throws {
    let rig = try BlockRig(arguments: [
      "--aio=" + access, "--ops-size=10", "--ops-one-time-burst=100", "--ops-refill-time=100", "--bw-size=1048576",
      "--bw-one-time-burst=1048576", "--bw-refill-time=1000",
    ])
    let burst = try seconds { () throws -> Void in for _ in 0..<110 { #expect(try rig.read(0, 1).status == 0) } }
    #expect(burst < 0.8, "took \(burst) s; without a burst it would be one")
    let rest = try seconds { () throws -> Void in for _ in 0..<60 { #expect(try rig.read(0, 1).status == 0) } }
    // Ten of them at most have come in the meantime.
    #expect(rest > 0.45, "took \(rest) s")
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
    #expect(refused.log.contains("in use by process \(writer.program.processID) (martlet-block)"), "\(refused.log)")
    #expect(refused.exitCode() == 1)
    let reader = try BlockRig(image: writer.image, arguments: ["--read-only", "--force-share"])
    #expect(try writer.write(3, pattern(512, 9)).status == 0)
    #expect(try reader.read(3, 1).data == pattern(512, 9))
    #expect(try reader.write(3, pattern(512, 8)).status == 1)
  }

  /// Sizes change while reads are on their way: what lies inside all of them is read, what lies outside all of them fails.
  /// - Parameter goesBehind: writes go behind the end as well. One that is under way while the image is cut off may make it longer, and
  ///   then there are errors until the process has looked again.
  @Test(arguments: ["io_uring", "threads"], [false, true])
  func resizingUnderLoadHarmsNobody(access: String, goesBehind: Bool) throws {
    let least = 2048
    let most = 8192
    let rig = try BlockRig(sectors: most, arguments: ["--aio=" + access])
    #expect(try rig.write(0, pattern(least * 512, 5)).status == 0)
    let data = pattern(least * 512, 5)
    let front = rig.front
    let queue = front.queues[0]
    let places = (0..<32).map { _ in (header: front.allocate(16), data: front.allocate(4096, alignment: 512), status: front.allocate(1)) }
    var free = Array(places.indices)
    var outstanding: [UInt16: (place: Int, sector: UInt64, isWrite: Bool)] = [:]
    var random = SeededRandom(31)
    var (kept, lost) = (0, 0)
    for round in 0..<400 {
      if round % 4 == 0 {
        truncate(rig.image, Int.random(in: least + 8...most, using: &random) * 512)
        rig.program.signal(SIGHUP)
      }
      while let place = free.popLast() {
        let isWrite = Bool.random(using: &random)
        let sector = random.next() % UInt64(isWrite && !goesBehind ? least - 7 : most + 4096)
        let (header, buffer, status) = places[place]
        _ = front.memory.store(UInt32(isWrite ? 1 : 0), at: header)
        _ = front.memory.store(sector, at: GuestAddress(header.rawValue + 8))
        _ = front.memory.store(UInt8(0xAA), at: status)
        if isWrite {
          // What is kept is written as it is.
          let bytes = (Int(sector) * 512..<Int(sector) * 512 + 4096).map { $0 < data.count ? data[$0] : 0x77 }
          _ = front.memory.copyIn(bytes, at: buffer)
        }
        let head = queue.offer([
          DriverBuffer(header, 16, isDeviceWritable: false), DriverBuffer(buffer, 4096, isDeviceWritable: !isWrite),
          DriverBuffer(status, 1, isDeviceWritable: true),
        ])
        outstanding[try unwrap(head)] = (place, sector, isWrite)
      }
      for _ in 0..<24 {
        let (place, sector, isWrite) = try unwrap(outstanding.removeValue(forKey: try queue.nextUsed().head))
        let status = front.memory.load(UInt8.self, at: places[place].status)
        if sector + 8 <= UInt64(least) {
          let start = Int(sector) * 512
          let found = front.memory.bytes(at: places[place].data, count: 4096)
          if goesBehind, status == 1 {
            lost += 1
          } else {
            check(status == 0 && (isWrite || found == Array(data[start..<start + 4096])), "sector \(sector)")
            kept += 1
          }
        } else if sector + 8 > UInt64(most) {
          check(status == 1, "sector \(sector) is outside of every size")
        } else {
          check(status == 0 || status == 1)
        }
        free.append(place)
      }
    }
    #expect(kept > 1000 && lost < kept / 2, "\(kept) kept, \(lost) refused")
    #expect(rig.program.isRunning)
  }

  @Test("The configuration space has 256 bytes for whoever asks, zeros behind its own")
  func longConfiguration() throws {
    let rig = try BlockRig()
    let space = try rig.front.configuration(256)
    #expect(space.count == 256 && space[96...].allSatisfy { $0 == 0 } && space[0] == 0 && space[1] == 8)
    #expect(try rig.front.configuration(160, at: 96).allSatisfy { $0 == 0 })
    #expect(throws: (any Error).self) { try rig.front.configuration(2, at: 255) }
  }

  @Test func wearIsToldWhereItIsKnown() throws {
    let rig = try BlockRig(arguments: ["--lifetime=1,2,11"])
    #expect(rig.front.offered.contains(.blockLifetime))
    let answer = try rig.request(10, inputCount: 6)
    #expect(answer.status == 0 && answer.written == 7 && answer.data == [1, 0, 2, 0, 11, 0])
    #expect(try rig.request(10, inputCount: 5).status == 1)
    let silent = try BlockRig()
    #expect(!silent.front.offered.contains(.blockLifetime))
    #expect(try silent.request(10, inputCount: 6).status == 2)
  }

  @Test func whatIsNotToBeOfferedIsNot() throws {
    let rig = try BlockRig(arguments: ["--ring-without=packed,event_idx"], wanting: { $0 })
    #expect(!rig.front.offered.contains(.packedRing) && !rig.front.offered.contains(.eventIndex))
    #expect(rig.front.offered.contains(.indirectDescriptors) && !rig.front.offered.contains(.inOrder))
    #expect(try rig.read(0, 1).status == 0)
  }

  /// Only a disk that answers at once answers in the order of the requests, and says so.
  @Test(arguments: [false, true])
  func aDiskWithoutStorageAnswersInOrder(isPacked: Bool) throws {
    let program = try DeviceProcess("martlet-block", ["--blk-null=1048576", "--num-queues=1"])
    let front = try TestFrontEnd(try program.connect(), wanting: { isPacked ? $0 : $0.subtracting(.packedRing) })
    try #require(front.features.contains(.inOrder) && front.features.contains(.packedRing) == isPacked)
    let queue = try front.startQueue(size: 32)
    let header = front.allocate(16)
    let data = front.allocate(4096)
    var random = SeededRandom(3)
    var expected: [UInt16] = []
    for _ in 0..<200 {
      for _ in 0..<Int(random.next() % 10 + 1) {
        // Reads, writes, flushes, and some that are refused.
        _ = front.memory.store([UInt32(0), 1, 4, 99][Int(random.next() % 4)], at: header)
        _ = front.memory.store(UInt64(0), at: GuestAddress(header.rawValue + 8))
        let head = queue.offer([
          DriverBuffer(header, 16, isDeviceWritable: false), DriverBuffer(data, 512, isDeviceWritable: random.next() % 2 == 0),
          DriverBuffer(front.allocate(1, alignment: 1), 1, isDeviceWritable: true),
        ])
        if let head { expected.append(head) }
      }
      for _ in 0..<Int.random(in: 0...expected.count, using: &random) { #expect(try queue.nextUsed().head == expected.removeFirst()) }
    }
    while !expected.isEmpty { #expect(try queue.nextUsed().head == expected.removeFirst()) }
  }

  @Test func aDiskWithoutStorageServes() throws {
    let program = try DeviceProcess("martlet-block", ["--blk-null=1048576", "--num-queues=1"])
    let front = try TestFrontEnd(try program.connect(), wanting: { $0 })
    #expect(try front.configuration(8) == [0, 8, 0, 0, 0, 0, 0, 0])
  }
}
