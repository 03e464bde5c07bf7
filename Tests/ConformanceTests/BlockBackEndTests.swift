import Foundation
import HostSystem
import TestSupport
import Testing
import VhostUser
import VirtioSpec

/// Our front end with block back ends that are programs of their own: ours, and QEMU's.
@Suite(.serialized) struct BlockBackEndTests {
  enum Program: String, CaseIterable, Sendable { case martlet, storageDaemon }

  /// The program, or a sentence why it cannot be tried.
  private static func start(_ program: Program, queues: Int, image: [UInt8]) throws -> BlockProgram? {
    switch program {
    case .martlet:
      guard let path = BlockProgram.martletBlock else { return nil }
      return try BlockProgram(path, image: image) { image, socket in
        ["--socket-path=\(socket)", "--blk-file=\(image)", "--num-queues=\(queues)"]
      }
    case .storageDaemon:
      let path = "/usr/bin/qemu-storage-daemon"
      guard FileManager.default.isExecutableFile(atPath: path) else { return nil }
      return try BlockProgram(path, image: image) { image, socket in
        [
          "--blockdev", "driver=file,node-name=disk,filename=\(image)",
          "--export", "type=vhost-user-blk,id=export,node-name=disk,addr.type=unix,addr.path=\(socket),writable=on,num-queues=\(queues)",
        ]
      }
    }
  }

  private func pattern(_ seed: Int, _ count: Int) -> [UInt8] { (0..<count).map { UInt8(truncatingIfNeeded: $0 &* 31 &+ seed) } }

  @Test(arguments: Program.allCases, [false, true])
  func aDiskIsReadWrittenStoppedResumedAndReset(program: Program, acknowledges: Bool) throws {
    let image = pattern(7, 1 << 20)
    guard let running = try Self.start(program, queues: 2, image: image) else {
      print("Skipped: \(program) is not installed here")
      return
    }
    let wanted: ProtocolFeatures = acknowledges ? [.mq, .replyAck, .config, .resetDevice, .configureMemSlots] : [.mq, .config]
    let disk = try BlockFrontEnd(
      running.connect(), features: [.version1, .eventIndex, .indirectDescriptors, FeatureSet(bit: 9), FeatureSet(bit: 12)],
      wanted: wanted, queueCount: 2)
    let offer = try unwrap(disk.session.offer)
    #expect(offer.features.contains(.version1))
    #expect(offer.protocolFeatures.contains(.replyAck) == acknowledges)
    #expect(try unwrap(offer.configuration).prefix(8) == [0, 8, 0, 0, 0, 0, 0, 0])
    #expect(try unwrap(offer.queueCount) >= 2)

    try disk.activate()
    for queue in 0..<2 {
      let read = try disk.request(0, sector: 3, readByteCount: 1024, queue: queue)
      #expect(read.status == 0 && read.bytes == Array(image[1536..<2560]))
    }
    let written = try disk.request(1, sector: 5, write: pattern(99, 512), queue: 1)
    let flushed = try disk.request(4, sector: 0)
    #expect(written.status == 0 && flushed.status == 0)
    #expect(try running.imageBytes(2560..<3072) == pattern(99, 512))
    let beyond = try disk.request(0, sector: 1 << 40, readByteCount: 512)
    #expect(beyond.status == 1)

    // Stopped where it was: the base is the number of requests made.
    let bases = try disk.stop()
    #expect(bases == [VringState(index: 0, number: 3), VringState(index: 1, number: 2)])
    try disk.resume()
    let again = try disk.request(0, sector: 5, readByteCount: 512, queue: 1)
    #expect(again.status == 0 && again.bytes == pattern(99, 512))

    try disk.reset()
    try disk.activate()
    let fresh = try disk.request(0, sector: 5, readByteCount: 512)
    #expect(fresh.status == 0 && fresh.bytes == pattern(99, 512))
  }

  @Test(arguments: Program.allCases) func theNextFrontEndIsServedToo(program: Program) throws {
    guard let running = try Self.start(program, queues: 1, image: pattern(1, 65536)) else {
      print("Skipped: \(program) is not installed here")
      return
    }
    for round in 0..<3 {
      let disk = try BlockFrontEnd(running.connect(), features: [.version1])
      try disk.activate()
      let read = try disk.request(0, sector: UInt64(round), readByteCount: 512)
      #expect(read.status == 0 && read.bytes == Array(pattern(1, 65536)[round * 512..<round * 512 + 512]))
    }
  }
}
