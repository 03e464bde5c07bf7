import Foundation
import HostSystem
import TestSupport
import VMMemory
import VhostUser
import VirtioQueue
import VirtioSpec

/// A disk served by `martlet-block`, seen from its driver.
final class BlockRig {
  let program: DeviceProcess
  let front: TestFrontEnd
  let image: String
  private let ownsImage: Bool

  /// - Parameters:
  ///   - sectors: the size of a fresh image; with `image`, of no meaning.
  ///   - image: an image that is there already.
  init(
    sectors: Int = 2048, image: String? = nil, queues: Int = 1, queueSize: UInt16 = 128, arguments: [String] = [],
    wrapper: [String] = [], wanting wanted: (FeatureSet) -> FeatureSet = { $0.subtracting(.packedRing) }
  ) throws {
    ownsImage = image == nil
    self.image = image ?? "/tmp/martlet-disk-" + UUID().uuidString
    if image == nil {
      guard FileManager.default.createFile(atPath: self.image, contents: nil) else { throw TestFailure("no image") }
      truncate(self.image, sectors * 512)
    }
    program = try DeviceProcess(
      "martlet-block", ["--blk-file=" + self.image, "--num-queues=\(queues)"] + arguments, wrapper: wrapper)
    front = try TestFrontEnd(try program.connect(), wanting: wanted)
    for _ in 0..<queues { try front.startQueue(size: queueSize) }
  }

  deinit { if ownsImage { unlink(image) } }

  var content: [UInt8] { (FileManager.default.contents(atPath: image)).map { Array($0) } ?? [] }

  /// One request, alone: header and status byte in descriptors of their own, data in `pieces`.
  struct Exchange {
    var status: UInt8
    var written: UInt32?
    var data: [UInt8]
  }

  /// Sends a request and waits. `output` travels to the device, `inputCount` bytes come back.
  func request(
    _ type: UInt32, sector: UInt64 = 0, output: [UInt8] = [], inputCount: Int = 0, queue: Int = 0, pieces: Int = 1
  ) throws -> Exchange {
    let queue = front.queues[queue]
    let header = front.allocate(16)
    _ = front.memory.store(type, at: header)
    _ = front.memory.store(UInt32(0), at: GuestAddress(header.rawValue + 4))
    _ = front.memory.store(sector, at: GuestAddress(header.rawValue + 8))
    let data = front.allocate(max(output.count, inputCount) + 8)
    _ = front.memory.copyIn(output.isEmpty ? [UInt8](repeating: 0xEE, count: inputCount) : output, at: data)
    let status = front.allocate(1, alignment: 1)
    _ = front.memory.store(UInt8(0xAA), at: status)
    var buffers = [DriverBuffer(header, 16, isDeviceWritable: false)]
    let count = max(output.count, inputCount)
    var done = 0
    for piece in 0..<pieces where count > 0 {
      let length = piece == pieces - 1 ? count - done : count / pieces
      buffers.append(DriverBuffer(GuestAddress(data.rawValue + UInt64(done)), UInt32(length), isDeviceWritable: output.isEmpty))
      done += length
    }
    buffers.append(DriverBuffer(status, 1, isDeviceWritable: true))
    let head = queue.offer(buffers)
    let used = try queue.nextUsed()
    guard used.head == head else { throw TestFailure("another chain came back") }
    return Exchange(
      status: front.memory.load(UInt8.self, at: status) ?? 0xFF, written: used.written,
      data: front.memory.bytes(at: data, count: inputCount) ?? [])
  }

  func read(_ sector: UInt64, _ sectorCount: Int, pieces: Int = 1) throws -> Exchange {
    try request(0, sector: sector, inputCount: sectorCount * 512, pieces: pieces)
  }
  func write(_ sector: UInt64, _ bytes: [UInt8], pieces: Int = 1) throws -> Exchange {
    try request(1, sector: sector, output: bytes, pieces: pieces)
  }
  /// Makes a request available, without kicking: where its status will be.
  func offer(_ type: UInt32, sector: UInt64 = 0, output: [UInt8] = [], queue: Int = 0) -> GuestAddress {
    let header = front.allocate(16)
    _ = front.memory.store(type, at: header)
    _ = front.memory.store(UInt32(0), at: GuestAddress(header.rawValue + 4))
    _ = front.memory.store(sector, at: GuestAddress(header.rawValue + 8))
    let data = front.allocate(max(1, output.count))
    _ = front.memory.copyIn(output, at: data)
    let status = front.allocate(1, alignment: 1)
    _ = front.memory.store(UInt8(0xAA), at: status)
    var buffers = [DriverBuffer(header, 16, isDeviceWritable: false)]
    if !output.isEmpty { buffers.append(DriverBuffer(data, UInt32(output.count), isDeviceWritable: false)) }
    buffers.append(DriverBuffer(status, 1, isDeviceWritable: true))
    front.queues[queue].add(buffers)
    return status
  }

  func flush() throws -> Exchange { try request(4) }

  /// Discard (11) or write-zeroes (13) of ranges.
  func ranges(_ type: UInt32, _ ranges: [(sector: UInt64, count: UInt32, flags: UInt32)]) throws -> Exchange {
    var bytes: [UInt8] = []
    for range in ranges {
      withUnsafeBytes(of: range.sector.littleEndian) { bytes += $0 }
      withUnsafeBytes(of: range.count.littleEndian) { bytes += $0 }
      withUnsafeBytes(of: range.flags.littleEndian) { bytes += $0 }
    }
    return try request(type, output: bytes)
  }
}
