import Foundation
import HostSystem
import TestSupport
import Testing
import VMMemory
import VirtioQueue
import VirtioSpec

/// Status bytes.
private let ok: UInt8 = 0
private let ioError: UInt8 = 1
private let unsupported: UInt8 = 2

@Suite struct RequestTests {
  @Test(arguments: ["io_uring", "threads"])
  func writtenSectorsAreReadBackAndLieInTheImage(access: String) throws {
    let rig = try BlockRig(arguments: ["--aio=" + access])
    let data = pattern(8 * 512, 1)
    let written = try rig.write(5, data, pieces: 3)
    #expect(written.status == ok)
    #expect(written.written == 1)
    let read = try rig.read(5, 8, pieces: 5)
    #expect(read.status == ok)
    #expect(read.written == 4097)
    #expect(read.data == data)
    #expect(Array(rig.content[5 * 512..<13 * 512]) == data)
    #expect(rig.content[..<(5 * 512)].allSatisfy { $0 == 0 })
    #expect(try rig.flush().status == ok)
  }

  @Test func theLastSectorCanBeUsedAndTheNextCannot() throws {
    let rig = try BlockRig(sectors: 100)
    #expect(try rig.write(99, pattern(512, 2)).status == ok)
    #expect(try rig.read(99, 1).data == pattern(512, 2))
    #expect(try rig.read(100, 1).status == ioError)
    #expect(try rig.read(99, 2).status == ioError)
    #expect(try rig.write(100, pattern(512, 3)).status == ioError)
    #expect(try rig.read(UInt64.max, 1).status == ioError)
    #expect(try rig.read(UInt64.max / 512, 1).status == ioError)
    #expect(try rig.write(UInt64.max - 1, pattern(1024, 3)).status == ioError)
    #expect(rig.content.count == 51200)
  }

  @Test func aRefusedReadLeavesTheBufferAlone() throws {
    let rig = try BlockRig(sectors: 100)
    let refused = try rig.read(100, 1)
    #expect(refused.status == ioError)
    #expect(refused.data.allSatisfy { $0 == 0xEE })
    // Of a buffer that was not filled nothing counts as written.
    #expect(refused.written == 0)
  }

  @Test func partsOfSectorsAreRefused() throws {
    let rig = try BlockRig()
    #expect(try rig.request(0, inputCount: 100).status == ioError)
    #expect(try rig.request(1, output: pattern(513, 1)).status == ioError)
    #expect(try rig.request(0, inputCount: 0).status == ok)
  }

  @Test func unknownRequestsAreUnsupported() throws {
    let rig = try BlockRig()
    for type: UInt32 in [2, 3, 5, 7, 9, 10, 12, 14, 15, 16, 18, 26, 99, .max] {
      #expect(try rig.request(type, inputCount: 512).status == unsupported)
    }
    #expect(try rig.read(0, 1).status == ok)
  }

  @Test func theSerialIsTwentyPaddedBytes() throws {
    let rig = try BlockRig(arguments: ["--serial=disk-7"])
    let answer = try rig.request(8, inputCount: 20)
    #expect(answer.status == ok)
    #expect(answer.written == 21)
    #expect(answer.data == Array("disk-7".utf8) + [UInt8](repeating: 0, count: 14))
    // A small buffer gets what fits.
    #expect(try rig.request(8, inputCount: 4).data == Array("disk".utf8))
  }

  @Test func aReadOnlyDiskRefusesEveryChange() throws {
    let rig = try BlockRig(arguments: ["--read-only"])
    #expect(rig.front.offered.contains(.blockReadOnly))
    #expect(!rig.front.offered.contains(.blockDiscard))
    #expect(try rig.write(0, pattern(512, 1)).status == ioError)
    #expect(try rig.ranges(11, [(0, 8, 0)]).status == unsupported)
    #expect(try rig.read(0, 1).status == ok)
    #expect(try rig.flush().status == ok)
    #expect(rig.content.allSatisfy { $0 == 0 })
  }

  @Test func discardedRangesBecomeHoles() throws {
    let rig = try BlockRig(sectors: 4096)
    #expect(try rig.write(0, pattern(1 << 20, 1)).status == ok)
    #expect(try rig.ranges(11, [(8, 8, 0), (1024, 512, 0)]).status == ok)
    let content = rig.content
    #expect(content[4096..<8192].allSatisfy { $0 == 0 })
    #expect(content[(1024 * 512)..<(1536 * 512)].allSatisfy { $0 == 0 })
    #expect(Array(content[..<4096]) == Array(pattern(1 << 20, 1)[..<4096]))
    #expect(content.count == 4096 * 512)
  }

  @Test(arguments: [0, 1] as [UInt32])
  func zeroedRangesReadAsZeros(flags: UInt32) throws {
    let rig = try BlockRig(sectors: 4096)
    #expect(try rig.write(0, pattern(1 << 20, 1)).status == ok)
    // Not aligned to anything but sectors.
    #expect(try rig.ranges(13, [(3, 9, flags)]).status == ok)
    let content = rig.content
    #expect(content[(3 * 512)..<(12 * 512)].allSatisfy { $0 == 0 })
    #expect(Array(content[(12 * 512)..<(1 << 20)]) == Array(pattern(1 << 20, 1)[(12 * 512)...]))
  }

