import Glibc
import HostSystem
import Testing
import TestSupport
import VMMemory
import VirtioQueue
import VirtioSpec

/// A small generator with a seed, so that a failure can be repeated.
struct SeededGenerator: RandomNumberGenerator {
  var state: UInt64
  mutating func next() -> UInt64 {
    state &+= 0x9E37_79B9_7F4A_7C15
    var mixed = state
    mixed = (mixed ^ mixed >> 30) &* 0xBF58_476D_1CE4_E5B9
    mixed = (mixed ^ mixed >> 27) &* 0x94D0_49BB_1331_11EB
    return mixed ^ mixed >> 31
  }
}

/// Guest memory in three regions: two that touch each other at `border`, and a third after a hole.
enum GuestFixture {
  static let start: UInt64 = 0x1_0000
  static let border: UInt64 = 0x9_0000
  static let end: UInt64 = 0x11_0000
  static let farStart: UInt64 = 0x1_0000_0000
  static let farEnd: UInt64 = 0x1_0001_0000

  static let ring = GuestAddress(start)
  /// Room for buffers and tables behind the rings, in the first region.
  static let buffers: UInt64 = 0x5_0000

  static func memory() throws -> GuestMemory {
    let near = try MemoryMapping.anonymous(byteCount: Int(end - start))
    let far = try MemoryMapping.anonymous(byteCount: Int(farEnd - farStart))
    return try GuestMemory(regions: [
      MemoryRegion(
        guestAddress: GuestAddress(start), byteCount: border - start, frontEndAddress: 0x7F00_0000_0000, fileOffset: 0, mapping: near),
      // Mapped elsewhere than where the first one ends, so that a pointer must not run across the border.
      MemoryRegion(
        guestAddress: GuestAddress(border), byteCount: end - border, frontEndAddress: 0x7F10_0000_0000, fileOffset: 0,
        mapping: try MemoryMapping.anonymous(byteCount: Int(end - border))),
      MemoryRegion(
        guestAddress: GuestAddress(farStart), byteCount: farEnd - farStart, frontEndAddress: 0x7F20_0000_0000, fileOffset: 0,
        mapping: far),
    ])
  }
}

/// Both ends of one queue over the same memory.
struct QueuePair: ~Copyable {
  let memory: GuestMemory
  var driver: DriverQueue
  var device: Virtqueue
  var chain: DescriptorChain

  init(size: UInt16, _ features: FeatureSet, at ring: GuestAddress = GuestFixture.ring, memory: GuestMemory? = nil) throws {
    let memory = try memory ?? GuestFixture.memory()
    let configuration = VirtqueueConfiguration.contiguous(size: size, features: features, at: ring)
    let driver = try DriverQueue(configuration, memory: memory)
    let device = try Virtqueue(configuration, memory: memory)
    self.memory = memory
    self.chain = DescriptorChain(for: device)
    self.driver = driver
    self.device = device
  }

  /// Offers one chain made of `buffers`.
  mutating func offer(_ buffers: [DriverBuffer]) -> UInt16? {
    let head = driver.add(buffers.span)
    _ = driver.publish()
    return head
  }

  mutating func next() -> ChainOutcome { device.next(&chain) }
}

func readable(_ address: UInt64, _ count: UInt32) -> DriverBuffer { DriverBuffer(GuestAddress(address), count, isDeviceWritable: false) }
func writable(_ address: UInt64, _ count: UInt32) -> DriverBuffer { DriverBuffer(GuestAddress(address), count, isDeviceWritable: true) }

let split: FeatureSet = [.version1, .indirectDescriptors]
let packed: FeatureSet = [.version1, .indirectDescriptors, .packedRing]

/// One piece of a chain as host memory.
struct Piece: Equatable {
  var address: UInt
  var count: Int
  var isWritable: Bool
}

extension DescriptorChain {
  borrowing func pieces() -> [Piece] {
    readable.map { Piece(address: UInt(bitPattern: $0.iov_base), count: $0.iov_len, isWritable: false) }
      + writable.map { Piece(address: UInt(bitPattern: $0.iov_base), count: $0.iov_len, isWritable: true) }
  }
}

extension GuestMemory {
  /// The pieces that these buffers must become.
  func expectedPieces(_ buffers: [DriverBuffer]) -> [Piece] {
    var pieces: [Piece] = []
    for buffer in buffers {
      var done: UInt64 = 0
      while done < buffer.byteCount {
        let here = GuestAddress(buffer.address.rawValue + done)
        let count = min(contiguousByteCount(from: here), UInt64(buffer.byteCount) - done)
        let pointer = translate(here, byteCount: count)
        pieces.append(Piece(address: UInt(bitPattern: pointer), count: Int(count), isWritable: buffer.isDeviceWritable))
        done += count
      }
    }
    return pieces
  }
}
