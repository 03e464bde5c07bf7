import CLinux
import Glibc
import HostSystem
import VMMemory
import VhostUser
import VirtioQueue
import VirtioSpec

/// What is offered.
extension Session {
  var offered: FeatureSet {
    var features: FeatureSet = [.version1, .indirectDescriptors, .eventIndex, .packedRing, .vhostUserProtocolFeatures, .vhostLogAll]
    if device == .block {
      features.formUnion([
        .blockFlush, .blockBlockSize, .blockSegMax, .blockSizeMax, .blockMultipleQueues, .blockDiscard, .blockWriteZeroes,
        .blockConfigWriteCache,
      ])
      if has("read-only") { features.insert(.blockReadOnly) }
      if has("wce-alone") { features.remove(.blockFlush) }
    }
    if device == .net { features.insert([.netMAC, .netChecksum, .netHostTSO4, .netStatus, .netMultipleQueues, .netControlQueue, .netMTU]) }
    if device == .net, has("dependencies") { features.remove(.netChecksum) }
    if device == .console { features.insert([.consoleSize, .consoleMultiplePorts]) }
    features.insert(.accessPlatform)
    if has("no-version1") { features.remove(.version1) }
    if has("no-platform") { features.remove(.accessPlatform) }
    if has("no-protocol") { features.remove(.vhostUserProtocolFeatures) }
    if has("features-change"), sessionNumber % 2 == 0 { features.remove(.indirectDescriptors) }
    return features
  }

  var offeredProtocol: ProtocolFeatures {
    var features: ProtocolFeatures = [
      .mq, .replyAck, .config, .inflightShmFD, .resetDevice, .configureMemSlots, .status, .logShmFD, .backEndRequests, .deviceState,
      .backEndSendsFD,
    ]
    if device == .net { features.formUnion([.rarp, .netMTU]) }
    features.formUnion([.crossEndian, .pageFault, .sharedObject, .sharedMemory, .inbandNotifications, .cryptoSession])
    if has("protocol-dependency") {
      features.remove(.backEndRequests)
    }
    if has("no-config") { features.remove(.config) }
    if has("no-mq") { features.remove(.mq) }
    if has("no-ack") { features.remove(.replyAck) }
    if has("no-slots") { features.remove(.configureMemSlots) }
    if has("no-inflight") { features.remove(.inflightShmFD) }
    if has("no-reset") { features.remove(.resetDevice) }
    if has("no-log") { features.remove(.logShmFD) }
    if has("no-state") { features.remove(.deviceState) }
    if has("no-crypto") { features.remove(.cryptoSession) }
    return features
  }

  var configuration: [UInt8] {
    var bytes = [UInt8](repeating: 0, count: 256)
    switch device {
    case .block:
      var config = BlockConfiguration()
      config.capacity = has("capacity-zero") ? 0 : UInt64(disk.bytes.count / 512)
      config.sizeMax = has("size-max-zero") ? 0 : 1 << 20
      config.segmentMax = has("seg-max-zero") ? 0 : 62
      config.blockSize = has("blk-size-odd") ? 1000 : 512
      config.queueCount = has("queues-zero") ? 0 : 4
      config.writeback = disk.writeback
      config.maxDiscardSectors = has("discard-zero") ? 0 : 1024
      config.maxDiscardSegments = 1
      config.discardSectorAlignment = 1
      config.maxWriteZeroesSectors = has("write-zeroes-zero") ? 0 : 1024
      config.maxWriteZeroesSegments = 1
      bytes.replaceSubrange(0..<96, with: config.encoded())
    case .net:
      bytes.replaceSubrange(0..<6, with: has("mac-group") ? [3, 0, 0, 0, 0, 1] : [2, 0, 0, 0, 0, 1])
      bytes[6] = has("status-odd") ? 0xF1 : 1
      bytes[8] = has("pairs-zero") ? 0 : has("pairs-many") ? 200 : 2
      bytes.replaceSubrange(10..<12, with: has("mtu-small") ? [20, 0] : [0xDC, 5])
    case .console: bytes.replaceSubrange(0..<8, with: has("console-ports") ? [80, 0, 25, 0, 0, 0, 0, 0] : [80, 0, 25, 0, 2, 0, 0, 0])
    case .fileSystem:
      if !has("tag-empty") { bytes.replaceSubrange(0..<4, with: Array("test".utf8)) }
      bytes[36] = has("fs-queues") ? 0 : 1
    default: break
    }
    if has("config-changes") {
      configReads += 1
      bytes[20] = UInt8(truncatingIfNeeded: configReads)
    }
    if disk.staleBase == 0xC0FF { bytes[0] ^= 0xFF }
    return bytes
  }
}
