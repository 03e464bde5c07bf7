import DiskImage
import Synchronization
import VirtioSpec

/// What the driver sees of the disk, and the one thing it can change: the write cache.
final class BlockConfigurationSpace: Sendable {
  let image: DiskImage
  let queueCount: Int
  let greatestQueueSize: UInt16
  let blockSize: Int
  /// GET_ID's answer: 20 bytes, padded with zeros.
  let serial: [UInt8]
  /// GET_LIFETIME's answer; nil where the storage does not say.
  let lifetime: [UInt8]?
  private let missing: FeatureSet
  let pollPolicy: PollPolicy
  let limiter: RateLimiter?
  /// Promises no more than QEMU's storage daemon does, so that it could take over.
  let isPortable: Bool

  /// What that daemon promises (docs of its vhost-user-blk export): segments of a request, sectors and ranges of a discard.
  private enum Portable {
    static let segments: UInt32 = 126
    static let sectors: UInt32 = 32768
    static let ranges: UInt32 = 1
  }

  /// What the driver wrote into `writeback`; until it does, write-back. Stays until the device is reset: a stop and a start,
  /// with the same features negotiated again, must not loosen what the driver relies on.
  private let wantsWriteback = Atomic<Bool>(true)
  private let negotiatedBits = Atomic<UInt64>(0)
  /// Completed writes may stay in the host's cache until a flush. Read by every queue for every write.
  private let isWriteback = Atomic<Bool>(true)

  init(image: DiskImage, blockSize: Int, _ options: BlockOptions) {
    self.image = image
    queueCount = options.queueCount
    greatestQueueSize = options.greatestQueueSize
    pollPolicy = options.poll
    isPortable = options.isPortable
    limiter = RateLimiter(bytes: options.byteRate, operations: options.operationRate)
    self.blockSize = blockSize
    var bytes = Array(options.serial.utf8.prefix(BlockSpec.idByteCount))
    bytes.append(contentsOf: repeatElement(0, count: BlockSpec.idByteCount - bytes.count))
    self.serial = bytes
    missing = options.missing
    lifetime = options.lifetime.map { life in
      var bytes = [UInt8](repeating: 0, count: BlockSpec.lifetimeByteCount)
      LittleEndian.store(life.endOfLife, to: &bytes, at: 0)
      LittleEndian.store(life.typeA, to: &bytes, at: 2)
      LittleEndian.store(life.typeB, to: &bytes, at: 4)
      return bytes
    }
  }

  /// Everything this disk can do.
  var features: FeatureSet {
    var features: FeatureSet = [
      .version1, .indirectDescriptors, .eventIndex, .packedRing, .blockSegMax, .blockBlockSize, .blockFlush, .blockTopology,
      .blockConfigWriteCache,
    ]
    // Storage answers in an order of its own; only where there is none, answers come as requests did.
    if image.isNull { features.insert(.inOrder) }
    if lifetime != nil { features.insert(.blockLifetime) }
    if queueCount > 1 { features.insert(.blockMultipleQueues) }
    if image.isReadOnly { features.insert(.blockReadOnly) }
    if !image.isReadOnly, image.canPunchHoles { features.insert(.blockDiscard) }
    if !image.isReadOnly, image.canWriteZeroes { features.insert(.blockWriteZeroes) }
    if !image.isReadOnly, image.canSecureErase { features.insert(.blockSecureErase) }
    if isPortable { features.subtract([.packedRing, .inOrder, .blockLifetime, .blockSecureErase]) }
    return features.subtracting(missing)
  }

  /// The driver's choice. Without FLUSH it cannot ask for stability, so every write is stable by itself.
  func negotiated(_ features: FeatureSet) {
    negotiatedBits.store(features.rawValue, ordering: .relaxed)
    decide()
  }

  func reset() {
    wantsWriteback.store(true, ordering: .relaxed)
    negotiatedBits.store(0, ordering: .relaxed)
    isWriteback.store(true, ordering: .relaxed)
  }

  private var negotiatedFeatures: FeatureSet { FeatureSet(rawValue: negotiatedBits.load(ordering: .relaxed)) }

  private func decide() {
    let canFlush = negotiatedFeatures.contains(.blockFlush)
    isWriteback.store(canFlush && wantsWriteback.load(ordering: .relaxed), ordering: .relaxed)
  }

  var isWriteThrough: Bool { !isWriteback.load(ordering: .relaxed) }

  /// For the queues that start now.
  var limits: BlockLimits {
    let features = negotiatedFeatures
    return BlockLimits(
      capacity: image.byteCount / 512, isReadOnly: image.isReadOnly, allowsDiscard: features.contains(.blockDiscard),
      allowsWriteZeroes: features.contains(.blockWriteZeroes), allowsSecureErase: features.contains(.blockSecureErase),
      allowsLifetime: features.contains(.blockLifetime))
  }

  /// The configuration space as it is now.
  var bytes: [UInt8] {
    var space = BlockConfiguration()
    space.capacity = image.byteCount / 512
    // A request is data between a header and a status byte, each in a descriptor of its own.
    space.segmentMax = UInt32(max(1, Int(greatestQueueSize) - 2))
    space.blockSize = UInt32(blockSize)
    let physical = max(blockSize, min(image.physicalBlockSize, 65536))
    space.physicalBlockExponent = UInt8((physical / blockSize).trailingZeroBitCount)
    space.minimumIOSize = 1
    space.optimalIOSize = 0
    space.writeback = isWriteback.load(ordering: .relaxed) ? 1 : 0
    space.queueCount = UInt16(queueCount)
    let offered = features
    if offered.contains(.blockDiscard) {
      space.maxDiscardSectors = BlockLimits.greatestRange
      space.maxDiscardSegments = UInt32(BlockLimits.greatestRangeCount)
      // Smaller holes give nothing back.
      space.discardSectorAlignment = UInt32(physical / 512)
    }
    if offered.contains(.blockWriteZeroes) {
      space.maxWriteZeroesSectors = BlockLimits.greatestRange
      space.maxWriteZeroesSegments = UInt32(BlockLimits.greatestRangeCount)
      space.writeZeroesMayUnmap = image.canPunchHoles ? 1 : 0
    }
    if offered.contains(.blockSecureErase) {
      space.maxSecureEraseSectors = BlockLimits.greatestRange
      space.maxSecureEraseSegments = UInt32(BlockLimits.greatestRangeCount)
      space.secureEraseSectorAlignment = UInt32(blockSize / 512)
    }
    if isPortable {
      space.segmentMax = min(space.segmentMax, Portable.segments)
      space.maxDiscardSectors = min(space.maxDiscardSectors, Portable.sectors)
      space.maxDiscardSegments = min(space.maxDiscardSegments, Portable.ranges)
      space.maxWriteZeroesSectors = min(space.maxWriteZeroesSectors, Portable.sectors)
      space.maxWriteZeroesSegments = min(space.maxWriteZeroesSegments, Portable.ranges)
    }
    return space.encoded()
  }

  /// The driver writes `writeback`, the one field that is its own; false for anything else.
  func write(_ bytes: [UInt8], at offset: Int) -> Bool {
    guard offset == BlockConfiguration.Offset.writeback, bytes.count == 1, bytes[0] <= 1,
      negotiatedFeatures.contains(.blockConfigWriteCache)
    else { return false }
    wantsWriteback.store(bytes[0] == 1, ordering: .relaxed)
    decide()
    return true
  }
}