  @Test func badRangesChangeNothing() throws {
    let rig = try BlockRig(sectors: 4096)
    let data = pattern(4096 * 512, 1)
    #expect(try rig.write(0, data).status == ok)
    #expect(try rig.ranges(11, [(0, 8, 1)]).status == unsupported)
    #expect(try rig.ranges(13, [(0, 8, 2)]).status == unsupported)
    #expect(try rig.ranges(11, [(0, 8, 0), (4095, 2, 0)]).status == ioError)
    #expect(try rig.ranges(13, [(UInt64.max, 2, 0)]).status == ioError)
    #expect(try rig.ranges(11, [(0, .max, 0)]).status == ioError)
    #expect(try rig.request(11, output: pattern(15, 1)).status == ioError)
    #expect(try rig.request(11, output: []).status == ioError)
    #expect(try rig.ranges(13, Array(repeating: (0, 1, 0), count: 17)).status == ioError)
    #expect(try rig.ranges(11, [(0, 0, 0)]).status == ok)
    #expect(rig.content == data)
  }

  @Test func rangesNeedTheFeature() throws {
    let rig = try BlockRig { $0.subtracting([.packedRing, .blockDiscard, .blockWriteZeroes]) }
    #expect(try rig.ranges(11, [(0, 8, 0)]).status == unsupported)
    #expect(try rig.ranges(13, [(0, 8, 0)]).status == unsupported)
  }

  @Test func aChainWithoutRoomForAStatusComesBackEmpty() throws {
    let rig = try BlockRig()
    let queue = rig.front.queues[0]
    let header = rig.front.allocate(64)
    let head = queue.offer([DriverBuffer(header, 16, isDeviceWritable: false)])
    let used = try queue.nextUsed()
    #expect(used.head == head)
    #expect(used.written == 0)
    // A header that is cut off has a status byte to say so.
    let status = rig.front.allocate(1)
    queue.offer([DriverBuffer(header, 15, isDeviceWritable: false), DriverBuffer(status, 1, isDeviceWritable: true)])
    _ = try queue.nextUsed()
    #expect(rig.front.memory.load(UInt8.self, at: status) == ioError)
    #expect(try rig.read(0, 1).status == ok)
  }

  @Test func headerDataAndStatusMayLieInAnyPieces() throws {
    let rig = try BlockRig()
    let front = rig.front
    #expect(try rig.write(3, pattern(512, 9)).status == ok)
    // The header byte by byte; data and status in one descriptor.
    let header = front.allocate(16)
    _ = front.memory.copyIn([0, 0, 0, 0, 0, 0, 0, 0, 3, 0, 0, 0, 0, 0, 0, 0], at: header)
    let data = front.allocate(513)
    let buffers = (0..<16).map { DriverBuffer(GuestAddress(header.rawValue + $0), 1, isDeviceWritable: false) }
    front.queues[0].offer(buffers + [DriverBuffer(data, 513, isDeviceWritable: true)])
    #expect(try front.queues[0].nextUsed().written == 513)
    #expect(front.memory.bytes(at: data, count: 513) == pattern(512, 9) + [ok])
    // The same through an indirect table.
    _ = front.memory.copyIn([UInt8](repeating: 0xEE, count: 513), at: data)
    front.queues[0].offer(buffers + [DriverBuffer(data, 513, isDeviceWritable: true)], indirectTable: front.allocate(17 * 16))
    #expect(try front.queues[0].nextUsed().written == 513)
    #expect(front.memory.bytes(at: data, count: 513) == pattern(512, 9) + [ok])
  }

  @Test func anImageThatWasCutOffAnswersWithErrorsNotZeros() throws {
    let rig = try BlockRig(sectors: 2048)
    #expect(try rig.write(0, pattern(1 << 20, 4)).status == ok)
    truncate(rig.image, 1024 * 512)
    #expect(try rig.read(0, 1024).status == ok)
    #expect(try rig.read(1024, 1).status == ioError)
    #expect(try rig.read(1000, 48).status == ioError)
    #expect(rig.program.log.contains("input/output error"))
  }

  @Test func aBrokenRingIsReportedAndOthersGoOn() throws {
    let rig = try BlockRig(queues: 2)
    #expect(try rig.read(0, 1).status == ok)
    rig.front.queues[0].driver.setAvailableIndex(1000)
    rig.front.queues[0].kick.signal()
    check(try rig.front.queues[0].error.fd.waitUntil(.readable, timeout: .seconds(10)), "the error descriptor was signalled")
    #expect(try rig.request(0, inputCount: 512, queue: 1).status == ok)
    // Stopped and started afresh, it serves again.
    _ = try rig.front.stop(rig.front.queues[0])
    #expect(rig.program.log.contains("Queue 0 is broken"))
  }
}
